"""Seconds: the roofline by hand, fits that find what times were made of, the cost graph for placement."""
from __future__ import annotations

import json
import random
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from genie_dynamo.core.datasheets import datasheet
from genie_dynamo.core.errors import CostError
from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.core.observations import Observation
from genie_dynamo.passes.costs import (
    CostFit,
    analyze_costs,
    bind_symbols,
    cost_graph,
    fit_costs,
    node_seconds,
    observations,
    refine,
)
from tests.passes.costs.tracing import call_node, trace

BOX = HardwareFacts(
    name="box", kind="cpu", source="a test", num_threads=1, matmul_flops_per_s=(("float32", 1e9),),
    elementwise_ops_per_s=(("float32", 1e8),), memory_bytes_per_s=((1, 1e9),), op_overhead_s=1e-6)


@dataclass(frozen=True)
class Device:
    kind: str


def test_the_roofline_by_hand() -> None:
    gm = trace(lambda x, y: ((x @ y) + 1).view(-1).exp(), torch.randn(100, 50), torch.randn(50, 20))
    seconds = node_seconds(analyze_costs(gm), BOX)
    assert seconds[call_node(gm, "aten.mm").name] == pytest.approx(1e-6 + 2 * 100 * 50 * 20 / 1e9)
    assert seconds[call_node(gm, "aten.add").name] == pytest.approx(1e-6 + max(2000 / 1e8, 16000 / 1e9))
    assert seconds[call_node(gm, "aten.view").name] == 1e-6
    assert seconds[call_node(gm, "aten.exp").name] == pytest.approx(1e-6 + 7 * 2000 / 1e8)


def test_seconds_follow_the_sizes_of_a_call() -> None:
    gm = trace(lambda x, y: x @ y, torch.randn(6, 5), torch.randn(5, 7), symbolic=True)
    costs = analyze_costs(gm)
    for rows in (6, 600):
        values = bind_symbols(gm, (torch.randn(rows, 5), torch.randn(5, 7)))
        assert sum(node_seconds(costs, BOX, values).values()) == pytest.approx(1e-6 + 2 * rows * 35 / 1e9, rel=0.9)


def test_a_dtype_without_rate_is_named() -> None:
    gm = trace(lambda x: x @ x, torch.randn(4, 4, dtype=torch.bfloat16))
    with pytest.raises(CostError, match="no rate for matrix products in bfloat16"):
        node_seconds(analyze_costs(gm), BOX)


def made_up(rng: random.Random, family: str, truth: tuple[float, float, float], noise: float) -> Observation:
    flops, moved = (0.0, 0.0) if family == "view" else (10 ** rng.uniform(2, 8), 10 ** rng.uniform(2, 7))
    rate = 1e9 if family == "matmul" else 1e8
    seconds = truth[0] * 1e-6 + truth[1] * flops / rate + truth[2] * moved / 1e9
    return Observation(model="m", machine="box", kind="cpu", num_threads=1, op=f"aten::{family}", family=family,
                       dtype="float32", flops=flops, bytes_moved=moved, seconds=seconds * rng.uniform(1, 1 + noise))


def test_a_fit_finds_what_times_were_made_of() -> None:
    rng = random.Random(0)
    truth = {"matmul": (2.0, 1.5, 0.2), "norm": (4.0, 0.5, 1.0), "view": (0.7, 0.0, 0.0)}       # views have no work
    rows = [made_up(rng, family, factors, 0.05) for family, factors in truth.items() for _ in range(200)]
    strangers = [made_up(rng, "matmul", (50, 50, 50), 0)] * 50
    strangers = [Observation(**{name: getattr(r, name) for name in Observation.__slots__} | {"machine": "other"})
                 for r in strangers]
    fit = fit_costs(rows + strangers, BOX)
    for family, factors in truth.items():
        for found, true in zip(fit.coefficients(f"aten::{family}", family), factors, strict=True):
            assert (family == "view" and true == 0) or found == pytest.approx(true, rel=0.15)
    assert fit.num_rows == 600
    assert fit.coefficients("aten::new", "conv") == fit.kinds["matrix"]
    assert fit.coefficients("aten::rms", "norm") == fit.families["norm"]


def test_what_small_ops_say_is_not_stretched_to_large_ones() -> None:
    """Dispatch is all of a small op's time: of its arithmetic nothing is learnt."""
    rng = random.Random(2)
    small = [Observation(
        model="m", machine="box", kind="cpu", num_threads=1, op="aten::mm", family="matmul", dtype="float32",
        flops=rng.uniform(10, 100), bytes_moved=rng.uniform(10, 100), seconds=rng.uniform(8e-6, 12e-6))
        for _ in range(300)]
    overhead, arithmetic, memory = fit_costs(small, BOX).coefficients("aten::mm", "matmul")
    assert overhead == pytest.approx(10, rel=0.2)
    assert 0.3 < arithmetic < 3 and 0.3 < memory < 3


def test_outliers_do_not_move_a_fit() -> None:
    rng = random.Random(1)
    rows = [made_up(rng, "norm", (4.0, 0.5, 1.0), 0.05) for _ in range(200)]
    rows += [made_up(rng, "norm", (400.0, 50.0, 100.0), 0.05) for _ in range(20)]
    assert fit_costs(rows, BOX).coefficients("aten::norm", "norm") == pytest.approx((4.0, 0.5, 1.0), rel=0.25)


