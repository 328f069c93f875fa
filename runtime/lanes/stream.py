"""Messages over a stream socket of the operating system: the way of calls whose payload is small.

ZeroMQ hands every message to an I/O thread on either side, so a round trip wakes four threads; over a plain socket
it wakes two, and the answer is where the caller waits. What is large stays with ZeroMQ, whose threads move it while
the worker computes.

    message   u32 bytes of header | u32 number of frames | u64 bytes of each frame | header | frames
    ELSEWHERE the same with no header and no frames: the message itself comes over the ZeroMQ connection

A Unix socket lies beside the worker's own in a directory of mode 0700; both ends look who the other is.
"""
from __future__ import annotations

import contextlib
import errno
import itertools
import os
import socket as socket_module
import struct
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import torch

from genie_dynamo.core.errors import AuthenticationError, MessageLimitError

STREAM_BYTES = 1 << 20
"""Messages up to this size go over a stream where there is one."""

ELSEWHERE: Final = struct.pack("<II", 0, 0)

_PREFIX = struct.Struct("<II")
_BUFFER_BYTES = 64 << 10
_MAX_BUFFERS = 256                     # of one system call
_MAX_FRAMES = 64                       # each has more than INLINE_BYTES (zmq_frames.py)
_MAX_BYTES = STREAM_BYTES + _BUFFER_BYTES
_SOCKET_BUFFER_BYTES = STREAM_BYTES    # the kernel may give less
_PEER_CREDENTIALS = struct.Struct("iII")

Socket = socket_module.socket
Message = tuple[bytes, list[torch.Tensor]]


def fits(header: bytes, frames: Sequence[Any]) -> bool:
    """Whether a message may go over a stream."""
    if not frames:
        return len(header) <= STREAM_BYTES
    return len(frames) <= _MAX_FRAMES and len(header) + sum(map(len, frames)) <= STREAM_BYTES


def to_parts(header: bytes, frames: Sequence[Any]) -> list[Any]:
    """The buffers of a message, in order."""
    if not frames:
        return [_PREFIX.pack(len(header), 0) + header]
    sizes = struct.pack(f"<{len(frames)}Q", *map(len, frames))
    return [_PREFIX.pack(len(header), len(frames)) + sizes + header, *frames]


def send_all(sock: Socket, parts: Sequence[Any], waiting: Callable[[], None]) -> None:
    """Send from a blocking socket; `waiting` is called, and may raise, whenever it has taken nothing for a while.

    Raises: OSError.
    """
    left = deque([memoryview(part) for part in parts])
    while left:
        try:
            sent = sock.sendmsg(left)
        except BlockingIOError:
            waiting()
        else:
            _advance(left, sent)


def _advance(left: deque[memoryview], sent: int) -> None:
    """Forget the first `sent` bytes."""
    while left and sent >= left[0].nbytes:
        sent -= left.popleft().nbytes
    if sent:
        left[0] = left[0][sent:]


class Outbox:
    """What a non-blocking socket did not take yet."""

    def __init__(self, sock: Socket) -> None:
        self._socket = sock
        self._left: deque[memoryview] = deque()

    def send(self, parts: Sequence[Any]) -> bool:
        """Send what the socket takes now; True when nothing is left. Raises: OSError where the peer is gone."""
        if len(parts) == 1 and not self._left:
            try:
                sent = self._socket.send(parts[0])
            except BlockingIOError:
                sent = 0
            if sent == len(parts[0]):
                return True
            self._left.append(memoryview(parts[0])[sent:])
            return False
        self._left.extend([memoryview(part) for part in parts])
        return self.flush()

    def flush(self) -> bool:
        """Go on sending; True when nothing is left. Raises: OSError where the peer is gone."""
        try:
            while self._left:
                _advance(self._left, self._socket.sendmsg(list(itertools.islice(self._left, _MAX_BUFFERS))))
        except BlockingIOError:
            return False
        return True

    @property
    def size_bytes(self) -> int:
        """What is still to be sent."""
        return sum(part.nbytes for part in self._left)


