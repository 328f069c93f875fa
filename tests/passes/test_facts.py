"""What Dynamo and AOTAutograd know when a graph is compiled is read as it is, and recorded with the plan."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.core.plan import GuardFacts
from genie_dynamo.passes.facts import GraphFacts, read_facts, read_guards
from genie_dynamo.passes.planning import plan_graph

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Recorder:
    """A backend that runs graphs here and keeps the facts of each."""

    def __init__(self) -> None:
        self.guards: list[GuardFacts] = []
        self.facts: list[GraphFacts] = []
        self.planned: list[GuardFacts] = []

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        self.guards.append(read_guards(gm))
        return aot_autograd(fw_compiler=self._as("forward"), bw_compiler=self._as("backward"),
                            inference_compiler=self._as("inference"), keep_inference_input_mutations=True)(gm, inputs)

    def _as(self, kind: str) -> Callable[..., Any]:
        def compiler(gm: fx.GraphModule, _: Any) -> Any:
            self.facts.append(read_facts(gm, kind))
            self.planned.append(plan_graph(gm, self.facts[-1], self.guards[-1]).guards)
            return make_boxed_func(gm.forward)

        return compiler


def test_guards_sources_ranges_and_the_guard_expression() -> None:
    def f(x: torch.Tensor, scale: float) -> torch.Tensor:
        torch._check(x.shape[0] <= 50)
        return x * scale if x.shape[0] > 3 else x

    recorder = Recorder()
    x = torch.randn(7, 4)
    torch._dynamo.mark_dynamic(x, 0)
    torch.compile(f, backend=recorder)(x, 2.5)
    (guards,) = recorder.guards
    kinds = {(source, kind) for source, kind, _ in guards.guards}
    assert ("L['x']", "TENSOR_MATCH") in kinds
    assert any(source == "L['scale']" for source, _ in kinds)
    (symbol, source, bounds), = (row for row in guards.ranges if "L['x'].size()[0]" in row[1])
    assert bounds == "[4, 50]", "the branch that was taken, and what was checked, bound the size"
    assert symbol in str(guards) and source in str(guards)
    assert recorder.planned == [guards]


def test_the_guard_expression_relates_sizes() -> None:
    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + 1 if x.shape[0] > 2 * y.shape[0] else x

    recorder = Recorder()
    torch.compile(f, backend=recorder, dynamic=True)(torch.randn(9), torch.randn(3))
    assert "2*" in recorder.guards[0].expression and ">" in recorder.guards[0].expression


def test_parameters_buffers_and_what_is_saved() -> None:
    net = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))
    recorder = Recorder()
    torch.compile(net, backend=recorder)(torch.randn(5, 4)).sum().backward()
    forward, backward = recorder.facts
    assert (forward.kind, backward.kind) == ("forward", "backward")
    assert len(forward.static_inputs) == len(list(net.parameters())) + len(list(net.buffers()))
    assert len(forward.bumped) == 3 and forward.bumped <= set(forward.static_inputs), "BatchNorm's three buffers"
    assert backward.static_inputs == () and backward.bumped == frozenset()


def test_inference_saves_nothing() -> None:
    recorder = Recorder()
    with torch.no_grad():
        torch.compile(lambda x: (x + 1, x * 2), backend=recorder)(torch.randn(3))
    (facts,) = recorder.facts
    assert facts == GraphFacts(kind="inference", static_inputs=(), bumped=frozenset(), num_outputs=2)


def test_outside_a_compilation_nothing_is_known() -> None:
    graph = fx.Graph()
    graph.output((graph.placeholder("x"),))
    gm = fx.GraphModule({}, graph)
    assert read_guards(gm) == GuardFacts()
    assert read_facts(gm, "inference").num_outputs == 1
