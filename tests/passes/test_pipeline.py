"""The runner of the pipeline: order, timing, reports, checks, dumps."""
from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from genie_dynamo.core.errors import PlanError
from genie_dynamo.passes.base import CaptureFacts, Match, NoMatch, Outcome
from genie_dynamo.passes.pipeline import PIPELINE, read_capture_facts, run_pipeline
from genie_dynamo.passes.portable_sdpa import PortableSdpa


@dataclass(frozen=True, slots=True, kw_only=True)
class Scripted:
    """A pass that does what a test says."""

    name: str
    action: Callable[[fx.GraphModule], tuple[Outcome, ...]]

    def run(self, gm: fx.GraphModule, facts: CaptureFacts) -> tuple[Outcome, ...]:
        return self.action(gm)


class Clock:
    """Each look at it takes a quarter of a second."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        self.now_s += 0.25
        return self.now_s


def graph() -> fx.GraphModule:
    traced = fx.symbolic_trace(lambda x, y: (x + y) * y)
    return fx.GraphModule(nn.Module(), traced.graph)


def double_the_sum(gm: fx.GraphModule) -> tuple[Outcome, ...]:
    (add,) = [node for node in gm.graph.nodes if node.target is operator.add]
    with gm.graph.inserting_after(add):
        double = gm.graph.call_function(operator.mul, (add, 2))
    add.replace_all_uses_with(double, delete_user_cb=lambda user: user is not double)
    gm.recompile()
    return (Match(node=add.name, detail="doubled"), NoMatch(node="mul", reason="it is not a sum"))


def unused(gm: fx.GraphModule) -> tuple[Outcome, ...]:
    return ()


def test_passes_run_in_order_and_are_reported() -> None:
    gm, order = graph(), []

    def note(name: str, action: Any) -> Scripted:
        return Scripted(name=name, action=lambda gm: (order.append(name), action(gm))[1])

    report = run_pipeline(gm, [1, 2], passes=[note("first", unused), note("second", double_the_sum)],
                          facts=CaptureFacts(), clock=Clock())
    assert order == ["first", "second"]
    assert [step.name for step in report.passes] == ["first", "second"]
    assert [step.seconds for step in report.passes] == [0.25, 0.25] and report.seconds == 0.5
    first, second = report.passes
    assert (first.nodes_before, first.nodes_after, second.nodes_before, second.nodes_after) == (5, 5, 5, 6)
    assert second.matches == (Match(node="add", detail="doubled"),)
    assert second.no_matches == (NoMatch(node="mul", reason="it is not a sum"),)
    assert gm(torch.tensor(3), torch.tensor(4)) == (3 + 4) * 2 * 4


def test_a_report_prints_a_table_with_the_reasons() -> None:
    report = run_pipeline(graph(), [1, 2], passes=[Scripted(name="doubling", action=double_the_sum)],
                          facts=CaptureFacts(), clock=Clock())
    head, row, reason = str(report).splitlines()
    assert head.split() == ["pass", "ms", "nodes", "matches", "left"]
    assert row.split() == ["doubling", "250.00", "5", "->", "6", "1", "1"]
    assert reason.strip() == "mul: it is not a sum"


def break_order(gm: fx.GraphModule) -> tuple[Outcome, ...]:
    *_, mul, output = gm.graph.nodes
    output.append(mul)      # a value after its use
    return ()


def drop_an_input(gm: fx.GraphModule) -> tuple[Outcome, ...]:
    x, y, *_ = gm.graph.nodes
    y.replace_all_uses_with(x)
    gm.graph.erase_node(y)
    return ()


def nest(action: Callable[[fx.GraphModule], Any]) -> Callable[[fx.GraphModule], tuple[Outcome, ...]]:
    def run(gm: fx.GraphModule) -> tuple[Outcome, ...]:
        gm.add_submodule("inner", graph())
        action(gm.inner)  # type: ignore[arg-type]
        return ()

    return run


@pytest.mark.parametrize(("action", "says"), [
    (break_order, "not well formed"), (nest(break_order), "not well formed"), (drop_an_input, "left 1 inputs"),
])
def test_a_pass_that_breaks_the_graph_is_named(action: Any, says: str) -> None:
    with pytest.raises(PlanError, match=f"pass culprit left.*{says.removeprefix('left ')}"):
        run_pipeline(graph(), [1, 2], passes=[Scripted(name="culprit", action=action)], facts=CaptureFacts())


def test_a_dump_shows_each_step(tmp_path: Path) -> None:
    folder = tmp_path / "dump"
    run_pipeline(graph(), [1, 2], passes=[Scripted(name="nothing", action=unused),
                                          Scripted(name="doubling", action=double_the_sum)],
                 facts=CaptureFacts(), dump_dir=folder)
    assert sorted(path.name for path in folder.iterdir()) == [
        "00_nothing.after.txt", "00_nothing.before.txt", "00_nothing.diff",
        "01_doubling.after.txt", "01_doubling.before.txt", "01_doubling.diff", "report.txt"]
    assert (folder / "00_nothing.diff").read_text().strip() == ""
    assert (folder / "00_nothing.after.txt").read_text() == (folder / "01_doubling.before.txt").read_text()
    added = [line for line in (folder / "01_doubling.diff").read_text().splitlines() if line.startswith("+ ")]
    assert any("mul" in line for line in added)
    assert "doubling" in (folder / "report.txt").read_text()


def test_the_pipeline_is_a_list_of_values() -> None:
    assert PIPELINE[0] == PortableSdpa()
    assert len({step.name for step in PIPELINE}) == len(PIPELINE)
    hash(PIPELINE)


def test_it_runs_over_a_graph_from_dynamo(fresh_dynamo: None) -> None:
    reports = []

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        reports.append(run_pipeline(gm, inputs))
        return gm.forward

    x = torch.randn(2, 4, 5, 8)
    compiled = torch.compile(lambda x: F.scaled_dot_product_attention(x, x, x), backend=backend)
    torch.testing.assert_close(compiled(x), F.scaled_dot_product_attention(x, x, x), rtol=0, atol=0)
    (report,) = reports
    assert [match.detail for match in report.passes[0].matches] == ["genie::sdpa"]
    assert report.passes[0].seconds > 0


def test_capture_facts_are_those_of_the_process() -> None:
    assert read_capture_facts() == CaptureFacts()
    with sdpa_kernel(SDPBackend.MATH):
        assert read_capture_facts() == CaptureFacts(sdp_backends_limited=True)
    with torch.autograd.forward_ad.dual_level():
        assert read_capture_facts() == CaptureFacts(forward_ad=True)
    assert read_capture_facts() == CaptureFacts()
