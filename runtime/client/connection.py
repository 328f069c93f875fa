"""One thread's way to one worker: messages out, messages in, never waiting beyond a deadline or for a lost worker.

It is a ZeroMQ socket and, where the worker offers one that both can use, a better way (runtime/lanes/ends.py): a
native lane, which takes everything and brings its answers, or a stream for small runs, whose large answers come over
the ZeroMQ socket, and the stream says so. Negotiation (runtime/client/negotiation.py) decides.
"""
from __future__ import annotations

import socket as socket_module
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn, TypeVar

import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import (
    WIRE_ERRORS,
    GenieError,
    LaneLostError,
    ProtocolError,
    RemoteExecutionError,
    VersionMismatchError,
    WorkerLostError,
    WorkerTimeoutError,
    WorkerUnreachableError,
)
from genie_dynamo.core.stencil import WIDE
from genie_dynamo.core.wire import pack, unpack
from genie_dynamo.runtime.lanes.compression import Compression, is_packed
from genie_dynamo.runtime.lanes.copies import Tally, Work, count_for
from genie_dynamo.runtime.lanes.ends import End, Message, NativeEnd, Numbers
from genie_dynamo.runtime.lanes.zmq_frames import send_parts

POLL_MS = 100
"""How often a waiting thread looks whether its worker is still there. It sleeps in between."""
SEND_TIMEOUT_S = 60.0
"""How long a lane may take nothing of a message that no call's deadline covers."""
STREAM_GRACE_S = 1.0
"""How long a closed stream may be ahead of the news that its worker has ended, where that is seen at once."""

T = TypeVar("T")
Received = tuple[m.Message, Sequence[Any], int]
"""A message, what came beside it, and the size of the message part."""


