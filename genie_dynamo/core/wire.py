"""msgpack with limits: how every message and every graph becomes bytes, and safely an object again.

What travels: None, bool, int (64 bit), float (every bit pattern), str, bytes, arrays and maps with str or bytes keys.
Arrays arrive as tuples. Ext types do not travel. Nothing but ProtocolError and MessageLimitError leaves this module.
"""
from __future__ import annotations

import threading
from itertools import chain
from typing import Any

import msgpack

from genie_dynamo.core.errors import MessageLimitError, ProtocolError
from genie_dynamo.core.limits import DEFAULT_LIMITS, Limits

_PACK_BUFFER_BYTES = 64 << 10
_CHEAP_BYTES = 4096
"""Below this size a message cannot claim enough array slots to matter: 4096 bytes nest at most 1365 arrays of 4096."""

_SLOT_BYTES = 8
_DECODER_DEPTH = 1024
"""What the msgpack extension nests before it gives up; it reserves an array's slots when it meets the header."""

_MAX_CLAIMED_BYTES = 256 << 20
_CONTAINER_HEADS = bytes((*range(0x80, 0xA0), 0xDC, 0xDD, 0xDE, 0xDF))
_NOT_CONTAINER_HEADS = bytes(b for b in range(256) if b not in _CONTAINER_HEADS)


class _PerThread(threading.local):
    """A packer may not be shared while it works; a new one per message would cost an allocation."""

    def __init__(self) -> None:
        self.pack = msgpack.Packer(buf_size=_PACK_BUFFER_BYTES).pack


_packers = _PerThread()


def pack(obj: Any) -> bytes:
    """The bytes of a plain object.

    Raises: ProtocolError where it holds what msgpack cannot carry (other types, integers beyond 64 bits, cycles).
    """
    try:
        data: bytes = _packers.pack(obj)
    except Exception as exc:
        raise ProtocolError(f"cannot be packed: {type(exc).__name__}: {exc}; only None, bool, 64-bit int, float, "
                            f"str, bytes, arrays and maps travel") from exc
    return data


def unpack(data: Any, limits: Limits = DEFAULT_LIMITS, what: str = "message", *, flat: bool = False) -> Any:
    """The object behind the bytes (anything with the buffer protocol); arrays are tuples.

    Args:   flat: the caller looks at the outer levels only and never recurses: depth is left to the decoder's bound.

    Raises: MessageLimitError beyond a limit; ProtocolError for anything else that is not one msgpack object.
    """
    try:
        size_bytes = len(data)
        if size_bytes > limits.header_bytes:
            raise MessageLimitError(f"{what} of {size_bytes} bytes; at most {limits.header_bytes} are read")
        items = min(limits.list_items, size_bytes)
        if size_bytes > _CHEAP_BYTES:
            _refuse_bomb(data, items, what)
        obj = msgpack.unpackb(
            data, use_list=False, raw=False, strict_map_key=True, ext_hook=_refuse_ext, timestamp=0,
            max_str_len=min(limits.string_bytes, size_bytes), max_bin_len=size_bytes, max_array_len=items,
            max_map_len=items, max_ext_len=0,
        )
    except ProtocolError:
        raise
    except Exception as exc:
        raise _translated(exc, what, limits) from exc
    if not flat and (type(obj) is tuple or type(obj) is dict):
        _check_nesting(obj, data, limits.nesting, what)
    return obj


def _refuse_ext(code: int, _: bytes) -> Any:
    raise ProtocolError(f"msgpack extension type {code} is not part of the protocol")


def _translated(exc: Exception, what: str, limits: Limits) -> ProtocolError:
    text = str(exc) or type(exc).__name__
    if isinstance(exc, (msgpack.exceptions.StackError, RecursionError)):
        return MessageLimitError(f"{what} nests deeper than {limits.nesting} levels")
    if "exceeds max" in text or isinstance(exc, MemoryError):
        return MessageLimitError(f"{what} is beyond a limit: {text[:200]}")
    return ProtocolError(f"{what} is not valid msgpack: {type(exc).__name__}: {text[:200]}")


def _check_nesting(obj: Any, data: Any, limit: int, what: str) -> None:
    """Refuse more than `limit` levels. Bytes with too few container heads cannot nest that deep: no walk then."""
    if type(data) is bytes and len(data.translate(None, _NOT_CONTAINER_HEADS)) <= limit:
        return
    level = [obj]
    for _ in range(limit):
        flat = list(chain.from_iterable(x if type(x) is tuple else x.values() for x in level))
        kinds = set(map(type, flat))
        if tuple not in kinds and dict not in kinds:
            return
        level = [x for x in flat if type(x) is tuple or type(x) is dict]
    raise MessageLimitError(f"{what} nests deeper than {limit} levels")


def _refuse_bomb(data: Any, items: int, what: str) -> None:
    """Refuse bytes whose nested array heads would reserve far more memory than the message has bytes.

    An array's slots are reserved before its elements are read, so heads of arrays that never end could claim
    gigabytes. Counting possible heads is a scan at memory speed; only where that looks bad are the true heads read.
    """
    raw = data if type(data) is bytes else bytes(data)
    small = min(items, 0xFFFF)
    claimed = min(raw.count(b"\xdd"), _DECODER_DEPTH) * items + min(raw.count(b"\xdc"), _DECODER_DEPTH) * small
    if claimed * _SLOT_BYTES <= _MAX_CLAIMED_BYTES:
        return
    bound = _MAX_CLAIMED_BYTES // _SLOT_BYTES + len(raw)
    claimed = _claimed_slots(raw, bound)
    if claimed > bound:
        raise MessageLimitError(f"{what} of {len(raw)} bytes claims arrays of {claimed} items and more")


def _claimed_slots(raw: bytes, bound: int) -> int:
    """The sum of all array lengths, head by head, without building anything; stops beyond `bound`."""
    claimed, at, end = 0, 0, len(raw)
    while at < end and claimed <= bound:
        head = raw[at]
        if head < 0x90 or head >= 0xE0 or head in (0xC0, 0xC2, 0xC3):
            at += 1
        elif head < 0xA0:
            claimed += head & 0x0F
            at += 1
        elif head < 0xC0:
            at += 1 + (head & 0x1F)
        elif head in _SIZED:
            width = _SIZED[head]
            at += 1 + width + int.from_bytes(raw[at + 1 : at + 1 + width], "big")
        elif head in _FIXED:
            at += 1 + _FIXED[head]
        elif head in (0xDC, 0xDD):
            width = 2 if head == 0xDC else 4
            claimed += int.from_bytes(raw[at + 1 : at + 1 + width], "big")
            at += 1 + width
        elif head in (0xDE, 0xDF):
            at += 3 if head == 0xDE else 5
        else:
            return claimed  # not msgpack; the decoder stops here too
    return claimed


_SIZED = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
"""Heads of bin and str: width of the length that follows. Ext heads are left out: the decoder refuses them."""

_FIXED = {0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8, 0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8}
