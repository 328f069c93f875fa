"""The inner loops of the searches, where somebody has faster ones than Python's.

Passes do not import the native extension: the face gives them its classes (`genie_dynamo.placing`), and without these
`MakespanSearch` and `LoadSearch` do the same, slower.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from genie_dynamo.passes.placement.problem import Floats, Ints, Problem


class MakespanKernel(Protocol):
    """One problem of min_latency, annealed as often as one likes."""

    def anneal(self, *, start_A: Ints, seed: int, tries: int, limit_s: float, cool_by_time: bool, hot: float,
               cold: float) -> tuple[Ints, Floats, float, int]:
        """The best placement met on the way from a start that obeys all limits, as the result does.

        Args:    tries: schedules at most.  limit_s: seconds at most, inf for none.  cool_by_time: cool down over the
                 limit, not over the tries.  hot, cold: worsening that is likely to be taken first and last, as a
                 share of the objective.
        Returns: device of each atom; priorities with which `Timeline.run` gives its schedule; its makespan; how many
                 were tried.
        """


class LoadKernel(Protocol):
    """One problem of max_throughput, annealed as often as one likes."""

    def anneal(self, *, start_A: Ints, seed: int, tries: int, limit_s: float, cool_by_time: bool, hot: float,
               cold: float) -> tuple[Ints, float, int]:
        """The same for loads: device of each atom, the largest load, how many placements were tried."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernels:
    """Makers of inner loops from a problem as arrays (below)."""

    makespan: Callable[[Mapping[str, Any]], MakespanKernel]
    loads: Callable[[Mapping[str, Any]], LoadKernel]


def makespan_arrays(problem: Problem) -> dict[str, Any]:
    """A problem of min_latency: by nodes. Every edge stands there once."""
    nodes = len(problem.graph.nodes)
    pairs = np.unique(np.array(problem.graph.pairs, dtype=np.int64).reshape(-1, 2), axis=0)
    moved = {name: np.zeros(nodes) for name in ("fixed_s", "size_bytes", "sized")}
    for name, per_tensor in (("fixed_s", problem.fixed_s_T), ("size_bytes", problem.size_bytes_T),
                             ("sized", problem.sized_T)):
        moved[name][problem.tensor_node_T] = per_tensor
    return {
        "order": np.array(problem.graph.order), "atom_of": problem.atom_of_N, "src": pairs[:, 0], "dst": pairs[:, 1],
        "seconds": problem.node_seconds_ND, "runs": np.isfinite(problem.seconds_AD), "memory_bytes": problem.memory_A,
        "capacity_bytes": problem.capacity_D, "s_per_byte": problem.s_per_byte_DD, "latency_s": problem.latency_DD,
        **moved}


def load_arrays(problem: Problem) -> dict[str, Any]:
    """A problem of max_throughput: by atoms and tensors."""
    return {
        "source": problem.source_T, "pin_tensor": problem.pin_tensor_P, "pin_atom": problem.pin_atom_P,
        "seconds": problem.seconds_AD, "memory_bytes": problem.memory_A, "capacity_bytes": problem.capacity_D,
        "pays": problem.pays_D, "fixed_s": problem.fixed_s_T, "size_bytes": problem.size_bytes_T,
        "sized": problem.sized_T, "s_per_byte": problem.s_per_byte_DD, "latency_s": problem.latency_DD}
