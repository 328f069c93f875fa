"""Is the worker there? Heartbeats that no GIL can delay.

    worker   HeartbeatEcho: a ROUTER whose zmq.proxy sends every message back. The loop runs in C on its own
             thread with the GIL released, so a worker that compiles, or sits in one long C call, still answers.
    client   HeartbeatMonitor: one daemon thread that pings many workers and says which are lost, and why:
             silence beyond timeout_s (a stopped process, a dead network), the end of the process (embedded
             workers), or a connection that was closed and does not come back.

`HeartbeatState` decides; it has no sockets, threads or clock. `HeartbeatMonitor` is the shell that does the
I/O. A client that slept itself (suspended, its own GIL held) does not take that for a worker's silence.
"""
from __future__ import annotations

import contextlib
import logging
import os
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from genie_dynamo.core.errors import ConfigError, SessionClosedError
from genie_dynamo.runtime.security import Security, apply_client, apply_server, harden

_LOG = logging.getLogger(__name__)

_NONCE_BYTES = 8
_MAX_INCARNATION_BYTES = 128
_PROCESS_POLL_S = 0.1         # how soon the end of an embedded worker's process is seen
_RECONNECT_GRACE_S = 1.0      # at least so long a closed connection may take to come back
_MONITOR_EVENTS = zmq.EVENT_DISCONNECTED | zmq.EVENT_HANDSHAKE_FAILED_AUTH


# ---------------------------------------------------------------- the worker's side
class HeartbeatEcho:
    """Sends back what arrives, until `close()`, which must come before the context's term().

    Args:    bind_address: tcp://HOST:* or ipc://PATH.
    Attribute `address`: where it listens, with the port that was chosen.
    """

    def __init__(self, context: zmq.Context[Any], bind_address: str, security: Security) -> None:
        self._socket = context.socket(zmq.ROUTER)
        self._control = context.socket(zmq.PAIR)
        self._control.linger = 0
        control_address = f"inproc://genie-heartbeat-{secrets.token_hex(8)}"
        try:
            harden(self._socket, "heartbeat")
            apply_server(self._socket, security)
            self._socket.bind(bind_address)
            self._control.bind(control_address)
        except BaseException:
            self._socket.close()
            self._control.close()
            raise
        self.address = self._socket.last_endpoint.decode().rstrip("\0")
        self._thread = threading.Thread(
            target=self._run, args=(context, control_address), name="genie-heartbeat-echo", daemon=True)
        self._thread.start()

    def _run(self, context: zmq.Context[Any], control_address: str) -> None:
        try:
            with context.socket(zmq.PAIR) as control:
                control.linger = 0
                control.connect(control_address)
                zmq.proxy_steerable(self._socket, self._socket, None, control)
        except zmq.ContextTerminated:
            pass
        finally:
            self._socket.close()

    def close(self) -> None:
        """Stop echoing. Idempotent; also right after the context was terminated."""
        with contextlib.suppress(zmq.ZMQError):     # the context is gone, and the thread with it
            if not self._control.closed:
                self._control.send(b"TERMINATE", zmq.NOBLOCK)
        self._thread.join(timeout=2.0)
        self._control.close()


def reachable_address(echo_address: str, worker_address: str) -> str:
    """The echo's address as this client reaches it: its port on the host by which the client knows the worker.

    A worker that listens on a wildcard address does not know its own name.
    """
    if not (echo_address.startswith("tcp://") and worker_address.startswith("tcp://")):
        return echo_address
    return f"{worker_address.rpartition(':')[0]}:{echo_address.rpartition(':')[2]}"


