"""max_throughput: the evaluator against a slow reference, the search against every placement there is."""
from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import genie_dynamo as genie
from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.errors import PlacementError
from genie_dynamo.passes.placement import exact_loads
from genie_dynamo.passes.placement.contiguous import cut_sequence
from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.load_search import LoadSearch
from genie_dynamo.passes.placement.loads import compute_bound, device_loads, forced_together
from genie_dynamo.passes.placement.problem import build_problem
from tests.passes.placement import reference
from tests.passes.placement.graphs import CPU, FOUR_GPUS, cost_graphs, device_sets, layered


def forever() -> bool:
    return False


@settings(deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=9), device_sets(), st.integers(0, 2**20))
def test_loads_are_those_of_the_definition(graph: CostGraph, devices: tuple[Device, ...], seed: int) -> None:
    problem = build_problem(graph, devices)
    device_A = np.random.default_rng(seed).integers(len(devices), size=problem.num_atoms)
    if not np.isfinite(problem.seconds_AD[np.arange(problem.num_atoms), device_A]).all():
        return
    device_of = {n.id: devices[device_A[a]].id for n, a in zip(graph.nodes, problem.atom_of_N, strict=True)}
    expected = reference.loads(graph, devices, device_of)
    assert device_loads(problem, device_A).tolist() == pytest.approx([expected[d.id] for d in devices])


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cost_graphs(), device_sets())
def test_the_heuristic_is_valid_and_near_the_best(graph: CostGraph, devices: tuple[Device, ...]) -> None:
    best = reference.best_load(graph, devices)
    assert best is not None        # gpu0 can hold everything
    placed = genie.place(graph, devices=devices, policy="max_throughput")
    assert reference.obeys_limits(graph, devices, placed.device)
    assert placed.objective_value == pytest.approx(max(reference.loads(graph, devices, placed.device).values()))
    assert placed.objective_value == max(placed.loads_s.values())
    assert placed.objective_value <= best * 1.05 + 1e-9
    assert placed.lower_bound is None or placed.lower_bound <= best + 1e-9


@settings(max_examples=25, deadline=None, derandomize=True)
@given(cost_graphs(), device_sets())
def test_the_exact_solver_finds_and_proves_the_best(graph: CostGraph, devices: tuple[Device, ...]) -> None:
    best = reference.best_load(graph, devices)
    assert best is not None
    placed = genie.place(graph, devices=devices, policy="max_throughput", method="exact")
    assert reference.obeys_limits(graph, devices, placed.device)
    assert placed.objective_value == pytest.approx(best)
    assert placed.lower_bound == pytest.approx(best) and "proven optimal" in placed.method


@settings(deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=9), device_sets(), st.integers(0, 2**20))
def test_the_search_knows_its_loads(graph: CostGraph, devices: tuple[Device, ...], seed: int) -> None:
    """Sums of many exact changes are what counting anew gives."""
    problem = build_problem(graph, devices)
    search = LoadSearch(problem, np.zeros(problem.num_atoms, dtype=np.int64), seed)
    search.anneal(200, forever)
    assert search._loads == pytest.approx(device_loads(problem, np.array(search._device)).tolist(), abs=1e-9)
    assert search.best_value == pytest.approx(device_loads(problem, search.best_A).max())


@settings(max_examples=40, deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=7), device_sets())
def test_bounds_hold_and_what_is_joined_may_be_joined(graph: CostGraph, devices: tuple[Device, ...]) -> None:
    best = reference.best_load(graph, devices)
    assert best is not None
    problem = build_problem(graph, devices)
    assert compute_bound(problem) <= best * (1 + 1e-9)
    joined = problem.contract(forced_together(problem, best * (1 + 1e-9)))
    answer = exact_loads.solve(joined, None, 1.0, Deadline(time.monotonic, None), 0)
    assert answer.device_A is not None        # some placement obeys both the limits and what was joined
    found = [max(reference.loads(graph, devices, p).values()) for p in reference.placements(graph, devices)
             if _keeps(joined.atom_of_N.tolist(), graph, p)]
    assert min(found) == pytest.approx(best)


def _keeps(atom_of: list[int], graph: CostGraph, device_of: dict[str, str]) -> bool:
    homes: dict[int, set[str]] = {}
    for node, atom in zip(graph.nodes, atom_of, strict=True):
        homes.setdefault(atom, set()).add(device_of[node.id])
    return all(len(h) == 1 for h in homes.values())


@settings(deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=8, groups=False))
def test_intervals_are_the_best_contiguous_ones(graph: CostGraph) -> None:
    devices = FOUR_GPUS[:3]
    problem = build_problem(graph, devices)
    order = np.arange(problem.num_atoms)
    found = cut_sequence(problem, order, 100)
    assert found is not None
    size = problem.num_atoms
    cuts = [[0] * i + [1] * (j - i) + [2] * (size - j) for i in range(size + 1) for j in range(i, size + 1)]
    best = min(float(device_loads(problem, np.array(c)).max()) for c in cuts)
    assert device_loads(problem, found).max() == pytest.approx(best)


def test_same_seed_same_placement() -> None:
    graph = layered(80, 6, seed=3, transfer_ratio=0.5)
    first, second = (genie.place(graph, devices=[*FOUR_GPUS, CPU], policy="max_throughput", seed=5) for _ in range(2))
    assert first.device == second.device and first.objective_value == second.objective_value


def test_a_device_that_pays_no_transfers_is_not_charged() -> None:
    graph = reference.chain(1.0, 1.0, edge_s=5.0)
    two = [Device(id="a", kind="gpu"), Device(id="b", kind="gpu", pays_transfers=False)]
    problem = build_problem(graph, two)
    assert device_loads(problem, np.array([0, 1])).tolist() == [6.0, 1.0]


def test_memory_that_only_some_packing_obeys() -> None:
    """Total memory is enough to the byte; the fastest device alone would not do."""
    nodes = tuple(genie.CostNode(id=f"n{i}", seconds={"gpu": 1.0}, memory_bytes=m)
                  for i, m in enumerate([6, 5, 5, 4, 4, 3, 3]))
    devices = [Device(id=f"g{i}", kind="gpu", memory_bytes=10) for i in range(3)]
    placed = genie.place(CostGraph(nodes), devices=devices, policy="max_throughput")
    assert reference.obeys_limits(CostGraph(nodes), devices, placed.device)


def test_memory_that_no_packing_obeys_is_proven() -> None:
    nodes = tuple(genie.CostNode(id=f"n{i}", seconds={"gpu": 1.0}, memory_bytes=6) for i in range(3))
    devices = [Device(id=f"g{i}", kind="gpu", memory_bytes=10) for i in range(2)]
    with pytest.raises(PlacementError, match=r"need 18 bytes, the largest 6; devices have g0 10, g1 10.*proven"):
        genie.place(CostGraph(nodes), devices=devices, policy="max_throughput")