class Connection:
    """Used by one thread at a time. After an error that leaves replies under way, close it: never reuse it.

    Args: on_closed: told of this connection when it closes, while its counters can be asked still.
    """

    def __init__(self, socket: zmq.Socket[bytes], address: str, check_alive: Callable[[], None],
                 grace_s: float = STREAM_GRACE_S,
                 on_closed: Callable[[Connection], None] = lambda connection: None) -> None:
        self.socket = socket
        self._check_alive = check_alive
        self._grace_s = grace_s
        self._requests = WIDE
        self.address = address
        self.end: End | None = None
        self._streaming = False            # the answer comes over the end
        self._tally = Tally()
        self._work = Work(self._tally)
        self._on_closed = on_closed
        self.compression: Compression | None = None
        socket.setsockopt(zmq.RCVTIMEO, POLL_MS)
        socket.setsockopt(zmq.SNDTIMEO, POLL_MS)

    def next_request(self) -> int:
        """A number for the next message that wants an answer."""
        self._requests += 1
        return self._requests

    def request(self, message: m.Message, frames: Sequence[Any] = ()) -> None:
        """Send what will be answered: over the lane where there is one, else over the ZeroMQ socket."""
        self._streaming = self._has_lane
        self.send(message, frames)

    @property
    def _has_lane(self) -> bool:
        return self.end is not None and self.end.carries_all

    def send(self, message: m.Message, frames: Sequence[Any] = ()) -> int:
        """Send what is not answered; returns the size of the message part in bytes.

        The frames must stay unchanged until a later message is answered. A Cancel is to overtake what it cancels.
        """
        header = pack(m.to_wire(message))
        if self._has_lane and type(message) is not m.Cancel:
            self._send_over_end(header, frames, time.monotonic() + SEND_TIMEOUT_S)
        else:
            self._send_over_socket(header, frames, time.monotonic() + SEND_TIMEOUT_S)
        return len(header)

    def run(self, header: bytes, frames: Sequence[Any], deadline_s: float, streaming: bool = True) -> None:
        """Send a packed Run, over the stream or lane if that is allowed and it fits; `receive` then waits there.

        Raises: WorkerLostError, WorkerTimeoutError.
        """
        end = self.end
        self._streaming = end is not None and (streaming or end.carries_all) and end.fits(header, frames)
        if self._streaming:
            self._send_over_end(header, frames, deadline_s)
        else:
            self._send_over_socket(header, frames, deadline_s)

    def _send_over_socket(self, header: bytes, frames: Sequence[Any], deadline_s: float) -> None:
        if self.compression is not None and frames:
            header, frames = self.compression.pack(header, frames)
        self._tally.moved_out += len(header) + (sum(map(len, frames)) if frames else 0)
        while True:
            try:
                send_parts(self.socket, [header, *frames])
                return
            except zmq.Again:        # a full queue takes no part of a message
                self._still_waiting(deadline_s)

    def _send_over_end(self, header: bytes, frames: Sequence[Any], deadline_s: float) -> None:
        assert self.end is not None
        if self.compression is not None and frames and self._has_lane:
            header, frames = self.compression.pack(header, frames)
        if not self.end.carries_all:
            self._tally.moved_out += len(header) + (sum(map(len, frames)) if frames else 0)
        try:
            self.end.send(header, frames, lambda: self._still_waiting(deadline_s))
        except GenieError:
            raise            # a WorkerTimeoutError is an OSError too
        except OSError as error:
            self._end_broke(error)

    def receive(self, deadline_s: float) -> Received:
        """`(message, frames, size of the message part)`.

        Raises: WorkerLostError (through check_alive), WorkerTimeoutError, ProtocolError.
        """
        count_for(self._work)
        if self._streaming:
            came = self._from_end(deadline_s)
            if came is not None:
                if not self._has_lane:
                    header, frames = came
                    self._tally.moved_in += len(header) + sum(frame.nbytes for frame in frames)
                return self._message(*came)
        return self._from_socket(deadline_s)

    @property
    def takes_stencils(self) -> bool:
        """Whether messages may be filled in and recognised; what is to be compressed is not."""
        return type(self.end) is NativeEnd and self.compression is None

    def run_stencil(self, stencil: Any, values: Sequence[Any], frames: Sequence[Any], deadline_s: float) -> None:
        """As `run`, where `takes_stencils`: see NativeEnd.send_stencil."""
        assert type(self.end) is NativeEnd
        self._streaming = True
        try:
            self.end.send_stencil(stencil, values, frames, lambda: self._still_waiting(deadline_s))
        except GenieError:
            raise
        except OSError as error:
            self._end_broke(error)

    def receive_stencil(self, stencil: Any, into: Sequence[int], request: int, frames: Sequence[tuple[int, int]],
                        deadline_s: float) -> Numbers | Received:
        """The numbers of an answer that is the stencil's and has gone to the addresses; another one as `receive`."""
        end = self.end
        assert type(end) is NativeEnd
        came = self._waited_for(lambda: end.read_stencil(stencil, into, request, frames), deadline_s)
        if isinstance(came, Numbers):
            return came
        header, frames_came = came
        return m.from_wire(unpack(header, flat=True)), frames_came, len(header)

    def _from_end(self, deadline_s: float) -> Message | None:
        assert self.end is not None
        return self._waited_for(self.end.read, deadline_s)

    def _waited_for(self, read: Callable[[], T], deadline_s: float) -> T:
        while True:
            try:
                return read()
            except BlockingIOError:
                self._still_waiting(deadline_s)
            except (EOFError, OSError) as error:
                self._end_broke(error)

    def wait_handle(self) -> Any:
        """What to poll for an answer: a socket or a descriptor; None where there is an answer already."""
        if not self._streaming:
            return self.socket
        assert self.end is not None
        return self.end.fileno() if self.end.arm() else None

    def _from_socket(self, deadline_s: float) -> Received:
        socket = self.socket
        while True:
            try:
                header = socket.recv()
                break
            except zmq.Again:
                self._still_waiting(deadline_s)
        frames: list[Any] = []
        while socket.getsockopt(zmq.RCVMORE):
            frames.append(socket.recv(copy=False))
        self._tally.moved_in += len(header) + sum(map(len, frames))
        return self._message(header, frames)

    def _message(self, header: bytes, frames: Sequence[Any]) -> Received:
        if is_packed(header):
            if self.compression is None:
                raise ProtocolError(f"{self.address} sent compressed frames that were not agreed on")
            header, frames = self.compression.unpack(header, frames)
        return m.from_wire(unpack(header, flat=True)), frames, len(header)

    def _still_waiting(self, deadline_s: float) -> None:
        self._check_alive()
        if time.monotonic() > deadline_s:
            raise WorkerTimeoutError(
                f"the worker at {self.address} is alive but did not answer in time; raise timeout_s, or look "
                "at `genie workers` for what it is busy with", address=self.address) from None

    def _end_broke(self, error: BaseException) -> NoReturn:
        """The stream or lane is closed: mostly because the worker is gone, which shows within moments."""
        if self._has_lane:
            self._lane_broke(error)
        until_s = time.monotonic() + self._grace_s
        while time.monotonic() < until_s:
            self._check_alive()
            time.sleep(POLL_MS / 1000)
        raise WorkerLostError(f"the worker at {self.address} has closed a connection in the middle of a call ({error})",
                              address=self.address) from error

    def _lane_broke(self, error: BaseException) -> NoReturn:
        """Ask over the ZeroMQ socket, which nothing else uses now, whether the worker is still there."""
        assert self.end is not None
        self._tally.add(self.end.counters())
        end, self.end, self._streaming, self.compression = self.end, None, False, None
        self._work = Work(self._tally)
        end.close()
        try:
            self.ask(m.Stats(self.next_request()), time.monotonic() + max(self._grace_s, STREAM_GRACE_S))
        except WorkerLostError:
            raise
        except GenieError as silent:
            raise WorkerLostError(f"the worker at {self.address} has closed a lane in the middle of a call ({error}) "
                                  f"and does not answer ({silent})", address=self.address) from error
        raise LaneLostError(f"the {end.name} lane to the worker at {self.address} broke ({error}); the worker lives",
                            address=self.address, lane=end.name, reason=str(error)) from error

    def open_end(self, end: End, route: bytes, token: bytes, lease_s: float, timeout_s: float) -> None:
        """Say hello over a stream or lane: from here on runs take it. Raises: what the worker says, or WorkerError."""
        self.end = end
        self._work = Work(self._tally, end.lend if type(end) is NativeEnd else None)
        deadline_s = time.monotonic() + timeout_s
        self.run(pack(m.to_wire(m.Hello(m.PROTOCOL_VERSION, token, lease_s, {}, route))), (), deadline_s)
        answer, _, _ = self.receive(deadline_s)
        if isinstance(answer, m.Failure):
            raise to_error(answer, self.address)

    def begin(self) -> None:
        """What this thread copies from here on is for this connection."""
        count_for(self._work)

    def copies(self) -> Tally:
        """What was moved and copied of all messages in both directions, with what the lane has counted."""
        return self._tally.plus(self.lane_counters())

    def lane_counters(self) -> dict[str, int]:
        """What the native lane has counted, of every message in both directions; nothing where there is none."""
        return self.end.counters() if self.end is not None else {}

    def lane_memory(self) -> dict[str, Any]:
        """The numbers of the pool that the native lane sends from; nothing where there is none."""
        return dict(self.end.channel.memory() or {}) if type(self.end) is NativeEnd else {}

    def tidy(self) -> None:
        """Give back memory of the lane that nothing has needed for a while."""
        if self.end is not None:
            self.end.tidy()

    def close_end(self) -> None:
        """Let go of the stream or lane: everything takes the ZeroMQ socket again."""
        if self.end is not None:
            self._tally.add(self.end.counters())
            self.end.close()
        self.end, self._streaming, self.compression = None, False, None
        self._work = Work(self._tally)

    def ask(self, message: m.Message, deadline_s: float) -> m.Message:
        """Send a request and wait for its answer; answers to older requests are dropped.

        Raises: the error that the worker reports.
        """
        self.request(message)
        request = getattr(message, "request", 0)
        while True:
            answer, _, _ = self.receive(deadline_s)
            if isinstance(answer, m.Failure) and answer.request in (request, 0):
                raise to_error(answer, self.address)
            if getattr(answer, "request", request) == request:
                return answer

    def close(self, linger_ms: int = 0) -> None:
        self._on_closed(self)
        if self.end is not None:
            self.end.close()
        self.socket.close(linger=linger_ms)


