"""The native inner loops against the definitions in Python: the same value for the same placement, limits kept."""
from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.passes.placement.kernel import load_arrays, makespan_arrays
from genie_dynamo.passes.placement.loads import device_loads, fits
from genie_dynamo.passes.placement.packing import pack
from genie_dynamo.passes.placement.problem import Problem, build_problem
from genie_dynamo.passes.placement.timeline import Timeline
from genie_dynamo.placing import planner
from tests.passes.placement.graphs import CPU, FOUR_GPUS, cost_graphs, device_sets, layered

native: Any = pytest.importorskip("genie_dynamo._native", reason="the native extension is not built",
                                  exc_type=ImportError)
OPTIONS: dict[str, Any] = {"limit_s": 60.0, "cool_by_time": False, "hot": 0.1, "cold": 0.0005}


def problems(graph: CostGraph, devices: tuple[Device, ...], seed: int) -> tuple[Problem, Any] | None:
    problem = build_problem(graph, devices)
    start_A = pack(problem, seed)
    return None if start_A is None or not fits(problem, start_A) else (problem, start_A)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=12), device_sets(), st.integers(0, 99))
def test_a_makespan_is_that_of_the_timeline(graph: CostGraph, devices: tuple[Device, ...], seed: int) -> None:
    made = problems(graph, devices, seed)
    if made is None:
        return
    problem, start_A = made
    timeline = Timeline(problem)
    search = native.MakespanSearch(makespan_arrays(problem))
    for tries in (0, 40):
        device_A, priority_N, makespan_s, _ = search.anneal(start_A=start_A, seed=seed, tries=tries, **OPTIONS)
        assert fits(problem, device_A)
        again = timeline.run(timeline.devices_of_nodes(device_A), priority_N.tolist()).makespan_s
        assert makespan_s == pytest.approx(again, rel=1e-12)
        if not tries:
            assert (device_A == start_A).all()
            assert makespan_s == pytest.approx(timeline.run(timeline.devices_of_nodes(start_A)).makespan_s, rel=1e-12)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cost_graphs(max_nodes=12), device_sets(), st.integers(0, 99))
def test_loads_are_those_of_the_definition(graph: CostGraph, devices: tuple[Device, ...], seed: int) -> None:
    made = problems(graph, devices, seed)
    if made is None:
        return
    problem, start_A = made
    search = native.LoadSearch(load_arrays(problem))
    for tries in (0, 400):
        device_A, largest_s, _ = search.anneal(start_A=start_A, seed=seed, tries=tries, **OPTIONS)
        assert fits(problem, device_A)
        assert largest_s == pytest.approx(device_loads(problem, device_A).max(), rel=1e-9)
        assert largest_s <= device_loads(problem, start_A).max() * (1 + 1e-12)


@pytest.mark.parametrize("kind", ["makespan", "loads"])
def test_the_same_seed_gives_the_same_and_time_ends_a_search(kind: str) -> None:
    problem = build_problem(layered(120, 8, 1, 0.3), (*FOUR_GPUS, CPU))
    search = (native.MakespanSearch(makespan_arrays(problem)) if kind == "makespan"
              else native.LoadSearch(load_arrays(problem)))
    start_A = np.zeros(problem.num_atoms, dtype=np.int64)
    one, other = (search.anneal(start_A=start_A, seed=3, tries=300, **OPTIONS) for _ in range(2))
    assert (one[0] == other[0]).all() and one[-2] == other[-2] and one[-1] == 300
    before = max(np.bincount(start_A, problem.seconds_AD[:, 0]))
    assert one[-2] < before, "nothing was found that is better than one device"
    timed = search.anneal(start_A=start_A, seed=3, tries=1 << 40, **{**OPTIONS, "limit_s": 0.02, "cool_by_time": True})
    assert 0 < timed[-1] < 1 << 40


def test_arrays_that_do_not_fit_are_refused() -> None:
    problem = build_problem(layered(20, 4, 1, 0.3), FOUR_GPUS)
    for make, arrays in ((native.MakespanSearch, makespan_arrays(problem)), (native.LoadSearch, load_arrays(problem))):
        with pytest.raises(ValueError, match="seconds has 3 numbers, expected 80"):
            make({**arrays, "seconds": np.zeros(3)})
        index = "src" if "src" in arrays else "pin_atom"
        with pytest.raises(ValueError, match=f"{index} has a number outside"):
            make({**arrays, index: np.full(len(arrays[index]), 20)})
        search = make(arrays)
        for start_A in (np.zeros(3, dtype=np.int64), np.full(20, 4)):
            with pytest.raises(ValueError, match="expected 20 on devices below 4"):
                search.anneal(start_A=start_A, seed=0, tries=1, **OPTIONS)
        with pytest.raises(ValueError, match="hot > 0"):
            search.anneal(start_A=np.zeros(20, dtype=np.int64), seed=0, tries=1, **{**OPTIONS, "hot": 0.0})


def test_the_planner_of_the_face_uses_them() -> None:
    kernels = planner().kernels
    assert kernels is not None and kernels.makespan is native.MakespanSearch and kernels.loads is native.LoadSearch
