"""The policy min_cost: the makespan of one call x the price of every device used, under a latency bound.

Sets of devices that differ in kind or number are tried by rising bound on their cost; each is a problem of min_latency.
What is known of any set: a call costs at least sum over atoms of the least price x seconds, because a device is paid
for at least as long as it computes.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from genie_dynamo.core.errors import ConfigError, PlacementError
from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.kernel import Kernels
from genie_dynamo.passes.placement.latency import FoundSchedule, best_makespan
from genie_dynamo.passes.placement.problem import Ints, Problem
from genie_dynamo.passes.placement.throughput import PROVEN
from genie_dynamo.passes.placement.timeline import Schedule, critical_path_s

_S_PER_HOUR = 3600.0
_MAX_SETS = 512
_MIN_LOOKS, _MAX_LOOKS = 1, 24
_LOOK_WORK = 24_000      # nodes and edges x devices that first looks go through in all
_NEAR = 1.3              # a set that a first schedule shows to cost more than this many times the best is left there

_Shortest = Callable[..., FoundSchedule]      # `best_makespan` with a seed and a kernel


@dataclass(slots=True, kw_only=True)
class FoundCost:
    """A schedule and what it costs, in currency per call."""

    device_A: Ints
    schedule: Schedule
    value: float
    lower_bound: float
    method: str

    @property
    def proven(self) -> bool:
        return self.value <= self.lower_bound * (1 + PROVEN)


@dataclass(slots=True, kw_only=True)
class _Candidate:
    devices: tuple[int, ...]
    price: float                # of all of them, per second
    least_s: float              # no makespan on them is below this
    seen: float = np.inf        # the least cost found on them

    @property
    def bound(self) -> float:
        return self.price * self.least_s


def price_per_s(problem: Problem, device_A: Ints) -> float:
    """What the devices used cost per second."""
    used = sorted(set(device_A.tolist()))
    return sum((problem.devices[d].price_per_hour or 0.0) for d in used) / _S_PER_HOUR


def best_cost(problem: Problem, deadline: Deadline, *, latency_bound_s: float | None, exact: bool | None,
              seed: int, kernels: Kernels | None = None) -> FoundCost:
    """A placement of small cost whose makespan is at most the bound.

    Raises: ConfigError where a device has no price; PlacementError where memory leaves no placement, or no makespan
            within the bound was found (with the shortest that was).
    """
    for device in problem.devices:
        if device.price_per_hour is None:
            raise ConfigError(f"min_cost needs price_per_hour of every device; {device.id!r} has none")
    bound_s = np.inf if latency_bound_s is None else latency_bound_s
    shortest: _Shortest = partial(best_makespan, seed=seed, kernels=kernels)
    sets, complete = _device_sets(problem, deadline)
    sets.sort(key=lambda c: (c.bound, len(c.devices)))
    found: FoundCost | None = None
    path_s = critical_path_s(problem)
    if latency_bound_s is not None:
        fastest = shortest(problem, deadline.part(0.25), exact=exact)
        path_s = max(path_s, fastest.lower_bound)
        found = _priced(problem, fastest, bound_s, None)
        if path_s > bound_s:
            raise _too_slow(fastest, bound_s)
    found = _first_looks(problem, sets, found, bound_s, deadline, shortest)
    if exact or not deadline.quick:
        found = _second_looks(problem, sets, found, bound_s, deadline, exact, shortest)
    if found is None:        # the sets looked at fit nothing, or too slowly: all devices together, whatever they cost
        fastest = shortest(problem, deadline, exact=False)
        found = _priced(problem, fastest, bound_s, None)
        if found is None:
            raise _too_slow(fastest, bound_s)
    found.lower_bound = min(found.value, _lower_bound(problem, sets if complete else [], bound_s, path_s))
    return found


def _first_looks(problem: Problem, sets: list[_Candidate], found: FoundCost | None, bound_s: float,
                 deadline: Deadline, shortest: _Shortest) -> FoundCost | None:
    """Each set that may be better, quickly: of one device all of them, of several as many as there is time for."""
    looks = max(_MIN_LOOKS, min(_MAX_LOOKS, _LOOK_WORK // (problem.graph_size * problem.num_devices)))
    for candidate in (c for c in sets if c.least_s <= bound_s):
        if found is not None and (candidate.bound >= found.value * (1 - PROVEN) or deadline.passed()):
            break
        if len(candidate.devices) > 1:
            looks -= 1
            if looks < 0:
                continue
        found = _try_set(problem, candidate, found, bound_s, deadline.part(0.3, quick=True), False, shortest)
    return found


def _second_looks(problem: Problem, sets: list[_Candidate], found: FoundCost | None, bound_s: float,
                  deadline: Deadline, exact: bool | None, shortest: _Shortest) -> FoundCost | None:
    """The sets that may still be better, with half of the time left for each in turn."""
    for candidate in sorted(sets, key=lambda c: (c.seen, c.bound)):
        if deadline.passed():
            break
        if candidate.least_s > bound_s or (found is not None and candidate.bound >= found.value * (1 - PROVEN)):
            continue
        found = _try_set(problem, candidate, found, bound_s, deadline.part(0.5), exact, shortest)
    return found


def _try_set(problem: Problem, candidate: _Candidate, found: FoundCost | None, bound_s: float, deadline: Deadline,
             exact: bool | None, shortest: _Shortest) -> FoundCost | None:
    part = problem.only(candidate.devices)
    if not part.supported():
        return found
    try:
        of_use_s = _NEAR * found.value / candidate.price if found is not None and candidate.price else np.inf
        best = shortest(part, deadline, exact=exact, of_use_s=of_use_s)
    except PlacementError:      # whole groups do not fit this set; another one may do
        return found
    candidate.seen = min(candidate.seen, best.schedule.makespan_s * candidate.price)
    candidate.least_s = max(candidate.least_s, best.lower_bound)
    best.device_A = np.asarray(candidate.devices)[best.device_A]
    best.schedule = Schedule(
        start_N=best.schedule.start_N, makespan_s=best.schedule.makespan_s,
        transfers=[(node, candidate.devices[p], candidate.devices[q], start, end)
                   for node, p, q, start, end in best.schedule.transfers])
    return _priced(problem, best, bound_s, found)


def _priced(problem: Problem, best: FoundSchedule, bound_s: float, found: FoundCost | None) -> FoundCost | None:
    value = best.schedule.makespan_s * price_per_s(problem, best.device_A)
    if best.schedule.makespan_s > bound_s or (found is not None and value >= found.value):
        return found
    return FoundCost(device_A=best.device_A, schedule=best.schedule, value=value, lower_bound=0.0, method=best.method)


def _device_sets(problem: Problem, deadline: Deadline) -> tuple[list[_Candidate], bool]:
    """Sets that differ in how many devices of each class they have, and whether these are all sets that can do.

    Where there are too many: each device alone, and all together.
    """
    count = int(np.prod([len(c) + 1 for c in problem.classes]))
    complete = count <= _MAX_SETS and deadline.allows(count * problem.num_atoms * 1e-6)
    if complete:
        choices = [tuple(itertools.chain.from_iterable(c[:n] for c, n in zip(problem.classes, numbers, strict=True)))
                   for numbers in itertools.product(*(range(len(c) + 1) for c in problem.classes)) if any(numbers)]
    else:
        choices = [(c[0],) for c in problem.classes] + [tuple(range(problem.num_devices))]
    sets = [_Candidate(devices=devices, price=price_per_s(problem, np.array(devices)),
                       least_s=_least_s(problem, devices)) for devices in choices]
    held = problem.memory_A.sum()
    return [c for c in sets if np.isfinite(c.least_s) and held <= problem.capacity_D[list(c.devices)].sum()], complete


def _least_s(problem: Problem, devices: tuple[int, ...]) -> float:
    """A quick bound on the makespan of a set: all compute, spread evenly over its devices."""
    seconds = problem.seconds_AD[:, list(devices)].min(axis=1)
    return float(max(seconds.max(initial=0.0), seconds.sum() / len(devices)) * (1 - 1e-12))


def _lower_bound(problem: Problem, sets: list[_Candidate], bound_s: float, path_s: float) -> float:
    """No placement within the latency bound costs less. `sets`: all that can do, or none."""
    prices = np.array([d.price_per_hour or 0.0 for d in problem.devices]) / _S_PER_HOUR
    finite = np.isfinite(problem.seconds_AD)
    paid = np.where(finite, np.where(finite, problem.seconds_AD, 0.0) * prices, np.inf)
    computed = paid.min(axis=1).sum()
    least = float(max(computed * (1 - 1e-12), prices.min() * path_s * (1 - 1e-12)))
    usable = [c.price * max(c.least_s, path_s) * (1 - 1e-12) for c in sets if c.least_s <= bound_s]
    return max(least, min(usable, default=0.0))


def _too_slow(fastest: FoundSchedule, bound_s: float) -> PlacementError:
    shortest, least = fastest.schedule.makespan_s, fastest.lower_bound
    why = "no placement can be faster than" if least > bound_s else "none was found; none can be faster than"
    return PlacementError(
        f"latency_bound_s={bound_s:g} cannot be met: the shortest makespan found is {shortest:.6g} s, and {why} "
        f"{least:.6g} s; raise the bound or add faster devices", makespan_s=shortest, lower_bound_s=least)
