"""State on a worker, message by message: handles, views, moves, the quota, and what is refused."""
from __future__ import annotations

from typing import Any

import pytest

from genie_dynamo.core import messages as m
from genie_dynamo.runtime.worker.events import Deliver, Execute, Finished, Reply, Tick
from genie_dynamo.runtime.worker.runs import MOVE_TIMEOUT_S
from tests.runtime.test_worker_state import TOKEN, Blob, Worker, failure_of


class StateWorker(Worker):
    """A worker with one program that takes one tensor and whose result may stay."""

    def __init__(self, quota_bytes: int = 1 << 30) -> None:
        super().__init__()
        self.state._quota_bytes = quota_bytes
        self.hello()
        self.load(state=(1,))

    def call(self, argument: Any, *, state: tuple[tuple[int, int], ...] = (), call: int = 1) -> list[Any]:
        return self.send(m.Run(call, 1, call, (argument,), (), (), (), 0, state))

    def finish(self, commands: list[Any], content: bytes) -> m.Result:
        (execute,) = commands
        assert isinstance(execute, Execute)
        (reply,) = self.state.handle(Finished(execute.run, ((0, Blob(b"out")),), (), 0.0, (Blob(content),)))
        assert isinstance(reply, Reply) and isinstance(reply.message, m.Result)
        return reply.message


def stored(tensor_id: int, content: bytes) -> tuple[Any, ...]:
    return (m.STORE, tensor_id, 1, (content,))


def test_what_came_along_and_what_stays_is_found_under_its_handle() -> None:
    worker = StateWorker()
    result = worker.finish(worker.call(stored(7, b"seven")), b"")
    assert result.state == () and result.evicted == ()
    result = worker.finish(worker.call((m.HELD, 7, 1), state=((8, 1),)), b"eight")
    assert result.state == (("form", 5),)
    (execute,) = worker.call((m.HELD, 8, 1))
    assert execute.run.env[0].content == b"eight"


@pytest.mark.parametrize("argument", [(m.HELD, 7, 2), (m.HELD, 8, 1), (m.HELD, 7, 1, ((1,), (1,), 0))])
def test_another_epoch_or_id_is_an_error_and_never_old_data(argument: tuple[Any, ...]) -> None:
    worker = StateWorker()
    if argument[2] == 2:
        worker.finish(worker.call(stored(7, b"old")), b"")
    told = failure_of(worker.call(argument))
    assert told.kind == "StaleHandleError" and told.facts["tensor_id"] == argument[1]


@pytest.mark.parametrize("argument", [(m.STORE, 7, 1), (m.STORE, 7, 0, (b"x",)), (m.HELD, "7", 1), (m.HELD, 7),
                                      (m.MOVED, 7), (m.HELD, 7, 1, 2, 3)])
def test_malformed_handles_are_refused(argument: tuple[Any, ...]) -> None:
    assert failure_of(StateWorker().call(argument)).kind == "ProtocolError"


def test_state_of_another_session_is_not_found() -> None:
    worker = StateWorker()
    worker.finish(worker.call(stored(7, b"seven")), b"")
    worker.hello(b"o" * 16, b"other")
    worker.state.sessions[b"o" * 16].programs.update(worker.state.sessions[TOKEN].programs)
    told = failure_of(worker.send(m.Run(1, 1, 1, ((m.HELD, 7, 1),), (), (), ()), b"other"))
    assert told.kind == "StaleHandleError"


def test_the_least_recently_used_goes_first_and_the_client_is_told() -> None:
    worker = StateWorker(quota_bytes=10)
    for tensor_id in (1, 2):
        assert worker.finish(worker.call(stored(tensor_id, b"1234"), call=tensor_id), b"").evicted == ()
    worker.finish(worker.call((m.HELD, 1, 1), call=3), b"")
    assert worker.finish(worker.call(stored(3, b"1234"), call=4), b"").evicted == ((2, 1),)
    assert failure_of(worker.call((m.HELD, 2, 1), call=5)).kind == "StaleHandleError"
    worker.finish(worker.call((m.HELD, 1, 1), call=6), b"")


def test_what_is_needed_at_once_must_fit() -> None:
    told = failure_of(StateWorker(quota_bytes=3).call(stored(1, b"1234")))
    assert told.kind == "WorkerMemoryError" and "raise the quota" in told.message


