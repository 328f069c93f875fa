"""The policy min_cost: the makespan of one call x the price of every device used, under a latency bound.

Sets of devices that differ in kind or number are tried by rising bound on their cost; each is a problem of min_latency.
What is known of any set: a call costs at least sum over atoms of the least price x seconds, because a device is paid
for at least as long as it computes.
"""
from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from genie_dynamo.core.errors import ConfigError, PlacementError
from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.latency import FoundSchedule, best_makespan
from genie_dynamo.passes.placement.problem import Ints, Problem
from genie_dynamo.passes.placement.throughput import PROVEN
from genie_dynamo.passes.placement.timeline import Schedule, critical_path_s

_S_PER_HOUR = 3600.0
_MAX_SETS = 512
_QUICK_SETS = 12


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

    @property
    def bound(self) -> float:
        return self.price * self.least_s


def price_per_s(problem: Problem, device_A: Ints) -> float:
    """What the devices used cost per second."""
    used = sorted(set(device_A.tolist()))
    return sum((problem.devices[d].price_per_hour or 0.0) for d in used) / _S_PER_HOUR


def best_cost(problem: Problem, deadline: Deadline, *, latency_bound_s: float | None, exact: bool | None,
              seed: int) -> FoundCost:
    """A placement of small cost whose makespan is at most the bound.

    Raises: ConfigError where a device has no price; PlacementError where memory leaves no placement, or no makespan
            within the bound was found (with the shortest that was).
    """
    for device in problem.devices:
        if device.price_per_hour is None:
            raise ConfigError(f"min_cost needs price_per_hour of every device; {device.id!r} has none")
    bound_s = np.inf if latency_bound_s is None else latency_bound_s
    fastest = best_makespan(problem, _part(deadline, 0.25), exact=exact, seed=seed)
    if fastest.lower_bound > bound_s:
        raise _too_slow(fastest, bound_s)
    sets, complete = _device_sets(problem, deadline)
    sets.sort(key=lambda c: (c.bound, len(c.devices)))
    found = _priced(problem, fastest, bound_s, None)
    left = [c for c in sets if c.least_s <= bound_s]
    for number, candidate in enumerate(left):
        if deadline.passed() or (deadline.limit_s is None and number >= _QUICK_SETS):
            break
        if found is not None and candidate.bound >= found.value * (1 - PROVEN):
            break
        found = _try_set(problem, candidate, found, bound_s, _part(deadline, 0.5), exact, seed)
    if found is None:
        raise _too_slow(fastest, bound_s)
    found.lower_bound = min(found.value, _lower_bound(problem, sets if complete else [], bound_s, fastest))
    return found


def _part(deadline: Deadline, share: float) -> Deadline:
    return deadline if deadline.limit_s is None else deadline.slice(share * deadline.left_s())


def _try_set(problem: Problem, candidate: _Candidate, found: FoundCost | None, bound_s: float, deadline: Deadline,
             exact: bool | None, seed: int) -> FoundCost | None:
    part = problem.only(candidate.devices)
    if not part.supported() or part.memory_A.sum() > part.capacity_D.sum():
        return found
    try:
        best = best_makespan(part, deadline, exact=exact, seed=seed)
    except PlacementError:      # whole groups do not fit this set; another one may do
        return found
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
    return [c for c in sets if np.isfinite(c.least_s)], complete


def _least_s(problem: Problem, devices: tuple[int, ...]) -> float:
    """A quick bound on the makespan of a set: all compute, spread evenly over its devices."""
    seconds = problem.seconds_AD[:, list(devices)].min(axis=1)
    return float(max(seconds.max(initial=0.0), seconds.sum() / len(devices)) * (1 - 1e-12))


def _lower_bound(problem: Problem, sets: list[_Candidate], bound_s: float, fastest: FoundSchedule) -> float:
    """No placement within the latency bound costs less. `sets`: all that can do, or none."""
    prices = np.array([d.price_per_hour or 0.0 for d in problem.devices]) / _S_PER_HOUR
    computed = np.where(np.isfinite(problem.seconds_AD), problem.seconds_AD * prices, np.inf).min(axis=1).sum()
    path_s = max(fastest.lower_bound, critical_path_s(problem)) if problem.num_atoms else 0.0
    least = float(max(computed * (1 - 1e-12), prices.min() * path_s * (1 - 1e-12)))
    usable = [c.price * max(c.least_s, path_s) * (1 - 1e-12) for c in sets if c.least_s <= bound_s]
    return max(least, min(usable, default=0.0))


def _too_slow(fastest: FoundSchedule, bound_s: float) -> PlacementError:
    shortest, least = fastest.schedule.makespan_s, fastest.lower_bound
    why = "no placement can be faster than" if least > bound_s else "none was found; none can be faster than"
    return PlacementError(
        f"latency_bound_s={bound_s:g} cannot be met: the shortest makespan found is {shortest:.6g} s, and {why} "
        f"{least:.6g} s; raise the bound or add faster devices", makespan_s=shortest, lower_bound_s=least)
