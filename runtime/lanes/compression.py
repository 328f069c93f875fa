"""Payload frames compressed on their way, where a sample says that it pays.

    envelope   0xC1 | u16 count | count x (u8 codec, u16 frame, u64 bytes before) | the message part as it was

0xC1 begins no msgpack object. An envelope comes only over a connection whose ends have agreed on codecs (m.Compress),
and what it claims is checked before any memory is taken for it. Pieces of a frame are never compressed together with
those of another, and small frames not at all.
"""
from __future__ import annotations

import functools
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import zmq

from genie_dynamo.core.errors import ConfigError, MessageLimitError, ProtocolError
from genie_dynamo.core.limits import DEFAULT_LIMITS, Limits

MIN_FRAME_BYTES = 64 << 10
SAMPLE_BYTES = 32 << 10
"""Of the middle of a frame: compressed and decompressed to see what that takes and what is left."""
GAIN = 0.8
"""It pays where it is to take less than this part of the time without."""
ZSTD_LEVEL = 1

_MAGIC = b"\xc1"
_COUNT = struct.Struct("<H")
_ENTRY = struct.Struct("<BHQ")


class Codec(NamedTuple):
    """A library's way to make bytes fewer. `expand(data, size)` raises ProtocolError where `size` bytes do not come."""

    name: str
    number: int                                   # on the wire: append, never reorder
    compress: Callable[[Any], bytes]
    expand: Callable[[Any, int], bytes]


def _zstd() -> Codec:
    import zstandard

    compressor = zstandard.ZstdCompressor(level=ZSTD_LEVEL)
    decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 28)

    def expand(data: Any, size: int) -> bytes:
        try:
            # The library takes the frame's own word for what memory it needs.
            if zstandard.frame_content_size(data) != size:
                raise ProtocolError(f"a zstd frame of {len(data)} bytes does not hold the {size} that it is said to")
            out: bytes = decompressor.decompress(data, max_output_size=size)
        except zstandard.ZstdError as error:
            raise ProtocolError(f"a zstd frame of {len(data)} bytes cannot be expanded: {error}") from error
        return _of_size(out, size)

    return Codec("zstd", 1, compressor.compress, expand)


def _lz4() -> Codec:
    from lz4 import block

    def compress(data: Any) -> bytes:
        out: bytes = block.compress(data, store_size=False)
        return out

    def expand(data: Any, size: int) -> bytes:
        try:
            out: bytes = block.decompress(data, uncompressed_size=size)
        except block.LZ4BlockError as error:
            raise ProtocolError(f"an lz4 block of {len(data)} bytes cannot be expanded: {error}") from error
        return _of_size(out, size)

    return Codec("lz4", 2, compress, expand)


def _of_size(data: bytes, size: int) -> bytes:
    if len(data) != size:
        raise ProtocolError(f"{len(data)} bytes came out of a frame that was said to hold {size}")
    return data


_MAKERS: dict[str, tuple[str, Callable[[], Codec]]] = {"zstd": ("zstandard", _zstd), "lz4": ("lz4", _lz4)}


def codec(name: str) -> Codec | None:
    """A codec of that name, where its library is installed. Of one thread at a time: zstd's contexts have state."""
    try:
        return _MAKERS[name][1]()
    except ImportError:
        return None


@functools.cache
def installed() -> tuple[str, ...]:
    """Codecs that this process has."""
    return tuple(name for name in _MAKERS if codec(name) is not None)


def wanted(option: str) -> tuple[str, ...]:
    """The codecs that a configuration allows. Raises: ConfigError where one is named whose library is not there."""
    if option == "off":
        return ()
    if option == "auto":
        return installed()
    if codec(option) is None:
        raise ConfigError(f"compression={option!r} needs the package {_MAKERS[option][0]}, which is not installed: "
                          "pip install 'genie-dynamo[compression]', here and where the workers run",
                          option="compression")
    return (option,)


