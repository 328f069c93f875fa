"""What a placement says: which device runs which node, how good that is, and how good it could be at best."""
from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, get_args

from genie_dynamo.core.errors import PlacementError

Policy = Literal["min_latency", "max_throughput", "min_cost"]
POLICIES: tuple[str, ...] = get_args(Policy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """The output of `node` on its way from one device to another."""

    node: str
    src: str
    dst: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """A device for every node.

    device           node id -> device id
    objective_value  max_throughput: the largest load over devices, in seconds; min_latency: the makespan of `start_s`
                     and `transfers`, in seconds; min_cost: that makespan x the price of every device used, in currency
    lower_bound      no placement is below it; None where nothing is known
    method           how it was found, and what is proven
    seconds          wall time that it took
    loads_s          max_throughput: device id -> load
    start_s          min_latency, min_cost: node id -> start in the schedule of one call
    transfers        min_latency, min_cost: every transfer of that schedule
    makespan_s       min_latency, min_cost: the time of one call in that schedule
    """

    device: Mapping[str, str]
    policy: Policy
    objective_value: float
    lower_bound: float | None
    method: str
    seconds: float
    loads_s: Mapping[str, float] = field(default_factory=dict)
    start_s: Mapping[str, float] = field(default_factory=dict)
    transfers: tuple[Transfer, ...] = ()
    makespan_s: float | None = None

    @property
    def gap(self) -> float | None:
        """How far the value may be from the best one, as a share of the value; 0.0 means proven optimal."""
        if self.lower_bound is None:
            return None
        return 0.0 if self.objective_value <= 0 else max(0.0, 1 - self.lower_bound / self.objective_value)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Placement:
        """The placement behind `to_json`.

        Raises: PlacementError where fields are missing or unknown.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            data["transfers"] = tuple(Transfer(**t) for t in data["transfers"])
            return cls(**data)
        except (TypeError, KeyError, ValueError) as exc:
            raise PlacementError(f"not a placement: {exc}") from exc

    def __str__(self) -> str:
        bound = "" if self.lower_bound is None else f", at least {self.lower_bound:.6g}"
        lines = [f"{self.policy}: {self.objective_value:.6g}{bound} ({self.method}, {self.seconds:.3f} s)"]
        nodes: dict[str, int] = {}
        for device in self.device.values():
            nodes[device] = nodes.get(device, 0) + 1
        for device in sorted(nodes.keys() | self.loads_s.keys()):
            load = f"  load {self.loads_s[device]:.6g} s" if device in self.loads_s else ""
            lines.append(f"{device:>16} {nodes.get(device, 0):>7} nodes{load}")
        return "\n".join(lines)
