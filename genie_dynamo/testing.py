"""For authors of plugins: try a pattern on graphs it should and should not match.

    check_pattern(SWISH, matches=[(lambda x: x * x.sigmoid(), (x,))], rejects=[(lambda x: x.sigmoid(), (x,))])
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from functorch.compile import default_partition
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch.fx.experimental.proxy_tensor import make_fx

from genie_dynamo.passes.semantics.engine import EngineReport, run_patterns
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Pattern
from genie_dynamo.passes.semantics.reading import read_graph
from genie_dynamo.passes.semantics.view import GraphView

Call = tuple[Callable[..., Any], Sequence[Any]]

__all__ = ["Match", "NoMatch", "Pattern", "PatternCheck", "check_pattern"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PatternCheck:
    """What a pattern answered, call by call and capture by capture."""

    rows: tuple[tuple[str, str, bool, str], ...]     # (call, capture, matched, reasons)
    slowest_s: float                                 # CPU time of the slowest graph

    def __str__(self) -> str:
        return "\n".join(f"{call:<24}{capture:<10}{'match' if matched else 'no match':<10}{why}"
                         for call, capture, matched, why in self.rows)


def check_pattern(pattern: Pattern, *, matches: Iterable[Call] = (), rejects: Iterable[Call] = ()) -> PatternCheck:
    """Run a pattern on each call as Dynamo gives it, with module paths and without, after AOTAutograd, and as the ops
    that eager executes.

    Raises: AssertionError where a call of `matches` has no match in one of the captures, one of `rejects` has one, a
            refusal gives no reason, or the pattern raises or is slow.
    """
    rows = []
    slowest_s = 0.0
    calls = [(call, True) for call in matches] + [(call, False) for call in rejects]
    for number, ((function, arguments), expected) in enumerate(calls):
        name = f"{getattr(function, '__name__', type(function).__name__)}#{number}"
        for capture, view in _views(function, arguments):
            report = run_patterns(view, (pattern,), disable=lambda p, why: None)
            rows.append(_row(name, capture, report, expected))
            slowest_s = max(slowest_s, report.seconds[0][1])
    return PatternCheck(rows=tuple(rows), slowest_s=slowest_s)


def _row(name: str, capture: str, report: EngineReport, expected: bool) -> tuple[str, str, bool, str]:
    reasons = "; ".join(r.reason for r in report.refusals) or "no anchor in the graph"
    where = f"{name} ({capture})"
    if report.disabled:
        raise AssertionError(f"{where}: {report.disabled[0]}")
    if any(not r.reason for r in report.refusals):
        raise AssertionError(f"{where}: NoMatch without a reason")
    if expected and not report.found:
        raise AssertionError(f"{where}: expected a match, got none: {reasons}")
    if not expected and report.found:
        raise AssertionError(f"{where}: expected none, matched {report.found[0].match.reason!r}")
    return name, capture, bool(report.found), report.found[0].match.reason if report.found else reasons


def _views(function: Callable[..., Any], arguments: Sequence[Any]) -> list[tuple[str, GraphView]]:
    found: list[tuple[str, GraphView]] = []

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        found.append(("dynamo", read_graph(gm)))
        found.append(("stripped", read_graph(gm, names=False)))

        def keep(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
            found.append(("aot", read_graph(graph)))
            return graph.forward

        return aot_autograd(
            fw_compiler=keep, bw_compiler=keep, inference_compiler=keep, partition_fn=default_partition,
            keep_inference_input_mutations=True)(gm, inputs)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(function, backend=backend, fullgraph=True, dynamic=False)(*arguments)
    torch._dynamo.reset()
    with torch.no_grad():
        found.append(("recorded", read_graph(make_fx(function)(*arguments))))
    return found
