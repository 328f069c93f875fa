"""A stencil is what the encoder makes of a message, with holes exactly where two calls may differ."""
from __future__ import annotations

import struct
from typing import Any

import pytest

from genie_dynamo.core import messages as m
from genie_dynamo.core.stencil import MAX_STENCIL_BYTES, WIDE, Form, Streak, result_form, run_form
from genie_dynamo.core.wire import pack


def tensor(payload: Any) -> tuple[Any, ...]:
    return (m.INLINE, (0, (2, 3), (3, 1), payload))


def run(request: int = WIDE, call: int = WIDE, arguments: tuple[Any, ...] = (), **more: Any) -> m.Run:
    return m.Run(request, 7, call, arguments, more.pop("keeps", ()), (), more.pop("frees", ()), **more)


def packed(message: m.Message) -> bytes:
    return pack(m.to_wire(message))


def filled(form: Form, *contents: bytes) -> bytes:
    data = bytearray(form.data)
    for (offset, size, _), content in zip(form.holes, contents, strict=True):
        assert len(content) == size
        data[offset:offset + size] = content
    return bytes(data)


def number(value: int) -> bytes:
    return value.to_bytes(8, "big")


def test_a_filled_run_is_what_the_encoder_makes() -> None:
    first = run(WIDE, WIDE + 1, (tensor(b"a" * 24), 3, None, tensor(0), tensor(b"b" * 24)), template=-4)
    form = run_form(first, packed(first))
    assert form is not None
    other = run(WIDE + 77, (1 << 63) + 5, (tensor(b"c" * 24), 3, None, tensor(0), tensor(b"d" * 24)), template=-4)
    assert filled(form, number(WIDE + 77), number((1 << 63) + 5), b"c" * 24, b"d" * 24) == packed(other)
    assert [kind for _, _, kind in form.holes] == ["number", "number", "memory", "memory"]


def test_a_filled_result_is_what_the_encoder_makes() -> None:
    first = m.Result(WIDE, ((1, tensor(b"a" * 24)), (0, 5)), (), 0.25, 0.0, 4096)
    form = result_form(first, packed(first))
    assert form is not None
    other = m.Result(WIDE + 9, ((1, tensor(b"\xff" * 24)), (0, 5)), (), 1e-9, float("inf"), 4096)
    assert filled(form, number(WIDE + 9), b"\xff" * 24, struct.pack(">d", 1e-9),
                  struct.pack(">d", float("inf"))) == packed(other)


@pytest.mark.parametrize("message", [
    run(request=5),                                                   # a number that takes fewer bytes
    run(call=5),
    run(frees=((1, 1),)),
    run(keeps=((1, 1),)),
    run(state=((1, 1),)),
    run(template=3),                                                  # to be remembered: not a call like any other
    run(arguments=((m.HELD, 3, 1),)),
    run(arguments=((m.STORE, 3, 1, (0, (2,), (1,), b"x" * 8)),)),
    run(arguments=((m.INLINE, (0, (2, 3), (3, 1), b"a" * 24, True)),)),
    run(arguments=((m.INLINE, (0, (0,), (1,), b"")),)),
    run(arguments=(tensor(b"a" * (MAX_STENCIL_BYTES + 1)),)),
])
def test_runs_that_are_not_remembered(message: m.Run) -> None:
    assert run_form(message, packed(message)) is None


@pytest.mark.parametrize("message", [
    m.Result(WIDE, ((0, (m.SPAN, (8, (4,), (1,), b"abcd"), (0, (1,), (1,), 0))),), (), 0.0, 0.0, 0),
    m.Result(WIDE, ((0, (m.INPUT_VIEW, (0, (1,), (1,), 0))),), (), 0.0, 0.0, 0),
    m.Result(WIDE, (), ((0, (1,), (1,)),), 0.0, 0.0, 0),
    m.Result(WIDE, (), (), 0.0, 0.0, 0, (), ((3, 1),)),
    m.Result(3, (), (), 0.0, 0.0, 0),
])
def test_results_that_are_not_remembered(message: m.Result) -> None:
    assert result_form(message, packed(message)) is None


def test_another_encoders_bytes_are_not_remembered() -> None:
    message = run()
    header = packed(message).replace(b"\x07", b"\xcc\x07", 1)         # the program's number in two bytes
    assert run_form(message, header) is None


def test_a_streak_that_was_wrong_takes_longer() -> None:
    streak = Streak()
    assert [streak.lasts("a") for _ in range(4)] == [False, False, True, True]
    assert not streak.lasts("b")
    streak.ended()
    assert [streak.lasts("b") for _ in range(5)] == [False, False, False, False, True]