def greet(connection: Connection, token: bytes, lease_s: float, facts: dict[str, Any], timeout_s: float) -> m.Welcome:
    """Say hello on a fresh connection.

    Raises: WorkerUnreachableError when nobody answers, VersionMismatchError, AuthenticationError.
    """
    hello = m.Hello(m.PROTOCOL_VERSION, token, lease_s, facts)
    try:
        answer = connection.ask(hello, time.monotonic() + timeout_s)
    except WorkerTimeoutError as error:
        raise WorkerUnreachableError(
            f"no genie worker answers at {connection.address} within {timeout_s:g} s; "
            f"{_what_to_do(connection.address)}", address=connection.address) from error
    if not isinstance(answer, m.Welcome):
        raise ProtocolError(f"{connection.address} answered hello with {type(answer).__name__}")
    if answer.version != m.PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"the worker at {connection.address} speaks protocol {answer.version}, this client {m.PROTOCOL_VERSION}; "
            "install the same genie-dynamo release on both sides")
    return answer


def _what_to_do(address: str) -> str:
    if address.startswith("tcp://"):
        host = address.removeprefix("tcp://").rpartition(":")[0].strip("[]")
        try:
            socket_module.getaddrinfo(host, None)
        except OSError as error:
            return f"the name {host!r} leads nowhere ({error.strerror or error}): check it"
    return (f"if none runs there, start one with `genie worker --bind {address}`, and check the port and the firewall; "
            "if one runs with keys, it answers only who knows its server.key and whose own *.key file lies in its "
            "--keys directory (its log names a key that it refuses): name both in cluster.yaml")


