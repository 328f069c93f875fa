"""max_throughput: the load of each device, and bounds below the largest load.

    load = compute + every tensor it sends, once (at the slowest of its receivers) + every tensor it receives, once

Source: Tarnawski et al., "Efficient Algorithms for Device Placement of DNN Graph Operators" (NeurIPS 2020), section
on throughput; there all transfers go through host memory, so that a tensor takes the same time to every receiver.
"""
from __future__ import annotations

import numpy as np

from genie_dynamo.passes.placement.problem import Floats, Ints, Problem

_BOUND_GAIN, _BOUND_PATIENCE = 1e-4, 40       # steps without such a gain end the search for weights
_BOUND_STEPS = 150
_BOUND_RATE = 0.08


def device_loads(problem: Problem, device_A: Ints) -> Floats:
    """Seconds of load per device; inf where a device cannot run what it was given."""
    num_devices = problem.num_devices
    atoms = np.arange(problem.num_atoms)
    loads = np.bincount(device_A, problem.seconds_AD[atoms, device_A], num_devices)
    src = device_A[problem.source_T[problem.pin_tensor_P]]
    dst = device_A[problem.pin_atom_P]
    away = src != dst
    received = np.unique(problem.pin_tensor_P[away] * num_devices + dst[away])
    tensor, dst = received // num_devices, received % num_devices
    src = device_A[problem.source_T[tensor]]
    times = problem.transfer_s(tensor, src, dst)
    loads += np.bincount(dst, times, num_devices) * problem.pays_D
    slowest = np.zeros(problem.num_tensors)
    np.maximum.at(slowest, tensor, times)
    loads += np.bincount(device_A[problem.source_T], slowest, num_devices) * problem.pays_D
    return np.asarray(loads)


def fits(problem: Problem, device_A: Ints) -> bool:
    """Whether every atom is on a device that runs it, and memory suffices."""
    runs = np.isfinite(problem.seconds_AD[np.arange(problem.num_atoms), device_A]).all()
    used = np.bincount(device_A, problem.memory_A, problem.num_devices)
    return bool(runs and (used <= problem.capacity_D).all())


def compute_bound(problem: Problem) -> float:
    """No placement's largest load, and no makespan, is below this.

    For weights y >= 0 that sum to 1, max load >= sum_d y_d load_d >= sum_a min_d y_d seconds[a, d]; good weights are
    found by multiplicative updates (weight goes to the devices that the minimum overloads).
    """
    if not problem.num_atoms:
        return 0.0
    seconds = problem.seconds_AD
    best = float(seconds.min(axis=1).max())
    weights = np.full(problem.num_devices, 1.0 / problem.num_devices)
    rows = np.arange(problem.num_atoms)
    finite = np.where(np.isfinite(seconds), seconds, 1e300)
    looked, mark = 0, best
    # Among devices that are all alike no weights are better than equal ones.
    for step in range(_BOUND_STEPS if len(problem.classes) > 1 else 1):
        priced = finite * weights
        chosen = priced.argmin(axis=1)
        best = max(best, float(priced[rows, chosen].sum()))
        if best > mark * (1 + _BOUND_GAIN):
            looked, mark = step, best
        elif step - looked > _BOUND_PATIENCE:
            break
        loads = np.bincount(chosen, finite[rows, chosen], problem.num_devices)
        # Identical devices share what any of them was given: argmin alone would give it all to the first.
        for alike in problem.classes:
            loads[list(alike)] = loads[list(alike)].mean()
        top = loads.max()
        if top <= 0:
            break
        weights = weights * np.exp(_BOUND_RATE / (1 + step / 30) * (loads / top - 1))
        weights /= weights.sum()
    return best * (1 - 1e-12)


def forced_together(problem: Problem, value: float) -> Ints:
    """Label of each atom, equal for atoms that are on one device in every placement with a load below `value`.

    Where at most one device is free of charge, cutting a tensor costs some device its transfer: one that takes longer
    than `value` is cut in no better placement.
    """
    parent = list(range(problem.num_atoms))

    def find(atom: int) -> int:
        while parent[atom] != atom:
            parent[atom] = parent[parent[atom]]
            atom = parent[atom]
        return atom

    if (~problem.pays_D).sum() <= 1:
        heavy = problem.least_transfer_s_T() > value
        for pin in np.flatnonzero(heavy[problem.pin_tensor_P]):
            a, b = find(int(problem.source_T[problem.pin_tensor_P[pin]])), find(int(problem.pin_atom_P[pin]))
            parent[max(a, b)] = min(a, b)
    labels: dict[int, int] = {}
    return np.array([labels.setdefault(find(a), len(labels)) for a in range(problem.num_atoms)], dtype=np.int64)
