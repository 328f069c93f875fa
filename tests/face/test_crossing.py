"""What a backward reads on another worker than its forward made it on: two real workers, eager's gradients."""
from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo import placed, sessions, worker_facts
from genie_dynamo.passes import crossing
from genie_dynamo.passes import partition as cutting
from tests.face.test_placed import Masked, tight

ARGS = (torch.randn(512, 256), torch.tensor([100, 500]))


@pytest.fixture(autouse=True)
def two_small_workers(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    """Neither can hold the weights of `Masked`, so that it is cut; nothing is applied twice in the forward."""
    monkeypatch.setattr(worker_facts, "facts_of", tight(11 << 19))
    monkeypatch.setattr(placed, "TIME_LIMIT_S", None)
    monkeypatch.setattr(cutting, "rewritten", lambda *_, **__: None)
    genie.init(workers=2, num_threads=1, strict=True)
    yield
    genie.shutdown()
    sessions._config = None


def all_on(worker: int) -> Any:
    """A backward that runs on one worker, whatever its forward has left where."""
    return lambda gm, homes, copies: {n.name: worker for n in gm.graph.nodes if n.op == "call_function"}


def train(steps: int = 4) -> dict[str, int]:
    """Steps of a masked chain, whose gradients are eager's; what came from workers' state in the last ones."""
    torch.manual_seed(0)
    model = Masked().train()
    reference, compiled = copy.deepcopy(model), torch.compile(model, backend="genie")
    for step in range(steps):
        # All of it is new in each step, so that nothing of an older one would do.
        x, lengths = torch.randn(512, 256), torch.tensor([100, 500 - 60 * step])
        for each in (compiled, reference):
            each(x, lengths).square().sum().div(512).backward()
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            largest = float(other.grad.abs().max())
            assert largest > 1e-5
            torch.testing.assert_close(mine.grad, other.grad, rtol=1e-4, atol=1e-5 * largest)
            with torch.no_grad():
                other -= other.grad * (0.01 / largest)
                mine.copy_(other)
            mine.grad = other.grad = None
        if step == steps - 2:
            genie.reset_stats()         # the backward was compiled in the first step, the forward planned for it after
    stats = genie.get_stats()
    assert all(row["calls"] for row in stats["workers"].values()), "the forward runs on both workers"
    return {reason: row["total"] for reason, row in stats["by_reason"].items()}


def test_what_both_workers_have_read_is_kept_on_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """The mask is read by every layer: gradients stay where they are, instead of going to where the mask was made."""
    full = train()
    torch._dynamo.reset()
    monkeypatch.setattr(placed, "crossed", lambda found, *_: found)
    plain = train()
    assert full["state"] == plain["state"] == 0
    assert full["activations"] < plain["activations"]


@pytest.mark.parametrize("worker", [0, 1])
def test_a_backward_elsewhere_gets_all_it_reads_without_the_client(worker: int,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossing, "follow", all_on(worker))
    assert train()["state"] == 0


def test_explain_says_what_was_decided_and_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(crossing, "follow", all_on(1))
    monkeypatch.setattr(worker_facts, "facts_of", tight(23 << 18))      # with its loss it needs more at its peak
    model = Masked().train()

    def step(x: torch.Tensor, lengths: torch.Tensor) -> None:
        model(x, lengths).square().mean().backward()

    found = genie.explain(step, *ARGS)
    rows = [row for graph in found.graphs for row in graph.crossings]
    assert {row.how for row in rows} == {"again", "moved"}, rows
    for row in rows:
        if row.how == "again":
            assert row.again_s is not None and row.again_s < row.move_s
        if row.how == "moved":
            assert row.again_s is None or row.again_s >= row.move_s
    text = str(found)
    assert "computed again there; moving it takes" in text and "sent there by the forward; moving it takes" in text
    assert any(graph["crossings"] for graph in json.loads(found.to_json())["graphs"])
    found.to_html(tmp_path / "plan.html")
    assert "Between forward and backward" in (tmp_path / "plan.html").read_text()


def test_copies_are_freed_with_the_activations() -> None:
    train()
    torch._dynamo.reset()
    gc.collect()
    assert all(link.num_saved == 0 for link in genie.session().links)


def test_saved_tensor_hooks_see_the_activations_and_nothing_is_lost() -> None:
    torch.manual_seed(0)
    model = Masked().train()
    reference, compiled = copy.deepcopy(model), torch.compile(model, backend="genie")
    for step in range(4):
        model.zero_grad()
        reference.zero_grad()
        for each in (compiled, reference):
            if step == 3:
                with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
                    each(*ARGS).square().mean().backward()
            else:
                each(*ARGS).square().mean().backward()
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-7)