def test_a_fit_needs_observations_of_its_hardware() -> None:
    with pytest.raises(CostError, match=r"no observations of H100"):
        fit_costs([made_up(random.Random(0), "norm", (1, 1, 1), 0)], datasheet("H100"))


def test_a_fit_survives_json_and_strangers_json_is_refused() -> None:
    fit = fit_costs([made_up(random.Random(0), "norm", (1, 1, 1), 0)], BOX)
    data = json.loads(json.dumps(fit.to_json()))
    assert CostFit.from_json(data) == fit
    for change in ({"families": {"norm": [1, 2]}}, {"families": {"norm": [1, 2, -1.0]}}, {"kinds": {}}, {"more": 1},
                   {"families": {"norm": "eval"}}, {"num_rows": -1}, {"families": {"norm": [1, 2, float("nan")]}}):
        with pytest.raises(CostError):
            CostFit.from_json({**data, **change})


def test_observed_times_become_rows_by_what_nodes_do() -> None:
    gm = trace(lambda x: ((x + 1) + 1).exp(), torch.randn(10))
    costs = analyze_costs(gm)
    rows = observations(costs, {}, dict(zip(costs.nodes, (2e-6, 4e-6, 9e-6), strict=True)), model="m", hardware=BOX)
    assert [(r.op, r.count, r.seconds, r.flops, r.bytes_moved) for r in rows] == [
        ("aten::add", 2, 3e-6, 10, 80), ("aten::exp", 1, 9e-6, 70, 80)]


# ---------------------------------------------------------------- for placement
def test_the_cost_graph() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> Any:
        values, indices = (x @ w).topk(2)
        return values + F.linear(x, w.t())[:, :2], indices

    gm = trace(fn, torch.randn(8, 4), torch.randn(4, 4), symbolic=True)
    weight = [n.name for n in gm.graph.nodes if n.op == "placeholder"][1]
    args = (torch.randn(8, 4), torch.randn(4, 4))
    graph = cost_graph(gm, [Device("cpu"), Device("cuda"), Device("cpu")], {"cpu": BOX, "cuda": datasheet("T4")},
                       bind_symbols(gm, args))
    assert json.loads(json.dumps(graph)) == graph
    rows = {row["id"]: row for row in graph["nodes"]}
    assert set(rows) == {n.name for n in gm.graph.nodes if n.op == "call_function"}
    assert all(set(row["seconds"]) == {"cpu", "cuda"} and row["seconds"]["cpu"] > 0 for row in rows.values()
               if "getitem" not in row["id"] and "sym" not in row["id"])
    out_bytes: dict[str, set[int]] = {}
    for edge in graph["edges"]:
        out_bytes.setdefault(edge["src"], set()).add(edge["bytes"])
    assert all(len(sizes) == 1 for sizes in out_bytes.values())          # one output per node
    top = call_node(gm, "topk").name
    assert out_bytes[top] == {8 * 2 * (4 + 8)}
    assert {row["colocation_group"] for name, row in rows.items() if "getitem" in name} == {
        rows[top]["colocation_group"]}
    assert weight


def test_readers_of_a_weight_stay_together_and_pay_for_it_once() -> None:
    gm = trace(lambda x, w: (x @ w, x @ w.t()), torch.randn(3, 4), torch.randn(4, 4))
    names = [n.name for n in gm.graph.nodes if n.op == "placeholder"]
    graph = cost_graph(gm, [Device("cpu")], {"cpu": BOX}, static_inputs=names[1:], backward=True)
    first, transposed, second = graph["nodes"]
    assert first["colocation_group"] == transposed["colocation_group"] is not None
    assert first["memory_bytes"] == 64 + 48 and second["memory_bytes"] == 48 and first["backward"] is True


def test_what_a_kind_cannot_run_has_no_seconds() -> None:
    gm = trace(lambda x: (x @ x).float() + 1, torch.randn(4, 4, dtype=torch.bfloat16))
    graph = cost_graph(gm, [Device("cpu")], {"cpu": BOX})
    assert [node["seconds"]["cpu"] is None for node in graph["nodes"]] == [True, False, False]


def test_a_kind_without_facts_is_named() -> None:
    with pytest.raises(CostError, match="no hardware facts for devices of kind tpu; known are cpu"):
        cost_graph(trace(torch.exp, torch.randn(3)), [Device("tpu")], {"cpu": BOX})


def test_a_refined_fit_believes_what_was_seen_and_keeps_the_rest() -> None:
    mm = Observation(model="m", machine="box", kind="cpu", num_threads=1, op="aten::mm", family="matmul",
                     dtype="float32", flops=2e9, bytes_moved=1e6, seconds=14.0, count=4)
    plain = (1.0, 1.0, 1.0)
    fit = CostFit(ops={"aten::add": plain}, families={}, num_rows=7,
                  kinds={"matrix": plain, "dispatch": plain, "other": plain})
    refined = refine(fit, [mm], BOX)
    assert refined is not None and refined.ops["aten::add"] == plain
    assert refined.coefficients("aten::bmm", "matmul") == plain
    overhead, arithmetic, memory = refined.ops["aten::mm"]
    assert overhead * 1e-6 + arithmetic * 2.0 + memory * 1e-3 == pytest.approx(14.0, rel=0.25)
    for other in (replace(mm, machine="another"), replace(mm, num_threads=2), replace(mm, dtype="float16"),
                  replace(mm, seconds=0.0), replace(mm, count=0)):
        assert refine(fit, [other], BOX) is fit
        assert refine(None, [other], BOX) is None
