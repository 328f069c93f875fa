"""A run may name what an earlier one of its session has still to keep: it waits for it, and fails with it."""
from __future__ import annotations

from genie_dynamo.core import messages as m
from genie_dynamo.runtime.worker.events import Abandon, Execute, Failed, Finished, Reply
from tests.runtime.test_worker_state import Blob, Worker

KEPT = (7, 1)
LATER = (m.RESIDENT, *KEPT)


def _worker() -> Worker:
    worker = Worker()
    worker.hello()
    worker.load(returns=(), keeps=(1,))
    return worker


def test_a_run_waits_for_what_an_earlier_one_keeps() -> None:
    worker = _worker()
    (first,) = worker.run(3, call_id=1, keeps=(KEPT,))
    (second,) = worker.run(LATER, call_id=2, keeps=((8, 1),), incoming=(KEPT,))
    assert isinstance(first, Execute) and isinstance(second, Execute)
    assert 0 not in second.run.env
    made = Blob(b"made")
    reply, ready = worker.state.handle(Finished(first.run, (), (made,), 0.0))
    assert isinstance(reply, Reply) and isinstance(reply.message, m.Result)
    assert isinstance(ready, Execute) and ready.run is second.run
    assert second.run.env[0] is made and not second.run.pending


def test_it_fails_with_the_run_that_it_waits_for() -> None:
    worker = _worker()
    (first,) = worker.run(3, call_id=1, keeps=(KEPT,))
    (second,) = worker.run(LATER, call_id=2, keeps=((8, 1),), incoming=(KEPT,))
    (third,) = worker.run((m.RESIDENT, 8, 1), call_id=3, keeps=((9, 1),), incoming=((8, 1),))
    commands = worker.state.handle(Failed(first.run, ValueError("no such value"), 0.0))
    failures = [c.message for c in commands if isinstance(c, Reply)]
    assert len(failures) == 3 and all("no such value" in f.message for f in failures)
    assert {c.run for c in commands if isinstance(c, Abandon)} == {second.run, third.run}
    # One that comes after the failure learns the reason too.
    (late,) = worker.run(LATER, call_id=4, keeps=((10, 1),), incoming=(KEPT,))
    assert isinstance(late.message, m.Failure) and "no such value" in late.message.message
