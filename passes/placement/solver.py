"""OR-tools CP-SAT, where it is installed (the extra `solver`): scaling to integers, symmetry, time limits.

The solver knows integers only. Times are scaled and rounded down, so that what it proves as a bound holds for the real
times too; what it finds is evaluated anew with the real times.
"""
from __future__ import annotations

import importlib.util
import itertools
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.problem import Floats, Ints, Problem

IMPORT_S = 1.2               # about what the first import takes
_UNITS = 1 << 30             # the value to beat, in integer units
_WORKERS = 2
_SYMMETRIC_ATOMS = 60        # atoms whose place breaks the symmetry of identical devices
_MARGIN_S = 0.08             # the solver looks at its clock only now and then
_MARGIN = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class Solution:
    """What the solver came to. `device_A` None: nothing found that is better than what was known."""

    device_A: Ints | None
    lower_bound: float
    proven: bool              # nothing is better than device_A, or than what was known


def installed() -> bool:
    """Whether OR-tools can be imported."""
    return importlib.util.find_spec("ortools") is not None


def time_to_load_s() -> float:
    return 0.0 if "ortools.sat.python.cp_model" in sys.modules else IMPORT_S


def scale_for(value: float) -> float:
    """Units per second such that `value` is a large integer."""
    return _UNITS / value if value > 0 else 1.0


def units(times: Floats, scale: float) -> Any:
    """Whole units, rounded down; inf becomes -1."""
    return np.where(np.isfinite(times), np.floor(np.where(np.isfinite(times), times, 0.0) * scale), -1).astype(np.int64)


def assignment(model: Any, problem: Problem) -> list[list[Any]]:
    """on[a][d] of a model: each atom on one device that runs it, within memory, identical devices in one order."""
    on = [[model.new_bool_var("") for _ in problem.devices] for _ in range(problem.num_atoms)]
    for atom, row in enumerate(on):
        model.add_exactly_one(row)
        for d, seconds in enumerate(problem.seconds_AD[atom]):
            if not np.isfinite(seconds):
                model.add(row[d] == 0)
    memory = problem.memory_A.astype(np.int64).tolist()
    for d, capacity in enumerate(problem.capacity_D):
        if np.isfinite(capacity):
            model.add(sum(m * row[d] for m, row in zip(memory, on, strict=True) if m) <= int(capacity))
    for alike in problem.classes:
        _break_symmetry(model, problem, on, alike)
    return on


def _by_weight(problem: Problem) -> list[int]:
    order: list[int] = np.argsort(-problem.seconds_AD.min(axis=1), kind="stable").tolist()
    return order[:_SYMMETRIC_ATOMS]


def _break_symmetry(model: Any, problem: Problem, on: list[list[Any]], alike: tuple[int, ...]) -> None:
    """The k-th of identical devices holds a heavy atom only if the one before it holds a heavier one."""
    heavy = _by_weight(problem)
    for before, device in itertools.pairwise(alike):
        for i, atom in enumerate(heavy):
            model.add_bool_or([on[atom][device].negated(), *(on[b][before] for b in heavy[:i])])


def canonical(problem: Problem, device_A: Ints) -> Ints:
    """The same placement with identical devices renamed as `_break_symmetry` wants them."""
    heavy = _by_weight(problem)
    rename = np.arange(problem.num_devices)
    for alike in problem.classes:
        met = dict.fromkeys(d for d in device_A[heavy].tolist() if d in alike)
        for target, d in zip(alike, [*met, *(d for d in alike if d not in met)], strict=True):
            rename[d] = target
    return rename[device_A]


def run(model: Any, deadline: Deadline, seed: int) -> tuple[Any, Any]:
    """Solve within the deadline: (solver, status)."""
    from ortools.sat.python import cp_model

    solver = cp_model.CpSolver()
    if deadline.limit_s is not None:
        left_s = deadline.left_s()
        solver.parameters.max_time_in_seconds = max(0.001, left_s - max(_MARGIN_S, _MARGIN * left_s))
    solver.parameters.num_workers = _WORKERS
    solver.parameters.random_seed = seed
    return solver, solver.solve(model)
