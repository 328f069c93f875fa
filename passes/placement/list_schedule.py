"""min_latency: list scheduling that chooses devices (earliest finish time) and knows that links are busy.

Source: HEFT (Topcuoglu, Hariri, Wu, "Performance-effective and low-complexity task scheduling for heterogeneous
computing", 2002); differs in links that carry one transfer at a time, in memory limits, in atoms, whose first node
decides for all, and in weighing the way to the end from each device.
"""
from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from genie_dynamo.passes.placement.problem import Floats, Ints
from genie_dynamo.passes.placement.timeline import Timeline


def earliest_finish(timeline: Timeline, transfer_weight: float, ahead: Sequence[Sequence[float]] | None) -> Ints | None:
    """A device for each atom; None where memory leaves an atom no device.

    Args: transfer_weight: how much of a mean transfer counts in priorities.
          ahead: of `ways_to_end`, to judge a device by its finish plus the best way to the end from there; None: by
          its finish alone.
    """
    problem = timeline.problem
    order = _by_mean_way(timeline, transfer_weight)
    num_devices = problem.num_devices
    device_of: list[int] = [-1] * problem.num_atoms
    free = problem.capacity_D.tolist()
    memory = problem.memory_A.tolist()
    runs = np.isfinite(problem.seconds_AD).tolist()
    idle_at = [0.0] * num_devices
    link_free: dict[tuple[int, int], float] = {}
    arrived: list[dict[int, float]] = [{} for _ in order]      # of each node's output: device -> when
    for node in order:
        atom = timeline.atom_of[node]
        fixed = device_of[atom]
        best, best_score, best_end = -1, np.inf, 0.0
        for d in range(num_devices) if fixed < 0 else (fixed,):
            if fixed < 0 and (not runs[atom][d] or memory[atom] > free[d]):
                continue
            ready = idle_at[d]
            for maker in timeline.makers[node]:
                at = arrived[maker].get(d)
                if at is None:
                    src = device_of[timeline.atom_of[maker]]
                    at = max(arrived[maker][src], link_free.get((src, d), 0.0)) + timeline.transfer_s(maker, src, d)
                if at > ready:
                    ready = at
            end = ready + timeline.seconds[node][d]
            score = end if ahead is None else end + ahead[node][d]
            if score < best_score:
                best, best_score, best_end = d, score, end
        if best < 0:
            return None
        for maker in timeline.makers[node]:
            if best not in arrived[maker]:
                src = device_of[timeline.atom_of[maker]]
                begin = max(arrived[maker][src], link_free.get((src, best), 0.0))
                arrived[maker][best] = link_free[src, best] = begin + timeline.transfer_s(maker, src, best)
        if fixed < 0:
            device_of[atom] = best
            free[best] -= memory[atom]
        idle_at[best] = arrived[node][best] = best_end
    return np.array(device_of, dtype=np.int64)


def ways_to_end(timeline: Timeline) -> list[list[float]]:
    """Per node and device the least way to the end after it, a mean transfer for each change of device."""
    moved = _mean_transfers(timeline)
    ahead = [[0.0] * timeline.problem.num_devices for _ in moved]
    for node in reversed(timeline.problem.graph.order):
        for user in timeline.users[node]:
            stay = [a + s for a, s in zip(ahead[user], timeline.seconds[user], strict=True)]
            leave = min(stay) + moved[node]
            ahead[node] = [max(old, min(way, leave)) for old, way in zip(ahead[node], stay, strict=True)]
    return ahead


def _by_mean_way(timeline: Timeline, transfer_weight: float) -> list[int]:
    """Nodes by falling mean way to the end."""
    seconds = timeline.problem.node_seconds_ND
    finite = np.isfinite(seconds)
    mean = (np.where(finite, seconds, 0.0).sum(axis=1) / finite.sum(axis=1)).tolist()
    moved = _mean_transfers(timeline)
    order = timeline.problem.graph.order
    rank = [0.0] * len(mean)
    for node in reversed(order):
        rank[node] = mean[node] + max((rank[u] + moved[node] * transfer_weight for u in timeline.users[node]),
                                      default=0.0)
    position = {node: i for i, node in enumerate(order)}
    return sorted(order, key=lambda n: (-rank[n], position[n]))


def _mean_transfers(timeline: Timeline) -> list[float]:
    """Seconds of sending each node's output, in the mean over pairs of devices."""
    problem = timeline.problem
    moved: Floats = np.zeros(len(problem.graph.nodes))
    if problem.num_devices > 1:
        apart = ~np.eye(problem.num_devices, dtype=bool)
        moved[problem.tensor_node_T] = (
            problem.fixed_s_T + problem.size_bytes_T * problem.s_per_byte_DD[apart].mean()
            + problem.sized_T * problem.latency_DD[apart].mean())
    found: list[float] = moved.tolist()
    return found
