"""The policy max_throughput: intervals of good sequences, annealing, then the exact solver, within the time given."""
from __future__ import annotations

import itertools
from dataclasses import dataclass, field

import numpy as np

from genie_dynamo.core.errors import PlacementError
from genie_dynamo.passes.placement import exact_loads, solver
from genie_dynamo.passes.placement.contiguous import cut_sequence
from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.kernel import Kernels, load_arrays
from genie_dynamo.passes.placement.load_search import COOLING, WIDE, LoadSearch, first_heat
from genie_dynamo.passes.placement.loads import compute_bound, device_loads, fits, forced_together
from genie_dynamo.passes.placement.orders import sequences
from genie_dynamo.passes.placement.packing import pack, single_device
from genie_dynamo.passes.placement.problem import Ints, Problem

PROVEN = 2e-6                  # a gap that only rounding to the solver's integers explains
_MAX_QUICK_ROUNDS = 5          # annealings of a small graph without a time limit;
_QUICK_ROUND_ATOMS = 1000      # of a larger one, so many that they anneal about this many atoms
_QUICK_MOVES = 2000
_QUICK_MOVES_PER_ATOM = 2
_MAX_QUICK_MOVES = 60_000
_QUICK_KERNEL_MOVES = 40_000   # the same with a native kernel
_QUICK_KERNEL_MOVES_PER_ATOM = 30
_SMALL_ATOMS = 400             # graphs that also get wide annealings
_WIDE_ROUNDS, _WIDE_MOVES = 5, 50_000
_BLOCKS = 256
_S_PER_NODE_ORDER = 3e-6       # about what one more sequence takes, per node and edge
_ROUND_S = 4.0                 # one annealing from hot to cold


@dataclass(slots=True, kw_only=True)
class Found:
    """The best so far, and how it came about."""

    device_A: Ints
    value: float
    lower_bound: float
    method: str
    starts: list[Ints] = field(default_factory=list)      # from which a search may begin too

    def take(self, device_A: Ints, value: float, method: str) -> bool:
        if value >= self.value * (1 - 1e-12):
            return False
        self.device_A, self.value, self.method = device_A, value, method
        return True

    @property
    def proven(self) -> bool:
        return self.value <= self.lower_bound * (1 + PROVEN)


def best_loads(problem: Problem, deadline: Deadline, *, exact: bool | None, seed: int,
               kernels: Kernels | None = None) -> Found:
    """A placement with a small largest load.

    Args:    exact: True: until proven or out of time; False: never the solver; None: where there is time for it.
    Raises:  PlacementError where memory leaves no placement, or none was found.
    """
    found = first_loads(problem, deadline, seed)
    found.lower_bound = compute_bound(problem) if deadline.allows(problem.num_atoms * 4e-5) else 0.0
    if found.proven or problem.num_devices == 1:
        found.lower_bound = max(found.lower_bound, found.value if problem.num_devices == 1 else 0.0)
        return found
    _anneal_quickly(problem, kernels, found, deadline, seed)
    if deadline.quick and exact is not True:
        return found
    if exact is not True and not found.proven:
        _anneal(problem, kernels, found, deadline.part(0.25, _ROUND_S), seed + 1)
    if exact is not False and not found.proven and not deadline.passed():
        _solve(problem, found, deadline if exact else deadline.part(0.6), seed)
    for number in itertools.count(2):
        if exact or found.proven or deadline.passed():
            break
        # Every other time so hot that it does not matter where the best lies.
        _anneal(problem, kernels, found, deadline.part(1.0, _ROUND_S), seed + number, hot=None if number % 2 else WIDE)
    return found


