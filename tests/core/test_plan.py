"""Plans round-trip, and every broken rule is found and shown in its row."""
from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from genie_dynamo.core.errors import PlanError, ProtocolError
from genie_dynamo.core.plan import RNG_STATE, Fragment, GuardFacts, Output, Plan, rng_after, verify_plan
from genie_dynamo.core.program import WorkerProgram, worker_programs

READS = {"n1": ("a",), "n2": ("n1", "b"), "n3": ("n2",)}


def plan(**changes: Any) -> Plan:
    fields: dict[str, Any] = {
        "graph_id": "g" * 64,
        "inputs": ("a", "b"),
        "static_inputs": (0,),
        "outputs": (Output(kind="value", name="n3"), Output(kind="saved", name="n1"), Output(kind="input", index=1),
                    Output(kind="literal", literal=None)),
        "mutations": ((0, "n2"),),
        "fragments": (
            Fragment(fragment_id=0, worker=0, node_names=("n1",), inputs=("a",), outputs=("n1",), rng_in=RNG_STATE),
            Fragment(fragment_id=1, worker=1, node_names=("n2", "n3"), inputs=("n1", "b"), outputs=("n2", "n3"),
                     rng_in=rng_after(0)),
        ),
        "num_workers": 2,
        "guards": GuardFacts(guards=(("L['x']", "TENSOR_MATCH", "check"),), ranges=(("s0", "x.size(0)", "[2, 9]"),)),
    }
    return Plan(**{**fields, **changes})


def fragment(index: int, **changes: Any) -> tuple[Fragment, ...]:
    fragments = list(plan().fragments)
    fragments[index] = dataclasses.replace(fragments[index], **changes)
    return tuple(fragments)


def test_a_right_plan_verifies_and_survives_json() -> None:
    verify_plan(plan(), READS)
    assert Plan.from_json(plan().to_json()) == plan()
    assert "<-" not in str(plan())


@pytest.mark.parametrize(("changes", "said"), [
    ({"fragments": fragment(1, worker=2)}, "worker 2 of 2"),
    ({"fragments": fragment(1, inputs=("later", "b"))}, "input later"),
    ({"fragments": fragment(1, inputs=("n1",))}, "node n2 reads b"),
    ({"fragments": fragment(1, node_names=("n3", "n2"))}, "node n3 reads n2"),
    ({"fragments": fragment(1, node_names=("n1", "n2", "n3"))}, "two fragments"),
    ({"fragments": fragment(0, outputs=("n9",))}, "output n9"),
    ({"fragments": fragment(1, fragment_id=0, rng_in=None)}, "ids repeat"),
    ({"fragments": fragment(1, rng_in="rng@7")}, "generator state rng@7"),
    ({"fragments": plan().fragments[:1]}, "node n2 is in no fragment"),
    ({"outputs": (Output(kind="value", name="n9"),)}, "output n9"),
    ({"outputs": (Output(kind="input", index=5),)}, "names no input"),
    ({"mutations": ((0, "n9"),)}, "mutation of input 0"),
])
def test_each_broken_rule_is_named(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(PlanError, match=said):
        verify_plan(plan(**changes), READS)


def test_the_table_marks_the_row_that_is_wrong() -> None:
    rows = str(plan(fragments=fragment(1, worker=2))).splitlines()
    assert "worker 2 of 2" in rows[3] and "<-" not in rows[2]


def test_programs_say_where_each_value_comes_from_and_goes() -> None:
    lanes = (("shm", 1, "@name"),)
    programs = worker_programs(plan(), {0: b"x", 1: b"y"}, program_id=4,
                               peers=(("ipc://0", "", ()), ("ipc://1", "key", lanes)))
    first, second = programs[0], programs[1]
    assert [send[1:] for send in first.sends] == [("ipc://1", "key", lanes)] * 2
    assert {send[0] for send in first.sends} == set(second.receives)
    assert len(first.keeps) == 1 and first.returns == ()
    assert len(second.returns) == 3, "n3, the new content of a, and the generator state"
    assert len(second.keeps) == 1, "the new content of the parameter stays too"
    for program in programs.values():
        assert WorkerProgram.from_wire(program.to_wire()) == program


@pytest.mark.parametrize("data", [(), 5, (1, 2, 3, 4, 5, 6, 7, 8, 9, 10),
                                  (1, ((0, "text", (), (), None),), (), (), (), (), (), (), (), "flat"),
                                  (1, (), (), (), (), (), (), (), (), "eval")])
def test_what_is_not_a_program_is_a_protocol_error(data: Any) -> None:
    with pytest.raises(ProtocolError):
        WorkerProgram.from_wire(data)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"graph_id": 1}', '{"fragments": [{"nope": 1}]}'])
def test_what_is_not_a_plan_is_a_plan_error(text: str) -> None:
    with pytest.raises(PlanError):
        Plan.from_json(text)
