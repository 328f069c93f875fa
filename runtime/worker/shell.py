"""Sockets and the loop of a worker: the only place where its state machine and engine meet the network.

One thread does everything that needs Python. Messages are read between the slices of running work, so a small call
of one client does not wait for the end of a long one of another. Heartbeats are answered elsewhere, in C.

A ZeroMQ socket says by its descriptor only that its state has changed: after every use of it, it is asked again before
anybody sleeps. Streams are plain sockets; while only they are used, ZeroMQ costs nothing.
"""
from __future__ import annotations

import logging
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import torch
import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import GenieError, ProtocolError, WorkerBusyError
from genie_dynamo.core.wire import pack, unpack
from genie_dynamo.runtime.flat import RunStatus
from genie_dynamo.runtime.lanes import stream
from genie_dynamo.runtime.lanes.compression import is_packed
from genie_dynamo.runtime.lanes.ends import BULK
from genie_dynamo.runtime.lanes.zmq_frames import send_parts
from genie_dynamo.runtime.worker.background import Background
from genie_dynamo.runtime.worker.engine import STREAM_BYTES, Engine, Outlets
from genie_dynamo.runtime.worker.events import (
    Abandon,
    Command,
    Deliver,
    Execute,
    Failed,
    Finished,
    Left,
    Measure,
    Received,
    Reply,
    Tick,
    failure,
)
from genie_dynamo.runtime.worker.lanes import Lanes, Offer
from genie_dynamo.runtime.worker.peers import Peer, Peers
from genie_dynamo.runtime.worker.records import RunRecord
from genie_dynamo.runtime.worker.state import WorkerState
from genie_dynamo.runtime.worker.streams import Streams

log = logging.getLogger(__name__)

SLICE_S = 0.003
"""A run gives way to waiting messages after this long."""
TICK_S = 1.0
WAKE_IDENTITY = b"genie-wake"
"""The connection of this process's own helper threads; a client cannot take it, ROUTER refuses it twice."""