def test_a_tensor_moves_and_the_run_that_names_it_waits_for_it() -> None:
    source, target = StateWorker(), StateWorker()
    source.finish(source.call(stored(7, b"seven")), b"")
    (deliver,) = source.send(m.Move(5, 7, 1, "tcp://b:1", ""))
    assert isinstance(deliver, Deliver) and deliver.address == "tcp://b:1" and deliver.request == 5
    (execute,) = target.call((m.MOVED, 7, 1, 2.0))
    assert execute.run.pending == {(7, 1): [0]}
    ((letter, _),) = deliver.letters
    (again,) = target.send(letter, b"peer")
    assert isinstance(again, Execute) and again.run.env[0].content == b"seven" and not again.run.pending
    assert failure_of(source.send(m.Move(6, 8, 1, "tcp://b:1", ""))).kind == "StaleHandleError"


def test_a_tensor_that_another_worker_sends_is_held_to_the_quota() -> None:
    worker = StateWorker(quota_bytes=10)
    worker.finish(worker.call(stored(1, b"12345678")), b"")
    (run,) = worker.call((m.MOVED, 7, 1, 2.0), call=2)
    (execute,) = worker.send(m.Land(TOKEN, 7, 1, (b"87654321",)), b"peer")
    assert execute.run is run.run and worker.finish([execute], b"").evicted == ((1, 1),)
    worker.call((m.MOVED, 8, 1, 2.0), call=3)
    reply, _ = worker.send(m.Land(TOKEN, 8, 1, (b"x" * 11,)), b"peer")
    assert failure_of([reply]).kind == "WorkerMemoryError"
    (session,) = worker.state.sessions.values()
    assert session.resident_bytes <= 10 and not session.broken


def test_what_is_resident_is_not_changed_by_a_peer() -> None:
    worker = StateWorker()
    worker.finish(worker.call(stored(7, b"seven")), b"")
    assert worker.send(m.Land(TOKEN, 7, 1, (b"other",)), b"peer") == []
    (execute,) = worker.call((m.HELD, 7, 1), call=2)
    assert execute.run.env[0].content == b"seven"


def test_a_tensor_that_never_comes_fails_the_run() -> None:
    worker = StateWorker()
    worker.call((m.MOVED, 7, 1, 3.0))
    assert worker.state.handle(Tick(2.0)) == []
    reply, _ = worker.state.handle(Tick(4.0))
    assert failure_of([reply]).facts["tensor_id"] == 7
    worker.call((m.MOVED, 8, 1, 1e9), call=2)
    assert worker.state.handle(Tick(MOVE_TIMEOUT_S - 1)) == []
    reply, _ = worker.state.handle(Tick(MOVE_TIMEOUT_S + 1))
    assert failure_of([reply]).kind == "StaleHandleError"
    assert worker.send(m.Land(b"?" * 16, 7, 1, (b"x",)), b"peer") == []
    assert failure_of(worker.send(m.Land(TOKEN, 7, 0, (b"x",)), b"peer")).kind == "ProtocolError"


def test_a_large_tensor_moves_in_pieces_in_any_order_and_twice() -> None:
    source, target = StateWorker(), StateWorker()
    source.finish(source.call(stored(7, b"twelve bytes")), b"")
    (deliver,) = source.send(m.Move(5, 7, 1, "tcp://b:1", ""))
    assert isinstance(deliver, Deliver) and len(deliver.letters) == 6
    target.call((m.MOVED, 7, 1, 2.0))
    letters = [letter for letter, _ in reversed(deliver.letters)]
    for letter in (*letters[:-1], letters[0]):
        assert target.send(letter, b"peer") == []
    (again,) = target.send(letters[-1], b"peer")
    assert isinstance(again, Execute) and again.run.env[0].content == b"twelve bytes"
    assert target.send(letters[0], b"peer") == [], "what is resident is not changed"
    (session,) = target.state.sessions.values()
    assert not session.arriving


def test_pieces_beyond_the_quota_fail_the_run_before_there_is_memory_for_them() -> None:
    worker = StateWorker(quota_bytes=10)
    worker.call((m.MOVED, 7, 1, 2.0))
    reply, _ = worker.send(m.Piece(TOKEN, 7, 1, (b"12", 12), None, 0), b"peer")
    assert failure_of([reply]).kind == "WorkerMemoryError"
    (session,) = worker.state.sessions.values()
    assert not session.arriving and not session.broken
