"""A first placement that obeys memory and support, whatever it costs."""
from __future__ import annotations

import random

import numpy as np

from genie_dynamo.passes.placement.problem import Ints, Problem

_TRIES = 40


def single_device(problem: Problem) -> Ints | None:
    """All atoms on the one device that is fastest at it; None where no device runs and holds them all."""
    total = problem.seconds_AD.sum(axis=0)
    total[problem.memory_A.sum() > problem.capacity_D] = np.inf
    if not problem.num_atoms or not np.isfinite(total.min()):
        return None
    return np.full(problem.num_atoms, int(total.argmin()))


def pack(problem: Problem, seed: int) -> Ints | None:
    """Largest first, by several rules for the device, in growing disorder; None where this found nothing."""
    if not problem.num_atoms:
        return np.zeros(0, dtype=np.int64)
    draw = random.Random(seed)
    choices = np.isfinite(problem.seconds_AD).sum(axis=1)
    share = problem.memory_A / max(1.0, problem.memory_A.max(initial=0.0))
    for attempt in range(_TRIES):
        noise = np.array([draw.random() for _ in range(problem.num_atoms)])
        # What has only one device to go to goes there first.
        key = np.where(choices == 1, np.inf, share * (1 + attempt / _TRIES * noise))
        found = _pack_once(problem, np.argsort(-key, kind="stable"), attempt)
        if found is not None:
            return found
    return None


def _pack_once(problem: Problem, order: Ints, attempt: int) -> Ints | None:
    free = problem.capacity_D.copy()
    device_A = np.zeros(problem.num_atoms, dtype=np.int64)
    for atom in order:
        fits = np.flatnonzero((free >= problem.memory_A[atom]) & np.isfinite(problem.seconds_AD[atom]))
        if not len(fits):
            return None
        if attempt % 3 == 0:       # the fullest that still has room; of those without a limit, the fastest
            at = np.lexsort((problem.seconds_AD[atom, fits], free[fits]))[0]
        elif attempt % 3 == 1:     # the emptiest
            at = free[fits].argmax()
        else:                      # the fastest
            at = problem.seconds_AD[atom, fits].argmin()
        device = int(fits[at])
        device_A[atom] = device
        free[device] -= problem.memory_A[atom]
    return device_A
