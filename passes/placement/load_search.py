"""max_throughput: simulated annealing over placements, with exact changes of loads per move.

A move takes an atom (or two that exchange places, or two that are connected) to another device. What it changes is
found from the tensors at the atom: a tensor's loads depend only on the device of its source and on the set of devices
that read it, kept as a bit mask with counts, and are remembered per (tensor, source, mask).
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

from genie_dynamo.passes.placement.loads import device_loads
from genie_dynamo.passes.placement.problem import Ints, Problem

_CHECK_EVERY = 32        # moves between looks at the clock
_HOTTEST, COOLING = 0.1, 0.005   # first temperature at most, as a share of the largest load; last over first
WIDE = 0.3               # first temperature of a search for another valley
_MOVES_OF_HEAT = 2.0     # first temperature in mean atoms: in a large graph one move changes little
_POWER = 16              # the smooth maximum is the norm of this order

Shares = tuple[tuple[int, float], ...]
OutOfTime = Callable[[], bool]


def first_heat(problem: Problem, device_A: Ints) -> float:
    """A few mean moves' worth of worsening, as a share of the largest load; 0 where nothing can be gained."""
    scale = float(device_loads(problem, device_A).max(initial=0.0))
    if scale <= 0 or problem.num_devices < 2:
        return 0.0
    mean = float(problem.seconds_AD.min(axis=1).mean())
    return min(_HOTTEST, _MOVES_OF_HEAT * mean / scale) or _HOTTEST


