"""min_latency: list scheduling that chooses devices (earliest finish time) and knows that links are busy.

Source: HEFT (Topcuoglu, Hariri, Wu, "Performance-effective and low-complexity task scheduling for heterogeneous
computing", 2002); differs in links that carry one transfer at a time, in memory limits, in atoms, whose first node
decides for all, and in weighing the way to the end from each device.
"""
from __future__ import annotations

import numpy as np

from genie_dynamo.passes.placement.problem import Floats, Ints
from genie_dynamo.passes.placement.timeline import Timeline


def earliest_finish(timeline: Timeline, transfer_weight: float, look_ahead: bool) -> Ints | None:
    """A device for each atom; None where memory leaves an atom no device.

    Args: transfer_weight: how much of a mean transfer counts in priorities.
          look_ahead: judge a device by its finish plus the best way to the end from there, not by its finish alone.
    """
    problem = timeline.problem
    order, ahead = _priorities(timeline, transfer_weight)
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
            score = end + (ahead[node][d] if look_ahead else 0.0)
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


def _priorities(timeline: Timeline, transfer_weight: float) -> tuple[list[int], list[list[float]]]:
    """Nodes by falling mean way to the end, and per node and device the least way to the end after it."""
    problem = timeline.problem
    seconds = problem.node_seconds_ND
    finite = np.isfinite(seconds)
    mean = (np.where(finite, seconds, 0.0).sum(axis=1) / finite.sum(axis=1)).tolist()
    if problem.num_devices > 1:
        apart = ~np.eye(problem.num_devices, dtype=bool)
        moved_T: Floats = (problem.fixed_s_T + problem.size_bytes_T * problem.s_per_byte_DD[apart].mean()
                           + problem.sized_T * problem.latency_DD[apart].mean())
    else:
        moved_T = np.zeros(problem.num_tensors)
    moved = np.zeros(len(mean))
    moved[problem.tensor_node_T] = moved_T
    transfers = (moved * transfer_weight).tolist()
    order = problem.graph.order
    rank, ahead = [0.0] * len(mean), [[0.0] * problem.num_devices for _ in mean]
    for node in reversed(order):
        rank[node] = mean[node] + max((rank[u] + transfers[node] for u in timeline.users[node]), default=0.0)
        for user in timeline.users[node]:
            stay = [a + s for a, s in zip(ahead[user], timeline.seconds[user], strict=True)]
            leave = min(stay) + moved[node]
            ahead[node] = [max(old, min(way, leave)) for old, way in zip(ahead[node], stay, strict=True)]
    position = {node: i for i, node in enumerate(order)}
    return sorted(order, key=lambda n: (-rank[n], position[n])), ahead