def beside(address: str, told: str) -> str:
    """A worker's other endpoint: its port, at the host under which we reach the worker."""
    if not told.startswith("tcp://"):
        return told
    host = address.removeprefix("tcp://").rpartition(":")[0]
    return f"tcp://{host}:{told.rpartition(':')[2]}"


_SAME_TYPE: dict[str, type[Exception]] = {
    cls.__name__: cls
    for cls in (IndexError, ValueError, TypeError, NotImplementedError, ZeroDivisionError, AssertionError, KeyError,
                OverflowError, ArithmeticError)
}
_REMOTE_TYPES: dict[str, type[RemoteExecutionError]] = {}


def _remote_type(name: str) -> type[RemoteExecutionError]:
    """RemoteExecutionError that is also the type eager would have raised, so that the caller's `except` still works."""
    if name == "_LinAlgError":
        import torch

        base: type[Exception] = torch.linalg.LinAlgError  # type: ignore[attr-defined]
    elif name in _SAME_TYPE:
        base = _SAME_TYPE[name]
    else:
        return RemoteExecutionError
    if name not in _REMOTE_TYPES:
        _REMOTE_TYPES[name] = type(f"Remote{name}", (RemoteExecutionError, base), {"__str__": Exception.__str__})
    return _REMOTE_TYPES[name]


def to_error(failure: m.Failure, address: str) -> GenieError:
    """The exception that a worker's Failure stands for."""
    cls = WIRE_ERRORS.get(failure.kind)
    facts = {str(k): v for k, v in failure.facts.items()}
    facts["worker"] = address
    if cls is None or cls is RemoteExecutionError:
        return _remote_type(str(facts.get("exception", "")))(failure.message, **facts)
    return cls(failure.message, **facts)
