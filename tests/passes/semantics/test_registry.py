"""A plugin's life: registered, asked, failing, slow, loaded anew, in conflict with others."""
from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from genie_dynamo import testing
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.passes.semantics import registry as module
from genie_dynamo.passes.semantics.annotate import Annotator
from genie_dynamo.passes.semantics.engine import run_patterns
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Pattern
from genie_dynamo.passes.semantics.registry import REGISTRY, Registry, register_pattern
from genie_dynamo.passes.semantics.view import GraphView, ViewNode


def small_view() -> GraphView:
    """y = sigmoid(x) * x"""
    facts: dict[str, Any] = {"shape": (2, 3), "hint": (2, 3), "dtype": "float32"}
    x = ViewNode(index=0, name="x", kind="input", op="input", target="", **facts)
    gate = ViewNode(index=1, name="gate", kind="call", op="sigmoid", target="sigmoid", args=(x,), **facts)
    out = ViewNode(index=2, name="out", kind="call", op="mul", target="mul", args=(gate, x), **facts)
    return GraphView([x, gate, out])


def swish(view: GraphView, node: ViewNode) -> Match | NoMatch:
    scaled = next((u for u in node.users if u.op == "mul" and node.inputs[0] in u.inputs), None)
    if scaled is None:
        return NoMatch("the sigmoid does not scale its own input")
    return Match(kind="swish", core=(node, scaled), confidence=0.9, reason="x * sigmoid(x)")


def raises(view: GraphView, node: ViewNode) -> Match | NoMatch:
    raise KeyError(node.name)


def pattern(matcher: Any = swish, **fields: Any) -> Pattern:
    return Pattern(**{"name": "swish", "matcher": matcher, "anchors": ("sigmoid",), "kinds": ("swish",), **fields})


@pytest.fixture
def registry() -> Registry:
    return Registry(lambda: (), group="genie_no_such_group")


@pytest.fixture
def global_registry() -> Iterator[Registry]:
    yield REGISTRY
    for status in REGISTRY.statuses():
        if status.pattern.origin == "registered":
            REGISTRY.unregister(status.pattern.name)


def kinds(registry: Registry, view: GraphView | None = None, **options: Any) -> list[str]:
    report = run_patterns(view or small_view(), registry.enabled(), disable=registry.disable, **options)
    return [found.match.kind for found in report.found]


def test_registered_and_taken_out(registry: Registry) -> None:
    registry.register(pattern())
    assert kinds(registry) == ["swish"]
    registry.unregister("swish")
    assert kinds(registry) == []
    with pytest.raises(ConfigError, match="no pattern 'swish'"):
        registry.unregister("swish")


def test_a_name_and_version_that_another_pattern_has_is_refused(registry: Registry) -> None:
    first = registry.register(pattern())
    assert registry.register(pattern()) == first, "the same one again is no other"

    def other(view: GraphView, node: ViewNode) -> Match | NoMatch:
        return NoMatch("never")

    with pytest.raises(ConfigError, match=r"another pattern 'swish', version 1, .* \(registered\).*replace"):
        registry.register(pattern(other))
    assert kinds(registry) == ["swish"], "the first one stays"
    registry.register(pattern(other), replace=True)
    assert kinds(registry) == []
    registry.register(pattern(version="2"))
    assert kinds(registry) == ["swish"]


def test_a_built_in_pattern_is_not_replaced_unawares() -> None:
    registry = Registry(lambda: (pattern(),), group="genie_no_such_group")
    with pytest.raises(ConfigError, match="built-in"):
        registry.register(pattern(raises))


