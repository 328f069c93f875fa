"""The worker's side of the protocol, as a state machine without sockets, threads or a clock.

    events     Received(message), Left(connection), Finished(run), Failed(run), Tick
    commands   Reply, Execute (a run has all it needs to go on), Abandon (forget a run), Measure (when there is time)

Tensors are opaque here. A resident tensor is stored under (tensor id, epoch) and never changes: a run that updates
one stores a new epoch, and the client decides, once the whole call has succeeded, which epoch is the current one.
"""
from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import (
    WIRE_ERRORS,
    GenieError,
    MessageLimitError,
    ProtocolError,
    RemoteExecutionError,
    StaleHandleError,
    VersionMismatchError,
    WorkerBusyError,
)
from genie_dynamo.core.limits import DEFAULT_LIMITS, Limits
from genie_dynamo.core.program import WorkerProgram

_NONE: frozenset[tuple[int, int]] = frozenset()

MAX_ECHO_BYTES = 64 << 20


class Toolbox(Protocol):
    """What the state machine needs of the world: pure functions over opaque tensors and programs."""

    def land(self, wire: Any, frames: Sequence[Any]) -> Any: ...
    def own(self, tensor: Any) -> Any: ...
    def load(self, program: WorkerProgram) -> Any: ...
    def is_small(self, loaded: Any) -> bool: ...
    def run_now(self, loaded: Any, env: dict[int, Any], resident_bytes: int) -> tuple[Sequence[Any], float]: ...
    def content_bytes(self, tensor: Any) -> Any: ...
    def size_bytes(self, tensor: Any) -> int: ...
    def form(self, value: Any) -> Any: ...
    def stage(self, value: Any, frames: list[Any]) -> Any: ...
    def facts(self) -> dict[str, Any]: ...


@dataclass(slots=True, eq=False)
class RunRecord:
    """One Run message on its way through the worker."""

    session: SessionState
    connection: bytes
    message: m.Run
    program: WorkerProgram
    loaded: Any
    env: dict[int, Any]                                    # value id -> value, as far as known
    pending: dict[tuple[int, int], list[int]]              # (tensor id, epoch) still to come -> value ids
    awaited: set[int]                                      # value ids that peers still have to push
    received_s: float
    compute_s: float = 0.0
    queue_s: float = 0.0
    abandoned: bool = False
    state: Any = None                                      # the engine's own

    def arrived(self, value_id: int, value: Any) -> None:
        self.env[value_id] = value
        self.awaited.discard(value_id)


@dataclass(frozen=True, slots=True)
class Template:
    """The resident arguments of a program's last calls, so that the next ones need not name them."""

    number: int
    env: dict[int, Any]                                    # value id -> tensor
    keys: frozenset[tuple[int, int]]                       # (tensor id, epoch) of what env holds
    others: tuple[int, ...]                                # value ids of the arguments that each call brings


@dataclass(slots=True, eq=False)
class SessionState:
    """One client's life on this worker."""

    token: bytes
    lease_s: float
    last_heard_s: float
    connections: set[bytes] = field(default_factory=set)
    programs: dict[int, tuple[WorkerProgram, Any, bool]] = field(default_factory=dict)   # the last: small
    tensors: dict[tuple[int, int], Any] = field(default_factory=dict)
    resident_bytes: int = 0
    templates: dict[int, Template] = field(default_factory=dict)         # program id -> its remembered arguments
    mailbox: dict[int, dict[int, Any]] = field(default_factory=dict)     # call id -> value id -> value
    cancelled: dict[int, None] = field(default_factory=dict)             # call ids whose late pushes are dropped
    runs: dict[int, list[RunRecord]] = field(default_factory=dict)       # call id -> runs
    broken: dict[tuple[int, int], GenieError] = field(default_factory=dict)


class Received(NamedTuple):
    connection: bytes
    message: m.Message
    frames: Sequence[Any]
    now_s: float


class Left(NamedTuple):
    """A stream has ended."""

    connection: bytes


class Finished(NamedTuple):
    """A run is complete: `values` are those not sent as Partial, `kept` is aligned with program.keeps."""

    run: RunRecord
    values: tuple[tuple[int, Any], ...]
    kept: tuple[Any, ...]
    now_s: float


class Failed(NamedTuple):
    run: RunRecord
    error: BaseException
    now_s: float


class Tick(NamedTuple):
    now_s: float


class Reply(NamedTuple):
    connection: bytes
    message: m.Message
    frames: Sequence[Any] = ()


class Execute(NamedTuple):
    run: RunRecord


class Abandon(NamedTuple):
    run: RunRecord


