"""Messages filled in and read by the extension: what fits lands, and whatever does not comes as it is."""
from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any

import pytest

from tests.runtime.lanes.ends import native

HOLES = [(2, 8, "number"), (12, 4, "memory"), (17, 8, "real")]
BYTES = b"ab" + bytes(8) + b"cd" + bytes(4) + b"e" + bytes(8) + b"f"


def memory(content: bytes) -> Any:
    return ctypes.create_string_buffer(content, len(content))


@pytest.fixture()
def ends() -> Iterator[tuple[Any, Any]]:
    one, other = native().inproc()
    yield one, other
    one.close()
    other.close()


def receive(end: Any, into: Any, *, first: int = 0, frames: Any = ()) -> Any:
    return end.receive_stencil(native().Stencil(BYTES, HOLES), [ctypes.addressof(into)], first, list(frames), 1.0)


def send(end: Any, number: int, content: bytes, real: float, frames: Any = ()) -> None:
    source = memory(content)
    values = (number, ctypes.addressof(source), real)
    assert end.send_stencil(native().Stencil(BYTES, HOLES), values, list(frames), 1.0, False)


def test_what_is_filled_in_arrives(ends: tuple[Any, Any]) -> None:
    one, other = ends
    into, frame = memory(b"...."), memory(b"........")
    send(one, (1 << 64) - 1, b"wxyz", -0.5, [b"12345678", b"rest"])
    numbers, left = receive(other, into, first=(1 << 64) - 1, frames=[(ctypes.addressof(frame), 8), (0, 4)])
    assert numbers == ((1 << 64) - 1, -0.5)
    assert (into.raw, frame.raw, [bytes(x) for x in left]) == (b"wxyz", b"12345678", [b"rest"])


def test_the_bytes_are_those_of_fill(ends: tuple[Any, Any]) -> None:
    one, other = ends
    source = memory(b"wxyz")
    stencil = native().Stencil(BYTES, HOLES)
    send(one, 7, b"wxyz", 2.0)
    header, _ = other.receive(1.0)
    assert header == stencil.fill([7, ctypes.addressof(source), 2.0])


@pytest.mark.parametrize(("header", "frames"), [
    (BYTES[:-1], []), (BYTES + b"x", []), (b"x" + BYTES[1:], []), (BYTES[:-1] + b"x", []),
    (BYTES[:11] + b"x" + BYTES[12:], []), (b"", []), (BYTES, [b"unasked"]),
])
def test_another_message_comes_as_it_is(ends: tuple[Any, Any], header: bytes, frames: list[bytes]) -> None:
    one, other = ends
    into = memory(b"....")
    one.send([header, *frames])
    came, left = receive(other, into)
    assert came == header and [bytes(x) for x in left] == frames and into.raw == b"...."


def test_another_first_number_or_size_comes_as_it_is(ends: tuple[Any, Any]) -> None:
    one, other = ends
    into, frame = memory(b"...."), memory(b"....")
    send(one, 7, b"wxyz", 2.0)
    assert type(receive(other, into, first=8)[0]) is bytes
    send(one, 7, b"wxyz", 2.0, [b"12345"])
    assert type(receive(other, into, frames=[(ctypes.addressof(frame), 4)])[0]) is bytes
    assert into.raw == frame.raw == b"...."


def test_nothing_and_the_end(ends: tuple[Any, Any]) -> None:
    one, other = ends
    stencil, into = native().Stencil(BYTES, HOLES), memory(b"....")
    assert other.receive_stencil(stencil, [ctypes.addressof(into)], 0, [], 0.0) is None
    assert other.receive_stencil(stencil, [ctypes.addressof(into)], 0, [], -1.0) is None
    one.close()
    with pytest.raises(OSError, match="closed"):
        other.receive_stencil(stencil, [ctypes.addressof(into)], 0, [], 1.0)
    with pytest.raises(OSError, match="closed"):
        one.send_stencil(stencil, (1, ctypes.addressof(into), 0.0), [], 1.0, False)


@pytest.mark.parametrize("holes", [
    [(0, 9, "number")], [(20, 8, "memory"), (0, 8, "number")], [(0, 8, "number"), (7, 2, "memory")],
    [(len(BYTES) - 1, 2, "memory")], [(1 << 63, 1 << 63, "memory")], [(0, 8, "text")],
])
def test_holes_that_cannot_be(holes: list[tuple[int, int, str]]) -> None:
    with pytest.raises(ValueError, match="hole"):
        native().Stencil(BYTES, holes)


def test_a_value_for_each_hole(ends: tuple[Any, Any]) -> None:
    with pytest.raises(ValueError, match="each hole"):
        ends[0].send_stencil(native().Stencil(BYTES, HOLES), (1,), [], 1.0, False)
    with pytest.raises(ValueError, match="address"):
        ends[1].receive_stencil(native().Stencil(BYTES, HOLES), [], 0, [], 0.0)
