"""The policy min_latency: list schedules, annealing, then the exact solver, within the time given."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from genie_dynamo.passes.placement import exact_makespan, solver
from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.kernel import Kernels, MakespanKernel, makespan_arrays
from genie_dynamo.passes.placement.list_schedule import earliest_finish, ways_to_end
from genie_dynamo.passes.placement.loads import compute_bound, fits
from genie_dynamo.passes.placement.makespan_search import COLD, HOT, MakespanSearch
from genie_dynamo.passes.placement.packing import single_device
from genie_dynamo.passes.placement.problem import Ints, Problem
from genie_dynamo.passes.placement.throughput import PROVEN, first_loads
from genie_dynamo.passes.placement.timeline import Schedule, Timeline, critical_path_s, serial_schedule

_S_PER_SCHEDULE = 6e-6         # per node and edge, about
_S_PER_CHOICE = 1.5e-6           # a list schedule, per device and node or edge
_MAX_QUICK_ROUNDS = 9
_QUICK_ROUND_NODES = 1000
_QUICK_STEPS = 9_000           # nodes and edges that one quick annealing schedules;
_QUICK_KERNEL_STEPS = 400_000  # with a native kernel
_MIN_QUICK_TRIES, _MAX_QUICK_TRIES, _MAX_QUICK_KERNEL_TRIES = 8, 400, 4000
_FEW_SCHEDULES = 1500          # nodes and edges from which on quick planning has fewer starts
_ROUND_S = 4.0
_WIDE = 0.15                   # heat of a search that begins elsewhere than at the best
_VARIANTS = ((1.0, False), (1.0, True), (0.0, False), (3.0, True))      # of list schedules: see earliest_finish


@dataclass(slots=True, kw_only=True)
class FoundSchedule:
    """The best so far, and how it came about."""

    device_A: Ints
    schedule: Schedule
    lower_bound: float
    method: str

    def take(self, device_A: Ints, schedule: Schedule, method: str) -> None:
        if schedule.makespan_s < self.schedule.makespan_s * (1 - 1e-12):
            self.device_A, self.schedule, self.method = device_A, schedule, method

    @property
    def proven(self) -> bool:
        return self.schedule.makespan_s <= self.lower_bound * (1 + PROVEN)


def best_makespan(problem: Problem, deadline: Deadline, *, exact: bool | None, seed: int,
                  kernels: Kernels | None = None, of_use_s: float = np.inf) -> FoundSchedule:
    """A placement with a short makespan. Arguments and errors are those of `best_loads`.

    Args: of_use_s: quick planning of a large graph refines nothing that it finds to be longer than this.
    """
    found, timeline, kernel = _first(problem, deadline, seed, kernels)
    if deadline.allows(problem.graph_size * 1e-5):
        found.lower_bound = max(critical_path_s(problem), compute_bound(problem))
    if problem.num_devices == 1:
        found.lower_bound = found.schedule.makespan_s
    if found.proven or timeline is None:
        return found
    if deadline.quick and problem.graph_size > _FEW_SCHEDULES and found.schedule.makespan_s > of_use_s:
        return found
    tries = (min(_MAX_QUICK_TRIES, _QUICK_STEPS // problem.graph_size) if kernel is None else
             min(_MAX_QUICK_KERNEL_TRIES, max(_MIN_QUICK_TRIES, _QUICK_KERNEL_STEPS // problem.graph_size)))
    rounds = max(1, min(_MAX_QUICK_ROUNDS, _QUICK_ROUND_NODES // len(problem.graph.nodes)))
    others = list(_list_schedules(timeline, _VARIANTS)) if rounds > 1 and tries >= _MIN_QUICK_TRIES else []
    for number in range(rounds):
        if tries >= _MIN_QUICK_TRIES and not found.proven:
            # Where transfers are dear, the best start is often a trap: every other round begins elsewhere, and hotter.
            start_A = others[number // 2 % len(others)] if number % 2 and others else None
            _anneal(timeline, kernel, found, deadline, seed + number, tries, start_A)
    if deadline.quick and exact is not True:
        return found
    if exact is not True and not found.proven:
        _anneal(timeline, kernel, found, deadline.part(0.25, _ROUND_S), seed + 1)
    if exact is not False and not found.proven and not deadline.passed():
        _solve(timeline, found, deadline if exact else deadline.part(0.7), seed)
    for number in itertools.count(2):
        if exact or found.proven or not deadline.allows(2 * problem.graph_size * _S_PER_SCHEDULE):
            break
        # Every other time so hot that it does not matter where the best lies.
        _anneal(timeline, kernel, found, deadline.part(1.0, _ROUND_S), seed + number,
                start_A=found.device_A if number % 2 else None)
    return found


def _first(problem: Problem, deadline: Deadline, seed: int,
           kernels: Kernels | None) -> tuple[FoundSchedule, Timeline | None, MakespanKernel | None]:
    """The best of one device and of list schedules; what is good for throughput where memory refuses these."""
    found: FoundSchedule | None = None
    alone = single_device(problem)
    if alone is not None:
        schedule = serial_schedule(problem, int(alone[0]))
        found = FoundSchedule(device_A=alone, schedule=schedule, lower_bound=0.0, method="one device")
    schedule_s = problem.graph_size * _S_PER_SCHEDULE
    choice_s = problem.graph_size * problem.num_devices * _S_PER_CHOICE + schedule_s
    if found is not None and (problem.num_devices == 1 or not deadline.allows(choice_s + 2 * schedule_s)):
        return found, None, None
    timeline = Timeline(problem)
    kernel = None if kernels is None else kernels.makespan(makespan_arrays(problem))
    few = deadline.quick and problem.graph_size > _FEW_SCHEDULES
    starts: list[tuple[Ints, str]] = []
    for device_A in _list_schedules(timeline, _VARIANTS[:2] if few else _VARIANTS):
        starts.append((device_A, "list schedule"))
        if not deadline.allows(2 * choice_s):
            break
    if (found is None and not starts) or (not few and deadline.allows(4 * choice_s)):
        loads = first_loads(problem, deadline, seed)
        starts.append((loads.device_A, loads.method))
    if kernel is not None and len(starts) > 1:
        # In the extension a schedule takes a fraction of the time: only the best of them is made here too.
        starts = [min(starts, key=lambda start: _makespan_s(kernel, start[0]))]
    for device_A, method in starts:
        schedule = timeline.run(timeline.devices_of_nodes(device_A))
        if found is None:
            found = FoundSchedule(device_A=device_A, schedule=schedule, lower_bound=0.0, method=method)
        found.take(device_A, schedule, method)
    assert found is not None
    return found, timeline, kernel


def _makespan_s(kernel: MakespanKernel, device_A: Ints) -> float:
    """Of a placement as it is."""
    return kernel.anneal(start_A=device_A, seed=0, tries=0, limit_s=np.inf, cool_by_time=False, hot=HOT, cold=COLD)[2]


def _list_schedules(timeline: Timeline, variants: tuple[tuple[float, bool], ...]) -> Iterator[Ints]:
    ahead = ways_to_end(timeline) if any(look_ahead for _, look_ahead in variants) else None
    for weight, look_ahead in variants:
        device_A = earliest_finish(timeline, weight, ahead if look_ahead else None)
        if device_A is not None and fits(timeline.problem, device_A):
            yield device_A


def _anneal(timeline: Timeline, kernel: MakespanKernel | None, found: FoundSchedule, deadline: Deadline, seed: int,
            tries: int | None = None, start_A: Ints | None = None) -> None:
    """Args: start_A: where to begin, widely; None: at the best that was found, nearby."""
    if not deadline.allows(2 * timeline.problem.graph_size * _S_PER_SCHEDULE):
        return
    begin_A, hot = (found.device_A, HOT) if start_A is None else (start_A, _WIDE)
    # One more schedule must fit before time is up.
    last_s = timeline.problem.graph_size * _S_PER_SCHEDULE
    if kernel is not None:
        limit_s = max(0.0, deadline.left_s() - last_s)
        device_A, priority_N, makespan_s, _ = kernel.anneal(
            start_A=begin_A, seed=seed, tries=tries or 1 << 62, limit_s=limit_s, cool_by_time=not tries, hot=hot,
            cold=COLD)
        if makespan_s >= found.schedule.makespan_s:
            return
        found.take(device_A, timeline.run(timeline.devices_of_nodes(device_A), priority_N.tolist()), "annealing")
        return
    search = MakespanSearch(timeline, begin_A, seed)
    search.anneal(tries or 1 << 62, lambda: not deadline.allows(last_s), None if tries else deadline.share_left, hot)
    found.take(search.best_A, search.best, "annealing")


def _solve(timeline: Timeline, found: FoundSchedule, deadline: Deadline, seed: int) -> None:
    if not solver.installed():
        return
    if not deadline.allows(2 * exact_makespan.time_to_build_s(timeline) + solver.time_to_load_s()):
        return
    answer, schedule = exact_makespan.solve(timeline, found.device_A, found.schedule, deadline, seed)
    if answer.device_A is not None and schedule is not None:
        found.take(np.asarray(answer.device_A), schedule, "exact (CP-SAT)")
    found.lower_bound = max(found.lower_bound, min(answer.lower_bound, found.schedule.makespan_s))