class Measure(NamedTuple):
    """Take a measurement when there is time for it, and answer."""

    connection: bytes
    message: m.Calibrate | m.Probe
    session: bytes


Event = Received | Left | Finished | Failed | Tick
Command = Reply | Execute | Abandon | Measure


def failure(request: int, error: BaseException) -> m.Failure:
    """The wire form of an error: one of the names both sides know, or RemoteExecutionError with the type's name."""
    kind = type(error).__name__
    if kind in WIRE_ERRORS:
        facts = {k: v for k, v in getattr(error, "facts", {}).items() if isinstance(v, str | int | float | bool)}
        return m.Failure(request, kind, str(error), facts)
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    return m.Failure(request, RemoteExecutionError.__name__, f"{error}{notes}", {"exception": kind})


def _template(run: RunRecord) -> Template:
    """What a call with all its arguments leaves to be remembered."""
    resident: dict[int, tuple[int, int]] = {}
    for value_id, argument in zip(run.program.inputs, run.message.arguments, strict=True):
        if type(argument) is tuple and argument[0] == m.RESIDENT and argument[2] >= 1 and value_id in run.env:
            resident[value_id] = (argument[1], argument[2])
    return Template(run.message.template, {v: run.env[v] for v in resident}, frozenset(resident.values()),
                    tuple(v for v in run.program.inputs if v not in resident))


