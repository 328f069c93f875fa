"""Cut a sequence of atoms into one interval per device so that the largest load is least: dynamic programming.

The load of all intervals comes from prefix sums. A tensor loads an interval [i, j) that holds some but not all of its
pins; "some" is a sum over the pin that comes first in the interval, so that every pin is a rectangle of (i, j).

    best[used devices, j] = min over i, kind of device of max(best[used - kind, i], load_kind[i, j])
"""
from __future__ import annotations

import itertools
import math

import numpy as np

from genie_dynamo.passes.placement.problem import Floats, Ints, Problem

_MAX_STATES = 96
_MAX_CELLS = 1_000_000      # (i, j) that are looked at over all sets of used devices; fewer blocks where these are many


def cut_sequence(problem: Problem, order_A: Ints, blocks: int) -> Ints | None:
    """Device of each atom; None where no such cut obeys the limits.

    Args: order_A: atoms in sequence.  blocks: at most this many pieces of about equal weight, which stay whole.
    """
    groups = _groups(problem)
    steps = sum(math.prod(len(g) + (g is not last) for g in groups) for last in groups)
    block_A, num_blocks = _blocks(problem, order_A, min(blocks, math.isqrt(_MAX_CELLS // steps)))
    load = [_interval_loads(problem, block_A, num_blocks, group[0]) for group in groups]
    start = tuple(0 for _ in groups)
    best = {start: np.where(np.arange(num_blocks + 1) == 0, 0.0, np.inf)}
    came: dict[tuple[int, ...], tuple[Ints, Ints]] = {}
    for used in itertools.product(*(range(len(g) + 1) for g in groups)):
        if used == start:
            continue
        value = np.full(num_blocks + 1, np.inf)
        origin, kind_of = np.zeros(num_blocks + 1, dtype=np.int64), np.full(num_blocks + 1, -1)
        for kind in (k for k, count in enumerate(used) if count):
            before = best[_less(used, kind)]
            candidates = np.maximum(before[:, None], load[kind])
            i = candidates.argmin(axis=0)
            here = candidates[i, np.arange(num_blocks + 1)]
            better = here < value
            value[better], origin[better], kind_of[better] = here[better], i[better], kind
        best[used], came[used] = value, (origin, kind_of)
    return _trace(groups, came, best, block_A, num_blocks)


def _less(used: tuple[int, ...], kind: int) -> tuple[int, ...]:
    return tuple(n - (k == kind) for k, n in enumerate(used))


def _groups(problem: Problem) -> tuple[tuple[int, ...], ...]:
    """Devices that are alike, in classes; with very many kinds, the devices one by one in a fixed set."""
    states = 1
    groups: list[tuple[int, ...]] = []
    for alike in sorted(problem.classes, key=lambda c: (-len(c), c)):
        # The states grow with the product of class sizes: a class is shortened rather than dropped.
        room = max(1, _MAX_STATES // states - 1)
        groups.append(alike[:room])
        states *= len(groups[-1]) + 1
        if states * 2 > _MAX_STATES:
            break
    return tuple(groups)


def _blocks(problem: Problem, order_A: Ints, blocks: int) -> tuple[Ints, int]:
    """Block of each atom; blocks follow the order and have about the same compute and number of atoms."""
    block_A = np.empty(problem.num_atoms, dtype=np.int64)
    if problem.num_atoms <= blocks:
        block_A[order_A] = np.arange(problem.num_atoms)
        return block_A, problem.num_atoms
    weight = problem.seconds_AD.min(axis=1)[order_A]
    total = weight.sum()
    share: Floats = np.full(len(order_A), 1.0 / problem.num_atoms)
    if total > 0:
        share += weight / total
    number = np.minimum((np.cumsum(share) - share / 2) / share.sum() * blocks, blocks - 1).astype(np.int64)
    _, dense = np.unique(number, return_inverse=True)
    block_A[order_A] = dense
    return block_A, int(dense.max()) + 1


def _interval_loads(problem: Problem, block_A: Ints, num_blocks: int, device: int) -> Floats:
    """load[i, j] of blocks i..j-1 on a device; inf for what it cannot run or hold, and for j < i."""
    size = num_blocks + 1
    seconds = problem.seconds_AD[:, device]
    finite = np.isfinite(seconds)
    prefix = _prefix(block_A, np.where(finite, seconds, 0.0), size)
    load: Floats = prefix[None, :] - prefix[:, None]
    if problem.pays_D[device]:
        load += _interval_transfers(problem, block_A, num_blocks, device)
    memory = _prefix(block_A, problem.memory_A, size)
    barred = _prefix(block_A, (~finite).astype(np.float64), size)
    capacity = problem.capacity_D[device]
    bad = np.tri(size, k=-1, dtype=bool) | (barred[None, :] > barred[:, None])
    bad |= memory[None, :] - memory[:, None] > capacity
    load[bad] = np.inf
    return load


def _prefix(block_A: Ints, weight_A: Floats, size: int) -> Floats:
    return np.concatenate(([0.0], np.cumsum(np.bincount(block_A, weight_A, size - 1))))


def _interval_transfers(problem: Problem, block_A: Ints, num_blocks: int, device: int) -> Floats:
    """Seconds of transfers of every interval, each tensor at its mean time to and from the device."""
    size = num_blocks + 1
    others = np.arange(problem.num_devices) != device
    pace = problem.s_per_byte_DD[device, others].mean() if others.any() else 0.0
    latency = problem.latency_DD[device, others].mean() if others.any() else 0.0
    time_T = problem.fixed_s_T + problem.size_bytes_T * pace + problem.sized_T * latency
    tensor = np.concatenate([np.arange(problem.num_tensors), problem.pin_tensor_P])
    place = np.concatenate([block_A[problem.source_T], block_A[problem.pin_atom_P]])
    keys = np.unique(tensor * size + place)
    tensor, place = keys // size, keys % size
    first = np.concatenate(([True], tensor[1:] != tensor[:-1]))[:len(tensor)]
    last = np.concatenate((tensor[1:] != tensor[:-1], [True]))[-len(tensor):] if len(tensor) else first
    before = np.where(first, -1, np.concatenate(([0], place[:-1]))[:len(place)])
    steps = np.zeros(size * size)
    # The pin is the first of its tensor in [i, j): before < i <= place < j.
    steps += np.bincount((before + 1) * size + place + 1, time_T[tensor], size * size)
    steps -= np.bincount((place + 1) * size + place + 1, time_T[tensor], size * size)
    # All pins are in [i, j): i <= first, last < j; then nothing moves.
    opens, closes = place[first], place[last]
    steps -= np.bincount(closes + 1, time_T, size * size)
    steps += np.bincount((opens + 1) * size + closes + 1, time_T, size * size)
    return np.asarray(steps.reshape(size, size).cumsum(axis=0).cumsum(axis=1))


def _trace(groups: tuple[tuple[int, ...], ...], came: dict[tuple[int, ...], tuple[Ints, Ints]],
           best: dict[tuple[int, ...], Floats], block_A: Ints, num_blocks: int) -> Ints | None:
    used = min(best, key=lambda u: float(best[u][num_blocks]))
    if not np.isfinite(best[used][num_blocks]):
        return None
    device_of_block = np.zeros(num_blocks, dtype=np.int64)
    j = num_blocks
    while j > 0:
        origin, kind_of = came[used]
        i, kind = int(origin[j]), int(kind_of[j])
        device_of_block[i:j] = groups[kind][used[kind] - 1]
        used, j = _less(used, kind), i
    return device_of_block[block_A]
