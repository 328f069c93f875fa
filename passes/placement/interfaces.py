"""What a user may replace: where costs come from, and how placements are found."""
from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.placement import Placement, Policy

Method = Literal["auto", "heuristic", "exact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds a search: wall time (None: a fixed, short amount of work), and min_cost's longest makespan."""

    time_limit_s: float | None = None
    latency_bound_s: float | None = None
    method: Method = "auto"
    seed: int = 0


class CostModel(ABC):
    """Says what a graph's nodes cost on each kind of device."""

    @abstractmethod
    def cost_graph(self, graph: Any, devices: Sequence[Device]) -> CostGraph:
        """The cost graph of `graph` (an fx.GraphModule, or whatever this model takes) with seconds for the devices."""


class PlacementStrategy(ABC):
    """Finds placements."""

    @abstractmethod
    def place(self, cost_graph: CostGraph, devices: Sequence[Device], policy: Policy, limits: Limits) -> Placement:
        """A placement that obeys memory, support, colocation and limits.

        Raises: PlacementError where there is none.
        """
