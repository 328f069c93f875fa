"""min_latency: annealing over placements, each judged by its whole schedule.

Half of the moves take a node of the critical way (its start plus its way to the end is the makespan) and put its atom
where a neighbour in the graph is; the others are drawn at large.
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable

import numpy as np

from genie_dynamo.passes.placement.problem import Ints
from genie_dynamo.passes.placement.timeline import Schedule, Timeline

HOT, COLD = 0.06, 0.0005
_REORDER = 0.1            # share of steps that change an order and no device


class MakespanSearch:
    """Needs a start that obeys all limits; never leaves them."""

    def __init__(self, timeline: Timeline, start_A: Ints, seed: int) -> None:
        problem = timeline.problem
        self._timeline, self._random = timeline, random.Random(seed)
        self._seconds = problem.seconds_AD.tolist()
        self._memory: list[float] = problem.memory_A.tolist()
        self._capacity: list[float] = problem.capacity_D.tolist()
        self._used: list[float] = np.bincount(start_A, problem.memory_A, problem.num_devices).tolist()
        self._nodes: list[list[int]] = [[] for _ in range(problem.num_atoms)]
        for node, atom in enumerate(timeline.atom_of):
            self._nodes[atom].append(node)
        self._device: list[int] = start_A.tolist()
        self._device_N = timeline.devices_of_nodes(start_A)
        self._bias = [0.0] * len(self._device_N)     # what is added to the priorities of nodes
        self._now = self._schedule()
        self._critical = self._find_critical(self._now)
        self.best_A, self.best = start_A.copy(), self._now

    def anneal(self, tries: int, out_of_time: Callable[[], bool],
               fraction_left: Callable[[], float] | None = None, hot: float = HOT) -> None:
        """Cool down over a number of schedules, or over the time left.

        Args: hot: worsening that is likely to be taken at first, as a share of the makespan.
        """
        scale = self._now.makespan_s
        if scale <= 0 or self._timeline.problem.num_devices < 2:
            return
        for step in range(tries):
            if out_of_time():
                return
            left = 1 - step / tries if fraction_left is None else fraction_left()
            self._step(scale * COLD * (hot / COLD) ** max(0.0, left))

    def _schedule(self) -> Schedule:
        ranks = self._timeline.ranks(self._device_N)
        return self._timeline.run(self._device_N, [r + b for r, b in zip(ranks, self._bias, strict=True)])

    def _step(self, heat: float) -> None:
        if self._random.random() < _REORDER:
            self._reorder(heat)
            return
        moves = self._propose()
        if not moves:
            return
        undo = [(atom, self._device[atom]) for atom, _ in moves]
        self._apply(moves)
        if any(self._used[d] > self._capacity[d] for _, d in moves):
            self._apply(undo)
            return
        if not self._accept(self._schedule(), heat):
            self._apply(undo)

    def _reorder(self, heat: float) -> None:
        """Let one node go earlier or later than its way to the end says."""
        node = int(self._random.random() * len(self._bias))
        before = self._bias[node]
        self._bias[node] = 0.0 if before else self._now.makespan_s * self._random.uniform(-0.5, 0.5)
        if not self._accept(self._schedule(), heat):
            self._bias[node] = before

    def _accept(self, schedule: Schedule, heat: float) -> bool:
        worse = schedule.makespan_s - self._now.makespan_s
        if worse > 0 and self._random.random() >= math.exp(-worse / heat):
            return False
        self._now = schedule
        self._critical = self._find_critical(schedule)
        if schedule.makespan_s < self.best.makespan_s:
            self.best, self.best_A = schedule, np.array(self._device, dtype=np.int64)
        return True

    def _apply(self, moves: list[tuple[int, int]]) -> None:
        for atom, device in moves:
            self._used[self._device[atom]] -= self._memory[atom]
            self._used[device] += self._memory[atom]
            self._device[atom] = device
            for node in self._nodes[atom]:
                self._device_N[node] = device

    def _find_critical(self, schedule: Schedule) -> list[int]:
        rank = self._timeline.ranks(self._device_N)
        least = schedule.makespan_s * (1 - 1e-9)
        found = [n for n, start in enumerate(schedule.start_N) if start + rank[n] >= least]
        return found or list(range(len(rank)))

    def _propose(self) -> list[tuple[int, int]]:
        pick, timeline = self._random.random, self._timeline
        among = self._critical if pick() < 0.5 else range(len(self._device_N))
        node = among[int(pick() * len(among))]
        around = timeline.makers[node] + timeline.users[node]
        friend = around[int(pick() * len(around))] if around else node
        src, dst = self._device_N[node], self._device_N[friend]
        if dst == src or pick() < 0.3:
            dst = int(pick() * timeline.problem.num_devices)
        atoms = [timeline.atom_of[node]]
        if dst == src:
            return []
        if self._device_N[friend] == src and pick() < 0.4:
            atoms = list(dict.fromkeys([*atoms, timeline.atom_of[friend]]))
            atoms += self._run_of(friend, src) if pick() < 0.5 else []
            atoms = list(dict.fromkeys(atoms))
        moves = [(atom, dst) for atom in atoms]
        if pick() < 0.15:
            other = timeline.atom_of[int(pick() * len(self._device_N))]
            if self._device[other] == dst and other not in atoms:
                moves.append((other, src))
        return moves if all(math.isfinite(self._seconds[a][d]) for a, d in moves) else []

    def _run_of(self, node: int, device: int) -> list[int]:
        """Atoms of a chain of users that starts at a node, as far as it stays on the device."""
        atoms = []
        for _ in range(1 + int(self._random.random() * 8)):
            following = [u for u in self._timeline.users[node] if self._device_N[u] == device]
            if not following:
                break
            node = following[int(self._random.random() * len(following))]
            atoms.append(self._timeline.atom_of[node])
        return atoms
