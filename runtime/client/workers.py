"""A session's link to one incarnation of one worker: its connections, what is to be freed there, and its health."""
from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import WorkerLostError
from genie_dynamo.core.program import Offers
from genie_dynamo.runtime.client.connection import Connection, greet
from genie_dynamo.runtime.client.negotiation import LaneChoice, agree_on_compression, lane_lost, negotiate, offers_of
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.copies import Tally
from genie_dynamo.runtime.launcher import EmbeddedWorker
from genie_dynamo.runtime.security import Security, apply_client, harden

COMPRESSED = ("sent_before", "sent_after", "received_before", "received_after", "left_alone")
LANE_COUNTERS = ("bytes_sent", "bytes_arrived", "bytes_shared", "bytes_copied_out", "bytes_copied_in")


class WorkerLink:
    """One incarnation of a worker as its client sees it. A restarted worker gets a new link."""

    def __init__(self, *, name: str, address: str, server_key: bytes | None, embedded: EmbeddedWorker | None,
                 context: zmq.Context[Any], security: Security, token: bytes, lease_s: float, timeout_s: float,
                 why_lost: Callable[[WorkerLink], str | None], grace_s: float, require_lane: str | None = None,
                 busy_poll_s: float = 0.0, codecs: Sequence[str] = ()) -> None:
        self.name = name
        self.address = address
        self.server_key = server_key
        self.embedded = embedded
        self.frees: deque[tuple[int, int]] = deque()      # appended from finalizers, in any thread
        self.drops: deque[int] = deque()                  # programs of collected graphs
        self.in_flight = 0
        self.num_saved = 0                                # activations there that a backward may still want
        self.lost = ""
        self.token = token
        self._context = context
        self._security = security
        self.lane = LaneChoice()
        self._require_lane = require_lane
        self._busy_poll_s = busy_poll_s
        self._codecs = tuple(codecs)                      # that payload may be compressed by
        self._compressed: Counter[str] = Counter()
        self._compression = "off"
        self._hello = (token, lease_s, {"client": name}, timeout_s)
        self._why_lost = why_lost
        self._grace_s = grace_s
        self._idle: list[Connection] = []
        self._open: list[Connection] = []
        self._past = Tally()                              # of connections that were closed
        self.incarnation = ""
        self.key = f"{name}/"                             # asked for already while nobody has answered
        connection = self._connect()
        try:
            self.welcome = greet(connection, *self._hello)
        except BaseException:
            connection.close()
            raise
        self.incarnation = self.welcome.incarnation
        try:
            self._negotiate(connection, self.welcome)
        except BaseException:
            connection.close()
            raise
        self.key = f"{name}/{self.incarnation}"           # names this incarnation in tables
        self._idle.append(connection)

    def check_alive(self) -> None:
        """Raises: WorkerLostError if the worker is known to be gone."""
        if not self.lost:
            self.lost = self._why_lost(self) or ""
        if self.lost:
            raise WorkerLostError(f"worker {self.name} at {self.address} is lost: {self.lost}",
                                  worker=self.name, address=self.address, incarnation=self.incarnation)

    @contextmanager
    def connection(self) -> Iterator[Connection]:
        """A greeted connection for one thread. It is closed, not reused, after any error."""
        connection = self.borrow()
        try:
            yield connection
        except BaseException:
            connection.close()
            raise
        self.give_back(connection)

    def borrow(self) -> Connection:
        """A greeted connection; return it with give_back, or close it after an error."""
        try:
            connection = self._idle.pop()
        except IndexError:
            connection = self._opened()
        connection.begin()
        return connection

    def _opened(self) -> Connection:
        connection = self._connect()
        try:
            welcome = greet(connection, *self._hello)
        except BaseException:
            connection.close()
            raise
        if welcome.incarnation != self.incarnation:
            connection.close()
            self.lost = f"it was restarted (incarnation {welcome.incarnation} now, {self.incarnation} before)"
            self.check_alive()
        try:
            self._negotiate(connection, welcome)
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def offers(self) -> Offers:
        """The lanes that other workers may try: none where this client may use ZeroMQ alone."""
        if self._require_lane in ("zmq", "stream"):
            return ()
        return tuple(offer for offer in offers_of(self.welcome, self.address)
                     if self._require_lane in (None, offer[0]))

    def _negotiate(self, connection: Connection, welcome: m.Welcome) -> None:
        token, lease_s, _, timeout_s = self._hello
        negotiate(connection, welcome, self.lane, token, lease_s, timeout_s, self._require_lane, self._busy_poll_s)
        if self._codecs:
            self._compression = agree_on_compression(connection, welcome, self.lane, self._codecs, token,
                                                     self._compressed)

    def lane_lost(self, name: str, reason: str) -> None:
        """A lane broke while the worker lives: new connections take the next best one."""
        lane_lost(self.lane, name, reason)
        while self._idle:
            self._idle.pop().close()

    def give_back(self, connection: Connection) -> None:
        self._idle.append(connection)

    def lane_facts(self) -> dict[str, Any]:
        """Which lane payload takes, why, how fast it was, and what the lane itself has counted on idle connections.

        `bytes_shared` went as pages that both sides see: no copy was made of them on the way.
        """
        counted: Counter[str] = Counter()
        for connection in list(self._idle):
            counted.update(connection.lane_counters())
        memory = native.sum_memory(connection.lane_memory() for connection in list(self._idle))
        return {**self.lane.to_json(), **{name: counted[name] for name in LANE_COUNTERS}, "memory": memory,
                "compression": {"agreed": self._compression, **{name: self._compressed[name] for name in COMPRESSED}}}

    def copies(self) -> Tally:
        """What was moved and copied between this client and the worker so far, on this side."""
        total = self._past.plus({})
        for connection in list(self._open):
            total.merge(connection.copies())
        return total

    def _closed(self, connection: Connection) -> None:
        if connection in self._open:
            self._open.remove(connection)
            self._past.merge(connection.copies())

    def tidy(self) -> None:
        """Give back memory of idle connections that nothing has needed for a while."""
        for connection in list(self._idle):
            connection.tidy()

    def take_frees(self) -> tuple[tuple[int, int], ...]:
        """What is to be freed there, at most a message's worth."""
        if not self.frees:
            return ()
        taken: list[tuple[int, int]] = []
        while self.frees and len(taken) < 10_000:
            taken.append(self.frees.popleft())
        return tuple(taken)

    def tell(self, message: m.Message) -> None:
        """Send a message that is not answered. Raises: WorkerLostError."""
        with self.connection() as connection:
            connection.send(message)

    def ask(self, build: Callable[[int], m.Message], timeout_s: float) -> m.Message:
        """Send a request and wait for the answer. Raises: what the worker reports, or WorkerError."""
        with self.connection() as connection:
            return connection.ask(build(connection.next_request()), time.monotonic() + timeout_s)

    def close(self) -> None:
        """Close all idle connections."""
        while self._idle:
            self._idle.pop().close()

    def _connect(self) -> Connection:
        socket = self._context.socket(zmq.DEALER)
        harden(socket, "client")
        apply_client(socket, self._security, self.server_key)
        socket.connect(self.address)
        connection = Connection(socket, self.address, self.check_alive, self._grace_s, self._closed)
        self._open.append(connection)
        return connection