# ---------------------------------------------------------------- the state machine
@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """Time has passed."""

    now_s: float
    process_alive: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Echoed:
    """Something came back."""

    now_s: float
    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnected:
    """The transport closed the connection (a process that died closes it at once; so does a network that broke)."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Refused:
    """The worker does not accept our key."""

    now_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ping:
    """Send this."""

    payload: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Lost:
    """Give the worker up. Said once."""

    reason: str


Event = Tick | Echoed | Disconnected | Refused
Command = Ping | Lost


@dataclass(slots=True, kw_only=True)
class HeartbeatState:
    """What is known of one worker. `handle(event) -> commands`; after a Lost it says nothing more."""

    incarnation: str
    interval_s: float
    timeout_s: float
    started_s: float
    nonce: Callable[[], bytes] = lambda: secrets.token_bytes(_NONCE_BYTES)
    lost: str | None = None
    round_trip_s: float | None = None
    _heard_s: float = field(init=False)
    _ticked_s: float = field(init=False)
    _next_ping_s: float = field(init=False)
    _gone_since_s: float | None = field(init=False, default=None)
    _sent: dict[bytes, float] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self._heard_s = self._ticked_s = self._next_ping_s = self.started_s

    def handle(self, event: Event) -> tuple[Command, ...]:
        if self.lost is not None:
            return ()
        if isinstance(event, Tick):
            return self._tick(event)
        if isinstance(event, Echoed):
            self._echoed(event)
        elif isinstance(event, Disconnected):
            if self._gone_since_s is None:
                self._gone_since_s = event.now_s
        else:
            return self._lose("it refuses this client's key")
        return ()

    def _lose(self, reason: str) -> tuple[Command, ...]:
        self.lost = reason
        return (Lost(reason=reason),)

    def _tick(self, event: Tick) -> tuple[Command, ...]:
        if not event.process_alive:
            return self._lose("its process has ended")
        now_s = event.now_s
        slept_s = now_s - self._ticked_s - self.interval_s
        if slept_s > 0:             # we did not look: no evidence against the worker
            self._heard_s += slept_s
            if self._gone_since_s is not None:
                self._gone_since_s += slept_s
        self._ticked_s = now_s
        silence_s = now_s - self._heard_s
        if silence_s >= self.timeout_s:
            return self._lose(f"no heartbeat for {silence_s:.1f} s (limit {self.timeout_s:g} s)")
        grace_s = min(self.timeout_s, max(_RECONNECT_GRACE_S, 2 * self.interval_s))
        if self._gone_since_s is not None and now_s - self._gone_since_s >= grace_s:
            return self._lose(f"its connection closed and did not come back within {grace_s:g} s")
        if now_s < self._next_ping_s:
            return ()
        self._next_ping_s = now_s + self.interval_s
        payload = self.nonce() + self.incarnation.encode()
        self._sent = {p: t for p, t in self._sent.items() if now_s - t < self.timeout_s}
        self._sent[payload] = now_s
        return (Ping(payload=payload),)

    def _echoed(self, event: Echoed) -> None:
        sent_s = self._sent.pop(event.payload, None)
        if sent_s is None:          # not ours, of another incarnation, or too old to say anything
            return
        self._heard_s = max(self._heard_s, event.now_s)
        self.round_trip_s = event.now_s - sent_s
        self._gone_since_s = None


# ---------------------------------------------------------------- the client's side
@dataclass(slots=True, eq=False)
class _Watched:
    """One worker as the monitor's thread sees it."""

    key: Hashable
    address: str
    state: HeartbeatState
    socket: zmq.Socket[Any]
    events: zmq.Socket[Any]
    is_alive: Callable[[], bool] | None

    def close(self) -> None:
        self.socket.disable_monitor()
        self.events.close(linger=0)
        self.socket.close(linger=0)