class Compression:
    """What two ends have agreed on for one connection. Used by one thread at a time.

    Args:   names: of codecs that both ends have.  bytes_per_s: of the lane, as it was measured.
            counted: gets `sent_before`, `sent_after`, `received_before`, `received_after`: bytes of the frames that
            travelled compressed, and `left_alone`, bytes of those for which that would not have paid.
    Raises: ProtocolError for a codec that this process has not.
    """

    def __init__(self, names: Sequence[Any], bytes_per_s: float, counted: Counter[str] | None = None,
                 clock: Callable[[], float] = time.perf_counter, limits: Limits = DEFAULT_LIMITS) -> None:
        found = [codec(name) if name in _MAKERS else None for name in names]
        self._codecs = tuple(c for c in found if c is not None)
        if not found or len(self._codecs) < len(found) or not 0 < bytes_per_s < float("inf"):
            raise ProtocolError(f"compression by {tuple(names)!r:.60} over a lane of {bytes_per_s!r} bytes/s was asked "
                                f"for; this side has {installed()}")
        self._by_number = {c.number: c for c in self._codecs}
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._limits = limits
        self.counted: Counter[str] = Counter() if counted is None else counted

    def pack(self, header: bytes, frames: Sequence[Any]) -> tuple[bytes, Sequence[Any]]:
        """A message with those frames compressed that gain by it."""
        packed: list[Any] = list(frames)
        entries: list[bytes] = []
        left_bytes = self._limits.inflated_bytes
        for index, frame in enumerate(frames):
            size = len(frame)
            if not MIN_FRAME_BYTES <= size <= left_bytes:
                continue
            view = memoryview(frame).cast("B")
            best = self._best(view)
            smaller = best.compress(view) if best is not None else b""
            if best is None or len(smaller) >= size * GAIN:
                self._count(left_alone=size)
                continue
            packed[index] = smaller
            entries.append(_ENTRY.pack(best.number, index, size))
            left_bytes -= size
            self._count(sent_before=size, sent_after=len(smaller))
        if not entries:
            return header, frames
        return b"".join((_MAGIC, _COUNT.pack(len(entries)), *entries, header)), packed

    def _best(self, view: memoryview) -> Codec | None:
        """The codec that makes the way shortest, judged by a sample; None where none makes it shorter."""
        start = (len(view) - SAMPLE_BYTES) // 2
        sample = view[start:start + SAMPLE_BYTES]
        best, best_s = None, GAIN * SAMPLE_BYTES / self._bytes_per_s
        for candidate in self._codecs:
            began_s = self._clock()
            smaller = candidate.compress(sample)
            candidate.expand(smaller, SAMPLE_BYTES)
            way_s = self._clock() - began_s + len(smaller) / self._bytes_per_s
            if way_s < best_s:
                best, best_s = candidate, way_s
        return best

    def unpack(self, header: bytes, frames: Sequence[Any]) -> tuple[bytes, Sequence[Any]]:
        """A message as it was before `pack`. Raises: ProtocolError, MessageLimitError; nothing was expanded then that
        is beyond a limit.
        """
        if not is_packed(header):
            return header, frames
        entries, header = _entries(header)
        total = sum(size for _, _, size in entries)
        if total > self._limits.inflated_bytes:
            raise MessageLimitError(f"compressed frames that hold {total} bytes; at most {self._limits.inflated_bytes} "
                                    "are expanded for one message", size_bytes=total)
        expanded, last = list(frames), -1
        for number, index, size in entries:
            found = self._by_number.get(number)
            if found is None or not last < index < len(frames) or size < MIN_FRAME_BYTES:
                raise ProtocolError(f"frame {index} of {len(frames)} is said to hold {size} bytes by codec {number}")
            data = frames[index].buffer if isinstance(frames[index], zmq.Frame) else memory_of(frames[index])
            expanded[index] = found.expand(data, size)
            last = index
            self._count(received_before=size, received_after=len(data))
        return header, expanded

    def _count(self, **bytes_by_name: int) -> None:
        with _count_lock:                    # the counter is that of all connections to a worker
            self.counted.update(bytes_by_name)


_count_lock = threading.Lock()


def memory_of(frame: Any) -> Any:
    """A received frame as a buffer."""
    return memoryview(frame.numpy()) if hasattr(frame, "numpy") else frame


def is_packed(header: bytes) -> bool:
    """Whether a message's frames are compressed."""
    return header[:1] == _MAGIC


def _entries(header: bytes) -> tuple[list[tuple[int, int, int]], bytes]:
    if len(header) < 1 + _COUNT.size:
        raise ProtocolError("an envelope ends before it says what is compressed")
    (count,) = _COUNT.unpack_from(header, 1)
    start = 1 + _COUNT.size
    end = start + count * _ENTRY.size
    if not count or end > len(header):
        raise ProtocolError(f"an envelope of {len(header)} bytes cannot name {count} frames")
    return [_ENTRY.unpack_from(header, at) for at in range(start, end, _ENTRY.size)], header[end:]
