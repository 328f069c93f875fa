"""What two workers hold at a time of a training step over parts of its batch: measured, in one process."""
from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from genie_dynamo.core.fragment import encode
from genie_dynamo.core.plan import GuardFacts
from genie_dynamo.core.program import worker_programs
from genie_dynamo.passes.lower import lower_fragment
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.runtime.flat import RunStatus
from genie_dynamo.runtime.worker.engine import Engine
from genie_dynamo.runtime.worker.records import RunRecord, SessionRecord
from tests.passes.test_partition import lane
from tests.passes.test_pipelining import pipeline, training_step

PARTS = 8


def held_bytes(run: RunRecord) -> int:
    """Bytes of the different memories that a run's fragments and its values refer to."""
    values = list(run.env.values())
    for part in run.state or ():
        values += part.flat._registers if part.flat is not None else []
    memories = [v.untyped_storage() for v in values if isinstance(v, torch.Tensor)]
    return sum({memory.data_ptr(): memory.nbytes() for memory in memories}.values())


def most_held(found: Any, step: Any, inputs: list[Any], *, in_order: bool) -> tuple[list[int], dict[str, Any]]:
    """(the most bytes that each worker held beyond what it began with, what came out)."""
    split = found.split
    plan = plan_graph(split.gm, step[1], GuardFacts(), assign=lambda n: found.assign.get(n.name, 0), num_workers=2,
                      in_order=in_order)
    specs = {f.fragment_id: encode(lower_fragment(split.gm, node_names=f.node_names, inputs=f.inputs,
                                                  outputs=f.outputs)) for f in plan.fragments}
    programs = worker_programs(plan, specs, program_id=1, peers=(("0", "", ()), ("1", "", ())))
    engine = Engine(device=torch.device("cpu"), num_threads=1)
    runs: dict[int, RunRecord] = {}
    for worker, program in programs.items():
        session = SessionRecord(token=b"", lease_s=1.0, last_heard_s=0.0)
        env = {value: inputs[value] for value in program.inputs}         # inputs are the first values of a plan
        message: Any = SimpleNamespace(state=(), keeps=())
        runs[worker] = RunRecord(session, b"", message, program, engine.load(program), env, {}, set(program.receives),
                                 0.0)
    most = [0, 0]
    began = [held_bytes(runs[worker]) for worker in (0, 1)]

    def emit(run: RunRecord, value_id: int, value: Any) -> bool:
        for sent_id, address, _, _ in run.program.sends:
            if sent_id == value_id:
                runs[int(address)].arrived(value_id, value.clone())
        for worker, held in runs.items():
            most[worker] = max(most[worker], held_bytes(held) - began[worker])
        return False

    waiting = [0, 1]
    while waiting:
        waiting = [w for w in waiting if engine.advance(runs[w], 0.0, emit) is not RunStatus.DONE]   # a slice each
    out = {}
    for worker, run in runs.items():
        made = {name for f in plan.fragments if f.worker == worker for name in f.outputs}
        names = [name for name in plan.returned_values() if name in made]
        out |= {name: run.env[value] for name, value in zip(names, run.program.returns, strict=True)}
    return most, out


def test_1f1b_holds_the_activations_of_as_many_parts_as_there_are_stages(fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    step = training_step(layers=6, width=64, rows=2048)
    found = pipeline(step, PARTS, lanes=[lane(latency_s=1e-6)])
    assert found.split is not None and found.split.in_order
    values = [n.meta["val"] for n in step[0].graph.nodes if n.op == "placeholder"]
    inputs = [torch.randint(64, v.shape) if v.dtype == torch.int64 else torch.randn(v.shape) / 8 for v in values]
    ordered, mine = most_held(found, step, list(inputs), in_order=True)
    free, other = most_held(found, step, list(inputs), in_order=False)
    assert mine
    for name, value in mine.items():
        torch.testing.assert_close(value, other[name])
    activation = 2048 * 64 * 4                             # of the whole batch, per layer
    # The first stage has some three layers: of all parts at once, or of two of eight and what is under way beside them.
    assert max(free) > 2.5 * activation, (free, activation)
    assert max(ordered) < 2 * activation, (ordered, activation)
    assert max(ordered) < 0.6 * max(free), (ordered, free)