def test_one_that_raises_is_disabled_and_said_once(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    registry.register(pattern(raises))
    with caplog.at_level(logging.WARNING):
        report = run_patterns(small_view(), registry.enabled(), disable=registry.disable)
        assert kinds(registry) == []
    assert report.disabled == ("pattern swish 1 is disabled: at gate: KeyError: 'gate'",)
    assert [s.disabled for s in registry.statuses()] == ["at gate: KeyError: 'gate'"]
    assert len([r for r in caplog.records if "is disabled" in r.message]) == 1


def test_one_that_is_slow_is_disabled(registry: Registry) -> None:
    ticks = iter(range(100))
    registry.register(pattern())
    assert kinds(registry, clock=lambda: float(next(ticks))) == []
    assert "took 1.00 s of CPU for 3 nodes, the limit is 0.25 s" in registry.statuses()[0].disabled


def test_one_that_was_slow_once_is_asked_again(registry: Registry) -> None:
    """A pause of the process (garbage collection) must not cost a pattern its place."""
    ticks = iter([0.0, 9.0, 9.0, 9.1, 9.1])
    registry.register(pattern())
    assert kinds(registry, clock=lambda: next(ticks)) == ["swish"]
    assert registry.statuses()[0].disabled == ""


def test_every_later_graph_says_what_is_disabled(registry: Registry) -> None:
    registry.register(pattern(raises))
    for _ in range(2):
        graph, _ = Annotator(registry=registry).annotate_view(small_view())
        assert graph.warnings[0] == "pattern swish 1 is disabled: at gate: KeyError: 'gate'"


def test_a_new_version_runs_again(registry: Registry) -> None:
    registry.register(pattern(raises))
    assert kinds(registry) == []
    registry.register(pattern(version="2"))
    assert kinds(registry) == ["swish"]


def test_wrong_answers_disable(registry: Registry) -> None:
    registry.register(pattern(lambda view, node: True))
    assert kinds(registry) == []
    assert "expected Match or NoMatch" in registry.statuses()[0].disabled
    registry.register(pattern(kinds=("other",)))
    assert kinds(registry) == []
    assert "declared ('other',)" in registry.statuses()[0].disabled


@pytest.mark.parametrize(("first", "second", "winner"), [
    ((0.9, 0), (0.8, 99), "first"), ((0.9, 0), (0.9, 5), "second"), ((0.5, 7), (0.9, 1), "second")])
def test_conflicts_go_by_confidence_then_priority(
        registry: Registry, first: tuple[float, int], second: tuple[float, int], winner: str) -> None:
    for name, (confidence, priority) in (("first", first), ("second", second)):
        def matcher(view: GraphView, node: ViewNode, confidence: float = confidence, name: str = name) -> Match:
            return Match(kind=name, core=(node,), confidence=confidence, reason="mine")

        registry.register(pattern(matcher, name=name, kinds=(name,), priority=priority))
    report = run_patterns(small_view(), registry.enabled(), disable=registry.disable)
    assert [found.match.kind for found in report.found] == [winner]
    assert [(r.pattern, r.node) for r in report.refusals] == [("second" if winner == "first" else "first", "gate")]
    assert f"{winner} has these nodes" in report.refusals[0].reason


@dataclass
class Entry:
    """What importlib.metadata gives."""

    name: str
    found: Any

    dist = None

    def load(self) -> Any:
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


def test_entry_points_are_found_reloaded_and_may_be_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [Entry("good", lambda: [pattern(name="plugin")]), Entry("bad", ImportError("no module x")),
               Entry("odd", lambda: ["text"])]
    monkeypatch.setattr(module.metadata, "entry_points", lambda group: entries)
    registry = Registry(lambda: ())
    assert [p.name for p in registry.enabled()] == ["plugin"]
    assert registry.enabled()[0].origin == "entry point"
    assert set(registry.broken_entry_points()) == {"bad", "odd"}
    assert registry.broken_entry_points()["bad"] == "ImportError: no module x"
    registry.register(pattern(name="kept"))
    entries[:] = [Entry("good", pattern(name="renewed"))]
    registry.reload()
    assert {p.name for p in registry.enabled()} == {"kept", "renewed"}


def test_the_decorator_and_its_errors(global_registry: Registry) -> None:
    decorated = register_pattern(name="swish", anchors=("sigmoid",), kinds=("swish",), annotations={"by": "us"})(swish)
    assert decorated is swish
    found = next(p for p in global_registry.enabled() if p.name == "swish")
    assert (found.priority, dict(found.annotations)) == (50, {"by": "us"})
    with pytest.raises(ConfigError, match="a decorator is called"):
        register_pattern(swish)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="needs a name, anchors and kinds"):
        register_pattern(name="nothing")(swish)
    with pytest.raises(ConfigError, match=r"anchors is a tuple of names, got 'sigmoid'; write anchors=\('sigmoid',\)"):
        register_pattern(name="text", anchors="sigmoid", kinds=("swish",))(swish)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="kinds is a tuple of names, got 'swish'"):
        pattern(kinds="swish")
    with pytest.raises(ConfigError, match="expected 0 < c <= 1"):
        Match(kind="x", core=small_view().nodes, confidence=1.5, reason="")


def test_a_plugin_reaches_analyze(global_registry: Registry) -> None:
    import genie_dynamo as genie

    register_pattern(name="swish", anchors=("sigmoid",), kinds=("swish",), annotations={"by": "us"})(swish)
    graph = genie.analyze(lambda x: torch.sigmoid(x) * x, torch.ones(3))
    assert [(r.kind, r.annotations) for r in graph.regions] == [("swish", (("by", "us"),))]


def test_check_pattern() -> None:
    x = torch.randn(2, 3)
    good = [(lambda x: x * torch.sigmoid(x), (x,)), (lambda x: torch.sigmoid(x) * x, (x,))]
    near = [(lambda x: torch.sigmoid(x) * 2.0, (x,)), (lambda x: torch.tanh(x), (x,))]
    check = testing.check_pattern(pattern(), matches=good, rejects=near)
    assert len(check.rows) == 16          # four calls, as Dynamo gives them, without names, after AOT, as recorded
    assert "the sigmoid does not scale its own input" in str(check)
    with pytest.raises(AssertionError, match="expected a match, got none: the sigmoid does not scale"):
        testing.check_pattern(pattern(), matches=near[:1])
    with pytest.raises(AssertionError, match="expected none, matched"):
        testing.check_pattern(pattern(), rejects=good)
    with pytest.raises(AssertionError, match="KeyError"):
        testing.check_pattern(pattern(raises), matches=good)
