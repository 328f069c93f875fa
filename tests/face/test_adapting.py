"""Plans while workers die, come back, and come and go: right results, and a plan for those that are there."""
from __future__ import annotations

import copy
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo import backend, placed, sessions, worker_facts
from genie_dynamo.core.errors import WorkerLostError
from genie_dynamo.passes.drift import FIRST_WAIT_S, Membership
from genie_dynamo.placed import PlacedGraph
from tests.face.test_placed import calls, inputs, known
from tests.passes.test_partition import WORKERS, Towers


def facts_of(session: Any, *, wait: bool = False) -> worker_facts.Facts:
    """Made-up facts about the workers that are there."""
    live = {link.name for link in session.links if not link.lost}
    facts = known(session)
    return worker_facts.Facts(key=facts.key, lanes=facts.lanes, workers=tuple(w for w in WORKERS if w.name in live))


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    monkeypatch.setattr(worker_facts, "facts_of", facts_of)
    monkeypatch.setattr(placed, "TIME_LIMIT_S", None)
    genie.init(workers=2, num_threads=1, strict=True)
    yield
    genie.shutdown()
    sessions._config = None


def kill(number: int) -> None:
    link = genie.session().links[number]
    assert link.embedded is not None
    os.kill(link.embedded.process.pid, signal.SIGKILL)


def plans_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Labels of graphs, as they are planned."""
    made: list[str] = []
    price = PlacedGraph.price
    monkeypatch.setattr(PlacedGraph, "price", lambda self, facts: (made.append(self.label), price(self, facts))[1])
    return made


def test_workers_killed_in_the_middle_of_calls_change_no_result() -> None:
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie")
    with torch.no_grad():
        expected = model(x, y)
        compiled(x, y)
        for number in (1, 0, 1):
            killer = threading.Timer(0.03, kill, (number,))
            killer.start()
            for _ in range(20):
                torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
            killer.join()
        genie.reset_stats()
        compiled(x, y)
    assert calls() == {"w0": 1, "w1": 1}, "new incarnations took over"


def test_a_training_step_whose_worker_died_says_so_and_the_next_one_works() -> None:
    model, (x, y) = Towers().train(), inputs()
    reference, compiled = copy.deepcopy(model), torch.compile(model, backend="genie")
    for step in range(5):
        for each in (model, reference):
            each.zero_grad()
        if step == 3:
            loss = compiled(x, y).square().mean()
            kill(1)
            with pytest.raises(WorkerLostError, match="run the training step again"):
                loss.backward()
            continue
        for run in (compiled, reference):
            run(x, y).square().mean().backward()
        for mine, other in zip(model.parameters(), reference.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-7)


def test_a_worker_that_leaves_and_comes_back_is_planned_without_and_with(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[PlacedGraph] = []
    now_s = [0.0]
    monkeypatch.setattr(backend, "observers", [seen.append])
    monkeypatch.setattr(placed, "Membership", lambda _: Membership(lambda: now_s[0]))
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie")
    with torch.no_grad():
        expected = compiled(x, y)
        (graph,) = seen
        assert graph.current.plan.num_workers == 2
        with monkeypatch.context() as patch:
            patch.setattr(genie.session(), "replace_lost", lambda: None)
            kill(1)
            for _ in range(3):
                torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
            assert graph.current.plan.num_workers == 1
        genie.session().replace_lost()
        torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
        assert graph.current.plan.num_workers == 1, "it may be gone again soon"
        now_s[0] += 2 * FIRST_WAIT_S
        genie.reset_stats()
        for _ in range(2):
            torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
    assert graph.current.plan.num_workers == 2 and calls() == {"w0": 2, "w1": 2}


def test_a_worker_that_comes_and_goes_is_not_planned_for_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made = plans_made(monkeypatch)
    model, (x, y) = Towers().eval(), inputs()
    compiled = torch.compile(model, backend="genie")
    with torch.no_grad():
        expected = compiled(x, y)
        for _ in range(4):
            kill(1)
            genie.session().links[1].embedded.process.wait()             # type: ignore[union-attr]
            for _ in range(2):
                torch.testing.assert_close(compiled(x, y), expected, rtol=0, atol=0)
        genie.reset_stats()
        compiled(x, y)
    assert len(made) == 2, "for the workers at first, and after the first change"
    assert calls() == {"w0": 1, "w1": 1}, "the plan that was made for the old incarnation holds for the new one"