class WorkerState:
    """See the module's docstring. `handle` never raises for anything a peer sends."""

    def __init__(self, *, incarnation: str, heartbeat_address: str, toolbox: Toolbox, stream_address: str = "",
                 limits: Limits = DEFAULT_LIMITS) -> None:
        self.incarnation = incarnation
        self.heartbeat_address = heartbeat_address
        self.stream_address = stream_address
        self.routes: dict[bytes, bytes] = {}               # stream -> connection of the same client thread
        self.sessions: dict[bytes, SessionState] = {}
        self.draining = False
        self._by_connection: dict[bytes, SessionState] = {}
        self._contents: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()
        self._tools = toolbox
        self._limits = limits
        self._handlers: dict[type[Any], Callable[..., list[Command]]] = {
            m.Load: self._load, m.Have: self._have, m.Put: self._put, m.Adopt: self._adopt,
            m.Cancel: self._cancel, m.Free: self._free, m.Drop: self._drop, m.Fetch: self._fetch,
            m.Stats: self._stats, m.Ping: self._ping, m.Bye: self._bye, m.Calibrate: self._measure,
            m.Probe: self._measure,
        }

    def handle(self, event: Event) -> list[Command]:
        """Advance by one event."""
        if type(event) is Received:
            return self._received(event)
        if type(event) is Finished:
            return self._finished(event)
        if type(event) is Failed:
            return self._failed(event)
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
            if type(message) is m.Push:
                return self._push(message, event.frames)
            if type(message) is m.Echo:
                return self._echo(event.connection, message, event.frames)
            session = self._by_connection.get(event.connection)
            if session is None:
                raise StaleHandleError(
                    f"this worker (incarnation {self.incarnation}) does not know the connection: it was restarted, "
                    "or the session has expired; open a new session", incarnation=self.incarnation)
            session.last_heard_s = event.now_s
            if type(message) is m.Run:
                return self._run(session, event)
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
        if session is None:
            if self.draining:
                raise WorkerBusyError("this worker is draining and takes no new sessions; use another")
            if len(self.sessions) >= self._limits.sessions:
                raise WorkerBusyError(f"{len(self.sessions)} sessions are open here, the limit is "
                                      f"{self._limits.sessions}; close one or start another worker")
            session = SessionState(hello.session, float(hello.lease_s), now_s)
            self.sessions[hello.session] = session
        session.connections.add(connection)
        session.last_heard_s = now_s
        self._by_connection[connection] = session
        return [Reply(connection, m.Welcome(m.PROTOCOL_VERSION, self.incarnation, self.heartbeat_address,
                                            self.stream_address, connection, self._tools.facts()))]

    def _left(self, connection: bytes) -> list[Command]:
        self.routes.pop(connection, None)
        session = self._by_connection.pop(connection, None)
        if session is not None:
            session.connections.discard(connection)
        return []

    def _load(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Load = event.message  # type: ignore[assignment]
        program = WorkerProgram.from_wire(message.program)
        loaded = self._tools.load(program)
        session.programs[program.program_id] = (program, loaded, self._tools.is_small(loaded))
        return [Reply(event.connection, m.Done(message.request, None))]

    def _have(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Have = event.message  # type: ignore[assignment]
        known = tuple(type(d) is bytes and d in self._contents for d in message.digests)
        return [Reply(event.connection, m.Done(message.request, known))]

    def _put(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Put = event.message  # type: ignore[assignment]
        key = (message.tensor_id, message.epoch)
        try:
            tensor = self._tools.own(self._tools.land(message.tensor, event.frames))
            if message.digest is not None:
                self._remember(message.digest, tensor)
        except Exception as error:
            return self._put_failed(session, event.connection, key, error)
        return self._store(session, key, tensor)

    def _remember(self, digest: bytes, tensor: Any) -> None:
        actual = hashlib.sha256(self._tools.content_bytes(tensor)).digest()
        if actual != digest:
            raise ProtocolError(f"content arrived with sha256 {actual.hex()[:16]}, announced was {digest.hex()[:16]}")
        self._contents[digest] = tensor

    def _put_failed(self, session: SessionState, connection: bytes, key: tuple[int, int],
                    error: BaseException) -> list[Command]:
        wrapped = error if isinstance(error, GenieError) else RemoteExecutionError(str(error))
        session.broken[key] = wrapped
        failed = [run for runs in session.runs.values() for run in runs if key in run.pending]
        return [command for run in failed for command in self._failed(Failed(run, error, 0.0))] + [
            Abandon(run) for run in failed]

    def _adopt(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Adopt = event.message  # type: ignore[assignment]
        tensor = self._contents.get(message.digest)
        key = (message.tensor_id, message.epoch)
        if tensor is None:
            gone = StaleHandleError(f"content {message.digest.hex()[:16]} was freed before it could be adopted")
            return self._put_failed(session, event.connection, key, gone)
        return self._store(session, key, tensor)

    def _store(self, session: SessionState, key: tuple[int, int], tensor: Any) -> list[Command]:
        self._keep(session, key, tensor)
        ready: list[Command] = []
        for runs in session.runs.values():
            for run in runs:
                value_ids = run.pending.pop(key, None)
                if value_ids:
                    for value_id in value_ids:
                        run.arrived(value_id, tensor)
                    ready.append(Execute(run))
        return ready

    def _keep(self, session: SessionState, key: tuple[int, int], tensor: Any) -> None:
        if key in session.tensors:
            session.resident_bytes -= self._tools.size_bytes(session.tensors[key])
        session.tensors[key] = tensor
        session.resident_bytes += self._tools.size_bytes(tensor)

    def _discard(self, session: SessionState, key: tuple[int, int]) -> None:
        if key[1]:
            for program_id in [p for p, t in session.templates.items() if key in t.keys]:
                del session.templates[program_id]
        tensor = session.tensors.pop(key, None)
        session.broken.pop(key, None)
        if tensor is not None:
            session.resident_bytes -= self._tools.size_bytes(tensor)

    def _run(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Run = event.message  # type: ignore[assignment]
        for key in message.frees:
            self._discard(session, key)
        entry = session.programs.get(message.program_id)
        if entry is None:
            raise StaleHandleError(f"program {message.program_id} is not loaded in this session")
        if message.call_id in session.cancelled:
            return []            # the cancellation took another way, and was faster
        program, loaded, small = entry
        template = self._template_of(session, message) if message.template < 0 else None
        value_ids = program.inputs if template is None else template.others
        if len(message.arguments) != len(value_ids):
            raise ProtocolError(f"program {program.program_id} takes {len(value_ids)} arguments, "
                                f"{len(message.arguments)} came")
        if message.keeps and len(message.keeps) != len(program.keeps):
            raise ProtocolError(f"program {program.program_id} keeps {len(program.keeps)} values, "
                                f"{len(message.keeps)} handles came")
        known = template.env if template is not None else {}
        if small and message.template <= 0:
            values = self._inline_arguments(message, event.frames)
            if values is not None:
                return [self._run_now(session, event, message, loaded,
                                      {**known, **dict(zip(value_ids, values, strict=True))})]
        if len(session.runs) >= self._limits.waiting_runs_per_session:
            raise WorkerBusyError(f"{self._limits.waiting_runs_per_session} runs of this session wait already")
        run = RunRecord(session, event.connection, message, program, loaded, dict(known), {}, set(), event.now_s)
        incoming = set(message.incoming) if message.incoming else _NONE
        for value_id, argument in zip(value_ids, message.arguments, strict=True):
            self._bind(run, value_id, argument, event.frames, incoming)
        if message.template > 0:
            session.templates[message.program_id] = _template(run)
        if program.receives:
            box = session.mailbox.pop(message.call_id, {})
            run.env.update(box)
            run.awaited = {v for v in program.receives if v not in box}
        session.runs.setdefault(message.call_id, []).append(run)
        return [Execute(run)]

    def _run_now(self, session: SessionState, event: Received, message: m.Run, loaded: Any,
                 env: dict[int, Any]) -> Reply:
        """Carry out a run of a small program: what it returns is all there is to say."""
        values, compute_s = self._tools.run_now(loaded, env, session.resident_bytes)
        frames: list[Any] = []
        staged = tuple([(index, self._tools.stage(value, frames)) for index, value in enumerate(values)])
        return Reply(event.connection, m.Result(message.request, staged, (), compute_s, 0.0,
                                                session.resident_bytes), frames)

    def _template_of(self, session: SessionState, message: m.Run) -> Template:
        template = session.templates.get(message.program_id)
        if template is None or template.number != -message.template:
            raise StaleHandleError(f"the arguments remembered as {-message.template} are gone; send all of them",
                                   template=-message.template)
        return template

    def _inline_arguments(self, message: m.Run, frames: Sequence[Any]) -> list[Any] | None:
        """The arguments that came with a message; None where it names resident tensors."""
        values: list[Any] = []
        for argument in message.arguments:
            if type(argument) is tuple:
                if len(argument) != 2 or argument[0] != m.INLINE:
                    return None
                values.append(self._tools.land(argument[1], frames))
            elif argument is None or isinstance(argument, int | float):
                values.append(argument)
            else:
                return None
        return values

    def _bind(self, run: RunRecord, value_id: int, argument: Any, frames: Sequence[Any],
              incoming: Set[tuple[int, int]]) -> None:
        if type(argument) is not tuple:
            if argument is not None and not isinstance(argument, int | float | bool):
                raise ProtocolError(f"an argument is a number, None, a tensor or a handle, got {argument!r:.60}")
            run.env[value_id] = argument
        elif argument and argument[0] == m.RESIDENT and len(argument) == 3:
            key = (argument[1], argument[2])
            tensor = run.session.tensors.get(key)
            if tensor is not None:
                run.env[value_id] = tensor
            elif key in run.session.broken:
                raise run.session.broken[key]
            elif key in incoming:
                run.pending.setdefault(key, []).append(value_id)
            else:
                raise StaleHandleError(
                    f"tensor {key[0]} at epoch {key[1]} is not on this worker (incarnation {self.incarnation})",
                    tensor_id=key[0], epoch=key[1])
        elif len(argument) == 2 and argument[0] == m.INLINE:
            run.env[value_id] = self._tools.land(argument[1], frames)
        else:
            raise ProtocolError(f"not an argument: {argument!r:.60}")

    def _push(self, message: m.Push, frames: Sequence[Any]) -> list[Command]:
        session = self.sessions.get(message.session)
        if session is None or message.call_id in session.cancelled:
            return []
        value = message.value
        if type(value) is tuple:
            if len(value) != 2 or value[0] != m.INLINE:
                raise ProtocolError(f"a pushed value is a number or a tensor, got {value!r:.60}")
            value = self._tools.land(value[1], frames)
        for run in session.runs.get(message.call_id, ()):
            if message.value_id in run.awaited:
                run.arrived(message.value_id, value)
                return [Execute(run)]
        box = session.mailbox.setdefault(message.call_id, {})
        if len(session.mailbox) > self._limits.waiting_runs_per_session:
            del session.mailbox[message.call_id]
            raise MessageLimitError(f"values of {len(session.mailbox)} calls wait here for their runs")
        box[message.value_id] = value
        return []

    def _cancel(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Cancel = event.message  # type: ignore[assignment]
        session.mailbox.pop(message.call_id, None)
        session.cancelled[message.call_id] = None
        while len(session.cancelled) > self._limits.waiting_runs_per_session:
            session.cancelled.pop(next(iter(session.cancelled)))
        runs = session.runs.pop(message.call_id, [])
        for run in runs:
            run.abandoned = True
        return [Abandon(run) for run in runs]

    def _free(self, session: SessionState, event: Received) -> list[Command]:
        for key in event.message.tensors:  # type: ignore[union-attr]
            self._discard(session, key)
        return []

    def _drop(self, session: SessionState, event: Received) -> list[Command]:
        session.programs.pop(event.message.program_id, None)  # type: ignore[union-attr]
        session.templates.pop(event.message.program_id, None)  # type: ignore[union-attr]
        return []

    def _fetch(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Fetch = event.message  # type: ignore[assignment]
        tensor = session.tensors.get((message.tensor_id, message.epoch))
        if tensor is None:
            raise StaleHandleError(f"tensor {message.tensor_id} at epoch {message.epoch} is not on this worker "
                                   f"(incarnation {self.incarnation})")
        frames: list[Any] = []
        value = self._tools.stage(tensor, frames)
        return [Reply(event.connection, m.Result(message.request, ((0, value),), (), 0.0, 0.0,
                                                 session.resident_bytes), frames)]

    def _stats(self, session: SessionState, event: Received) -> list[Command]:
        info = {
            **self._tools.facts(), "incarnation": self.incarnation, "sessions": len(self.sessions),
            "programs": len(session.programs), "resident_tensors": len(session.tensors),
            "resident_bytes": session.resident_bytes, "waiting_runs": sum(map(len, session.runs.values())),
        }
        return [Reply(event.connection, m.Done(event.message.request, info))]  # type: ignore[union-attr]

    def _measure(self, session: SessionState, event: Received) -> list[Command]:
        message: m.Calibrate | m.Probe = event.message  # type: ignore[assignment]
        if type(message) is m.Probe and not 0 < message.size_bytes <= MAX_ECHO_BYTES:
            raise ProtocolError(f"an echo takes 1 to {MAX_ECHO_BYTES} bytes, asked were {message.size_bytes}")
        return [Measure(event.connection, message, session.token)]

    def _echo(self, connection: bytes, message: m.Echo, frames: Sequence[Any]) -> list[Command]:
        """Also from workers, which have no connection of their own here but know the session."""
        if message.session not in self.sessions:
            raise StaleHandleError("an echo was asked for in a session that is not open on this worker")
        if type(message.value) is not tuple or len(message.value) != 2 or message.value[0] != m.INLINE:
            raise ProtocolError(f"an echoed value is a tensor, got {message.value!r:.60}")
        out: list[Any] = []
        value = self._tools.stage(self._tools.land(message.value[1], frames), out)
        return [Reply(connection, m.Result(message.request, ((0, value),), (), 0.0, 0.0, 0), out)]

    def _ping(self, session: SessionState, event: Received) -> list[Command]:
        return []

    def _bye(self, session: SessionState, event: Received) -> list[Command]:
        commands = self._end(session)
        return [*commands, Reply(event.connection, m.Done(event.message.request, None))]  # type: ignore[union-attr]

    # -- runs and time ----------------------------------------------------------------------------------------

    def _finished(self, event: Finished) -> list[Command]:
        run = event.run
        self._forget(run)
        if run.abandoned:
            return []
        session, message = run.session, run.message
        frames: list[Any] = []
        ready = [command for key, value in zip(message.keeps, event.kept, strict=False)
                 for command in self._store(session, key, value)]
        forms = tuple(self._tools.form(value) for value in event.kept) if message.keeps else ()
        values = [(index, self._tools.stage(value, frames)) for index, value in event.values]
        if not message.keeps and event.kept:
            start = len(run.program.returns)
            values += [(start + i, self._tools.stage(value, frames)) for i, value in enumerate(event.kept)]
        result = m.Result(message.request, tuple(values), forms, run.compute_s, run.queue_s, session.resident_bytes)
        return [Reply(run.connection, result, frames), *ready]

    def _failed(self, event: Failed) -> list[Command]:
        self._forget(event.run)
        if event.run.abandoned:
            return []
        run = event.run
        run.abandoned = True
        # Runs sent before this one had ended may wait for what it was to keep: they fail with it.
        broken = [command for key in run.message.keeps
                  for command in self._put_failed(run.session, run.connection, key, event.error)]
        return [Reply(run.connection, failure(run.message.request, event.error)), *broken]

    def _forget(self, run: RunRecord) -> None:
        runs = run.session.runs.get(run.message.call_id)
        if runs and run in runs:
            runs.remove(run)
            if not runs:
                del run.session.runs[run.message.call_id]

    def _tick(self, now_s: float) -> list[Command]:
        late = [s for s in self.sessions.values()
                if s.lease_s > 0 and now_s - s.last_heard_s > s.lease_s and not s.runs]
        return [command for session in late for command in self._end(session)]

    def _end(self, session: SessionState) -> list[Command]:
        self.sessions.pop(session.token, None)
        for connection in session.connections:
            self._by_connection.pop(connection, None)
            self.routes.pop(connection, None)
        runs = [run for runs in session.runs.values() for run in runs]
        for run in runs:
            run.abandoned = True
        session.runs.clear()
        session.tensors.clear()
        session.programs.clear()
        session.templates.clear()
        session.mailbox.clear()
        return [Abandon(run) for run in runs]