class Reader:
    """Cuts what a socket brings into messages; what a peer may claim is bounded.

    Args: sock: blocking with a receive timeout, or non-blocking.
    """

    def __init__(self, sock: Socket) -> None:
        self._socket = sock
        self._buffer = bytearray(_BUFFER_BYTES)
        self._view = memoryview(self._buffer)
        self._start = self._end = 0
        self._header = b""
        self._frames: list[torch.Tensor] = []
        self._open: deque[memoryview] = deque()       # memory of frames that is still to be filled
        self._cut_out = False                         # header and frames are of a message that `read` will return

    def read(self) -> Message | None:
        """The next message; None for one that comes elsewhere.

        Raises: BlockingIOError while it is not complete (nothing is lost), EOFError at the end of the stream,
                MessageLimitError where the peer announces too much: the stream is of no use after that.
        """
        while not self._cut_out:
            if not self._cut():
                self._fill()
        while self._open:
            self._fill()
        header, frames = self._header, self._frames
        self._frames, self._cut_out = [], False
        return (header, frames) if header else None

    @property
    def has_more(self) -> bool:
        """Whether something of a further message has been read already."""
        return self._end > self._start

    def _cut(self) -> bool:
        """Take a message's header, and what is there of its frames, from the buffer; False if the header is not."""
        start, have = self._start, self._end - self._start
        if have < _PREFIX.size:
            return False
        header_bytes, num_frames = _PREFIX.unpack_from(self._buffer, start)
        lead = _PREFIX.size + 8 * num_frames
        if num_frames > _MAX_FRAMES or header_bytes > _MAX_BYTES:
            raise MessageLimitError(f"a message of {header_bytes} bytes and {num_frames} frames on a stream; at most "
                                    f"{_MAX_BYTES} bytes and {_MAX_FRAMES} frames are read")
        if have < lead + header_bytes:
            self._make_room(lead + header_bytes)
            return False
        self._header = bytes(self._view[start + lead:start + lead + header_bytes])
        sizes = struct.unpack_from(f"<{num_frames}Q", self._buffer, start + _PREFIX.size) if num_frames else ()
        self._start = start + lead + header_bytes
        if sizes:
            self._open_frames(sizes)
        if self._start == self._end:
            self._start = self._end = 0
        self._cut_out = True
        return True

    def _open_frames(self, sizes: Sequence[int]) -> None:
        if sum(sizes) > _MAX_BYTES:
            raise MessageLimitError(f"{len(sizes)} frames of {sum(sizes)} bytes on a stream; at most {_MAX_BYTES} are "
                                    "read")
        for size in sizes:
            frame = torch.empty(size, dtype=torch.uint8, device="cpu")
            self._frames.append(frame)
            memory = memoryview(frame.numpy())  # type: ignore[arg-type]
            ready = min(size, self._end - self._start)
            memory[:ready] = self._view[self._start:self._start + ready]
            self._start += ready
            if ready < size:
                self._open.append(memory[ready:])

    def _make_room(self, size: int) -> None:
        """Let `size` bytes from the start on fit into the buffer."""
        kept = self._buffer[self._start:self._end]
        if size > len(self._buffer):
            self._buffer = bytearray(size)
            self._view = memoryview(self._buffer)
        if self._start or len(kept) < self._end:
            self._start, self._end = 0, len(kept)
        self._view[:len(kept)] = kept

    def _fill(self) -> None:
        if self._open:
            memory = self._open[0]
            count = self._socket.recv_into(memory)
            if count == memory.nbytes:
                self._open.popleft()
            else:
                self._open[0] = memory[count:]
        else:
            if self._end == len(self._buffer):
                self._make_room(self._end - self._start + 1)
            count = self._socket.recv_into(self._view[self._end:])
            self._end += count
        if not count:
            raise EOFError("the peer has closed the stream")


