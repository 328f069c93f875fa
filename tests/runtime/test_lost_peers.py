"""A worker whose peer worker, or a client, is gone in the middle of something: its loop goes on."""
from __future__ import annotations

import select
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import zmq

from genie_dynamo.runtime.worker.peers import Peer, Peers, _Way
from genie_dynamo.runtime.worker.shell import Shell

GONE = Peer("tcp://127.0.0.1:9", "", ())


@pytest.fixture
def full_socket() -> Iterator[zmq.Socket[bytes]]:
    """A way to nobody, which takes two messages."""
    socket = zmq.Context.instance().socket(zmq.DEALER)
    socket.setsockopt(zmq.SNDHWM, 2)
    socket.connect(GONE.address)
    yield socket
    socket.close(linger=0)


class BrokenEnd:
    """A lane that broke; its descriptor is `fd`."""

    name = "shm"

    def __init__(self, fd: int) -> None:
        self.channel = self
        self._fd = fd

    def try_receive(self) -> Any:
        raise ConnectionResetError("the other end is gone")

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None: ...


def test_pushes_that_neither_lane_nor_socket_takes_are_lost_and_said(
        full_socket: zmq.Socket[bytes], caplog: pytest.LogCaptureFixture) -> None:
    poller = select.epoll()
    peers = Peers(lambda address, key: full_socket, poller, lambda: None)
    way = peers._ways[GONE.address] = _Way()
    way.unsure.extend((SimpleNamespace(), [b"push"]) for _ in range(10))     # type: ignore[misc]
    with zmq.Context.instance().socket(zmq.DEALER) as other:
        peers._proven.append((GONE, BrokenEnd(other.getsockopt(zmq.FD))))    # type: ignore[arg-type]
        peers.tidy()                                                         # raised, and so ended the worker
    assert way.end is None and not way.unsure
    assert "are lost" in caplog.text
    peers.close()
    poller.close()


def test_an_event_of_a_lane_that_is_closed_by_now_is_passed_over() -> None:
    nobody = SimpleNamespace(owns=lambda fd: False, has_more=False, serve_more=lambda: None)
    shell = Shell.__new__(Shell)
    shell._socket_used, shell._socket_fd, shell._streams = False, -1, None
    shell._lanes = shell._peers = nobody                                     # type: ignore[assignment]
    shell._poller = SimpleNamespace(poll=lambda timeout_s: [(7, select.EPOLLIN)])     # type: ignore[assignment]
    assert shell._listen(0.0)
