"""min_latency: one call on a clock. When each node runs and each tensor moves, given the devices of nodes.

A device runs one node at a time. A link is an ordered pair of devices and carries one transfer at a time; transfers
overlap compute and transfers of other links. A tensor goes once to each device that reads it. A free device takes the
ready node, a free link the waiting tensor, of highest priority: by default what has the longest way to the end.
"""
from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genie_dynamo.passes.placement.problem import Floats, Ints, Problem


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """`transfers`: (node whose output moves, from device, to device, start, end)."""

    start_N: list[float]
    transfers: list[tuple[int, int, int, float, float]]
    makespan_s: float


class Timeline:
    """A problem's nodes and edges as lists, for schedules of many placements."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        size = len(problem.graph.nodes)
        self.users: list[list[int]] = [[] for _ in range(size)]
        self.makers: list[list[int]] = [[] for _ in range(size)]
        for src, dst in dict.fromkeys(problem.graph.pairs):
            self.users[src].append(dst)
            self.makers[dst].append(src)
        self.seconds: list[list[float]] = problem.node_seconds_ND.tolist()
        self.atom_of: list[int] = problem.atom_of_N.tolist()
        self._tensor: dict[int, int] = {node: t for t, node in enumerate(problem.tensor_node_T.tolist())}
        self._seconds_of = problem.transfer_function()

    def transfer_s(self, node: int, src: int, dst: int) -> float:
        """Seconds to move a node's output; 0 within a device."""
        return 0.0 if src == dst else self._seconds_of(self._tensor[node], src, dst)

    def parts_what_is_one(self, device_N: Sequence[int]) -> bool:
        """Whether a value would have to move that only nodes of its own atom read: such values have no transfer."""
        return any(device_N[node] != device_N[user] for node, users in enumerate(self.users)
                   if node not in self._tensor for user in users)

    def ranks(self, device_N: Sequence[int]) -> list[float]:
        """Seconds from the start of each node to the end of the call, if nothing waited for a device or link."""
        rank = [0.0] * len(device_N)
        for node in reversed(self.problem.graph.order):
            here, longest = device_N[node], 0.0
            for user in self.users[node]:
                there = device_N[user]
                way = rank[user] if there == here else rank[user] + self.transfer_s(node, here, there)
                if way > longest:
                    longest = way
            rank[node] = longest + self.seconds[node][here]
        return rank

    def run(self, device_N: Sequence[int], priority: Sequence[float] | None = None) -> Schedule:
        """The schedule of a placement."""
        return _Run(self, device_N, self.ranks(device_N) if priority is None else priority).schedule()

    def replay(self, device_N: Sequence[int], ran: Sequence[tuple[float, float]],
               sent: Mapping[tuple[int, int], tuple[float, float]]) -> Schedule:
        """The schedule in which devices and links do things in the order of times given, each as early as can be.

        Args: ran: (start, end) of each node, in any unit.  sent: (node, to device) -> (start, end) of a transfer;
              one that is not there is sent when it is needed.
        """
        position = {node: i for i, node in enumerate(self.problem.graph.order)}
        # What takes no time comes before what starts with it: it may be its input, or have had the device before.
        tasks = [(*times, position[node], -1, node) for node, times in enumerate(ran)]
        tasks += [(*times, position[node], to, node) for (node, to), times in sent.items()]
        return _Replay(self, device_N).schedule(sorted(tasks))

    def devices_of_nodes(self, device_A: Ints) -> list[int]:
        devices: list[int] = device_A[self.problem.atom_of_N].tolist()
        return devices


