"""Stages for parts of a batch: chosen where a pipeline is estimated to win, timed part by part."""
from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.core.errors import PlacementError
from genie_dynamo.core.plan import GuardFacts, verify_plan
from genie_dynamo.passes.costs.analysis import analyze_costs
from genie_dynamo.passes.facts import read_facts
from genie_dynamo.passes.partition import MARGIN, Partition
from genie_dynamo.passes.pipelining import pipeline_partition
from genie_dynamo.passes.placement.interfaces import Limits
from genie_dynamo.passes.placement.planner import Planner
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.passes.rows.split import split_batch
from tests.passes.test_partition import WORKERS, capture, lane


def chain(width: int = 512, layers: int = 8) -> nn.Sequential:
    return nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.GELU())]).eval()


def pipeline(graph: Any, parts: int, workers: Sequence[Any] = WORKERS, policy: Any = "min_latency",
             lanes: Any = None) -> Partition:
    return pipeline_partition(*graph, split_batch(*graph, parts), workers, lanes or [lane()], policy,
                              Planner(time.monotonic), Limits())


@pytest.fixture(scope="module")
def graph() -> Any:
    return capture(chain(), torch.randn(256, 512))


def test_a_chain_becomes_two_stages_whose_parts_overlap(graph: Any) -> None:
    found = pipeline(graph, 4)
    assert found.workers == ("w0", "w1") and found.split is not None and found.placement is not None
    whole = min(a.est_s for a in found.alternatives if a.est_s is not None and a.name in ("w0", "w1"))
    # Two balanced stages and four parts take 5/8 of the time of one worker, and transfers are on top.
    assert 5 / 8 * whole < found.est_s < MARGIN * whole
    plan = plan_graph(found.split.gm, graph[1], GuardFacts(), assign=lambda n: found.assign[n.name], num_workers=2)
    verify_plan(plan)
    # One run of nodes on each worker, one value between them for each part.
    first, second = plan.fragments
    assert {first.worker, second.worker} == {0, 1}
    assert len(set(first.outputs) & set(second.inputs)) == 4
    starts = found.placement.start_s
    stage_of = {name: found.assign[name] for name in found.split.part}
    last_of_first = max(starts[n] for n, w in stage_of.items() if w == first.worker)
    assert min(starts[n] for n, w in stage_of.items() if w == second.worker) < last_of_first


def test_more_parts_are_estimated_to_be_better_until_messages_eat_the_gain(graph: Any) -> None:
    estimates = {k: pipeline(graph, k).est_s for k in (2, 4, 8)}
    assert estimates[4] < estimates[2]
    slow = [lane(latency_s=5e-4)]
    late = {k: pipeline(graph, k, lanes=slow).est_s for k in (4, 64)}
    assert late[64] > late[4]


def test_a_slow_lane_keeps_the_graph_whole_and_says_what_the_pipeline_would_take(graph: Any) -> None:
    found = pipeline(graph, 4, lanes=[lane(latency_s=1.0)])
    assert len(found.workers) == 1 and found.split is None
    (row,) = [a for a in found.alternatives if "parts of the batch" in a.name]
    assert not row.chosen and row.est_s and row.est_s > 1.0 and "must win" in row.reason
    slower = pipeline(graph, 4, lanes=[lane(latency_s=3e-3)])
    (row,) = [a for a in slower.alternatives if "parts of the batch" in a.name]
    assert slower.split is None and not row.chosen and row.est_s and "must win" in row.reason


def test_what_has_one_weight_has_no_stages() -> None:
    one = capture(nn.Linear(512, 512).eval(), torch.randn(256, 512))
    found = pipeline(one, 4, lanes=[lane(latency_s=1.0)])
    (row,) = [a for a in found.alternatives if "parts of the batch" in a.name]
    assert not row.chosen and row.est_s is None and "busiest worker" in row.reason


def test_under_max_throughput_the_busiest_worker_counts(graph: Any) -> None:
    found = pipeline(graph, 4, policy="max_throughput")
    assert found.split is not None and found.placement is not None
    assert found.est_s == max(found.placement.loads_s.values())
    assert found.est_s < (found.placement.makespan_s or 0.0)


def test_the_part_of_a_weight_lies_on_one_worker(graph: Any) -> None:
    found = pipeline(graph, 4)
    assert found.split is not None
    homes: dict[str, set[int]] = {}
    for node, origin in found.split.origin.items():
        homes.setdefault(origin, set()).add(found.assign[node])
    assert all(len(workers) == 1 for workers in homes.values())


