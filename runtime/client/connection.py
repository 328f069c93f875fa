"""One socket to one worker: messages out, messages in, never waiting beyond a deadline or for a lost worker."""
from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import (
    WIRE_ERRORS,
    GenieError,
    ProtocolError,
    RemoteExecutionError,
    VersionMismatchError,
    WorkerTimeoutError,
    WorkerUnreachableError,
)
from genie_dynamo.core.wire import pack, unpack
from genie_dynamo.runtime.lanes.zmq_frames import send_parts

POLL_MS = 100
"""How often a waiting thread looks whether its worker is still there. It sleeps in between."""


class Connection:
    """Used by one thread at a time. After an error that leaves replies under way, close it: never reuse it."""

    def __init__(self, socket: zmq.Socket[bytes], address: str, check_alive: Callable[[], None]) -> None:
        self.socket = socket
        self._check_alive = check_alive
        self._requests = 0
        self.address = address
        socket.setsockopt(zmq.RCVTIMEO, POLL_MS)

    def next_request(self) -> int:
        """A number for the next message that wants an answer."""
        self._requests += 1
        return self._requests

    def send(self, message: m.Message, frames: Sequence[Any] = ()) -> int:
        """Send; returns the size of the message part in bytes. The frames must stay unchanged until the answer."""
        header = pack(m.to_wire(message))
        if frames:
            send_parts(self.socket, [header, *frames])
        else:
            self.socket.send(header)
        return len(header)

    def receive(self, deadline_s: float) -> tuple[m.Message, list[Any], int]:
        """`(message, frames, size of the message part)`.

        Raises: WorkerLostError (through check_alive), WorkerTimeoutError, ProtocolError.
        """
        socket = self.socket
        while True:
            try:
                header = socket.recv()
                break
            except zmq.Again:
                self._check_alive()
                if time.monotonic() > deadline_s:
                    raise WorkerTimeoutError(
                        f"the worker at {self.address} is alive but did not answer in time; raise timeout_s, or look "
                        "at `genie workers` for what it is busy with", address=self.address) from None
        frames: list[Any] = []
        while socket.getsockopt(zmq.RCVMORE):
            frames.append(socket.recv(copy=False))
        return m.from_wire(unpack(header, flat=True)), frames, len(header)

    def ask(self, message: m.Message, deadline_s: float) -> m.Message:
        """Send a request and wait for its answer; answers to older requests are dropped.

        Raises: the error that the worker reports.
        """
        self.send(message)
        request = getattr(message, "request", 0)
        while True:
            answer, _, _ = self.receive(deadline_s)
            if isinstance(answer, m.Failure) and answer.request in (request, 0):
                raise to_error(answer, self.address)
            if getattr(answer, "request", request) == request:
                return answer

    def close(self, linger_ms: int = 0) -> None:
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
            f"no genie worker answers at {connection.address} within {timeout_s:g} s; start one there with "
            f"`genie worker --bind {connection.address}`, check the address and the firewall, and if it was started "
            "with keys give genie.init(cluster=...) its public key", address=connection.address) from error
    if not isinstance(answer, m.Welcome):
        raise ProtocolError(f"{connection.address} answered hello with {type(answer).__name__}")
    if answer.version != m.PROTOCOL_VERSION:
        raise VersionMismatchError(
            f"the worker at {connection.address} speaks protocol {answer.version}, this client {m.PROTOCOL_VERSION}; "
            "install the same genie-dynamo release on both sides")
    return answer


_SAME_TYPE: dict[str, type[Exception]] = {
    cls.__name__: cls
    for cls in (IndexError, ValueError, TypeError, NotImplementedError, ZeroDivisionError, AssertionError, KeyError,
                OverflowError, ArithmeticError)
}
_REMOTE_TYPES: dict[str, type[RemoteExecutionError]] = {}


def _remote_type(name: str) -> type[RemoteExecutionError]:
    """RemoteExecutionError that is also the type eager would have raised, so that the caller's `except` still works."""
    if name == "LinAlgError":
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