class HeartbeatMonitor:
    """Watches workers from one daemon thread; all methods may be called from any thread.

    Args: on_loss: called once per lost worker as on_loss(key, reason), on the monitor's thread.
    """

    def __init__(
        self, interval_s: float, timeout_s: float, clock: Callable[[], float] = time.monotonic, *,
        on_loss: Callable[[Hashable, str], None] | None = None,
    ) -> None:
        self._interval_s = interval_s
        self._timeout_s = timeout_s
        self._clock = clock
        self._on_loss = on_loss
        self._lost: dict[Hashable, str] = {}
        self._todo: deque[Callable[[], None]] = deque()
        self._watched: dict[Hashable, _Watched] = {}
        self._closing = False
        self._owner_pid = os.getpid()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._context = zmq.Context()
        self._poller = zmq.Poller()
        self._poller.register(self._wake_fd, zmq.POLLIN)
        self._thread = threading.Thread(target=self._run, name="genie-heartbeat", daemon=True)
        self._thread.start()

    # -- any thread
    def add(
        self, worker_key: Hashable, address: str, security: Security, incarnation: str, *,
        server_public: bytes | None = None, is_alive: Callable[[], bool] | None = None,
    ) -> None:
        """Watch a worker from now on; a known key is watched anew.

        Args:   address: its HeartbeatEcho's.  server_public: its key, where it has one.
                is_alive: cheap and without blocking, as `lambda: process.poll() is None`; asked every 0.1 s.
        Raises: ConfigError for an incarnation that does not fit into a ping, or keys that do not suffice;
                SessionClosedError after close().
        """
        if self._closing:
            raise SessionClosedError("the heartbeat monitor is closed; its session has ended")
        if len(incarnation.encode()) > _MAX_INCARNATION_BYTES:
            raise ConfigError(f"an incarnation of {len(incarnation.encode())} bytes; at most {_MAX_INCARNATION_BYTES}")
        socket = self._context.socket(zmq.DEALER)
        try:
            harden(socket, "heartbeat")
            apply_client(socket, security, server_public)
            events = socket.get_monitor_socket(_MONITOR_EVENTS)
            socket.connect(address)
        except BaseException:
            socket.close(linger=0)
            raise
        state = HeartbeatState(
            incarnation=incarnation, interval_s=self._interval_s, timeout_s=self._timeout_s, started_s=self._clock())
        self._lost.pop(worker_key, None)
        # From here on the sockets belong to the monitor's thread; the queue hands them over.
        watched = _Watched(worker_key, address, state, socket, events, is_alive)
        self._post(lambda: self._start(watched))

    def remove(self, worker_key: Hashable) -> None:
        """Stop watching, and forget that it was lost. An unknown key is no error."""
        self._lost.pop(worker_key, None)
        self._post(lambda: self._stop(worker_key, forget=True))

    def is_lost(self, worker_key: Hashable) -> str | None:
        """Why the worker was given up, or None."""
        return self._lost.get(worker_key)

    def round_trip_s(self, worker_key: Hashable) -> float | None:
        """The last ping's way there and back, in seconds; None before the first."""
        watched = self._watched.get(worker_key)
        return watched.state.round_trip_s if watched is not None else None

    def close(self) -> None:
        """End the thread and free its sockets. Idempotent; in a forked child, where neither lives, a no-op."""
        if os.getpid() != self._owner_pid:
            return
        self._closing = True
        self._post(lambda: None)
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout=5.0)

    def _post(self, action: Callable[[], None]) -> None:
        self._todo.append(action)
        with contextlib.suppress(OSError):      # closed: the thread is gone, nothing is watched
            os.eventfd_write(self._wake_fd, 1)

    # -- the monitor's thread
    def _start(self, watched: _Watched) -> None:
        self._stop(watched.key, forget=True)
        self._watched[watched.key] = watched
        self._poller.register(watched.socket, zmq.POLLIN)
        self._poller.register(watched.events, zmq.POLLIN)

    def _stop(self, key: Hashable, *, forget: bool) -> None:
        watched = self._watched.pop(key, None)
        if watched is not None:
            self._poller.unregister(watched.socket)
            self._poller.unregister(watched.events)
            watched.close()
        if forget:
            self._lost.pop(key, None)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._poller.poll(int(self._wait_s() * 1000) + 1)
                with contextlib.suppress(BlockingIOError):
                    os.eventfd_read(self._wake_fd)
                while self._todo:
                    self._todo.popleft()()
                for watched in list(self._watched.values()):
                    self._look_at(watched)
        except BaseException:
            # Nobody watches any more, and a worker that nobody watches must not look healthy.
            _LOG.exception("the heartbeat monitor failed")
            self._lost |= {key: "nobody watches it: the heartbeat monitor failed" for key in self._watched}
        finally:
            for key in list(self._watched):
                self._stop(key, forget=False)
            self._context.destroy(linger=0)
            os.close(self._wake_fd)

    def _wait_s(self) -> float:
        if any(watched.is_alive is not None for watched in self._watched.values()):
            return min(_PROCESS_POLL_S, self._interval_s)
        return min(1.0, self._interval_s) if self._watched else 3600.0

    def _look_at(self, watched: _Watched) -> None:
        """First everything that has arrived, then the clock: late reading must not look like silence."""
        for event in self._arrived(watched):
            self._carry_out(watched, watched.state.handle(event))
        alive = watched.is_alive is None or watched.is_alive()
        self._carry_out(watched, watched.state.handle(Tick(now_s=self._clock(), process_alive=alive)))

    def _arrived(self, watched: _Watched) -> list[Event]:
        events: list[Event] = []
        with contextlib.suppress(zmq.Again):
            while True:
                raised = recv_monitor_message(watched.events, zmq.NOBLOCK)["event"]
                kind = Disconnected if raised == zmq.EVENT_DISCONNECTED else Refused
                events.append(kind(now_s=self._clock()))
        with contextlib.suppress(zmq.Again):
            while True:
                payload = watched.socket.recv(zmq.NOBLOCK)
                events.append(Echoed(now_s=self._clock(), payload=payload))
        return events

    def _carry_out(self, watched: _Watched, commands: tuple[Command, ...]) -> None:
        for command in commands:
            if isinstance(command, Ping):
                with contextlib.suppress(zmq.Again):     # its queue is full: the state will notice the silence
                    watched.socket.send(command.payload, zmq.NOBLOCK)
                continue
            reason = f"{command.reason} (heartbeats to {watched.address})"
            self._lost[watched.key] = reason
            self._stop(watched.key, forget=False)
            if self._on_loss is not None:
                try:
                    self._on_loss(watched.key, reason)
                except Exception:
                    _LOG.exception("on_loss failed for worker %r", watched.key)
