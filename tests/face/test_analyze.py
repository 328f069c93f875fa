"""genie.analyze from outside."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from tests.models import architectures, handwritten


def test_a_model() -> None:
    model, inputs = architectures.build("gpt2")
    with torch.no_grad():
        graph = genie.analyze(model, **inputs)
    assert (graph.workload, graph.phase, graph.modalities) == ("llm", "prefill", ("text",))
    assert len(graph.of_kind("attention")) == 2
    assert graph.guards.guards
    assert "attention.0" in str(graph)
    assert genie.SemanticGraph.from_json(graph.to_json()) == graph


def test_nothing_runs_and_nothing_changes() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.calls = nn.BatchNorm1d(3), 0

        def forward(self, x: torch.Tensor, seen: list[torch.Tensor]) -> torch.Tensor:
            self.calls += 1
            seen.append(x)
            x.add_(1)
            return self.norm(x)  # type: ignore[no-any-return]

    model, x, seen = Counting().train(), torch.zeros(4, 3), []
    graph = genie.analyze(model, x, seen)
    assert [r.kind for r in graph.regions] == ["norm"]
    assert (model.calls, seen, x.sum().item()) == (0, [], 0.0)
    assert model.norm.num_batches_tracked == 0


def test_a_function_and_a_compiled_module() -> None:
    assert genie.analyze(lambda x: torch.softmax(x, -1), torch.ones(3)).workload == "unknown"
    model, inputs = handwritten.build("dlrm")
    assert genie.analyze(torch.compile(model, backend="eager"), **inputs).workload == "recsys"


def test_what_cannot_be_one_graph_is_refused_with_the_reason() -> None:
    def branches(x: torch.Tensor) -> torch.Tensor:
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(genie.UnsupportedGraphError, match="branches cannot be captured as one graph"):
        genie.analyze(branches, torch.ones(3))


def test_the_users_own_error_is_theirs() -> None:
    def wrong(x: torch.Tensor) -> Any:
        return x @ torch.ones(5, 5)

    with pytest.raises(Exception, match=r"(?i)mat|size|shape"):
        genie.analyze(wrong, torch.ones(3, 3))


def test_a_call_without_tensors_says_so() -> None:
    graph = genie.analyze(lambda: 3)
    assert graph.warnings == ("the call computes nothing on tensors",)


def test_regions_have_the_costs_of_their_aten_ops() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.GELU(), torch.nn.Linear(64, 16)).eval()
    for rows in (4, 8):                          # the second time their number is a symbol
        graph = genie.analyze(model, torch.randn(rows, 16))
        counted = [region for region in graph.regions if region.flops is not None]
        products = 2 * 2 * rows * 16 * 64
        assert counted and products <= sum(region.flops or 0.0 for region in counted) <= 1.5 * products
        assert sum(region.bytes_moved or 0.0 for region in counted) >= 4 * 2 * 16 * 64
