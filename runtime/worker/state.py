"""The worker's side of the protocol, as a state machine without sockets, threads or a clock.

It is told events and answers with commands (worker/events.py). Sessions begin and end here; runs are in
worker/runs.py, resident tensors in worker/residents.py; tensors are opaque to all of them. A resident tensor is stored
under (tensor id, epoch) and never changes: a run that updates one stores a new epoch, and the client decides, once the
whole call has succeeded, which epoch is the current one.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError, StaleHandleError, VersionMismatchError, WorkerBusyError
from genie_dynamo.core.limits import DEFAULT_LIMITS, Limits
from genie_dynamo.core.program import WorkerProgram, read_offers
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.compression import Compression
from genie_dynamo.runtime.lanes.copies import Tally, Work
from genie_dynamo.runtime.worker.events import (
    Abandon,
    Command,
    Event,
    Failed,
    Finished,
    Left,
    Measure,
    Received,
    Reply,
    Tick,
    failure,
)
from genie_dynamo.runtime.worker.records import SessionRecord
from genie_dynamo.runtime.worker.runs import Runs
from genie_dynamo.runtime.worker.toolbox import Toolbox

MAX_ECHO_BYTES = 64 << 20
UPLOAD_SILENCE_S = 60.0
"""After this long without a piece an upload is given up: its client goes on with others or has gone."""


def _is_second_way(connection: bytes) -> bool:
    """Whether this is the name of a stream or lane: ZeroMQ's own that begin like it have five bytes."""
    return connection[:1] == b"\0" and len(connection) > 5


