"""Graphs that are placed by cost over two real workers: what eager gives, forward, backward and with random ops."""
from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo import backend, placed, sessions, worker_facts
from genie_dynamo.core.errors import ConfigError, PlanError
from genie_dynamo.passes import partition as cutting
from genie_dynamo.passes.drift import CALLS, FIRST_WAIT_S, Drift
from genie_dynamo.placed import PlacedGraph
from genie_dynamo.runtime.client.remote_graph import RemoteGraph
from tests.passes.test_partition import WORKERS, Towers, lane


def known(session: Any, *, wait: bool = False) -> worker_facts.Facts:
    """Facts that do not depend on the machine, so that neither do the plans."""
    return worker_facts.Facts(key=worker_facts.incarnations(session), workers=WORKERS, lanes=(lane(),))


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    monkeypatch.setattr(worker_facts, "facts_of", known)
    genie.init(workers=2, num_threads=1, strict=True)
    yield
    genie.shutdown()
    sessions._config = None


def inputs() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    return torch.randn(256, 512), torch.randn(256, 512)


def calls() -> dict[str, int]:
    return {name: row["calls"] for name, row in genie.get_stats()["workers"].items()}


def test_towers_run_side_by_side_and_give_what_eager_gives() -> None:
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie")
    with torch.no_grad():
        for _ in range(3):
            torch.testing.assert_close(compiled(x, y), model(x, y), rtol=0, atol=0)
    assert calls() == {"w0": 3, "w1": 3}


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_training_gives_eagers_gradients_and_numbers(dropout: float) -> None:
    model, (x, y) = Towers(dropout=dropout).train(), inputs()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="genie")
    for step in range(2):
        losses = []
        for run in (compiled, reference):
            torch.manual_seed(step)
            loss = run(x, y).square().mean()
            loss.backward()
            losses.append((loss.detach(), torch.rand(1)))
        torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=0)
    for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-7)
    assert min(calls().values()) == 4


