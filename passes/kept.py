"""What a backward reads on another worker than that which made it, and what is done about it (crossing.py decides)."""
from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

from torch import fx

How = Literal["kept", "moved", "again"]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Crossing:
    """One value that the backward reads on another worker than that which made it.

    move_s    of sending it there, 0 where the forward has done so anyway
    again_s   of computing it there with all that this needs and that is not there anyway; None where it must not be
    """

    name: str
    worker: int
    how: How
    size_bytes: int
    move_s: float
    again_s: float | None


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Crossings:
    """What is done about all of them, as the backward graph that goes by it.

    backward  the graph in place of the other; after its own inputs it takes the copies, in order
    assign    node of it -> worker, copies included
    copies    how many outputs the forward has more than the graph that it replaces
    """

    backward: fx.GraphModule
    assign: Mapping[str, int]
    copies: int
    decisions: tuple[Crossing, ...]
