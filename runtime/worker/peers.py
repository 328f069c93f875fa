"""A worker's ways to other workers: ZeroMQ at once, and a native lane as soon as one is proven.

A lane is opened and proven (an echo of a nonce, as negotiation.py does for clients) in a thread of its own: two
workers that open lanes to each other at the same time must both go on answering. Until then, and after a lane has
broken, pushes take ZeroMQ. Pushes that a broken lane may have lost are sent again: the receiver knows them by call and
value.
"""
from __future__ import annotations

import logging
import secrets
import select
import threading
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import zmq

from genie_dynamo.core.errors import GenieError, ProtocolError
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.ends import NORMAL, NativeEnd, connect_native
from genie_dynamo.runtime.lanes.transfer import Transfer
from genie_dynamo.runtime.lanes.zmq_frames import send_parts
from genie_dynamo.runtime.worker.echoes import TIMEOUT_S, echo

log = logging.getLogger(__name__)

NONCE_BYTES = 64 << 10

Offers = tuple[tuple[str, int, str], ...]


class Peer(NamedTuple):
    """Another worker, as a program names it."""

    address: str
    key: str
    offers: Offers                   # native lanes: (name, version, address), best first


class _Way:
    """The lane to one peer, and what it has not taken for certain."""

    def __init__(self) -> None:
        self.end: NativeEnd | None = None
        self.fd = -1
        self.tried = False               # whether a lane was looked for; a message that names no offers does not
        self.reason = "not tried yet"
        self.unsure: deque[tuple[Transfer, list[Any]]] = deque()


class Peers:
    """Sends to other workers. Everything but the opening of lanes happens in the worker's loop.

    Args: connect: opens a ZeroMQ socket to `(address, key)`.  wake: called from other threads when a lane is there.
    """

    def __init__(self, connect: Callable[[str, str], zmq.Socket[bytes]], poller: select.epoll,
                 wake: Callable[[], None]) -> None:
        self._connect = connect
        self._poller = poller
        self._wake = wake
        self._sockets: dict[str, zmq.Socket[bytes]] = {}
        self._ways: dict[str, _Way] = {}
        self._by_fd: dict[int, tuple[Peer, _Way]] = {}
        self._proven: deque[tuple[Peer, NativeEnd]] = deque()      # from the opening threads
        self._closed = False

    def send(self, peer: Peer, session: bytes, parts: list[Any], priority: int = NORMAL) -> None:
        """Send a message and its frames, which stay as they are from here on. What a run waits for in the middle of a
        call overtakes what is BULK, on a lane; ZeroMQ keeps the order.
        """
        way = self._ways.get(peer.address)
        if way is None:
            way = self._ways[peer.address] = _Way()
        if peer.offers and not way.tried and native.module() is not None:
            way.tried = True
            threading.Thread(target=self._open, args=(peer, session), name="genie-peer-lane", daemon=True).start()
        if self._proven:
            self._take_proven()
        if way.end is None or not self._over_lane(peer, way, parts, priority):
            self._over_zmq(peer, parts)

    def _over_lane(self, peer: Peer, way: _Way, parts: list[Any], priority: int) -> bool:
        end = way.end
        assert end is not None
        try:
            self._settle(way)
            sent = end.post(parts, priority)
        except OSError as error:
            self._broke(peer, way, error)
            return False
        if sent is not None:
            way.unsure.append((sent, parts))
        return sent is not None

    def _over_zmq(self, peer: Peer, parts: list[Any]) -> None:
        socket = self._sockets.get(peer.address)
        if socket is None:
            socket = self._sockets[peer.address] = self._connect(peer.address, peer.key)
        send_parts(socket, parts, zmq.NOBLOCK)

    def owns(self, fd: int) -> bool:
        return fd in self._by_fd

    def serve(self, fd: int) -> None:
        """Something about a lane has changed: acknowledgements, or its end."""
        peer, way = self._by_fd[fd]
        try:
            self._settle(way)
            assert way.end is not None
            while not way.end.channel.arm():
                self._settle(way)
        except OSError as error:
            self._broke(peer, way, error)

    def tidy(self) -> None:
        """Let go of what peers have by now."""
        if self._proven:
            self._take_proven()
        for fd in [fd for fd, (_, way) in self._by_fd.items() if way.unsure]:
            self.serve(fd)

    def _settle(self, way: _Way) -> None:
        """Take what has come (a refusal, at most) and forget what the peer has for certain. Raises: OSError."""
        assert way.end is not None
        channel = way.end.channel
        while (came := channel.try_receive()) is not None:
            log.warning("another worker refused a push: %.200r", came[0])
        while way.unsure and way.unsure[0][0].done() and way.unsure[0][0].end == "OK":
            way.unsure.popleft()

    def _broke(self, peer: Peer, way: _Way, error: OSError) -> None:
        log.warning("the lane to worker %s broke (%s); pushes take ZeroMQ", peer.address, error)
        assert way.end is not None
        self._poller.unregister(way.fd)
        del self._by_fd[way.fd]
        way.end.close()
        way.end, way.reason = None, f"it broke: {error}"
        again, way.unsure = way.unsure, deque()
        try:
            for _, parts in again:
                self._over_zmq(peer, parts)
        except zmq.ZMQError as lost:         # the peer itself is gone; whoever waits for these pushes is told by time
            log.warning("pushes to worker %s are lost: %s", peer.address, lost)

    def _take_proven(self) -> None:
        while self._proven:
            peer, end = self._proven.popleft()
            way = self._ways[peer.address]
            way.end, way.fd, way.reason = end, end.fileno(), "proven"
            self._by_fd[way.fd] = (peer, way)
            self._poller.register(way.fd, select.EPOLLIN)
            self.serve(way.fd)

    def _open(self, peer: Peer, session: bytes) -> None:
        for name, version, address in peer.offers:
            if version != native.lane_version():
                continue
            try:
                end = connect_native(name, address, TIMEOUT_S, TIMEOUT_S)
            except OSError as error:
                log.info("no %s lane to worker %s: %s", name, peer.address, error)
                continue
            try:
                prove(end, session)
            except (OSError, GenieError) as error:
                log.warning("the %s lane to worker %s opens but is not proven: %s", name, peer.address, error)
                end.close()
                continue
            if self._closed:
                end.close()
                return
            self._proven.append((peer, end))
            self._wake()
            return

    def lanes(self) -> dict[str, dict[str, Any]]:
        """Which lane pushes to each peer take, by its address, and what that lane has counted."""
        return {address: {"name": "zmq", "reason": way.reason} if way.end is None else
                {"name": way.end.name, "reason": way.reason,
                 **{name: way.end.counters()[name] for name in ("bytes_sent", "bytes_shared", "bytes_copied_out")}}
                for address, way in self._ways.items()}

    def close(self) -> None:
        self._closed = True
        for _, way in self._by_fd.values():
            if way.end is not None:
                way.end.close()
        for socket in self._sockets.values():
            socket.close(linger=0)


def prove(end: NativeEnd, session: bytes) -> None:
    """Send bytes that nobody can guess there and back. Raises: OSError, GenieError."""
    nonce = torch.frombuffer(bytearray(secrets.token_bytes(NONCE_BYTES)), dtype=torch.uint8)
    if not torch.equal(echo(end, session, nonce), nonce):
        raise ProtocolError("what came back is not what was sent")