def _anneal_quickly(problem: Problem, kernels: Kernels | None, found: Found, deadline: Deadline, seed: int) -> None:
    """A fixed amount of work."""
    if kernels is not None:
        moves = max(_QUICK_KERNEL_MOVES, _QUICK_KERNEL_MOVES_PER_ATOM * problem.num_atoms)
        for number in range(_WIDE_ROUNDS if problem.num_atoms <= _SMALL_ATOMS else 0):
            if not found.proven:
                _anneal(problem, kernels, found, deadline, seed + number, moves=_WIDE_MOVES,
                        hot=WIDE if number % 2 else WIDE / 3, start_A=found.starts[number % len(found.starts)])
        if not found.proven:
            _anneal(problem, kernels, found, deadline, seed, moves=moves)
        return
    moves = min(_MAX_QUICK_MOVES, max(_QUICK_MOVES, _QUICK_MOVES_PER_ATOM * problem.num_atoms))
    for number in range(max(1, min(_MAX_QUICK_ROUNDS, _QUICK_ROUND_ATOMS // problem.num_atoms))):
        if not found.proven:
            # Every other time from one of the starts, which may lie in another valley than the best.
            other = found.starts[number // 2 % len(found.starts)] if number % 2 else None
            _anneal(problem, None, found, deadline, seed + number, moves=moves, start_A=other)


def first_loads(problem: Problem, deadline: Deadline, seed: int) -> Found:
    """The best of one device and of intervals of several sequences; any packing where none of these fits."""
    found: Found | None = None
    candidate, method = single_device(problem), "one device"
    orders = sequences(problem)
    step_s = (problem.graph_size + 2000) * _S_PER_NODE_ORDER
    while True:
        if candidate is not None and fits(problem, candidate):
            value = float(device_loads(problem, candidate).max(initial=0.0))
            if found is None:
                found = Found(device_A=candidate, value=value, lower_bound=0.0, method=method)
            found.take(candidate, value, method)
            found.starts.append(candidate)
        order = next(orders, None) if found is None or deadline.allows(2 * step_s) else None
        if order is None:
            break
        candidate, method = cut_sequence(problem, order, _BLOCKS), "intervals of a sequence (dynamic programming)"
    if found is None:
        found = _any_packing(problem, deadline, seed)
        found.starts.append(found.device_A)
    return found


def _any_packing(problem: Problem, deadline: Deadline, seed: int) -> Found:
    device_A, method = pack(problem, seed), "packing by memory"
    if device_A is None and solver.installed():
        answer = exact_loads.solve(problem, None, 1.0, deadline, seed)
        device_A, method = answer.device_A, "packing by memory (solver)"
        if device_A is None and answer.proven:
            raise PlacementError(f"memory leaves no placement: {memory_numbers(problem)}; it is enough in total, but "
                                 "no assignment of whole groups fits (proven); add memory or make groups smaller")
    if device_A is None:
        raise PlacementError(f"no placement found that fits memory: {memory_numbers(problem)}; add memory, make "
                             "groups smaller, or give more time and install the extra `solver`")
    value = float(device_loads(problem, device_A).max(initial=0.0))
    return Found(device_A=device_A, value=value, lower_bound=0.0, method=method)


def memory_numbers(problem: Problem) -> str:
    needs = np.sort(problem.memory_A)[::-1]
    return (f"{problem.num_atoms} groups need {needs.sum():.0f} bytes, the largest {needs[:1].sum():.0f}; devices have "
            + ", ".join(f"{d.id} {c:.0f}" for d, c in zip(problem.devices[:8], problem.capacity_D, strict=False)))


def _anneal(problem: Problem, kernels: Kernels | None, found: Found, deadline: Deadline, seed: int,
            moves: int | None = None, start_A: Ints | None = None, hot: float | None = None) -> None:
    """Anneal with atoms that belong together as one.

    Args: moves: None: for as long as there is time.  start_A: None: from the best so far.
          hot: worsening that is likely to be taken at first, as a share of the largest load; None: a few moves' worth.
    """
    if not deadline.allows(problem.graph_size * 8e-6):
        return
    labels = forced_together(problem, found.value)
    smaller = problem.contract(labels)
    if not smaller.supported():
        return
    chosen_A = np.zeros(smaller.num_atoms, dtype=np.int64)
    chosen_A[labels] = found.device_A if start_A is None else start_A
    if not fits(smaller, chosen_A):      # a start may separate what belongs together
        return
    hot = first_heat(smaller, chosen_A) if hot is None else hot
    if hot <= 0 or found.value <= 0:
        return
    if kernels is None:
        search = LoadSearch(smaller, chosen_A, seed)
        search.anneal(moves or 1 << 62, deadline.passed, None if moves else deadline.share_left, hot)
        best_A = search.best_A
    else:
        best_A, _, _ = kernels.loads(load_arrays(smaller)).anneal(
            start_A=chosen_A, seed=seed, tries=moves or 1 << 62, limit_s=max(0.0, deadline.left_s()),
            cool_by_time=not moves, hot=hot, cold=hot * COOLING)
    found.take(best_A[labels], float(device_loads(problem, best_A[labels]).max()), "annealing")


def _solve(problem: Problem, found: Found, deadline: Deadline, seed: int) -> None:
    if not solver.installed():
        return
    labels = forced_together(problem, found.value)
    smaller = problem.contract(labels)
    if not smaller.supported():      # what must be together fits nowhere: nothing is better
        found.lower_bound = found.value
        return
    if not deadline.allows(2 * exact_loads.time_to_build_s(smaller) + solver.time_to_load_s()):
        return
    start_A = np.zeros(smaller.num_atoms, dtype=np.int64)
    start_A[labels] = found.device_A
    answer = exact_loads.solve(smaller, start_A, found.value, deadline, seed)
    if answer.device_A is not None:
        device_A = answer.device_A[labels]
        found.take(device_A, float(device_loads(problem, device_A).max()), "exact (CP-SAT)")
    # Atoms were joined for placements better than found.value was: no other placement is below that value.
    found.lower_bound = max(found.lower_bound, min(answer.lower_bound, found.value))
