"""`microbatches` over two real workers: what the whole batch gives, one message per worker, no detour by the client."""
from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from genie_dynamo import backend, by_size, parts, placed, sessions, worker_facts
from genie_dynamo.core.errors import ConfigError, UnsupportedGraphError
from tests.face.test_placed import known
from tests.models import architectures
from tests.models.staged import Decoder, convolutions


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    monkeypatch.setattr(worker_facts, "facts_of", known)
    monkeypatch.setattr(parts, "_said", set())
    monkeypatch.setattr(placed, "TIME_LIMIT_S", None)      # a fixed amount of search: plans do not depend on the load
    genie.init(workers=2, num_threads=1, strict=True)
    yield
    genie.shutdown()
    sessions._config = None


def calls() -> dict[str, int]:
    return {name: row["calls"] for name, row in genie.get_stats()["workers"].items()}


@pytest.mark.parametrize("model, x", [
    (Decoder(), torch.arange(16 * 64).view(16, 64) % 97), (convolutions(), torch.randn(16, 3, 64, 64))],
    ids=["decoder", "vision"])
def test_a_batch_goes_through_two_workers_in_parts(model: nn.Module, x: torch.Tensor) -> None:
    compiled = torch.compile(model.eval(), backend="genie", options={"microbatches": 4})
    with torch.no_grad():
        expected = model(x)
        compiled(x)
        genie.reset_stats()
        for _ in range(2):
            torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
    assert calls() == {"w0": 2, "w1": 2}, "one message for each worker and call"
    moved = genie.get_stats()["by_reason"]
    # An input that has not changed may stay where it is.
    assert moved["inputs"]["sent"] <= 2 * x.nbytes and moved["outputs"]["received"] == 2 * expected.nbytes
    assert moved["state"]["received"] == 0 and moved["weights"]["sent"] == 0


def test_parts_may_take_different_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[placed.PlacedGraph] = []
    monkeypatch.setattr(backend, "observers", [seen.append])
    model = nn.Sequential(*[layer for _ in range(3) for layer in (
        nn.Conv2d(32, 32, 3, padding=1), nn.ReLU())]).eval().requires_grad_(False)
    x = torch.randn(16, 32, 32, 32)
    compiled = torch.compile(model, backend="genie", options={"microbatches": 4, "policy": "max_throughput"})
    for _ in range(3):
        torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    (found,) = [graph.found for graph in seen if graph.found is not None]
    assert found.placement is not None and "by another cut" in found.placement.method
    with torch.no_grad():
        model[2].weight.mul_(2.0)           # of the layer that lies on both workers
    torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    genie.reset_stats()
    compiled(x)
    assert genie.get_stats()["by_reason"]["weights"]["sent"] == 0


def test_training_in_parts_gives_the_gradients_of_the_whole_batch() -> None:
    torch.manual_seed(0)
    model = Decoder()
    reference = copy.deepcopy(model)
    ids = torch.arange(16 * 64).view(16, 64) % 97
    compiled = torch.compile(model, backend="genie", options={"microbatches": 4})
    for run in (compiled, reference):
        for _ in range(2):
            nn.functional.cross_entropy(run(ids).flatten(0, 1), ids.flatten()).backward()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
    assert calls() == {"w0": 4, "w1": 4}, "forward and backward, twice"


def test_a_step_with_its_backward_in_one_graph_runs_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[placed.PlacedGraph] = []
    monkeypatch.setattr(backend, "observers", [seen.append])
    torch.manual_seed(0)
    model = nn.Sequential(*[layer for _ in range(6) for layer in (nn.Linear(256, 256), nn.Tanh())])
    weights = dict(model.named_parameters())
    x, target = torch.randn(512, 256), torch.arange(512) % 256

    def step(x: torch.Tensor, target: torch.Tensor) -> Any:
        def loss(weights: Any) -> torch.Tensor:
            return nn.functional.cross_entropy(torch.func.functional_call(model, weights, (x,)), target)

        return torch.func.grad_and_value(loss)(weights)

    compiled = torch.compile(step, backend="genie", options={"microbatches": 4})
    expected, value = step(x, target)
    for _ in range(2):
        gradients, found = compiled(x, target)
        torch.testing.assert_close(found, value)
        torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-6)
    (graph,) = seen
    assert graph.found is not None and graph.found.split is not None and graph.found.split.num_parts == 4
    assert calls() == {"w0": 2, "w1": 2}