# ---------------------------------------------------------------- opening one
def listen(address: str) -> Socket:
    """A listening socket at `ipc://PATH` or `tcp://HOST:PORT`; port 0 lets the system choose. Raises: OSError."""
    family, name = _family(address)
    sock = Socket(family, socket_module.SOCK_STREAM)
    try:
        _bind(sock, name)
        if family == socket_module.AF_UNIX:
            Path(str(name)).chmod(0o600)
        sock.listen(64)
    except OSError:
        sock.close()
        raise
    sock.setblocking(False)
    return sock


def _bind(sock: Socket, name: Any) -> None:
    """Bind; the file that a killed worker has left at a Unix socket's path is removed, as ZeroMQ does with its own."""
    try:
        sock.bind(name)
    except OSError as error:
        if error.errno != errno.EADDRINUSE or sock.family != socket_module.AF_UNIX:
            raise
        with Socket(sock.family, socket_module.SOCK_STREAM) as probe:
            if probe.connect_ex(name) != errno.ECONNREFUSED:
                raise
        Path(name).unlink()
        sock.bind(name)


def accept(listener: Socket) -> Socket:
    """A non-blocking socket to a client. Raises: OSError; AuthenticationError for another user's process."""
    sock, _ = listener.accept()
    _tune(sock)
    sock.setblocking(False)
    return sock


def connect(address: str, poll_s: float, timeout_s: float) -> Socket:
    """A blocking socket whose reads and writes give up after `poll_s`. Raises: OSError, AuthenticationError."""
    family, name = _family(address)
    sock = Socket(family, socket_module.SOCK_STREAM)
    sock.settimeout(timeout_s)
    try:
        sock.connect(name)
        sock.settimeout(None)
        _tune(sock)
    except BaseException:
        sock.close()
        raise
    whole, part = divmod(poll_s, 1.0)
    limit = struct.pack("ll", int(whole), int(part * 1e6))
    for option in (socket_module.SO_RCVTIMEO, socket_module.SO_SNDTIMEO):
        sock.setsockopt(socket_module.SOL_SOCKET, option, limit)
    return sock


def address_of(listener: Socket) -> str:
    """Where it listens, as the client writes it."""
    name = listener.getsockname()
    if listener.family == socket_module.AF_UNIX:
        return f"ipc://{name}"
    host = f"[{name[0]}]" if listener.family == socket_module.AF_INET6 else name[0]
    return f"tcp://{host}:{name[1]}"


def close_listener(listener: Socket) -> None:
    """Close it, and remove a Unix socket's file."""
    name = listener.getsockname()
    listener.close()
    if isinstance(name, str) and name:
        with contextlib.suppress(FileNotFoundError):
            Path(name).unlink()


def _family(address: str) -> tuple[socket_module.AddressFamily, Any]:
    if address.startswith("ipc://"):
        return socket_module.AF_UNIX, address.removeprefix("ipc://")
    host, _, port = address.removeprefix("tcp://").rpartition(":")
    found = socket_module.getaddrinfo(host.strip("[]"), int(port), type=socket_module.SOCK_STREAM)
    return found[0][0], found[0][4]


def _tune(sock: Socket) -> None:
    for option in (socket_module.SO_SNDBUF, socket_module.SO_RCVBUF):
        sock.setsockopt(socket_module.SOL_SOCKET, option, _SOCKET_BUFFER_BYTES)
    if sock.family != socket_module.AF_UNIX:
        sock.setsockopt(socket_module.IPPROTO_TCP, socket_module.TCP_NODELAY, 1)
        return
    credentials = sock.getsockopt(socket_module.SOL_SOCKET, socket_module.SO_PEERCRED, _PEER_CREDENTIALS.size)
    _, uid, _ = _PEER_CREDENTIALS.unpack(credentials)
    if uid not in (os.getuid(), 0):
        sock.close()
        raise AuthenticationError(f"the other end of the stream is a process of user {uid}, not of {os.getuid()}")
