"""Whole models: totals against torch's counter. `python -m bench costs` does it for every architecture."""
from __future__ import annotations

import pytest
import torch

from genie_dynamo.passes.costs import analyze_costs, bind_symbols
from tests.captured import capture
from tests.models.architectures import build, loss_of
from tests.passes.costs.tracing import counted_flops

pytestmark = pytest.mark.heavy


@pytest.mark.parametrize("name", ["t5", "mobilenet_v2"])
def test_forward_flops(name: str) -> None:
    model, inputs = build(name)
    with torch.no_grad():
        graphs = capture(lambda: model(**inputs))
    for graph in graphs:
        costs = analyze_costs(graph.gm)
        assert not costs.without_formula
        totals = costs.totals(bind_symbols(graph.gm, graph.inputs))
        assert totals.matrix_flops == counted_flops(graph.expected) > 0


def test_training_flops() -> None:
    model, inputs = build("t5", training=True)
    for graph in capture(lambda: loss_of(model(**inputs)), fullgraph=False):
        totals = analyze_costs(graph.gm).totals(bind_symbols(graph.gm, graph.inputs))
        assert totals.matrix_flops == counted_flops(graph.expected) > 0