class _Run:
    """One pass through events: (time, kind, ...) with kinds node done, link free."""

    def __init__(self, timeline: Timeline, device_N: Sequence[int], priority: Sequence[float]) -> None:
        self._of, self._device, self._priority = timeline, device_N, priority
        self._missing = [len(m) for m in timeline.makers]
        self._ready: list[list[tuple[float, float, int]]] = [[] for _ in timeline.problem.devices]
        self._busy = [False] * timeline.problem.num_devices
        self._waiting: dict[tuple[int, int], list[tuple[float, int, float, list[int]]]] = {}
        self._sending: set[tuple[int, int]] = set()
        self._events: list[tuple[float, int, int, tuple[int, int] | None, list[int]]] = []
        self._start = [0.0] * len(device_N)
        self._transfers: list[tuple[int, int, int, float, float]] = []
        self._end = 0.0

    def schedule(self) -> Schedule:
        for node, missing in enumerate(self._missing):
            if not missing:
                self._queue(node)
        self._begin(0.0, set(range(len(self._ready))))
        while self._events:
            # All that ends at one time is taken in before anything begins, so that priority decides and not order.
            now = self._events[0][0]
            touched: set[int] = set()
            links: set[tuple[int, int]] = set()
            while self._events and self._events[0][0] == now:
                _, _, node, link, arrived = heapq.heappop(self._events)
                if link is None:
                    self._finish(now, node, touched, links)
                else:
                    self._sending.discard(link)
                    links.add(link)
                    self._deliver(arrived, touched)
            for link in sorted(links):
                self._send(now, link)
            self._begin(now, touched)
        return Schedule(start_N=self._start, transfers=self._transfers, makespan_s=self._end)

    def _queue(self, node: int) -> None:
        # Of equal priority, the shorter one: what follows it can start elsewhere.
        device = self._device[node]
        heapq.heappush(self._ready[device], (-self._priority[node], self._of.seconds[node][device], node))

    def _begin(self, now: float, devices: set[int]) -> None:
        for device in sorted(devices):
            ready = self._ready[device]
            if ready and not self._busy[device]:
                node = heapq.heappop(ready)[-1]
                self._busy[device] = True
                self._start[node] = now
                end = now + self._of.seconds[node][device]
                self._end = max(self._end, end)
                heapq.heappush(self._events, (end, node, node, None, []))

    def _finish(self, now: float, node: int, touched: set[int], links: set[tuple[int, int]]) -> None:
        here = self._device[node]
        self._busy[here] = False
        touched.add(here)
        away: dict[int, list[int]] = {}
        for user in self._of.users[node]:
            away.setdefault(self._device[user], []).append(user)
        self._deliver(away.pop(here, []), touched)
        for there, users in away.items():
            seconds = self._of.transfer_s(node, here, there)
            if seconds <= 0:
                self._transfers.append((node, here, there, now, now))
                self._deliver(users, touched)
                continue
            priority = -max(self._priority[user] for user in users)
            heapq.heappush(self._waiting.setdefault((here, there), []), (priority, node, seconds, users))
            links.add((here, there))

    def _deliver(self, users: list[int], touched: set[int]) -> None:
        for user in users:
            self._missing[user] -= 1
            if not self._missing[user]:
                self._queue(user)
                touched.add(self._device[user])

    def _send(self, now: float, link: tuple[int, int]) -> None:
        waiting = self._waiting.get(link)
        if waiting and link not in self._sending:
            _, node, seconds, users = heapq.heappop(waiting)
            self._sending.add(link)
            self._transfers.append((node, *link, now, now + seconds))
            heapq.heappush(self._events, (now + seconds, node, node, link, users))


class _Replay:
    """Nodes and transfers one by one in a given sequence."""

    def __init__(self, timeline: Timeline, device_N: Sequence[int]) -> None:
        self._of, self._device = timeline, device_N
        self._start, self._end = [0.0] * len(device_N), [0.0] * len(device_N)
        self._idle_at = [0.0] * timeline.problem.num_devices
        self._link_free: dict[tuple[int, int], float] = {}
        self._arrived: dict[tuple[int, int], float] = {}
        self._transfers: list[tuple[int, int, int, float, float]] = []

    def schedule(self, tasks: list[tuple[float, float, int, int, int]]) -> Schedule:
        for _, _, _, to, node in tasks:
            if to >= 0:
                self._send(node, to)
                continue
            here = self._device[node]
            ready = self._idle_at[here]
            for maker in self._of.makers[node]:
                if self._device[maker] != here:
                    self._send(maker, here)
                ready = max(ready, self._end[maker] if self._device[maker] == here else self._arrived[maker, here])
            self._start[node] = ready
            self._end[node] = self._idle_at[here] = ready + self._of.seconds[node][here]
        return Schedule(start_N=self._start, transfers=self._transfers, makespan_s=max(self._end, default=0.0))

    def _send(self, node: int, to: int) -> None:
        if (node, to) in self._arrived:
            return
        src = self._device[node]
        seconds, begin = self._of.transfer_s(node, src, to), self._end[node]
        if seconds > 0:       # what takes no time needs no turn on the link
            begin = max(begin, self._link_free.get((src, to), 0.0))
            self._link_free[src, to] = begin + seconds
        self._arrived[node, to] = begin + seconds
        self._transfers.append((node, src, to, begin, begin + seconds))


def serial_schedule(problem: Problem, device: int) -> Schedule:
    """All nodes one after the other on one device."""
    order = np.array(problem.graph.order, dtype=np.int64)
    ends = np.cumsum(problem.node_seconds_ND[order, device])
    start: Floats = np.zeros(len(order))
    start[order] = np.concatenate(([0.0], ends[:-1]))[:len(order)]
    return Schedule(start_N=start.tolist(), transfers=[], makespan_s=float(ends[-1]) if len(ends) else 0.0)


def critical_path_s(problem: Problem) -> float:
    """No makespan is below this: the longest way with every node on its fastest device and free transfers."""
    fastest = problem.node_seconds_ND.min(axis=1).tolist()
    users: list[list[int]] = [[] for _ in fastest]
    for src, dst in problem.graph.pairs:
        users[src].append(dst)
    rank = [0.0] * len(fastest)
    for node in reversed(problem.graph.order):
        rank[node] = fastest[node] + max((rank[user] for user in users[node]), default=0.0)
    return max(rank, default=0.0) * (1 - 1e-12)
