"""What every pass has in common: the facts it may use, and how it says what it found.

A pass is a frozen dataclass whose fields are its options. `run(gm, facts)` edits the graph in place and answers, for
each candidate, `Match` or `NoMatch(reason)`; the reasons are kept, so that `explain` can say why not. It reads no
environment and no globals: what it must know of the outside is in `CaptureFacts`.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import fx


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A candidate that the pass rewrote or annotated."""

    node: str           # the candidate's name before the pass
    detail: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class NoMatch:
    """A candidate that was left as it is."""

    node: str
    reason: str


Outcome = Match | NoMatch


@dataclass(frozen=True, slots=True, kw_only=True)
class CaptureFacts:
    """What held in the process when Dynamo captured the graph."""

    sdp_backends_limited: bool = False     # someone switched off a kernel of scaled_dot_product_attention
    forward_ad: bool = False               # forward-mode differentiation is going on


class Pass(Protocol):
    """Edits a graph in place; `graph.lint()` holds before and after."""

    @property
    def name(self) -> str: ...

    def run(self, gm: fx.GraphModule, facts: CaptureFacts) -> tuple[Outcome, ...]: ...
