"""What a pattern is: a name, the ops it looks from, and a matcher that answers `Match | NoMatch(reason)`.

    @genie.register_pattern(name="swish", anchors=("sigmoid",), kinds=("swish",), priority=5)
    def swish(view, node):
        if not any(user.op == "mul" and node.inputs[0] in user.inputs for user in node.users):
            return NoMatch("the sigmoid does not scale its own input")
        return Match(kind="swish", core=(node,), confidence=0.9, reason="x * sigmoid(x)")

A matcher is called once for each node whose op is one of its anchors, and searches near it: what it does per anchor
must be bounded, so that all patterns together stay linear in the graph.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.view import GraphView, ViewNode


@dataclass(frozen=True, slots=True, kw_only=True)
class Match:
    """A region that a pattern found.

    Fields:  core: nodes that make it what it is. Two matches that share one conflict, and the more confident wins,
             then the one of higher priority.  nodes: what else belongs to it where nobody has a better claim.
             confidence: in (0, 1].  annotations: facts beside the kind, such as {"variant": "cross"}.
    """

    kind: str
    core: tuple[ViewNode, ...]
    confidence: float
    reason: str
    nodes: tuple[ViewNode, ...] = ()
    annotations: Mapping[str, Scalar] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.core:
            raise ConfigError(f"a match of {self.kind} without core nodes: name at least the anchor")
        if not 0.0 < self.confidence <= 1.0:
            raise ConfigError(f"a match of {self.kind} with confidence {self.confidence}; expected 0 < c <= 1")


@dataclass(frozen=True, slots=True)
class NoMatch:
    """Why a candidate is not what the pattern looks for."""

    reason: str


Outcome = Match | NoMatch
Matcher = Callable[[GraphView, ViewNode], Outcome]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pattern:
    """A matcher with its name and rank.

    Fields:  version: of the pattern; a reload with another one enables it again.  priority: decides between equally
             confident matches; built-in patterns have 0 to 50.  anchors: canonical ops (ops.py) to start from.
             kinds: of the regions it makes.  annotations: given to each of its regions.
    """

    name: str
    matcher: Matcher
    anchors: tuple[str, ...]
    kinds: tuple[str, ...]
    version: str = "1"
    priority: int = 0
    annotations: Mapping[str, Scalar] = field(default_factory=dict)
    origin: str = "registered"     # "built-in", "registered", or the entry point's distribution

    def __post_init__(self) -> None:
        for field_name in ("anchors", "kinds"):
            names = getattr(self, field_name)
            if isinstance(names, str) or not all(isinstance(name, str) for name in names):
                raise ConfigError(f"pattern {self.name!r}: {field_name} is a tuple of names, got {names!r:.80}"
                                  + (f"; write {field_name}=({names!r},)" if isinstance(names, str) else ""))
            object.__setattr__(self, field_name, tuple(names))
        if not self.name or not self.anchors or not self.kinds:
            raise ConfigError(f"pattern {self.name!r} needs a name, anchors and kinds; got anchors={self.anchors}, "
                              f"kinds={self.kinds}")
        if not callable(self.matcher):
            raise ConfigError(f"pattern {self.name!r}: the matcher {self.matcher!r:.80} cannot be called")


def ordered(nodes: Iterable[ViewNode]) -> tuple[ViewNode, ...]:
    """Each node once, in topological order."""
    return tuple(sorted(set(nodes), key=lambda node: node.index))
