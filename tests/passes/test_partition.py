"""Which worker runs which node: a cut only where it is worth it, whole graphs where not, errors with the numbers."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import default_partition
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.core.errors import ConfigError, PlacementError
from genie_dynamo.core.hardware import HardwareFacts, LinkFacts
from genie_dynamo.core.plan import GuardFacts, verify_plan
from genie_dynamo.passes.facts import GraphFacts, read_facts
from genie_dynamo.passes.partition import MARGIN, Partition, WorkerFacts, partition
from genie_dynamo.passes.placement.interfaces import Limits
from genie_dynamo.passes.placement.planner import Planner
from genie_dynamo.passes.planning import plan_graph

HARDWARE = HardwareFacts(
    name="test", kind="cpu", source="made up for tests", matmul_flops_per_s=(("float32", 5e10),),
    elementwise_ops_per_s=(("float32", 2e9),), memory_bytes_per_s=((1, 1e10),), op_overhead_s=2e-6)
WORKERS = tuple(WorkerFacts(name=name, hardware=HARDWARE) for name in ("w0", "w1"))


def lane(latency_s: float = 1e-4, bytes_per_s: float = 2e9) -> LinkFacts:
    return LinkFacts(start="w0", end="w1", latency_s=latency_s, bytes_per_s=bytes_per_s, source="made up for tests")


class Towers(nn.Module):
    """Two towers that know nothing of each other, and a head."""

    def __init__(self, width: int = 512, dropout: float = 0.0) -> None:
        super().__init__()
        self.a, self.b = (nn.Sequential(*[layer for _ in range(4) for layer in (
            nn.Linear(width, width), nn.GELU(), nn.Dropout(dropout))]) for _ in range(2))
        self.head = nn.Linear(2 * width, 8)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.head(torch.cat([self.a(x), self.b(y)], -1))
        return out


def capture(model: nn.Module, *args: torch.Tensor, kind: str = "inference") -> tuple[fx.GraphModule, GraphFacts]:
    found: list[Any] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        found.append((gm, read_facts(gm, kind)))
        return gm.forward

    torch._dynamo.reset()
    backend = aot_autograd(fw_compiler=keep, inference_compiler=keep, partition_fn=default_partition)
    with torch.set_grad_enabled(kind == "forward"):
        torch.compile(model, backend=backend)(*args)
    graph: tuple[fx.GraphModule, GraphFacts] = found[0]
    return graph


def place(graph: tuple[fx.GraphModule, GraphFacts], workers: Sequence[WorkerFacts] = WORKERS,
          lanes: Sequence[LinkFacts] = (lane(),), policy: Any = "min_latency") -> Partition:
    return partition(*graph, workers, lanes, policy, Planner(time.monotonic), Limits())


@pytest.fixture(scope="module")
def towers() -> tuple[fx.GraphModule, GraphFacts]:
    return capture(Towers().eval(), torch.randn(256, 512), torch.randn(256, 512))


def test_independent_towers_are_cut_between_each_other(towers: Any) -> None:
    found = place(towers)
    assert found.workers == ("w0", "w1")
    whole = [a.est_s for a in found.alternatives if not a.chosen]
    assert found.est_s < MARGIN * min(s for s in whole if s is not None)
    plan = plan_graph(*towers, GuardFacts(), assign=lambda node: found.assign.get(node.name, 0), num_workers=2)
    verify_plan(plan)
    # One run of nodes for each tower, and the head with one of them or after both.
    assert len(plan.fragments) in (2, 3)
    assert {f.worker for f in plan.fragments} == {0, 1}


def test_a_chain_stays_whole_and_says_why() -> None:
    found = place(capture(nn.Sequential(*[nn.Linear(256, 256) for _ in range(6)]).eval(), torch.randn(64, 256)))
    assert len(found.workers) == 1 and set(found.assign.values()) == {0}
    assert sum(a.chosen for a in found.alternatives) == 1
    assert found.placement is None and not found.pinned
    (cut,) = [a for a in found.alternatives if a.name.startswith(("a cut", "cut"))]
    assert cut.name.startswith("a cut") and "none was found that is better than all of it on w" in cut.reason


def test_a_slow_lane_keeps_the_towers_together(towers: Any) -> None:
    assert len(place(towers, lanes=[lane(bytes_per_s=1e6)]).workers) == 1
    assert len(place(towers, lanes=[lane(latency_s=1.0)]).workers) == 1


def test_the_faster_of_two_unequal_workers_gets_a_whole_graph() -> None:
    slow = replace(HARDWARE, matmul_flops_per_s=(("float32", 1e9),), memory_bytes_per_s=((1, 1e8),))
    workers = [WorkerFacts(name="w0", hardware=slow), WorkerFacts(name="w1", hardware=HARDWARE)]
    found = place(capture(nn.Sequential(nn.Linear(256, 256), nn.ReLU()).eval(), torch.randn(64, 256)), workers)
    assert found.workers == ("w1",) and found.pinned


def test_a_graph_too_large_for_one_worker_is_split_so_that_it_fits() -> None:
    graph = capture(nn.Sequential(*[nn.Linear(512, 512) for _ in range(8)]).eval(), torch.randn(4, 512))
    held = 8 * 512 * 513 * 4
    workers = [replace(w, memory_bytes=int(held * 0.7)) for w in WORKERS]
    found = place(graph, workers)
    assert len(found.workers) == 2
    for number in range(2):
        assert sum(found.memory_bytes[n] for n, w in found.assign.items() if w == number) <= held * 0.7
    reasons = [a.reason for a in found.alternatives if not a.chosen]
    assert all("GiB" in reason for reason in reasons) and len(reasons) == 2


def test_a_graph_that_fits_nowhere_is_refused_with_the_numbers() -> None:
    graph = capture(nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)]).eval(), torch.randn(4, 512))
    with pytest.raises(PlacementError, match=r"\d"):
        place(graph, [replace(w, memory_bytes=1 << 20) for w in WORKERS])


def test_random_ops_keep_their_order_across_a_cut() -> None:
    gm, facts = capture(Towers(dropout=0.5).train(), torch.randn(256, 512), torch.randn(256, 512), kind="forward")
    found = place((gm, facts))
    plan = plan_graph(gm, facts, GuardFacts(), assign=lambda node: found.assign.get(node.name, 0), num_workers=2)
    order = [name for fragment in plan.fragments for name in fragment.node_names if "dropout" in name or "rand" in name]
    position = {node.name: k for k, node in enumerate(gm.graph.nodes)}
    makers = [name for name in order if "getitem" not in name]
    assert makers == sorted(makers, key=position.__getitem__) and len(makers) == 8


def test_throughput_prefers_whole_calls_side_by_side_until_memory_forbids_it(towers: Any) -> None:
    found = place(towers, policy="max_throughput")
    assert len(found.workers) == 1
    (chosen,) = [a for a in found.alternatives if a.chosen]
    assert "spread over 2 workers" in chosen.name
    small = [replace(w, memory_bytes=8 << 20) for w in WORKERS]
    assert len(place(towers, small, policy="max_throughput").workers) == 2


def priced(*prices: float | None) -> list[WorkerFacts]:
    """A worker that is three times as fast as the next, and so on."""
    return [WorkerFacts(name=f"w{n}", price_per_hour=price, hardware=replace(
        HARDWARE, matmul_flops_per_s=(("float32", 5e10 / 3 ** n),), memory_bytes_per_s=((1, 1e10 / 3 ** n),)))
        for n, price in enumerate(prices)]


def test_min_cost_takes_the_cheapest_worker_that_is_fast_enough() -> None:
    graph = capture(nn.Sequential(*[nn.Linear(512, 512) for _ in range(4)]).eval(), torch.randn(256, 512))
    fast_s, slow_s = (place(graph, [w]).est_s for w in priced(1.0, 1.0))
    cheap = partition(*graph, priced(9.0, 1.0), [lane()], "min_cost", Planner(time.monotonic), Limits())
    assert cheap.workers == ("w1",) and cheap.pinned and cheap.est_s == pytest.approx(slow_s)
    assert [a.name for a in cheap.alternatives if a.chosen] == ["w1"]
    bound = Limits(latency_bound_s=(fast_s + slow_s) / 2)
    in_time = partition(*graph, priced(9.0, 1.0), [lane()], "min_cost", Planner(time.monotonic), bound)
    assert in_time.workers == ("w0",) and in_time.est_s == pytest.approx(fast_s)
    with pytest.raises(PlacementError, match="bound"):
        partition(*graph, priced(9.0, 1.0), [lane()], "min_cost", Planner(time.monotonic),
                  Limits(latency_bound_s=fast_s / 100))


def test_min_cost_without_a_price_names_the_worker() -> None:
    graph = capture(nn.Linear(8, 8).eval(), torch.randn(4, 8))
    with pytest.raises(ConfigError, match=r"w1 has none; say price_per_hour in cluster\.yaml"):
        place(graph, priced(1.0, None), policy="min_cost")
