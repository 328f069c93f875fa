"""min_latency: schedules obey the rules, and the search comes near the best of all placements and orders."""
from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genie_dynamo as genie
from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device
from genie_dynamo.core.errors import ConfigError, PlacementError
from genie_dynamo.core.placement import Placement
from genie_dynamo.passes.placement import cost
from genie_dynamo.passes.placement.loads import compute_bound
from genie_dynamo.passes.placement.problem import build_problem
from genie_dynamo.passes.placement.timeline import Timeline, critical_path_s, serial_schedule
from tests.passes.placement import reference
from tests.passes.placement.graphs import CPU, FOUR_GPUS, cost_graphs, device_sets, layered


def check(graph: CostGraph, devices: tuple[Device, ...], placed: Placement) -> None:
    assert reference.obeys_limits(graph, devices, placed.device)
    assert not reference.schedule_problems(graph, devices, placed)
    assert placed.lower_bound is None or placed.lower_bound <= placed.objective_value


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=4), device_sets(max_devices=2))
def test_near_the_best_of_all_placements_and_orders(graph: CostGraph, devices: tuple[Device, ...]) -> None:
    best = reference.best_makespan(graph, devices)
    placed = genie.place(graph, devices=devices, policy="min_latency")
    check(graph, devices, placed)
    assert placed.makespan_s == placed.objective_value
    assert placed.objective_value <= best * 1.05 + 1e-9
    assert placed.lower_bound is None or placed.lower_bound <= best + 1e-9


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=4), device_sets(max_devices=2))
def test_the_exact_solver_finds_and_proves_the_best(graph: CostGraph, devices: tuple[Device, ...]) -> None:
    placed = genie.place(graph, devices=devices, policy="min_latency", method="exact")
    check(graph, devices, placed)
    assert placed.objective_value == pytest.approx(reference.best_makespan(graph, devices))
    assert "proven optimal" in placed.method


@settings(deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=12), device_sets())
def test_schedules_of_larger_graphs_obey_the_rules(graph: CostGraph, devices: tuple[Device, ...]) -> None:
    check(graph, devices, genie.place(graph, devices=devices, policy="min_latency"))


@settings(deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=10), device_sets(), st.integers(0, 2**20))
def test_replaying_a_schedule_gives_it_again(graph: CostGraph, devices: tuple[Device, ...], seed: int) -> None:
    problem = build_problem(graph, devices)
    timeline = Timeline(problem)
    device_A = np.random.default_rng(seed).integers(len(devices), size=problem.num_atoms)
    if not np.isfinite(problem.seconds_AD[np.arange(problem.num_atoms), device_A]).all():
        return
    device_N = timeline.devices_of_nodes(device_A)
    first = timeline.run(device_N)
    ran = [(s, s + timeline.seconds[n][device_N[n]]) for n, s in enumerate(first.start_N)]
    sent = {(node, dst): (start, end) for node, _, dst, start, end in first.transfers}
    assert timeline.replay(device_N, ran, sent).makespan_s <= first.makespan_s + 1e-9
    assert max(critical_path_s(problem), compute_bound(problem)) <= first.makespan_s + 1e-9


def test_one_device_runs_one_node_at_a_time() -> None:
    problem = build_problem(layered(50, 5, 1, 0.5), FOUR_GPUS[:1])
    timeline = Timeline(problem)
    assert serial_schedule(problem, 0).makespan_s == pytest.approx(timeline.run([0] * 50).makespan_s)


def test_transfers_overlap_compute_and_a_link_carries_one_at_a_time() -> None:
    """a, b on g0 feed c, d on g1: b runs while a's output moves; b's output waits for the link."""
    nodes = [CostNode(id=n, seconds={"gpu": 1.0 if n in "ab" else None, "tpu": None if n in "ab" else 1.0})
             for n in "abcd"]
    graph = CostGraph(tuple(nodes), (CostEdge(src="a", dst="c", seconds=3.0), CostEdge(src="b", dst="d", seconds=3.0)))
    devices = (Device(id="g0", kind="gpu"), Device(id="g1", kind="tpu"))
    placed = genie.place(graph, devices=devices, policy="min_latency")
    assert placed.objective_value == 1 + 3 + 3 + 1
    check(graph, devices, placed)