class WorkerState:
    """See the module's docstring. `handle` never raises for anything a peer sends."""

    def __init__(self, *, incarnation: str, heartbeat_address: str, toolbox: Toolbox, stream_address: str = "",
                 lanes: tuple[tuple[str, int, str], ...] = (), quota_bytes: int = 1 << 62,
                 limits: Limits = DEFAULT_LIMITS) -> None:
        self.incarnation = incarnation
        self.heartbeat_address = heartbeat_address
        self.stream_address = stream_address
        self.lanes = lanes                                 # (name, version, address), best first
        self.routes: dict[bytes, bytes] = {}               # stream -> connection of the same client thread
        self.compressions: dict[bytes, Compression] = {}   # by connection
        self.sessions: dict[bytes, SessionRecord] = {}
        self.draining = False
        self._by_connection: dict[bytes, SessionRecord] = {}
        self._tools = toolbox
        self._quota_bytes = quota_bytes
        self._from_peers = Work(Tally())                         # copies that no client's bytes are the reason of
        self._limits = limits
        self._runs = Runs(toolbox, incarnation, limits)
        residents = self._runs.residents
        self._handlers: dict[type[Any], Callable[..., list[Command]]] = {
            m.Load: self._load, m.Have: residents.have, m.Put: residents.put, m.Piece: residents.piece,
            m.Adopt: residents.adopt,
            m.Cancel: self._runs.cancel, m.Free: residents.free, m.Drop: self._drop, m.Fetch: residents.fetch,
            m.Move: residents.move,
            m.Stats: self._stats, m.Ping: self._ping, m.Bye: self._bye, m.Calibrate: self._measure,
            m.Probe: self._measure, m.Profile: self._profile, m.Compress: self._compress,
        }

    def handle(self, event: Event) -> list[Command]:
        """Advance by one event."""
        if type(event) is Received:
            return self._received(event)
        if type(event) is Finished:
            return self._runs.finished(event)
        if type(event) is Failed:
            return self._runs.failed(event)
        if type(event) is Left:
            return self._left(event.connection)
        assert type(event) is Tick
        return self._tick(event.now_s)

    # -- messages ---------------------------------------------------------------------------------------------

    def _received(self, event: Received) -> list[Command]:
        message = event.message
        try:
            if type(message) is m.Hello:
                return self._hello(event.connection, message, event.now_s)
            self._tools.works_for(self._from_peers)
            if type(message) is m.Push:
                return self._runs.push(self.sessions.get(message.session), message, event.frames)
            if type(message) is m.Land:
                return self._runs.residents.land(self.sessions.get(message.session), message, event.frames)
            if type(message) is m.Piece and message.session:
                return self._runs.residents.piece(self.sessions.get(message.session), event)
            if type(message) is m.Echo:
                return self._echo(event.connection, message, event.frames)
            session = self._by_connection.get(event.connection)
            if session is None:
                raise StaleHandleError(
                    f"this worker (incarnation {self.incarnation}) does not know the connection: it was restarted, "
                    "or the session has expired; open a new session", incarnation=self.incarnation)
            session.last_heard_s = event.now_s
            self._tools.works_for(session.work)
            if type(message) is m.Run:
                return self._runs.run(session, event)
            handler = self._handlers.get(type(message))
            if handler is None:
                raise ProtocolError(f"{type(message).__name__} is not a message for workers")
            return handler(session, event)
        except Exception as error:
            # Landing a payload can fail in torch itself (out of memory): the peer learns why, the worker lives on.
            return [Reply(event.connection, failure(getattr(message, "request", 0), error))]

    def _hello(self, connection: bytes, hello: m.Hello, now_s: float) -> list[Command]:
        if hello.version != m.PROTOCOL_VERSION:
            raise VersionMismatchError(
                f"the client speaks protocol {hello.version}, this worker {m.PROTOCOL_VERSION}; "
                "install the same genie-dynamo release on both sides",
                client=hello.version, worker=m.PROTOCOL_VERSION)
        if len(hello.session) != 16:
            raise ProtocolError(f"a session token has 16 bytes, got {len(hello.session)}")
        session = self.sessions.get(hello.session)
        if hello.route:
            if session is None or hello.route not in session.connections:
                raise ProtocolError("a stream belongs to a connection of the same session; this one is not known")
            self.routes[connection] = hello.route
        elif _is_second_way(connection):
            raise ProtocolError("a stream or lane names the connection of its session: sessions begin over ZeroMQ, "
                                "which asks for keys where this worker has some")
        if session is None:
            if self.draining:
                raise WorkerBusyError("this worker is draining and takes no new sessions; use another")
            if len(self.sessions) >= self._limits.sessions:
                raise WorkerBusyError(f"{len(self.sessions)} sessions are open here, the limit is "
                                      f"{self._limits.sessions}; close one or start another worker")
            session = SessionRecord(hello.session, float(hello.lease_s), now_s, self._quota_bytes)
            self.sessions[hello.session] = session
        session.connections.add(connection)
        session.last_heard_s = now_s
        self._by_connection[connection] = session
        return [Reply(connection, m.Welcome(m.PROTOCOL_VERSION, self.incarnation, self.heartbeat_address,
                                            self.stream_address, connection, self.lanes, self._tools.facts()))]

    def _left(self, connection: bytes) -> list[Command]:
        self.routes.pop(connection, None)
        self.compressions.pop(connection, None)
        session = self._by_connection.pop(connection, None)
        if session is not None:
            session.connections.discard(connection)
            session.work.tally.add(self._tools.lane_counters(connection))
            return self._runs.residents.give_up(session, lambda arriving: arriving.sender == connection)
        return []

    def _load(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Load = event.message  # type: ignore[assignment]
        program = WorkerProgram.from_wire(message.program)
        loaded = self._tools.load(program)
        session.programs[program.program_id] = (program, loaded, self._tools.is_small(loaded))
        return [Reply(event.connection, m.Done(message.request, None))]

    def _drop(self, session: SessionRecord, event: Received) -> list[Command]:
        session.programs.pop(event.message.program_id, None)  # type: ignore[union-attr]
        session.templates.pop(event.message.program_id, None)  # type: ignore[union-attr]
        return []

    def _stats(self, session: SessionRecord, event: Received) -> list[Command]:
        copies = session.work.tally.plus({})
        for connection in session.connections:
            copies.add(self._tools.lane_counters(connection))
        info = {
            **self._tools.facts(), "incarnation": self.incarnation, "sessions": len(self.sessions),
            "programs": len(session.programs), "resident_tensors": len(session.tensors),
            "resident_bytes": session.resident_bytes, "quota_bytes": session.quota_bytes,
            "waiting_runs": sum(map(len, session.runs.values())), "pushed_bytes": session.pushed_bytes,
            "lane_memory": native.sum_memory(map(self._tools.lane_memory, session.connections)),
            "copied": (copies.copied_out, copies.copied_in),
            "moved_bytes": session.moved_bytes,
        }
        return [Reply(event.connection, m.Done(event.message.request, info))]  # type: ignore[union-attr]

    def _measure(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Calibrate | m.Probe = event.message  # type: ignore[assignment]
        if type(message) is m.Probe and not 0 < message.size_bytes <= MAX_ECHO_BYTES:
            raise ProtocolError(f"an echo takes 1 to {MAX_ECHO_BYTES} bytes, asked were {message.size_bytes}")
        if type(message) is m.Probe:
            message = message._replace(offers=read_offers(message.offers))
        return [Measure(event.connection, message, session.token)]

    def _profile(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Profile = event.message  # type: ignore[assignment]
        entry = session.programs.get(message.program_id)
        if entry is None:
            raise StaleHandleError(f"program {message.program_id} is not loaded in this session")
        return [Reply(event.connection, m.Done(message.request, self._tools.profile(entry[1])))]

    def _echo(self, connection: bytes, message: m.Echo, frames: Sequence[Any]) -> list[Command]:
        """Also from workers, which have no connection of their own here but know the session."""
        if message.session not in self.sessions:
            raise StaleHandleError("an echo was asked for in a session that is not open on this worker")
        if type(message.value) is not tuple or len(message.value) != 2 or message.value[0] != m.INLINE:
            raise ProtocolError(f"an echoed value is a tensor, got {message.value!r:.60}")
        out: list[Any] = []
        value = self._tools.stage(self._tools.land(message.value[1], frames), out)
        return [Reply(connection, m.Result(message.request, ((0, value),), (), 0.0, 0.0, 0), out)]

    def _compress(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Compress = event.message  # type: ignore[assignment]
        self.compressions[event.connection] = Compression(message.codecs, message.bytes_per_s)
        return [Reply(event.connection, m.Done(message.request, None))]

    def _ping(self, session: SessionRecord, event: Received) -> list[Command]:
        return []

    def _bye(self, session: SessionRecord, event: Received) -> list[Command]:
        commands = self._end(session)
        return [*commands, Reply(event.connection, m.Done(event.message.request, None))]  # type: ignore[union-attr]

    # -- time -------------------------------------------------------------------------------------------------

    def _tick(self, now_s: float) -> list[Command]:
        late = [s for s in self.sessions.values()
                if s.lease_s > 0 and now_s - s.last_heard_s > s.lease_s and not s.runs]
        ended = [command for session in late for command in self._end(session)]
        for session in self.sessions.values():
            if session.arriving:         # nobody says when a connection over ZeroMQ is gone
                ended += self._runs.residents.give_up(session, lambda a: now_s - a.heard_s > UPLOAD_SILENCE_S)
        return ended + [command for session in self.sessions.values() for command in self._runs.tick(session, now_s)]

    def _end(self, session: SessionRecord) -> list[Command]:
        self.sessions.pop(session.token, None)
        for connection in session.connections:
            self._by_connection.pop(connection, None)
            self.routes.pop(connection, None)
            self.compressions.pop(connection, None)
        runs = [run for runs in session.runs.values() for run in runs]
        for run in runs:
            run.abandoned = True
        session.runs.clear()
        session.tensors.clear()
        session.arriving.clear()
        session.programs.clear()
        session.templates.clear()
        session.mailbox.clear()
        return [Abandon(run) for run in runs]