class LoadSearch:
    """A placement that is moved about. Needs a start that obeys all limits; never leaves them."""

    def __init__(self, problem: Problem, start_A: Ints, seed: int) -> None:
        self._problem = problem
        self._random = random.Random(seed)
        self._num_devices = problem.num_devices
        self._seconds: list[list[float]] = problem.seconds_AD.tolist()
        self._memory: list[float] = problem.memory_A.tolist()
        self._capacity: list[float] = problem.capacity_D.tolist()
        self._pays: list[bool] = problem.pays_D.tolist()
        self._transfer_s = problem.transfer_function()
        self._source: list[int] = problem.source_T.tolist()
        self._made: list[list[int]] = [[] for _ in range(problem.num_atoms)]
        self._read: list[list[int]] = [[] for _ in range(problem.num_atoms)]
        self._pins: list[list[int]] = [[s] for s in self._source]
        for tensor, atom in zip(problem.pin_tensor_P.tolist(), problem.pin_atom_P.tolist(), strict=True):
            self._read[atom].append(tensor)
            self._pins[tensor].append(atom)
        for tensor, atom in enumerate(self._source):
            self._made[atom].append(tensor)
        self._remembered: list[dict[int, Shares]] = [{} for _ in self._source]
        self.restart(start_A)

    def restart(self, device_A: Ints) -> None:
        """Go on from another placement."""
        self._device: list[int] = device_A.tolist()
        self._counts = [[0] * self._num_devices for _ in self._source]
        for tensor, pins in enumerate(self._pins):
            for atom in pins[1:]:
                self._counts[tensor][self._device[atom]] += 1
        self._mask = [sum(1 << d for d, n in enumerate(counts) if n) for counts in self._counts]
        self._used: list[float] = np.bincount(device_A, self._problem.memory_A, self._num_devices).tolist()
        self._members: list[list[int]] = [[] for _ in range(self._num_devices)]
        self._slot = [0] * len(self._device)
        for atom, device in enumerate(self._device):
            self._slot[atom] = len(self._members[device])
            self._members[device].append(atom)
        self._loads: list[float] = device_loads(self._problem, device_A).tolist()
        self.best_A, self.best_value = device_A.copy(), max(self._loads, default=0.0)

    def _shares(self, tensor: int, source: int, mask: int) -> Shares:
        """What a tensor adds to the loads of devices."""
        key = source + self._num_devices * mask
        known = self._remembered[tensor].get(key)
        if known is not None:
            return known
        times = {d: self._transfer_s(tensor, source, d) for d in range(self._num_devices)
                 if mask >> d & 1 and d != source}
        shares = [(d, seconds) for d, seconds in times.items() if self._pays[d]]
        if times and self._pays[source]:
            shares.append((source, max(times.values())))
        self._remembered[tensor][key] = result = tuple(shares)
        return result

    def _change(self, atom: int, dst: int) -> list[float]:
        """Loads after the atom has moved to dst."""
        src = self._device[atom]
        loads = self._loads.copy()
        loads[src] -= self._seconds[atom][src]
        loads[dst] += self._seconds[atom][dst]
        for tensor in self._made[atom]:
            mask = self._mask[tensor]
            for d, share in self._shares(tensor, src, mask):
                loads[d] -= share
            for d, share in self._shares(tensor, dst, mask):
                loads[d] += share
        for tensor in self._read[atom]:
            before = self._mask[tensor]
            after = before | 1 << dst
            if self._counts[tensor][src] == 1:
                after ^= 1 << src
            if after != before:
                source = self._device[self._source[tensor]]
                for d, share in self._shares(tensor, source, before):
                    loads[d] -= share
                for d, share in self._shares(tensor, source, after):
                    loads[d] += share
        return loads

    def _move(self, atom: int, dst: int, loads: list[float]) -> None:
        src = self._device[atom]
        for tensor in self._read[atom]:
            counts = self._counts[tensor]
            counts[src] -= 1
            counts[dst] += 1
            self._mask[tensor] = (self._mask[tensor] if counts[src] else self._mask[tensor] ^ 1 << src) | 1 << dst
        self._device[atom] = dst
        self._used[src] -= self._memory[atom]
        self._used[dst] += self._memory[atom]
        last = self._members[src].pop()
        if last != atom:
            self._members[src][self._slot[atom]] = last
            self._slot[last] = self._slot[atom]
        self._slot[atom] = len(self._members[dst])
        self._members[dst].append(atom)
        self._loads = loads

    def _allowed(self, atom: int, dst: int, freed: float = 0.0) -> bool:
        return (math.isfinite(self._seconds[atom][dst])
                and self._used[dst] - freed + self._memory[atom] <= self._capacity[dst])

    def _propose(self) -> list[tuple[int, int]]:
        """One or two (atom, device) moves that belong together; empty where the draw makes no sense."""
        pick, loads = self._random.random, self._loads
        busiest = max(range(self._num_devices), key=loads.__getitem__)
        src = busiest if pick() < 0.6 else int(pick() * self._num_devices)
        if not self._members[src]:
            return []
        atom = self._members[src][int(pick() * len(self._members[src]))]
        around = self._read[atom] + self._made[atom]
        friend = atom
        if around and pick() < 0.7:
            pins = self._pins[around[int(pick() * len(around))]]
            friend = pins[int(pick() * len(pins))]
        dst = self._device[friend] if self._device[friend] != src else int(pick() * self._num_devices)
        if dst == src:
            return []
        draw = pick()
        if draw < 0.25 and self._members[dst]:
            return [(atom, dst), (self._members[dst][int(pick() * len(self._members[dst]))], src)]
        if draw < 0.45 and friend != atom and self._device[friend] == src:
            return [(atom, dst), (friend, dst)]
        return [(atom, dst)]

    def anneal(self, moves: int, out_of_time: OutOfTime, fraction_left: Callable[[], float] | None = None,
               hot: float = _HOTTEST) -> bool:
        """Cool down over a number of proposals, or over the time left where `fraction_left` is given.

        Args:    hot: worsening that is likely to be taken at first, as a share of the largest load.

        Returns: whether the best placement has got better. Nothing is raised when time is up.
        """
        scale = max(self._loads, default=0.0)
        if scale <= 0 or self._num_devices < 2:
            return False
        entered = self.best_value
        energy = self._energy(self._loads, scale)
        heat = hot
        for step in range(moves):
            if step % _CHECK_EVERY == 0:
                if out_of_time():
                    break
                left = 1 - step / moves if fraction_left is None else fraction_left()
                heat = hot * COOLING ** (1 - left)
            energy = self._step(energy, scale, heat)
        # Sums of many changes drift: what is reported is counted anew.
        self.best_value = float(device_loads(self._problem, self.best_A).max())
        return self.best_value < entered

    def _energy(self, loads: list[float], scale: float) -> float:
        return math.pow(sum([math.pow(load / scale, _POWER) for load in loads]), 1 / _POWER)

    def _step(self, energy: float, scale: float, heat: float) -> float:
        proposal = self._propose()
        if not proposal:
            return energy
        before = self._loads
        (atom, dst), src = proposal[0], self._device[proposal[0][0]]
        partner = proposal[1] if len(proposal) == 2 else None
        freed = self._memory[partner[0]] if partner and partner[1] == src else 0.0
        if not self._allowed(atom, dst, freed):
            return energy
        loads = self._change(atom, dst)
        if partner:
            self._move(atom, dst, loads)
            if not self._allowed(*partner):
                self._move(atom, src, before)
                return energy
            loads = self._change(*partner)
        found = self._energy(loads, scale)
        if found > energy and self._random.random() >= math.exp((energy - found) / heat):
            if partner:
                self._move(atom, src, before)
            return energy
        self._move(*(partner or (atom, dst)), loads)
        if max(loads) < self.best_value * (1 - 1e-12):
            self.best_value = max(loads)
            self.best_A = np.array(self._device, dtype=np.int64)
        return found
