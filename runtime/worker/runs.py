"""Runs on their way through a worker: arguments bound, values awaited, results answered."""
from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import (
    MessageLimitError,
    ProtocolError,
    StaleHandleError,
    WorkerBusyError,
    WorkerMemoryError,
)
from genie_dynamo.core.limits import Limits
from genie_dynamo.runtime.worker.events import (
    Abandon,
    Command,
    Execute,
    Failed,
    Finished,
    Received,
    Reply,
    failure,
)
from genie_dynamo.runtime.worker.records import Repeatable, RunRecord, SessionRecord, Template
from genie_dynamo.runtime.worker.residents import Residents
from genie_dynamo.runtime.worker.toolbox import Toolbox

MOVE_TIMEOUT_S = 60.0
"""So long at most a run waits for state that another worker sends; the client says how long."""

_KINDS = (m.RESIDENT, m.HELD, m.STORE, m.MOVED)
_NONE: frozenset[tuple[int, int]] = frozenset()


def _template(run: RunRecord) -> Template:
    """What a call with all its arguments leaves to be remembered."""
    resident: dict[int, tuple[int, int]] = {}
    for value_id, argument in zip(run.program.inputs, run.message.arguments, strict=True):
        if type(argument) is tuple and argument[0] == m.RESIDENT and argument[2] >= 1 and value_id in run.env:
            resident[value_id] = (argument[1], argument[2])
    return Template(run.message.template, {v: run.env[v] for v in resident}, frozenset(resident.values()),
                    tuple(v for v in run.program.inputs if v not in resident))


def _is_moved(argument: Any) -> bool:
    """Whether this is `(MOVED, tensor id, epoch, seconds to wait for it)`."""
    return (type(argument) is tuple and len(argument) == 4 and argument[0] == m.MOVED
            and type(argument[1]) is type(argument[2]) is int and type(argument[3]) in (int, float))


def _handles(message: m.Run, kinds: tuple[int, ...]) -> set[tuple[int, int]]:
    """The resident tensors that a call names."""
    return {(a[1], a[2]) for a in message.arguments if type(a) is tuple and a[0] in kinds}