class Chain(torch.nn.Module):
    """Weights that no worker of TIGHT can hold all of, so that the chain is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.Sequential(*[m for _ in range(4) for m in (torch.nn.Linear(256, 256), torch.nn.GELU())])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layers(x)
        return out


class Masked(Chain):
    """A large mask, made of two numbers, that every layer applies."""

    def forward(self, x: torch.Tensor, lengths: torch.Tensor | None = None) -> torch.Tensor:
        assert lengths is not None
        mask = ((torch.arange(x.shape[0])[:, None] - torch.arange(256)) < lengths.max()).float()
        x = x * mask
        for layer in self.layers:
            x = layer(x) * mask
        return x


WEIGHTS_BYTES = 4 * (256 * 256 + 256) * 4


def tight(peak_bytes: int) -> Any:
    """Facts with room for three of a chain's four layers, beside what a call needs at its peak."""
    def facts_of(session: Any, *, wait: bool = False) -> worker_facts.Facts:
        facts = known(session)
        return replace(facts, lanes=(lane(bytes_per_s=1e8),), workers=tuple(
            replace(w, memory_bytes=peak_bytes + WEIGHTS_BYTES * 3 // 4) for w in facts.workers))

    return facts_of


def bytes_by_reason(monkeypatch: pytest.MonkeyPatch, run: Any, peak_bytes: int, *, rewrite: bool,
                    **options: Any) -> dict[str, int]:
    """What three calls moved on two workers that are too small for the weights, by reason."""
    torch._dynamo.reset()
    with monkeypatch.context() as patch:
        patch.setattr(worker_facts, "facts_of", tight(peak_bytes))
        patch.setattr(placed, "TIME_LIMIT_S", None)          # the same placement whatever else runs here
        if not rewrite:
            patch.setattr(cutting, "rewritten", lambda *_, **__: None)
        genie.reset_stats()
        run(options)
        stats = genie.get_stats()
    assert all(row["calls"] for row in stats["workers"].values())
    return {reason: row["total"] for reason, row in stats["by_reason"].items()}


def test_activations_are_kept_where_the_backward_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward runs where its forward did, and an activation that crossed over stays where it went."""
    def run(options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model, x = Chain().train(), torch.randn(512, 256)
        reference, compiled = copy.deepcopy(model), torch.compile(model, backend="genie", options=options)
        for _ in range(3):
            for each in (compiled, reference):
                each(x).square().mean().backward()
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-7)

    blind = bytes_by_reason(monkeypatch, run, 4 << 20, rewrite=False, awareness="weights")
    full = bytes_by_reason(monkeypatch, run, 4 << 20, rewrite=True)
    assert blind["state"] > 0 and full["state"] == 0
    assert full["gradients"] < blind["gradients"] / 1.3


def test_a_cheap_op_is_applied_on_both_workers_and_its_result_is_not_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(options: dict[str, Any]) -> None:
        torch.manual_seed(0)
        model, args = Masked().eval(), (torch.randn(512, 256), torch.tensor([100, 500]))
        compiled = torch.compile(model, backend="genie", options=options)
        with torch.no_grad():
            for _ in range(3):
                torch.testing.assert_close(compiled(*args), model(*args), rtol=0, atol=0)

    sent = bytes_by_reason(monkeypatch, run, 3 << 19, rewrite=False)
    twice = bytes_by_reason(monkeypatch, run, 3 << 19, rewrite=True)
    assert twice["activations"] < sent["activations"]


def test_a_worker_that_dies_is_replaced_and_the_graph_goes_on() -> None:
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie")
    with torch.no_grad():
        expected = compiled(x, y)
        link = genie.session().links[1]
        assert link.embedded is not None
        link.embedded.process.kill()
        link.embedded.process.wait()
        for _ in range(2):
            torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)


def test_a_cut_whose_worker_is_gone_for_good_runs_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie")
    with torch.no_grad():
        expected = compiled(x, y)
        session = genie.session()
        monkeypatch.setattr(session, "replace_lost", lambda: None)
        link = session.links[1]
        assert link.embedded is not None
        link.embedded.process.kill()
        link.embedded.process.wait()
        for _ in range(2):
            torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
    assert calls()["w0"] == 3


def test_a_cut_that_cannot_be_planned_leaves_the_graph_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any, **__: Any) -> Any:
        raise PlanError("outputs share memory but are made on two workers")

    model, (x, y) = Towers().eval(), inputs()
    monkeypatch.setattr(PlacedGraph, "_settle", broken)
    with torch.no_grad():
        torch.testing.assert_close(torch.compile(model, backend="genie")(x, y), model(x, y), rtol=0, atol=0)
    assert sum(calls().values()) == 1


def test_explain_shows_fragments_alternatives_and_what_was_measured(tmp_path: Path) -> None:
    model, (x, y) = Towers().eval(), inputs()
    with torch.no_grad():
        found = genie.explain(model, x, y)
    (graph,) = found.graphs
    assert {f.worker for f in graph.fragments} == {"w0", "w1"}
    assert all(f.measured_s and f.est_s for f in graph.fragments)
    assert sum(a.chosen for a in graph.alternatives) == 1
    text = str(found)
    assert "considered:" in text and "come from w" in text
    document = json.loads(found.to_json())
    assert document["version"] == 1
    assert len(document["graphs"][0]["fragments"]) == len(graph.fragments)
    page = tmp_path / "plan.html"
    found.to_html(page)
    written = page.read_text()
    assert "<svg" in written and "http" not in written and "needs nothing from other workers" in written


def test_explain_puts_the_generator_back() -> None:
    model, (x, y) = Towers(dropout=0.5).train(), inputs()
    before = torch.get_rng_state()
    genie.explain(model, x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_min_cost_runs_on_the_cheaper_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def priced(session: Any, *, wait: bool = False) -> worker_facts.Facts:
        facts = known(session)
        return replace(facts, workers=tuple(replace(w, price_per_hour=price)
                                            for w, price in zip(facts.workers, (3.0, 2.0), strict=True)))

    monkeypatch.setattr(worker_facts, "facts_of", priced)
    genie.session().prices.update(w0=3.0, w1=2.0)
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie", options={"policy": "min_cost"})
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(x, y), model(x, y), rtol=0, atol=0)
    assert calls() == {"w0": 0, "w1": 2}


@pytest.mark.parametrize("workers", [1, 2])
def test_min_cost_without_prices_is_an_error_however_many_workers_there_are(workers: int) -> None:
    if workers == 1:
        genie.init(workers=1, num_threads=1, strict=True)
    compiled = torch.compile(torch.nn.Linear(4, 4), backend="genie", options={"policy": "min_cost"})
    for _ in range(2):
        with pytest.raises(ConfigError, match="price_per_hour"), torch.no_grad():
            compiled(torch.randn(2, 4))
    with pytest.raises(ConfigError, match=r"embedded worker 0.*price_per_hour"):
        genie.init(workers=workers, policy="min_cost")


def test_a_worker_that_is_slower_than_estimated_loses_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    now_s = [0.0]
    monkeypatch.setattr(placed, "Drift", lambda _: Drift(lambda: now_s[0]))
    watched: list[PlacedGraph] = []
    monkeypatch.setattr(backend, "observers", [watched.append])
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie")
    times = {"w0": 1.0, "w1": 1.0}
    monkeypatch.setattr(RemoteGraph, "measured_s", lambda self, session: times)
    with torch.no_grad():
        expected = model(x, y)
        compiled(x, y)
        assert calls() == {"w0": 1, "w1": 1}
        (graph,) = watched
        found = graph._found
        assert found is not None
        est_s = graph._drift._est_s
        times.update(w0=est_s["w0"], w1=20 * est_s["w1"])
        for _ in range(CALLS):
            torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
        assert calls() == {"w0": CALLS + 1, "w1": CALLS + 1}, "too early to judge"
        now_s[0] += 2 * FIRST_WAIT_S
        genie.reset_stats()
        for _ in range(3):
            torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
    assert calls() == {"w0": 3, "w1": 0}, "all of it on the worker that keeps its word"
    assert any("plan made anew" in event for event in genie.get_stats()["events"])