def test_a_batch_of_any_size_is_cut_where_its_size_is_a_symbol() -> None:
    torch._dynamo.utils.counters.clear()
    model = Decoder(layers=2)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="genie", dynamic=True, options={"microbatches": 4, "strict": False})
    for number, rows in enumerate((16, 24, 16, 10)):
        ids = torch.arange(rows * 64).view(rows, 64) % 97
        for run in (compiled, reference):
            nn.functional.cross_entropy(run(ids).flatten(0, 1), ids.flatten()).backward()
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-6)
        if number < 3:
            assert min(calls().values()) == 2 * (number + 1), "forward and backward, on both"
    refused = [event for event in genie.get_stats()["events"] if "microbatches not used" in event]
    assert any("10 rows" in event and "multiple of 4" in event for event in refused), refused
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "no size is compiled anew"


def test_a_symbolic_batch_beyond_the_sizes_that_have_a_plan_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(by_size, "MAX_SIZES", 1)
    model = Decoder().eval()
    compiled = torch.compile(model, backend="genie", dynamic=True, options={"microbatches": 4})
    for rows in (16, 24):
        ids = torch.arange(rows * 64).view(rows, 64) % 97
        with torch.no_grad():
            torch.testing.assert_close(compiled(ids), model(ids), rtol=1e-5, atol=1e-5)
    assert sum(calls().values()) == 3
    assert any("have a plan already" in event for event in genie.get_stats()["events"])


def test_a_size_is_not_blamed_for_what_no_size_would_mend() -> None:
    model = convolutions(layers=2).train()
    compiled = torch.compile(model, backend="genie", dynamic=True, options={"microbatches": 4, "strict": False})
    for rows in (10, 8):
        compiled(torch.randn(rows, 3, 16, 16)).sum().backward()
    refused = [event for event in genie.get_stats()["events"] if "microbatches not used" in event]
    assert refused and all("BatchNorm in training" in event for event in refused), refused


def test_what_cannot_be_cut_is_refused_in_strict_mode_and_said_otherwise(caplog: pytest.LogCaptureFixture) -> None:
    model, x = convolutions().train(), torch.randn(8, 3, 16, 16)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as refused:
        torch.compile(model, backend="genie", options={"microbatches": 4})(x)
    assert isinstance(refused.value.inner_exception, UnsupportedGraphError)
    assert "BatchNorm in training" in str(refused.value)
    torch._dynamo.reset()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="genie", options={"microbatches": 4, "strict": False})
    with caplog.at_level(logging.WARNING, logger="genie_dynamo"):
        torch.testing.assert_close(compiled(x), reference(x), rtol=1e-5, atol=1e-5)
    assert "BatchNorm in training" in caplog.text
    assert any("microbatches not used" in event for event in genie.get_stats()["events"])


def test_a_mixture_of_experts_is_refused_with_the_reason() -> None:
    model, inputs = architectures.build("mixtral")
    compiled = torch.compile(model, backend="genie", options={"microbatches": 2})
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="sorted by expert together"):
        compiled(input_ids=inputs["input_ids"], use_cache=False)


def test_a_number_that_is_none_is_refused() -> None:
    with pytest.raises(ConfigError, match="microbatches"):
        genie.compile(nn.Linear(2, 2), microbatches=0)


def test_explain_shows_the_pipeline() -> None:
    genie.init(workers=2, num_threads=1, microbatches=4)
    with torch.no_grad():
        found = genie.explain(Decoder().eval(), torch.arange(16 * 64).view(16, 64) % 97)
    (graph,) = found.graphs
    chosen = [a for a in graph.alternatives if a.chosen]
    assert len(chosen) == 1 and "4 parts of the batch through 2 workers" in chosen[0].name
    assert {f.worker for f in graph.fragments} == {"w0", "w1"}
    assert all(f.est_s and f.measured_s and f.bytes_out for f in graph.fragments)
    assert {f"part {n}" for n in range(4)} <= {span.label for span in graph.timeline}