def coarse(layers: int = 3) -> nn.Sequential:
    """Equal layers that do not part into two equal halves."""
    return nn.Sequential(*[layer for _ in range(layers) for layer in (
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]).eval()


def test_where_layers_are_too_coarse_to_balance_parts_take_two_cuts() -> None:
    fast = [lane(latency_s=1e-5, bytes_per_s=2e10)]
    found = pipeline(capture(coarse(), torch.randn(16, 32, 32, 32)), 4, policy="max_throughput", lanes=fast)
    assert found.split is not None and found.placement is not None and "by another cut" in found.placement.method
    loads = found.placement.loads_s
    whole = min(a.est_s for a in found.alternatives if a.est_s is not None and a.name in ("w0", "w1"))
    assert max(loads.values()) < 0.6 * whole, "one cut leaves two of three layers on one worker"
    homes: dict[str, set[int]] = {}
    for node, origin in found.split.origin.items():
        if "convolution" in origin:
            homes.setdefault(origin, set()).add(found.assign[node])
    assert sorted(map(len, homes.values())) == [1, 1, 2], "the layer in the middle alone lies on both"


def test_two_cuts_need_memory_for_what_lies_twice() -> None:
    graph = capture(coarse(), torch.randn(16, 32, 32, 32))
    layer_bytes = 32 * (32 * 9 + 1) * 4
    peak_bytes = int(analyze_costs(graph[0]).totals().peak_bytes)
    tight = [replace(w, memory_bytes=peak_bytes + int(2.5 * layer_bytes)) for w in WORKERS]
    tight[1] = replace(tight[1], memory_bytes=peak_bytes + int(1.5 * layer_bytes))
    found = pipeline(graph, 4, tight, policy="max_throughput")
    assert found.placement is not None and "by another cut" not in found.placement.method


def test_memory_that_one_worker_lacks_makes_a_pipeline_of_it_whatever_it_costs(graph: Any) -> None:
    held = 8 * 512 * 513 * 4
    small = [replace(w, memory_bytes=int(held * 0.8) + (1 << 20)) for w in WORKERS]
    found = pipeline(graph, 4, small, lanes=[lane(latency_s=0.01)])
    assert len(found.workers) == 2
    with pytest.raises(PlacementError):
        pipeline(graph, 4, [replace(w, memory_bytes=1 << 20) for w in WORKERS])


def training_step(layers: int = 6, width: int = 256, rows: int = 512) -> Any:
    """A graph that holds loss and backward of a chain of layers."""
    model = nn.Sequential(*[layer for _ in range(layers) for layer in (nn.Linear(width, width), nn.Tanh())])
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}

    def step(x: torch.Tensor, target: torch.Tensor) -> Any:
        def loss(weights: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), target)

        # Weights that learn would make this the forward of yet another backward, for which everything is saved.
        return torch.func.grad_and_value(loss)(weights)

    return captured_step(step, torch.randn(rows, width), torch.arange(rows) % width)


def captured_step(step: Any, *inputs: torch.Tensor) -> Any:
    found: list[Any] = []

    def keep(gm: torch.fx.GraphModule, _: Any) -> Any:
        found.append((gm, read_facts(gm, "inference")))
        return make_boxed_func(gm.forward)

    torch.compile(step, backend=aot_autograd(fw_compiler=keep, keep_inference_input_mutations=True))(*inputs)
    return found[0]


@pytest.mark.parametrize("parts", [4, 8])
def test_a_training_step_starts_no_part_before_it_comes_back_to_an_earlier_one(parts: int, fresh_dynamo: None) -> None:
    step = training_step(rows=2048)
    found = pipeline(step, parts, lanes=[lane(latency_s=1e-6)])
    split = found.split
    assert split is not None and split.in_order and found.workers == ("w0", "w1")
    plan = plan_graph(split.gm, step[1], GuardFacts(), assign=lambda n: found.assign[n.name], num_workers=2,
                      in_order=True)
    verify_plan(plan)
    forward, backward = stages_of(split)
    held = {worker: most_held([n for f in plan.fragments if f.worker == worker for n in f.node_names], split, forward,
                              backward) for worker in (0, 1)}
    assert max(held.values()) <= 2, "as many parts as there are stages"
    free = plan_graph(split.gm, step[1], GuardFacts(), assign=lambda n: found.assign[n.name], num_workers=2)
    ahead = [most_held([n for f in free.fragments if f.worker == worker for n in f.node_names], split, forward,
                       backward) for worker in (0, 1)]
    assert max(ahead) == parts, "what the order is for"


def stages_of(split: Any) -> tuple[set[str], set[str]]:
    """The products of the forward and those of the backward, by name of the whole graph's node."""
    heavy = {split.origin[n.name]: n.target for n in split.gm.graph.nodes if n.target in (
        torch.ops.aten.addmm.default, torch.ops.aten.mm.default)}
    return ({n for n, target in heavy.items() if target is torch.ops.aten.addmm.default},
            {n for n, target in heavy.items() if target is torch.ops.aten.mm.default})


def most_held(names: Sequence[str], split: Any, forward: set[str], backward: set[str]) -> int:
    """How many parts at once have begun their forward on a worker and not ended their backward there."""
    last = {split.part[n]: index for index, n in enumerate(names) if split.origin[n] in backward}
    first: dict[int, int] = {}
    for index, name in enumerate(names):
        if split.origin[name] in forward:
            first.setdefault(split.part[name], index)
    return max(sum(start <= at <= last[part] for part, start in first.items()) for at in range(len(names)))
