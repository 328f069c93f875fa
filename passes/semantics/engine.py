"""Run patterns over a graph and settle who gets which node.

Each pattern is asked at each node whose op is one of its anchors. Matches are ranked by confidence, then priority; a
match whose core is taken by a better one is a conflict and is dropped with that reason. When all cores are settled,
the other nodes that matches ask for go to the best that asks.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Pattern, ordered
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

SLOW_BASE_S = 0.25
SLOW_PER_NODE_S = 1e-4

Clock = Callable[[], float]
Disable = Callable[[Pattern, str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """An accepted match with the nodes it got."""

    pattern: Pattern
    match: Match
    nodes: tuple[ViewNode, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """Why an anchor is not a region, for `explain` and for authors of patterns."""

    pattern: str
    node: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineReport:
    """What the patterns found, and did not."""

    found: tuple[Found, ...]
    refusals: tuple[Refusal, ...]
    disabled: tuple[str, ...]                     # in words, for warnings
    seconds: tuple[tuple[str, float], ...]        # CPU time by pattern


def run_patterns(view: GraphView, patterns: Sequence[Pattern], *, disable: Disable,
                 clock: Clock = time.thread_time) -> EngineReport:
    """Ask every pattern at its anchors.

    Args:  disable: told of a pattern that raised or took longer than SLOW_BASE_S + SLOW_PER_NODE_S per node of the
           graph. `clock` measures CPU time, so that a busy machine makes nobody slow.
    """
    limit_s = SLOW_BASE_S + SLOW_PER_NODE_S * len(view.nodes)
    candidates: list[tuple[Pattern, Match]] = []
    refusals: list[Refusal] = []
    disabled: list[str] = []
    seconds = []
    for pattern in patterns:
        matches, refused, reason, took_s = _ask(view, pattern, clock, limit_s)
        if took_s > limit_s:
            # A collection of garbage may have fallen into it: slow is who is slow twice.
            matches, refused, reason, took_s = _ask(view, pattern, clock, limit_s)
        seconds.append((pattern.name, took_s))
        refusals += refused
        if reason:
            disabled.append(f"pattern {pattern.name} {pattern.version} is disabled: {reason}")
            disable(pattern, reason)
        else:
            candidates += ((pattern, match) for match in matches)
    found, conflicts = _settle(candidates)
    return EngineReport(found=found, refusals=(*refusals, *conflicts), disabled=tuple(disabled),
                        seconds=tuple(seconds))


def _ask(view: GraphView, pattern: Pattern, clock: Clock,
         limit_s: float) -> tuple[list[Match], list[Refusal], str, float]:
    """(matches, refusals, why to disable it, seconds). A pattern that fails contributes nothing."""
    matches: list[Match] = []
    refusals: list[Refusal] = []
    started_s = clock()
    for anchor in pattern.anchors:
        for node in view.by_op.get(anchor, ()):
            try:
                answer = pattern.matcher(view, node)
                if not isinstance(answer, Match | NoMatch):
                    raise TypeError(f"answered {answer!r:.80}, expected Match or NoMatch")
                if isinstance(answer, Match) and answer.kind not in pattern.kinds:
                    raise ValueError(f"matched a {answer.kind!r}, declared {pattern.kinds}")
            except Exception as exc:          # a plugin's bug must not take the compile down
                return [], refusals, f"at {node.name}: {type(exc).__name__}: {exc}", clock() - started_s
            if isinstance(answer, Match):
                matches.append(answer)
            else:
                refusals.append(Refusal(pattern=pattern.name, node=node.name, reason=answer.reason))
            took_s = clock() - started_s
            if took_s > limit_s:
                reason = f"took {took_s:.2f} s of CPU for {len(view.nodes)} nodes, the limit is {limit_s:.2f} s"
                return [], refusals, reason, took_s
    return matches, refusals, "", clock() - started_s


def _settle(candidates: list[tuple[Pattern, Match]]) -> tuple[tuple[Found, ...], list[Refusal]]:
    ranked = sorted(candidates, key=lambda c: (-c[1].confidence, -c[0].priority, c[1].core[0].index))
    owner: dict[ViewNode, int] = {}
    accepted: list[tuple[Pattern, Match]] = []
    conflicts = []
    for pattern, match in ranked:
        rival = next((owner[node] for node in match.core if node in owner), None)
        if rival is not None:
            winner = accepted[rival]
            conflicts.append(Refusal(
                pattern=pattern.name, node=match.core[0].name,
                reason=f"{winner[0].name} has these nodes with confidence {winner[1].confidence:.2f}, priority "
                       f"{winner[0].priority}, against {match.confidence:.2f}, {pattern.priority}"))
            continue
        owner.update(dict.fromkeys(match.core, len(accepted)))
        accepted.append((pattern, match))
    for number, (_, match) in enumerate(accepted):
        for node in match.nodes:
            owner.setdefault(node, number)
    members: list[list[ViewNode]] = [[] for _ in accepted]
    for node, number in owner.items():
        if node.kind == "call":
            members[number].append(node)
    found = (Found(pattern=pattern, match=match, nodes=ordered(nodes))
             for (pattern, match), nodes in zip(accepted, members, strict=True) if nodes)
    return tuple(sorted(found, key=lambda f: f.nodes[0].index)), conflicts
