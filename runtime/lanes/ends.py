"""A client thread's end of the way that its runs take: a plain socket, or a native lane. One contract.

An end is used by one thread at a time. What a native lane brings lies in memory of its own or in the worker's pages.
"""
from __future__ import annotations

import contextlib
import math
import socket as socket_module
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch

from genie_dynamo.runtime.lanes import dpdk, native, stream
from genie_dynamo.runtime.lanes.transfer import Transfer

URGENT, NORMAL, BULK = range(3)
"""Priorities of transfers that wait for the same lane; a message that has begun is never interrupted."""

Message = tuple[bytes, list[torch.Tensor]]


class Numbers(NamedTuple):
    """Of a message that came as a stencil has it: the numbers in its holes, in order."""

    values: tuple[Any, ...]


class End(Protocol):
    """Where messages go and come from."""

    name: str
    carries_all: bool
    """Every message may take this way, not only small runs; answers come the same way."""

    def fits(self, header: bytes, frames: Sequence[Any]) -> bool: ...

    def send(self, header: bytes, frames: Sequence[Any], waiting: Callable[[], None]) -> None:
        """Send; `waiting` is called, and may raise, whenever nothing has moved for a while. Raises: OSError."""

    def read(self) -> Message | None:
        """The next message; None for one that comes over ZeroMQ.

        Raises: BlockingIOError where none has come for a while, EOFError, OSError, MessageLimitError.
        """

    def arm(self) -> bool:
        """Before somebody sleeps on `fileno`: False where there is a message already."""

    def fileno(self) -> int: ...

    def counters(self) -> dict[str, int]:
        """What the lane itself has counted; empty where it does not count."""

    def tidy(self) -> None:
        """Give back memory that nothing has needed for a while; called every few seconds."""

    def close(self) -> None: ...


class SocketEnd:
    """A stream (stream.py). Messages beyond its limit take the ZeroMQ socket."""

    name = "stream"
    carries_all = False

    def __init__(self, sock: stream.Socket) -> None:
        self._socket = sock
        self._reader = stream.Reader(sock)

    def fits(self, header: bytes, frames: Sequence[Any]) -> bool:
        return stream.fits(header, frames)

    def send(self, header: bytes, frames: Sequence[Any], waiting: Callable[[], None]) -> None:
        stream.send_all(self._socket, stream.to_parts(header, frames), waiting)

    def read(self) -> Message | None:
        return self._reader.read()

    def arm(self) -> bool:
        return not self._reader.has_more

    def fileno(self) -> int:
        return self._socket.fileno()

    def counters(self) -> dict[str, int]:
        return {}

    def tidy(self) -> None:
        """It keeps no memory."""

    def close(self) -> None:
        # A forked child has a duplicate of the descriptor: closing ours alone would tell the worker nothing.
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket_module.SHUT_RDWR)
        self._socket.close()


class NativeEnd:
    """A lane of genie_dynamo._native. A send that a thread leaves half done goes on in the extension's own thread."""

    carries_all = True

    def __init__(self, channel: Any, poll_s: float, spin_s: float, digest: bool) -> None:
        self.name: str = channel.name
        self.channel = channel
        self._poll_s = poll_s
        self._spin_s = spin_s
        self.digest = digest
        self.lend = channel.allocate if channel.shares_pages else None

    def fits(self, header: bytes, frames: Sequence[Any]) -> bool:
        return True

    def send(self, header: bytes, frames: Sequence[Any], waiting: Callable[[], None]) -> None:
        parts = [header, *frames] if frames else [header]
        while not self.channel.send(parts, self._poll_s, 0, self.digest):
            waiting()

    def post(self, parts: Sequence[Any], priority: int = NORMAL, deadline_s: float = math.inf) -> Transfer | None:
        """Send buffers that stay as they are until the transfer has ended; None where the lane's queue is full.

        Raises: OSError.
        """
        number = self.channel.send(parts, 0.0, 0, self.digest, priority, deadline_s, True)
        return Transfer(self.channel, number, sum(map(len, parts))) if number else None

    def read(self) -> Message | None:
        came = self.channel.receive(self._poll_s, self._spin_s)
        if came is None:
            raise BlockingIOError
        header, frames = came
        return header, [native.to_own_tensor(frame) for frame in frames] if frames else frames

    def send_stencil(self, stencil: Any, values: Sequence[Any], frames: Sequence[Any],
                     waiting: Callable[[], None]) -> None:
        """As `send`, of a message that is a stencil with these values in its holes: addresses for memory."""
        while not self.channel.send_stencil(stencil, values, frames, self._poll_s, self.digest):
            waiting()

    def read_stencil(self, stencil: Any, into: Sequence[int], first: int,
                     frames: Sequence[tuple[int, int]]) -> Numbers | Message:
        """As `read`; where the message is the stencil's and `first` its first number, its values go to the addresses
        `into` and `frames` (address, bytes), and its numbers are returned. Raises: as `read`.
        """
        came = self.channel.receive_stencil(stencil, into, first, frames, self._poll_s, self._spin_s)
        if came is None:
            raise BlockingIOError
        head, memory = came
        if type(head) is not bytes:
            return Numbers(head)
        return head, [native.to_own_tensor(frame) for frame in memory]

    def arm(self) -> bool:
        return bool(self.channel.arm())

    def fileno(self) -> int:
        return int(self.channel.fileno())

    def counters(self) -> dict[str, int]:
        return dict(self.channel.statistics())

    def tidy(self) -> None:
        self.channel.tidy()

    def close(self) -> None:
        self.channel.close()


def is_loopback(address: str) -> bool:
    """Whether HOST:PORT is this machine's own: no digest is needed there."""
    return address.startswith(("127.", "[::1]"))


def connect_native(name: str, address: str, timeout_s: float, poll_s: float, spin_s: float = 0.0,
                   digest: bool | None = None) -> NativeEnd:
    """Open a native lane. `digest` is on by default where the lane may leave the host. Raises: OSError."""
    channel = (dpdk.connect(address, timeout_s) if name == "dpdk"
               else native.module().connect(name, address, timeout_s))
    if digest is None:
        digest = channel.off_host and not is_loopback(address)
    return NativeEnd(channel, poll_s, spin_s, digest)