def test_a_tensor_goes_once_to_each_device() -> None:
    nodes = [CostNode(id=n, seconds={"gpu": 1.0 if n == "a" else None, "tpu": None if n == "a" else 0.0})
             for n in "abcd"]
    graph = CostGraph(tuple(nodes), tuple(CostEdge(src="a", dst=n, seconds=2.0) for n in "bcd"))
    placed = genie.place(graph, devices=[Device(id="g0", kind="gpu"), Device(id="g1", kind="tpu")],
                         policy="min_latency")
    assert placed.objective_value == 3.0 and len(placed.transfers) == 1


def test_bandwidth_and_latency_are_those_of_the_slower_end() -> None:
    graph = reference.chain(1.0, 1.0, size_bytes=125_000_000)
    pinned = CostGraph((graph.nodes[0], CostNode(id="n1", seconds={"tpu": 1.0})), graph.edges)
    devices = [Device(id="g", kind="gpu", network_gbps=10.0, network_latency_s=0.25),
               Device(id="t", kind="tpu", network_gbps=2.0, network_latency_s=0.125)]
    assert genie.place(pinned, devices=devices, policy="min_latency").objective_value == 1 + 0.5 + 0.25 + 1


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=4), device_sets(max_devices=2))
def test_min_cost_is_near_the_best(graph: CostGraph, devices: tuple[Device, ...]) -> None:
    prices = {d.id: d.price_per_hour or 0.0 for d in devices}
    best = min(reference._best_order(graph, devices, p) * sum(prices[d] for d in sorted(set(p.values()))) / 3600
               for p in reference.placements(graph, devices))
    placed = genie.place(graph, devices=devices, policy="min_cost")
    check(graph, devices, placed)
    assert placed.makespan_s is not None
    paid = sum(prices[d] for d in set(placed.device.values()))
    assert placed.objective_value == pytest.approx(placed.makespan_s * paid / 3600)
    assert placed.objective_value <= best * 1.05 + 1e-12
    assert placed.lower_bound is None or placed.lower_bound <= best + 1e-12


def test_min_cost_pays_for_speed_only_where_the_bound_asks_for_it() -> None:
    graph = layered(60, 6, seed=1, transfer_ratio=0.01)
    devices = [*FOUR_GPUS, CPU]
    free = genie.place(graph, devices=devices, policy="min_cost")
    assert free.makespan_s is not None and len(set(free.device.values())) == 1
    bound_s = free.makespan_s / 4
    bounded = genie.place(graph, devices=devices, policy="min_cost", latency_bound_s=bound_s)
    assert bounded.makespan_s is not None and bounded.makespan_s <= bound_s
    assert bounded.objective_value > free.objective_value
    assert not reference.schedule_problems(graph, devices, bounded)


def test_a_latency_bound_that_cannot_be_met_says_what_can() -> None:
    graph = reference.chain(1.0, 2.0, 3.0)
    with pytest.raises(PlacementError, match=r"latency_bound_s=5 cannot be met: the shortest makespan found is 6 s"):
        genie.place(graph, devices=FOUR_GPUS, policy="min_cost", latency_bound_s=5.0)


def test_min_cost_finds_what_fits_also_where_the_sets_looked_at_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three nodes that two devices could hold by their sum, and cannot: each holds one."""
    monkeypatch.setattr(cost, "_MAX_LOOKS", 1)
    kinds = ("a", "b", "c")
    graph = CostGraph(tuple(CostNode(id=f"n{i}", seconds=dict.fromkeys(kinds, 1.0), memory_bytes=6) for i in range(3)),
                      ())
    devices = [Device(id=kind, kind=kind, memory_bytes=10, price_per_hour=price)
               for kind, price in zip(kinds, (1.0, 2.0, 3.0), strict=True)]
    placed = genie.place(graph, devices=devices, policy="min_cost")
    assert sorted(placed.device.values()) == ["a", "b", "c"]


def test_min_cost_asks_for_prices() -> None:
    with pytest.raises(ConfigError, match="price_per_hour of every device; 'g' has none"):
        genie.place(reference.chain(1.0), devices=[Device(id="g", kind="gpu")], policy="min_cost")