class Runs:
    """Takes Run, Push and Cancel, and what the engine says of runs."""

    def __init__(self, toolbox: Toolbox, incarnation: str, limits: Limits) -> None:
        self.residents = Residents(toolbox, incarnation, self.failed)
        self._tools = toolbox
        self._incarnation = incarnation
        self._limits = limits

    def run(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Run = event.message  # type: ignore[assignment]
        try:
            return self._run(session, event, message)
        except Exception as error:
            # What names its results may have been sent before this, or be waiting: it would wait for ever.
            return [Reply(event.connection, failure(message.request, error)),
                    *self._fail_followers(session, message, error)]

    def _run(self, session: SessionRecord, event: Received, message: m.Run) -> list[Command]:
        for key in message.frees:
            self.residents.discard(session, key)
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
        if message.state and len(message.state) != len(program.state):
            raise ProtocolError(f"program {program.program_id} has {len(program.state)} values that may stay, "
                                f"{len(message.state)} handles came")
        known = template.env if template is not None else {}
        if small and message.template <= 0 and not message.state:
            values = self._inline_arguments(message, event.frames)
            if values is not None:
                return [self._run_now(session, event, message, loaded,
                                      {**known, **dict(zip(value_ids, values, strict=True))}, value_ids)]
        if len(session.runs) >= self._limits.waiting_runs_per_session:
            raise WorkerBusyError(f"{self._limits.waiting_runs_per_session} runs of this session wait already")
        run = RunRecord(session, event.connection, message, program, loaded, dict(known), {}, set(), event.now_s)
        incoming = set(message.incoming) if message.incoming else _NONE
        for value_id, argument in zip(value_ids, message.arguments, strict=True):
            self._bind(run, value_id, argument, event.frames, incoming)
        if session.resident_bytes > session.quota_bytes:
            self.residents.make_room(session, _handles(message, _KINDS) | self._remembered(run))
        if message.template > 0:
            session.templates[message.program_id] = _template(run)
        if program.receives:
            box = session.mailbox.pop(message.call_id, {})
            run.env.update(box)
            run.awaited = {v for v in program.receives if v not in box}
        session.runs.setdefault(message.call_id, []).append(run)
        return [Execute(run)]

    def _run_now(self, session: SessionRecord, event: Received, message: m.Run, loaded: Any,
                 env: dict[int, Any], value_ids: Sequence[int]) -> Reply:
        """Carry out a run of a small program: what it returns is all there is to say."""
        values, compute_s = self._tools.run_now(loaded, env, session.resident_bytes, event.connection)
        frames: list[Any] = []
        staged = tuple([(index, self._tools.stage(value, frames)) for index, value in enumerate(values)])
        return Reply(event.connection, m.Result(message.request, staged, (), compute_s, 0.0,
                                                session.resident_bytes), frames,
                     Repeatable(session, message, value_ids), values)

    def _template_of(self, session: SessionRecord, message: m.Run) -> Template:
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
                raise self.residents.stale(key)
        elif len(argument) == 2 and argument[0] == m.INLINE:
            run.env[value_id] = self._tools.land(argument[1], frames)
        elif (_is_moved(argument) and (argument[1], argument[2]) not in run.session.tensors):
            run.pending.setdefault((argument[1], argument[2]), []).append(value_id)
        elif argument and argument[0] in (m.HELD, m.STORE, m.MOVED):
            run.env[value_id] = self._state(run, argument, frames)
        else:
            raise ProtocolError(f"not an argument: {argument!r:.60}")

    def _state(self, run: RunRecord, argument: tuple[Any, ...], frames: Sequence[Any]) -> Any:
        """The state that an argument names or brings."""
        if not 3 <= len(argument) <= 4 or type(argument[1]) is not int or type(argument[2]) is not int:
            raise ProtocolError(f"not a handle of state: {argument!r:.60}")
        key = (argument[1], argument[2])
        if argument[0] == m.STORE:
            if len(argument) != 4 or key[1] < 1:
                raise ProtocolError(f"state to store has an epoch above 0 and a content, got {argument!r:.60}")
            tensor = self._tools.own(self._tools.land(argument[3], frames))
            self.residents.keep(run.session, key, tensor)
            return tensor
        tensor = self.residents.find(run.session, key)
        return self._tools.view(tensor, argument[3]) if argument[0] == m.HELD and len(argument) == 4 else tensor

    def push(self, session: SessionRecord | None, message: m.Push, frames: Sequence[Any]) -> list[Command]:
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

    def cancel(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Cancel = event.message  # type: ignore[assignment]
        session.mailbox.pop(message.call_id, None)
        session.cancelled[message.call_id] = None
        while len(session.cancelled) > self._limits.waiting_runs_per_session:
            session.cancelled.pop(next(iter(session.cancelled)))
        runs = session.runs.pop(message.call_id, [])
        for run in runs:
            run.abandoned = True
        return [Abandon(run) for run in runs]

    def tick(self, session: SessionRecord, now_s: float) -> list[Command]:
        """State that another worker was to send and that never came: the client sends it itself."""
        late = [(run, (a[1], a[2])) for runs in session.runs.values() for run in runs if run.pending
                for a in run.message.arguments if _is_moved(a) and (a[1], a[2]) in run.pending
                and now_s - run.received_s > min(a[3], MOVE_TIMEOUT_S)]
        commands: list[Command] = []
        for run, key in late:
            if run.abandoned:
                continue
            gone = self.residents.stale(key)
            commands += [*self.failed(Failed(run, gone, now_s)), Abandon(run)]
        return commands

    def finished(self, event: Finished) -> list[Command]:
        run = event.run
        self._forget(run)
        if run.abandoned:
            return []
        session, message = run.session, run.message
        stays = [*zip(message.keeps, event.kept, strict=False),
                 *((key, value) for key, value in zip(message.state, event.state, strict=False) if key[1])]
        for key, value in stays:
            self.residents.keep(session, key, value)
        if session.resident_bytes > session.quota_bytes:
            try:
                # What the call read may go now, but for the weights: the next call needs them and this one's results.
                self.residents.make_room(session, _handles(message, (m.RESIDENT,)) | self._remembered(run))
            except WorkerMemoryError as error:
                for key, _ in stays:
                    self.residents.discard(session, key)
                run.abandoned = True
                return [Reply(run.connection, failure(message.request, error)),
                        *self._fail_followers(session, message, error)]
        ready = [command for key, value in stays for command in self.residents.arrived(session, key, value)]
        return [self._result(run, event), *ready]

    def _fail_followers(self, session: SessionRecord, message: m.Run, error: BaseException) -> list[Command]:
        """Runs that were sent before this one had ended may wait for what it was to keep: they fail with it."""
        handles = [*message.keeps, *(key for key in message.state if key[1])]
        return [command for key in handles for command in self.residents.broke(session, key, error)]

    @staticmethod
    def _remembered(run: RunRecord) -> frozenset[tuple[int, int]]:
        """The resident tensors that a call takes from its template."""
        template = run.session.templates.get(run.message.program_id) if run.message.template < 0 else None
        return template.keys if template is not None else _NONE

    def _result(self, run: RunRecord, event: Finished) -> Reply:
        session, message = run.session, run.message
        frames: list[Any] = []
        forms = tuple(self._tools.form(value) for value in event.kept) if message.keeps else ()
        state = tuple([self._tools.form(value) if key[1] else None
                       for key, value in zip(message.state, event.state, strict=False)])
        values = [(index, self._tools.stage(value, frames)) for index, value in event.values]
        if not message.keeps and event.kept:
            start = len(run.program.returns)
            values += [(start + i, self._tools.stage(value, frames)) for i, value in enumerate(event.kept)]
        evicted = tuple(session.evicted)
        session.evicted.clear()
        return Reply(run.connection, m.Result(message.request, tuple(values), forms, run.compute_s, run.queue_s,
                                              session.resident_bytes, state, evicted), frames)

    def failed(self, event: Failed) -> list[Command]:
        self._forget(event.run)
        if event.run.abandoned:
            return []
        run = event.run
        run.abandoned = True
        return [Reply(run.connection, failure(run.message.request, event.error)),
                *self._fail_followers(run.session, run.message, event.error)]

    def _forget(self, run: RunRecord) -> None:
        runs = run.session.runs.get(run.message.call_id)
        if runs and run in runs:
            runs.remove(run)
            if not runs:
                del run.session.runs[run.message.call_id]
