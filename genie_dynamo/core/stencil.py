"""Where two messages of a kind differ: what a call that looks like the one before it has to write, or to read.

There is one encoder (core/wire.py). A stencil is what it has made of a message, with holes where numbers and payload
were; whoever fills them has the bytes that the encoder would have made. A message whose other bytes are not a
stencil's is decoded as ever.

    Run       request, call id, payload of each tensor that came inline
    Result    request, payload of each tensor that came inline, compute_s, queue_s

Numbers take eight bytes where they are at least WIDE: counters that go into stencils begin there.
"""
from __future__ import annotations

import struct
from collections.abc import Hashable, Sequence
from typing import Any, Final, NamedTuple

from genie_dynamo.core import messages as m
from genie_dynamo.core.wire import pack

WIDE: Final = 1 << 32
"""msgpack's integers take eight bytes from here on."""

MAX_STENCIL_BYTES: Final = 64 << 10
"""Longer messages are not worth remembering: what takes time is their payload."""

_FILLS: Final = (0x55, 0x2A)
"""No bit of the one is in the other, and as numbers they are wide, and finite."""


class Form(NamedTuple):
    """What is remembered of a message: its bytes, and (offset, size, kind) of its holes, in order."""

    data: bytes
    holes: tuple[tuple[int, int, str], ...]


def run_form(message: m.Run, header: bytes) -> Form | None:
    """What is remembered of a Run, which was encoded as `header`; None where it does not lend itself to that."""
    sizes = _inline_sizes(message.arguments)
    if sizes is None or message.keeps or message.incoming or message.frees or message.state or message.template > 0:
        return None
    forms = [m.Run(_number(fill), message.program_id, _number(fill), tuple(_filled(message.arguments, fill)),
                   (), (), (), message.template) for fill in _FILLS]
    return _compared(forms, header, [(8, "number"), (8, "number"), *((size, "memory") for size in sizes)])


def result_form(message: m.Result, header: bytes) -> Form | None:
    """What is remembered of a Result; None as above."""
    values = [value for _, value in message.values]
    sizes = _inline_sizes(values)
    if sizes is None or message.kept or message.state or message.evicted:
        return None
    indices = [index for index, _ in message.values]
    forms = [m.Result(_number(fill), tuple(zip(indices, _filled(values, fill), strict=True)), (), _real(fill),
                      _real(fill), message.resident_bytes) for fill in _FILLS]
    return _compared(forms, header, [(8, "number"), *((size, "memory") for size in sizes), (8, "real"), (8, "real")])


class Streak:
    """Whether something has been the same often enough to be remembered. Every time that was wrong, it takes longer."""

    __slots__ = ("_count", "_key", "_needed")

    def __init__(self) -> None:
        self._key: Hashable = None
        self._count = 0
        self._needed = 2

    def lasts(self, key: Hashable) -> bool:
        """Whether it is the same as the last `needed` times."""
        if key != self._key:
            self._key, self._count = key, 0
            return False
        self._count += 1
        return self._count >= self._needed

    def ended(self) -> None:
        """What was remembered did not hold."""
        self._key = None
        self._needed = min(2 * self._needed, 1024)


def _number(fill: int) -> int:
    return int.from_bytes(bytes([fill]) * 8, "big")


def _real(fill: int) -> float:
    found: float = struct.unpack(">d", bytes([fill]) * 8)[0]
    return found


def _inline_sizes(values: Sequence[Any]) -> list[int] | None:
    """Bytes of each payload within the message; None where something is neither a number nor a whole tensor."""
    sizes = []
    for value in values:
        if type(value) is not tuple:
            continue
        if len(value) != 2 or value[0] != m.INLINE or len(value[1]) != 4:
            return None
        payload = value[1][3]
        if type(payload) is bytes:
            if not payload:
                return None
            sizes.append(len(payload))
    return sizes


def _filled(values: Sequence[Any], fill: int) -> list[Any]:
    """The same with other payload."""
    return [(m.INLINE, (*value[1][:3], bytes([fill]) * len(value[1][3])))
            if type(value) is tuple and type(value[1][3]) is bytes else value for value in values]


def _compared(forms: Sequence[m.Message], header: bytes, expected: Sequence[tuple[int, str]]) -> Form | None:
    if len(header) > MAX_STENCIL_BYTES:
        return None
    one, other = (pack(m.to_wire(form)) for form in forms)
    spans = _differences(one, other)
    if [size for _, size in spans] != [size for size, _ in expected] or len(header) != len(one):
        return None
    without = bytearray(header)
    for offset, size in spans:
        without[offset:offset + size] = one[offset:offset + size]
    if without != one:
        return None              # another encoder's bytes, or numbers that take fewer
    return Form(one, tuple((offset, size, kind) for (offset, size), (_, kind) in zip(spans, expected, strict=True)))


def _differences(one: bytes, other: bytes) -> list[tuple[int, int]]:
    """(offset, size) of each run of bytes that differ; both have the same length, and differ in whole bytes."""
    spans: list[tuple[int, int]] = []
    start = None
    for at, (a, b) in enumerate(zip(one, other, strict=True)):
        if a != b and start is None:
            start = at
        elif a == b and start is not None:
            spans.append((start, at - start))
            start = None
    if start is not None:
        spans.append((start, len(one) - start))
    return spans