class Shell:
    """Drives one worker.

    Args:
        connect_peer: `connect_peer(address, key)` opens the way to another worker.
        listener: where clients may open streams; None where they may not.
        offers: the native lanes that clients may open.
        wake: makes `step` return from its wait; called from other threads.
    """

    def __init__(self, socket: zmq.Socket[bytes], state: WorkerState, engine: Engine,
                 connect_peer: Callable[[str, str], zmq.Socket[bytes]], listener: stream.Socket | None = None,
                 offers: Sequence[Offer] = (), wake: Callable[[], None] = lambda: None) -> None:
        self._socket = socket
        self._state = state
        self._engine = engine
        self._ready: deque[RunRecord] = deque()
        self._waiting: set[RunRecord] = set()
        self._sent: dict[RunRecord, set[int]] = {}
        self._background = Background(engine.device, engine.num_threads, connect_peer, self._answer)
        self._next_tick_s = time.monotonic() + TICK_S
        self._socket_used = True          # since it last said that there is nothing to read
        self._poller = select.epoll()
        self._socket_fd = int(socket.getsockopt(zmq.FD))
        self._poller.register(self._socket_fd, select.EPOLLIN)
        self._streams = Streams(listener, self._poller, self._message, self._left) if listener is not None else None
        self._peers = Peers(connect_peer, self._poller, wake)
        engine.peer_lanes = self._peers.lanes
        self._lanes = Lanes(offers, self._poller, self._message, self._left)
        engine.outlets = Outlets(self._lanes.lends, self._peers.lends, self._lanes.counters,
                                  self._lanes.memory)
        self.stopping = False

    def run_forever(self) -> None:
        """Serve until `stopping` is set and nothing is left to do."""
        while not (self.stopping and not self._ready and not self._waiting):
            self.step()

    def step(self) -> None:
        """One slice of work and then what has arrived meanwhile; or, where there is no work, wait for a message."""
        if self._ready:
            self._advance(self._ready.popleft())
            while self._ready and self._listen(0.0):
                pass
        elif self._background:
            if not self._listen(0.0):
                self._background.step()
        else:
            self._listen(TICK_S)
        now_s = time.monotonic()
        if now_s >= self._next_tick_s:
            self._next_tick_s = now_s + TICK_S
            self._carry_out(self._state.handle(Tick(now_s)))
            self._peers.tidy()
            self._lanes.tidy()

    def _listen(self, timeout_s: float) -> bool:
        """Handle what has arrived, at most one message of each client; False where nothing has, in time."""
        received = False
        if self._socket_used:
            received = self._receive()
            self._socket_used = received
        # A backlog on the one kind of socket does not keep the other waiting.
        busy = received or (self._streams is not None and self._streams.has_more)
        if timeout_s and not busy:
            self._lanes.linger()
        busy |= self._lanes.has_more
        events = self._poller.poll(0.0 if busy else timeout_s)
        for fd, mask in events:
            if fd == self._socket_fd:
                self._socket_used = True
            elif self._lanes.owns(fd):
                self._lanes.serve(fd)
            elif self._peers.owns(fd):
                self._peers.serve(fd)
            elif self._streams is not None:
                self._streams.serve(fd, mask)
            # Else it was closed while an earlier event of this batch was served.
        if self._streams is not None and self._streams.has_more:
            self._streams.serve_more()
        self._lanes.serve_more()
        return busy or bool(events)

    def _receive(self) -> bool:
        """Read and handle one message of the ZeroMQ socket; False where none has come."""
        socket = self._socket
        try:
            connection = socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return False
        header = socket.recv() if socket.getsockopt(zmq.RCVMORE) else b""
        frames: list[Any] = []
        while socket.getsockopt(zmq.RCVMORE):
            frames.append(socket.recv(copy=False))
        if connection == WAKE_IDENTITY:
            self._look_again()
        else:
            self._message(connection, header, frames)
        return True

    def _message(self, connection: bytes, header: bytes, frames: Sequence[Any]) -> None:
        try:
            if is_packed(header):
                compression = self._state.compressions.get(connection)
                if compression is None:
                    raise ProtocolError("frames came compressed, which was not agreed on")
                header, frames = compression.unpack(header, frames)
            message = m.from_wire(unpack(header, flat=True))
        except (GenieError, RecursionError) as error:
            log.warning("a peer sent bytes that are not a message: %s", error)
            self._carry_out([Reply(connection, failure(0, error))])
            return
        self._carry_out(self._state.handle(Received(connection, message, frames, time.monotonic())))

    def _left(self, connection: bytes) -> None:
        self._carry_out(self._state.handle(Left(connection)))

    def _look_again(self) -> None:
        """Compiled code has come: whoever waits may have waited for it."""
        self._ready.extend(self._waiting)
        self._waiting.clear()

    def _carry_out(self, commands: Sequence[Command]) -> None:
        for command in commands:
            if type(command) is Reply:
                self._reply(command.connection, command.message, command.frames)
                if command.repeatable is not None and command.connection not in self._state.compressions:
                    self._lanes.answered(command, self._engine)
            elif type(command) is Execute:
                run = command.run
                self._waiting.discard(run)
                if run not in self._ready:
                    self._ready.append(run)
            elif type(command) is Abandon:
                self._drop(command.run)
            elif type(command) is Deliver:
                self._deliver(command)
            elif type(command) is Measure:
                self._background.add(command)

    def _deliver(self, command: Deliver) -> None:
        answer: m.Message = m.Done(command.request, None)
        try:
            for message, frames in command.letters:
                self._peers.send(Peer(command.address, command.key, ()), message.session,
                                 [pack(m.to_wire(message)), *frames], BULK)
        except (zmq.ZMQError, GenieError) as error:
            answer = failure(command.request, WorkerBusyError(
                f"the way from this worker to {command.address} takes nothing ({error})"))
        self._reply(command.connection, answer, ())

    def _drop(self, run: RunRecord) -> None:
        self._waiting.discard(run)
        self._sent.pop(run, None)
        if run in self._ready:
            self._ready.remove(run)

    def _advance(self, run: RunRecord) -> None:
        self._engine.works_for(run.session.work)
        try:
            status = self._engine.advance(run, time.monotonic() + SLICE_S, self._emit)
            if status is RunStatus.DONE and not run.abandoned:
                values, kept, state = self._engine.results(run, self._sent.pop(run, set()))
                self._carry_out(self._state.handle(Finished(run, values, kept, time.monotonic(), state)))
                return
        except Exception as error:
            # An op of the user's model raised, or memory ran out: the caller gets it, the worker lives on.
            self._sent.pop(run, None)
            self._carry_out(self._state.handle(Failed(run, error, time.monotonic())))
            return
        if run.abandoned:
            self._drop(run)
        elif status is RunStatus.YIELDED:
            self._ready.append(run)
        else:
            self._waiting.add(run)

    def _emit(self, run: RunRecord, value_id: int, value: Any) -> bool:
        for sent_id, address, key, offers in run.program.sends:
            if sent_id == value_id:
                frames: list[Any] = []
                staged = self._engine.stage(value, frames)
                push = m.Push(run.session.token, run.message.call_id, value_id, staged)
                self._peers.send(Peer(address, key, offers), run.session.token, [pack(m.to_wire(push)), *frames])
                if isinstance(value, torch.Tensor):
                    run.session.pushed_bytes += value.numel() * value.element_size()
        index = run.loaded.return_index.get(value_id)
        if index is None or self._engine.size_bytes(value) < STREAM_BYTES or self._engine.begin_stage(value):
            return False
        frames = []
        staged = self._engine.stage(value, frames)
        self._reply(run.connection, m.Partial(run.message.request, ((index, staged),)), frames)
        self._sent.setdefault(run, set()).add(value_id)
        return True

    def _reply(self, connection: bytes, message: m.Message, frames: Sequence[Any]) -> None:
        header = pack(m.to_wire(message))
        compression = self._state.compressions.get(connection) if frames else None
        if compression is not None:
            header, frames = compression.pack(header, frames)
        if connection in self._lanes:
            self._lanes.send(connection, header, frames)
            if type(message) is m.Result:
                self._lanes.make_ready(connection)
            return
        if self._streams is not None and connection in self._streams:
            route = self._state.routes.get(connection)
            if route is None or (type(message) is not m.Partial and stream.fits(header, frames)):
                self._streams.send(connection, stream.to_parts(header, frames))
                return
            # ZeroMQ's threads move what is large while this one computes.
            self._streams.send(connection, [stream.ELSEWHERE])
            connection = route
        self._socket_used = True
        try:
            # The client may be gone, or so slow that its queue is full: it is dropped rather than waited for.
            send_parts(self._socket, [connection, header, *frames], zmq.NOBLOCK)
        except zmq.ZMQError as error:
            log.warning("reply to a client dropped (%s): %s", type(message).__name__, error)

    def _answer(self, reply: Reply) -> None:
        self._reply(reply.connection, reply.message, reply.frames)

    def close(self) -> None:
        """Close the sockets this shell opened or was given to listen on."""
        self._background.close()
        if self._streams is not None:
            self._streams.close()
        self._lanes.close()
        self._poller.close()
        self._peers.close()
