"""A call over several workers, in every order of answers and failures."""
from __future__ import annotations

import itertools

import pytest

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError, WorkerLostError
from genie_dynamo.runtime.client.calls import Answered, Broke, CallState


def result(worker: int, *values: tuple[int, object]) -> Answered:
    return Answered(worker, m.Result(1, (), (), 0.0, 0.0, 0), values)


def partial(worker: int, *values: tuple[int, object]) -> Answered:
    return Answered(worker, m.Partial(1, ()), values)


def test_a_call_is_done_when_every_worker_has_answered_in_any_order() -> None:
    events = [partial(0, (1, "b")), result(1, (0, "c"))]
    for order in itertools.permutations(events):
        state = CallState({0: 2, 1: 1})
        for event in order:
            assert not state.done
            state.handle(event)
        assert not state.done and state.open_workers == [0]
        state.handle(result(0, (0, "a")))
        assert state.done and state.error is None
        assert state.values == {0: {0: "a", 1: "b"}, 1: {0: "c"}}


def test_the_first_failure_decides_and_later_answers_change_nothing() -> None:
    state = CallState({0: 1, 1: 1})
    lost = WorkerLostError("w1 is lost")
    state.handle(Broke(1, lost))
    state.handle(result(0, (0, "a")))
    assert state.done and state.error is lost and state.values[0] == {}


@pytest.mark.parametrize("events", [
    [result(0)],                                         # a value is missing
    [result(0, (0, "a"), (1, "b"))],                     # one too many
    [partial(0, (0, "a")), result(0, (0, "again"))],     # one twice
    [result(0, (-1, "a"))],
])
def test_wrong_answers_are_protocol_errors(events: list[Answered]) -> None:
    state = CallState({0: 1})
    for event in events:
        state.handle(event)
    assert isinstance(state.error, ProtocolError)
