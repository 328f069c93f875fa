"""msgpack with limits: exact round trips, and nothing but ProtocolError for hostile bytes."""
from __future__ import annotations

import contextlib
import math
import struct
import threading
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from genie_dynamo.core.errors import MessageLimitError, ProtocolError
from genie_dynamo.core.limits import DEFAULT_LIMITS, Limits
from genie_dynamo.core.wire import pack, unpack

SCALARS = (
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.binary(max_size=20)
    | st.text(max_size=20)
)
OBJECTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=5).map(tuple) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
    max_leaves=20,
)


def exact(obj: Any) -> Any:
    """A value that is equal only where type and bits are."""
    if isinstance(obj, tuple):
        return ("tuple", *map(exact, obj))
    if isinstance(obj, dict):
        return ("dict", *((key, exact(value)) for key, value in obj.items()))
    if isinstance(obj, float):
        return ("float", "nan" if math.isnan(obj) else struct.pack("<d", obj))
    return (type(obj).__name__, obj)


@given(OBJECTS)
@settings(deadline=None)
def test_round_trip(obj: Any) -> None:
    assert exact(unpack(pack(obj))) == exact(obj)


def test_numbers_keep_their_type_and_bits() -> None:
    numbers = (True, 1, 1.0, -0.0, math.inf, -math.inf, 5e-324)
    assert exact(unpack(pack(numbers))) == exact(numbers)
    (nan,) = unpack(pack((struct.unpack("<d", b"\x01\x00\x00\x00\x00\x00\xf8\xff")[0],)))
    assert struct.pack("<d", nan) == b"\x01\x00\x00\x00\x00\x00\xf8\xff"


def test_lists_arrive_as_tuples_and_bytes_as_bytes() -> None:
    assert unpack(pack([1, [b"raw", "text"]])) == (1, (b"raw", "text"))


@given(st.binary(max_size=300))
@settings(deadline=None, max_examples=500)
def test_any_bytes_give_an_object_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        unpack(data)


@given(OBJECTS, st.data())
@settings(deadline=None, max_examples=300)
def test_damaged_messages_give_an_object_or_a_protocol_error(obj: Any, data: st.DataObject) -> None:
    raw = bytearray(pack(obj))
    for _ in range(data.draw(st.integers(1, 3))):
        position = data.draw(st.integers(0, len(raw) - 1))
        raw[position] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        unpack(bytes(raw[: data.draw(st.integers(0, len(raw)))]))


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "incomplete"), (b"\x01\x02", "ExtraData"), (b"\xc1", "FormatError"), (b"\xa1\xff", "utf-8"),
        (b"\x81\x01\x02", "int is not allowed for map key"), (b"\x81\x90\x90", "not allowed for map key"),
        (b"\x92\x01", "incomplete"), (3, "no len"), (None, "no len"),
    ],
)
def test_what_is_not_one_message_is_refused(data: Any, what: str) -> None:
    with pytest.raises(ProtocolError, match=what) as caught:
        unpack(data, what="reply")
    assert not isinstance(caught.value, MessageLimitError)
    assert str(caught.value).startswith("reply")


def test_extension_types_are_refused() -> None:
    for value in (msgpack.ExtType(5, b"abcd"), msgpack.Timestamp(1), msgpack.ExtType(5, b"")):
        with pytest.raises(ProtocolError):
            unpack(msgpack.packb(value))


@pytest.mark.parametrize(
    ("limits", "obj"),
    [
        (Limits(header_bytes=10), "x" * 11), (Limits(string_bytes=10), ("x" * 11,)),
        (Limits(list_items=3), (1, 2, 3, 4)),
        (Limits(list_items=3), {str(k): k for k in range(4)}), (Limits(nesting=3), ((((1,),),),)),
        (Limits(nesting=3), {"a": {"b": ({"c": 1},)}}),
    ],
)
def test_each_limit_is_kept(limits: Limits, obj: Any) -> None:
    data = pack(obj)
    assert exact(unpack(data)) == exact(obj)
    with pytest.raises(MessageLimitError):
        unpack(data, limits)


def test_nesting_up_to_the_limit_is_read() -> None:
    deep: Any = 1
    for _ in range(DEFAULT_LIMITS.nesting):
        deep = (deep,)
    assert unpack(pack(deep)) == deep
    with pytest.raises(MessageLimitError, match="nests deeper than 64"):
        unpack(pack((deep,)))
    with pytest.raises(MessageLimitError, match="nests deeper than 64"):
        unpack(b"\x91" * 100_000 + b"\x01")


@pytest.mark.parametrize("head", [b"\xdd\x00\x0f\xff\xff", b"\xdc\xff\xff", b"\xdf\x00\x0f\xff\xff", b"\x9f"])
@pytest.mark.parametrize("filler", [b"", b"\xc4\xff" + b"\xdd" * 255])
def test_heads_that_claim_much_reserve_little(head: bytes, filler: bytes) -> None:
    """Arrays reserve their slots when their head is read: a megabyte of heads must not take gigabytes."""
    data = (filler + head) * (2_000_000 // len(filler + head))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError):
            unpack(data)
        assert tracemalloc.get_traced_memory()[1] < 300 << 20
    finally:
        tracemalloc.stop()


def test_large_payloads_pass_whatever_bytes_they_hold() -> None:
    obj = (1, b"\xdd\x00\x0f\xff\xff" * 500_000, "text", tuple(range(1000)))
    assert unpack(pack(obj)) == obj


@pytest.mark.parametrize("obj", [{1, 2}, object(), 1 << 64, -(1 << 63) - 1, "\ud800", (1, [2, {3}])])
def test_what_cannot_travel_is_refused_by_the_sender(obj: Any) -> None:
    with pytest.raises(ProtocolError, match="cannot be packed"):
        pack(obj)
    assert unpack(pack((1, 2))) == (1, 2)  # the packer is clean after a failure


def test_a_cycle_is_refused_by_the_sender() -> None:
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(ProtocolError):
        pack(cycle)


def test_threads_pack_independently() -> None:
    failures: list[Any] = []

    def work(seed: int) -> None:
        for step in range(300):
            obj = (seed, tuple(range(step % 50)), "x" * step)
            if unpack(pack(obj)) != obj:
                failures.append(obj)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_reads_any_buffer() -> None:
    data = pack((1, (2, b"x" * 10_000)))
    assert unpack(memoryview(data)) == unpack(bytearray(data)) == unpack(data)
