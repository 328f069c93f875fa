"""A worker's native lanes: where they are offered, and their clients, none of which is waited for.

The same as streams.py for lanes of the extension. Whatever a client sends over a lane is answered over it, of any size.
"""
from __future__ import annotations

import itertools
import logging
import os
import resource
import secrets
import select
import time
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import MessageLimitError
from genie_dynamo.core.stencil import Streak
from genie_dynamo.runtime.lanes import dpdk, native
from genie_dynamo.runtime.lanes.ends import is_loopback
from genie_dynamo.runtime.worker.engine import Engine
from genie_dynamo.runtime.worker.events import Reply
from genie_dynamo.runtime.worker.steady import SteadyRun

log = logging.getLogger(__name__)

MAX_OPEN_BYTES = 4 << 30
"""A client that lets more than this of its answers pile up is dropped: half of what a lane of shared pages may hold."""

DESCRIPTORS_EACH = 8
"""What a lane takes of the process's descriptors, with a few segments."""
MAX_LANES = 1024
MAX_READY = 64
"""Kinds of answers, by their sizes, that memory was made ready for and that are remembered."""
LINGER_S = 400e-6
"""How long a worker stays awake for the next message after an answer, while messages come as fast as that."""


def max_lanes() -> int:
    """How many lanes clients may have open here: half of the descriptors that a process may have are theirs."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_LANES if limit == resource.RLIM_INFINITY else max(1, min(MAX_LANES, limit // 2 // DESCRIPTORS_EACH))


OnMessage = Callable[[bytes, bytes, Sequence[Any]], None]


class Offer(NamedTuple):
    """One kind of lane that clients may open."""

    name: str
    version: int
    address: str
    listener: Any


def offer(bind: str, bound: str, *, keys: bool) -> list[Offer]:
    """Listen for native lanes beside a worker's own socket; best first. What cannot be offered is logged.

    Args: bind, bound: the address as asked for and as it came out.  keys: whether the worker asks for keys; tcp and
        dpdk lanes have none, so then there are none of those that leave the host.
    """
    module = native.module()
    if module is None:
        log.info("no native lanes: %s", native.why_not())
        return []
    wanted = []
    if bind.startswith("ipc://"):
        wanted.append(("shm", bind.removeprefix("ipc://") + ".shm"))
    else:
        wanted.append(("shm", f"@genie-{os.getpid()}-{secrets.token_hex(8)}"))
        if not keys:
            host = bound.removeprefix("tcp://").rpartition(":")[0]
            wanted.append(("tcp", f"{host}:0"))
    if not dpdk.why_not() and (not keys or dpdk.stays_on_host()):
        wanted.insert(1, ("dpdk", ""))
    offers = []
    for name, address in wanted:
        try:
            listener = dpdk.listen() if name == "dpdk" else module.listen(name, address)
        except OSError as error:
            log.warning("the %s lane is not offered: %s", name, error)
            continue
        offers.append(Offer(name, native.lane_version(), listener.address, listener))
    return offers


class _Client:
    def __init__(self, name: bytes, channel: Any, digest: bool) -> None:
        self.name = name
        self.channel = channel
        self.digest = digest
        self.fd = channel.fileno()
        self.header = b""                         # of the message that is being handled the ordinary way
        self.steady: SteadyRun | None = None      # the run that it repeats
        self.streak = Streak()
        self.lends = channel.allocate if channel.shares_pages else None
        self.leaves: list[int] = []               # sizes of what an answer that is not complete has brought so far
        self.ready: set[tuple[int, ...]] = set()  # sizes of answers that memory was made ready for

    def receive(self, timeout_s: float, spin_s: float = 0.0) -> Any:
        """What has come: (header, frames), or numbers instead of the header where it is what `steady` knows."""
        if self.steady is not None:
            return self.channel.receive_stencil(self.steady.run, self.steady.into, 0, self.steady.frames, timeout_s,
                                                spin_s)
        return self.channel.try_receive() if timeout_s < 0 else self.channel.receive(timeout_s, spin_s)


class Lanes:
    """Every native lane of one worker, under one epoll.

    Args: as Streams (streams.py); offers: this object closes their listeners.
    """

    def __init__(self, offers: Sequence[Offer], poller: select.epoll, on_message: OnMessage,
                 on_left: Callable[[bytes], None]) -> None:
        self._offers = tuple(offers)
        self._listeners = {offer.listener.fileno(): offer.listener for offer in offers}
        self._poller = poller
        self._on_message = on_message
        self._on_left = on_left
        self._max_lanes = max_lanes()
        self._numbers = itertools.count(1)
        self._by_fd: dict[int, _Client] = {}
        self._by_name: dict[bytes, _Client] = {}
        self._to_arm: set[_Client] = set()
        self._more: set[_Client] = set()
        self._answered: _Client | None = None     # the last one
        self._answered_s = 0.0
        self._lingered = True                     # since then
        self._brisk = False                       # what came last came soon after an answer, and from the same client
        self._may_linger = len(os.sched_getaffinity(0)) > 1
        for fd in self._listeners:
            poller.register(fd, select.EPOLLIN)

    def __contains__(self, connection: bytes) -> bool:
        return connection in self._by_name

    def owns(self, fd: int) -> bool:
        return fd in self._by_fd or fd in self._listeners

    def serve(self, fd: int) -> None:
        """Do what an event asks for: accept, or take one message."""
        client = self._by_fd.get(fd)
        if client is not None:
            self._read(client)
        elif fd in self._listeners:
            self._accept(self._listeners[fd])

    def linger(self) -> None:
        """After an answer, wait awake for the same client's next message where its last one came as soon.

        To wake a sleeping core takes longer than a small run, and what runs then finds its caches cold.
        """
        client, lingered, self._lingered = self._answered, self._lingered, True
        if client is None or lingered or self._more or not (self._brisk and self._may_linger) \
                or client.name not in self._by_name:
            return
        try:
            came = client.receive(0.0, LINGER_S)
        except OSError as error:
            self._drop(client, error)
            return
        self._take(client, came)

    @property
    def has_more(self) -> bool:
        """Whether there is something to take without waiting. Ask before sleeping: it is what arms the lanes."""
        while self._to_arm:
            client = self._to_arm.pop()
            if client.name in self._by_name and not client.channel.arm():
                self._more.add(client)
        return bool(self._more)

    def serve_more(self) -> None:
        """One more message of each client that has one."""
        for client in list(self._more):
            self._more.discard(client)
            if client.name in self._by_name:
                self._read(client)

    def _read(self, client: _Client) -> None:
        try:
            came = client.receive(-1.0)
        except OSError as error:
            self._drop(client, error)
            return
        self._take(client, came)

    def _take(self, client: _Client, came: Any) -> None:
        self._to_arm.add(client)
        if came is not None:
            self._more.add(client)           # perhaps: asking again is cheaper than arming
            self._brisk = client is self._answered and time.monotonic() - self._answered_s < LINGER_S
            header, frames = came
            if type(header) is not bytes:
                header = self._repeat(client, header, frames)
                if header is None:
                    return
            client.header = header
            self._on_message(client.name, header, [native.to_tensor(frame) for frame in frames] if frames else frames)
            client.header = b""

    def _repeat(self, client: _Client, numbers: Sequence[Any], frames: Sequence[Any]) -> bytes | None:
        """Carry out a run that came as the last ones; the message where it has to take the ordinary way."""
        steady = client.steady
        assert steady is not None
        answer = steady.carry_out(numbers, frames)
        if answer is None:
            return steady.refilled(numbers)
        try:
            self._sent(client, client.channel.send_stencil(steady.result, answer.values, answer.frames, 0.0,
                                                           client.digest), answer.frames)
        except (OSError, MessageLimitError) as error:
            self._drop(client, error)
        return None

    def answered(self, reply: Reply, engine: Engine) -> None:
        """A run has taken the ordinary way that may come again as it was: once it often has, it is remembered."""
        client = self._by_name.get(reply.connection)
        if client is None:
            return
        if client.steady is not None:
            client.steady = None
            client.streak.ended()
        run = reply.repeatable
        assert run is not None
        if client.streak.lasts((run.message.program_id, run.message.template, len(client.header))):
            assert type(reply.message) is m.Result
            client.steady = SteadyRun.of(engine, run, client.header, reply.message, reply.returned, client.name)

    def lends(self, connection: bytes) -> Callable[[int], Any] | None:
        """What lends memory that a client's lane sends without a copy; None where the lane has none."""
        client = self._by_name.get(connection)
        return client.lends if client is not None else None

    def make_ready(self, connection: bytes) -> None:
        """An answer is complete: have memory for the next one of its sizes while the client still holds this one."""
        client = self._by_name.get(connection)
        if client is None or not client.leaves:
            return
        sizes, client.leaves = tuple(sorted(client.leaves)), []
        if sizes not in client.ready:
            if len(client.ready) >= MAX_READY:
                client.ready.clear()
            client.ready.add(sizes)
            for size_bytes, count in Counter(sizes).items():
                client.channel.reserve(size_bytes, count)

    def counters(self, connection: bytes) -> dict[str, int]:
        """What a client's lane has counted; nothing of what is none."""
        client = self._by_name.get(connection)
        return dict(client.channel.statistics()) if client is not None else {}

    def memory(self, connection: bytes) -> dict[str, Any]:
        """The numbers of the pool that a client's lane sends from; nothing where it has none."""
        client = self._by_name.get(connection)
        return dict(client.channel.memory() or {}) if client is not None else {}

    def send(self, connection: bytes, header: bytes, frames: Sequence[Any]) -> None:
        """Send, or queue; a client that is gone is forgotten, one that does not read is dropped."""
        client = self._by_name.get(connection)
        if client is None:
            return
        try:
            self._sent(client, client.channel.send([header, *frames] if frames else [header], 0.0, 0, client.digest),
                       frames)
        except (OSError, MessageLimitError) as error:
            self._drop(client, error)
        else:
            if frames and client.lends is not None:
                client.leaves += map(len, frames)

    def _sent(self, client: _Client, sent: int, frames: Sequence[Any]) -> None:
        """After a message to a client. Raises: MessageLimitError where too much of what it was sent is open."""
        self._answered, self._answered_s, self._lingered = client, time.monotonic(), False
        if sent and frames and client.channel.statistics()["bytes_open"] <= MAX_OPEN_BYTES:
            self._to_arm.add(client)
            return
        if not sent or frames:
            raise MessageLimitError("it does not read its answers")

    def tidy(self) -> None:
        """Give back memory of lanes that nothing has needed for a while."""
        for client in self._by_fd.values():
            client.channel.tidy()
            self._to_arm.add(client)         # what has come with that is not told of

    def close(self) -> None:
        for client in list(self._by_fd.values()):
            client.channel.close()
        self._by_fd.clear()
        self._by_name.clear()
        for item in self._offers:
            item.listener.close()

    def _accept(self, listener: Any) -> None:
        try:
            channel = listener.accept()
        except OSError as error:
            log.warning("a client's lane was refused: %s", error)
            return
        if channel is None:
            return
        if len(self._by_name) >= self._max_lanes:
            log.warning("a client's lane was refused: %d are open, and a process may have %d descriptors (ulimit -n)",
                        self._max_lanes, resource.getrlimit(resource.RLIMIT_NOFILE)[0])
            channel.close()
            return
        # ZeroMQ's own names of this first byte have five bytes, and clients cannot choose one.
        name = b"\0lane" + next(self._numbers).to_bytes(8, "big")
        client = self._by_name[name] = _Client(name, channel, channel.off_host and not is_loopback(listener.address))
        self._by_fd[client.fd] = client
        self._poller.register(client.fd, select.EPOLLIN)
        self._more.add(client)

    def _drop(self, client: _Client, error: BaseException) -> None:
        if client.channel.close_end not in ("PEER_LOST", "PENDING"):
            log.warning("a client's lane is closed: %s", error)
        self._on_left(client.name)               # who keeps accounts may ask for its counters
        self._poller.unregister(client.fd)
        del self._by_fd[client.fd], self._by_name[client.name]
        self._more.discard(client)
        self._to_arm.discard(client)
        client.channel.close()
