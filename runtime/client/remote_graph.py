"""A plan as the callable that torch gets for a graph.

    arguments -> where each must be -> messages -> answers -> commit -> outputs

Nothing touches a worker before the first call. A call changes the caller's tensors only after all workers have
answered, so it can be repeated elsewhere when one of them is lost.
"""
from __future__ import annotations

import logging
import random
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import (
    GenieError,
    StaleHandleError,
    UnsupportedGraphError,
    WorkerLostError,
    WorkerTimeoutError,
)
from genie_dynamo.core.plan import Plan
from genie_dynamo.core.tensors import view_of, view_of_input
from genie_dynamo.runtime.client.binding import RNG_ARGUMENT, Binding, BoundProgram, Template, bind
from genie_dynamo.runtime.client.calls import Answered, Broke, CallState
from genie_dynamo.runtime.client.connection import POLL_MS, Connection, to_error
from genie_dynamo.runtime.client.residency import Entry, Seen, StaticSet
from genie_dynamo.runtime.client.saved import SavedHandle, handle_of, hooks_active, placeholder
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.uploads import (
    Needs,
    acknowledge,
    find_needs,
    payload_bytes,
    send_fresh,
    send_put,
    unclaim,
)
from genie_dynamo.runtime.client.verify import compare, run_reference
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames
from genie_dynamo.runtime.telemetry import Share

log = logging.getLogger(__name__)
CPU = torch.device("cpu")


class Part(NamedTuple):
    """One worker's share of one call."""

    bound: BoundProgram
    connection: Connection
    request: int
    needs: Needs
    keeps: tuple[tuple[int, int], ...]
    sent: dict[str, int]
    template: Template


Kept = tuple[Part, int, Any]
"""A value that stayed on a worker: whose it is, its index among the kept, and its form."""


class GraphInfo(NamedTuple):
    """What the backend knows about a graph beyond its plan."""

    backward: bool
    bumped: frozenset[int]            # inputs whose version AOTAutograd raises before each call
    label: str                        # for logs: "forward 3"


class RemoteGraph:
    """Boxed callable: takes the list of arguments, empties it, returns the tuple of outputs.

    Args:
        plan, specs: the plan and its encoded fragments.
        get_session: the session of this process; called once per call.
        run_local: runs the same graph here (for on_worker_loss="local").
    """

    def __init__(self, plan: Plan, specs: dict[int, bytes], info: GraphInfo, config: Config,
                 get_session: Callable[[], Session], run_local: Callable[[list[Any]], Any]) -> None:
        self._boxed_call = True        # on the instance: torch's wrappers copy its __dict__, not its class
        self.plan = plan
        self.info = info
        self._specs = specs
        self._config = config
        self._get_session = get_session
        self._run_local = run_local
        self._lane = ZmqFrames()
        self._blind = config.awareness == "blind"
        self._per_session: weakref.WeakKeyDictionary[Session, SessionPart] = weakref.WeakKeyDictionary()
        self._down_reason = "gradients" if info.backward else "outputs"
        self._up_reason = "gradients" if info.backward else "inputs"
        self._saves = bool(plan.saved_values())
        self._final_rng = plan.final_rng
        self._static_mutations = {name: i for i, name in plan.mutations if i in set(plan.static_inputs)}

    def __call__(self, args: list[Any]) -> tuple[Any, ...]:
        values = list(args)
        args.clear()
        started_s = time.perf_counter()
        session = self._get_session()
        part = self._per_session.get(session)
        if part is None:
            part = self._per_session[session] = SessionPart(session)
            weakref.finalize(self, _drop_programs, weakref.ref(session), part.bindings)
        if self._config.verify and random.random() < self._config.verify:
            return self._verified(session, part, values, started_s)
        return self._call(session, part, values, started_s)

    def _verified(self, session: Session, part: SessionPart, args: list[Any], started_s: float) -> tuple[Any, ...]:
        expected = run_reference(self._run_local, materialize(args, self._get_session))
        outputs = self._call(session, part, args, started_s)
        compare(self.plan, self.info.label, outputs, expected)
        session.telemetry.event("call verified")
        return outputs

    def _call(self, session: Session, part: SessionPart, values: list[Any], started_s: float) -> tuple[Any, ...]:
        if part.refusal:
            return self._locally(session, part.refusal, values)
        try:
            return self._attempt(session, part, values, started_s)
        except UnsupportedGraphError as error:
            # The worker lacks an op that this process has.
            if self._config.strict:
                raise
            part.refusal = str(error)
            log.warning("%s runs locally, the worker refuses it: %s", self.info.label, error)
            return self._locally(session, part.refusal, values)
        except StaleHandleError as error:
            # Another thread renewed a parameter between our look and the worker's: look again, once.
            if "template" not in error.facts and any(handle_of(v) is not None for v in values):
                raise
            session.residency.stamp += 1
            session.telemetry.event("stale handle, call repeated")
            return self._attempt(session, part, values, time.perf_counter())
        except WorkerLostError as error:
            return self._after_loss(session, part, values, error)

    # -- one attempt ------------------------------------------------------------------------------------------

    def _attempt(self, session: Session, part: SessionPart, args: list[Any], started_s: float) -> tuple[Any, ...]:
        handles = _collect_handles(args) if self.info.backward else {}
        binding = self._choose(session, part, handles)
        seen = self._look(session, part, args)
        deadline_s = time.monotonic() + self._config.timeout_s
        call_id = session.next_id()
        keep = not self._blind and not (self._saves and hooks_active())
        parts: list[Part] = []
        state = CallState({w: len(b.program.returns) + (0 if keep else len(b.program.keeps))
                           for w, b in binding.programs.items()})
        try:
            for bound in binding.programs.values():
                bound.link.in_flight += 1
            for bound in binding.programs.values():
                parts.append(self._send(session, bound, args, handles, seen, part, call_id, keep, deadline_s))
            sent_s = time.perf_counter()
            received = self._collect(list(binding.programs), parts, state, args, deadline_s)
        except BaseException:
            self._abandon(session, parts, call_id, state)
            raise
        finally:
            for bound in binding.programs.values():
                bound.link.in_flight -= 1
        if state.error is not None:
            self._abandon(session, parts, call_id, state)
            raise state.error
        answered_s = time.perf_counter()
        for p in parts:
            p.bound.link.give_back(p.connection)
        outputs = self._finish(session, part, binding, parts, state, args, seen, keep)
        self._count(session, binding, parts, state, received, started_s, sent_s, answered_s)
        return outputs

    def _choose(self, session: Session, part: SessionPart, handles: dict[int, SavedHandle]) -> Binding:
        """Workers for this call: where the saved activations are, else the least busy ones."""
        count = self.plan.num_workers
        if handles and count == 1:
            links = [next(iter(handles.values())).link]
            links[0].check_alive()
        elif count == 1:
            links = [session.pick(part.prefer)]
        else:
            session.pick()       # replaces lost workers
            links = [link for link in session.links if not link.lost][:count]
            if len(links) < count:
                raise WorkerLostError(f"the plan needs {count} workers, {len(links)} are left")
        key = tuple([link.key for link in links])
        binding = part.bindings.get(key)
        if binding is None or not binding.usable:
            with part.session.residency.lock:
                binding = part.bindings.get(key)
                if binding is None or not binding.usable:
                    binding = bind(session, self.plan, self._specs, links, self._config.worker_compiler,
                                   self._config.timeout_s)
                    part.bindings[key] = binding
            part.prefer = tuple({*part.prefer, *(link.name for link in links)})
        return binding

    def _look(self, session: Session, part: SessionPart, args: Sequence[Any]) -> Seen | None:
        """Check the parameters and buffers; None where there are none to keep on workers."""
        if part.statics is None:
            part.statics = self._find_statics(session, args)
        if not part.statics.positions:
            return None
        try:
            return part.statics.check(args)
        except (RuntimeError, AttributeError):
            # An inference tensor (no version counter) took a parameter's place: look again at what can be tracked.
            part.statics = self._find_statics(session, args)
            return part.statics.check(args) if part.statics.positions else None

    def _find_statics(self, session: Session, args: Sequence[Any]) -> StaticSet:
        if self._blind:
            candidates: Sequence[int] = ()
        elif self.info.backward:
            candidates = [i for i, a in enumerate(args)
                          if isinstance(a, torch.Tensor) and session.residency.find(a) is not None]
        else:
            candidates = self.plan.static_inputs
        positions = [i for i in candidates
                     if isinstance(args[i], torch.Tensor) and not args[i].is_inference() and args[i].device == CPU]
        return StaticSet(session.residency, positions, self.info.bumped)

    def _send(self, session: Session, bound: BoundProgram, args: Sequence[Any], handles: dict[int, SavedHandle],
              seen: Seen | None, part: SessionPart, call_id: int, keep: bool, deadline_s: float) -> Part:
        link, lane = bound.link, self._lane
        connection = link.borrow()
        needs = Needs([], [], [])
        try:
            frames: list[Any] = []
            sent: dict[str, int] = {}
            template = bound.template
            if seen is not None and template.seen is not seen:
                needs, template = self._refresh(session, bound, args, seen, part, connection, deadline_s)
            encoded: list[Any] = [] if template.known else list(template.references)
            for slot, index in template.others:
                value = self._encode(session, link, args, index, handles, frames, sent, lane)
                if template.known:
                    encoded.append(value)
                else:
                    encoded[slot] = value
            keeps = self._keeps(session, bound) if keep else ()
            request = connection.next_request()
            header = connection.send(
                m.Run(request, bound.program.program_id, call_id, tuple(encoded), keeps, tuple(needs.incoming),
                      link.take_frees(), -template.number if template.known else template.number), frames)
            inline = sum(sent.values()) - (sum(map(len, frames)) if frames else 0)
            sent["control"] = header - inline
            for upload in needs.changed:
                send_put(connection, lane, link, upload, session.telemetry)
        except BaseException:
            unclaim(session.residency, link, [*needs.fresh, *needs.changed])
            connection.close()
            raise
        return Part(bound, connection, request, needs, keeps, sent, template)

    def _refresh(self, session: Session, bound: BoundProgram, args: Sequence[Any], seen: Seen, part: SessionPart,
                 connection: Connection, deadline_s: float) -> tuple[Needs, Template]:
        """Something about the parameters has changed: new references, and what the worker lacks of them."""
        assert part.statics is not None
        slots = {index: slot for slot, index in enumerate(bound.arguments)}
        chosen = [(slots[p], e, args[p]) for p, e in zip(part.statics.positions, seen.entries, strict=True)
                  if p in slots]
        references: list[Any] = [None] * len(bound.arguments)
        for slot, entry, _ in chosen:
            references[slot] = (m.RESIDENT, entry.tensor_id, entry.epoch)
        needs = find_needs(session.residency, bound.link, [e for _, e, _ in chosen], [t for _, _, t in chosen])
        if needs.fresh:
            send_fresh(connection, self._lane, bound.link, needs.fresh, session.telemetry, deadline_s=deadline_s,
                       progress=session.config.progress)
        if needs.incoming:
            return needs, Template(seen, references, bound.arguments, 0)
        # All of it is known to be there: the next calls may reuse the references without another look.
        bound.template = Template(seen, references, bound.arguments, session.next_id() if chosen else 0)
        return needs, bound.template

    def _encode(self, session: Session, link: WorkerLink, args: Sequence[Any], index: int,
                handles: dict[int, SavedHandle], frames: list[Any], sent: dict[str, int], lane: ZmqFrames) -> Any:
        if index == RNG_ARGUMENT:
            value: Any = torch.get_rng_state()
            reason = "state"
        else:
            value = args[index]
            handle = handles.get(index)
            if handle is not None:
                if handle.link is link:
                    return (m.RESIDENT, handle.tensor_id, 0)
                value = session.fetch(handle.link, handle.tensor_id, 0)
            reason = self._up_reason
            if not isinstance(value, torch.Tensor):
                return value
            if self._blind and index in self.plan.static_inputs:
                reason = "weights"
        wire = lane.stage(value, frames)
        sent[reason] = sent.get(reason, 0) + payload_bytes(wire, frames)
        return (m.INLINE, wire)

    def _keeps(self, session: Session, bound: BoundProgram) -> tuple[tuple[int, int], ...]:
        """Handles for what stays: new ids for activations, new epochs for updated parameters and buffers."""
        if not bound.keep_names:
            return ()
        return tuple((session.next_id(), 1 if i in bound.keep_updates else 0) for i in range(len(bound.keep_names)))

    # -- answers ----------------------------------------------------------------------------------------------

    def _collect(self, workers: Sequence[int], parts: Sequence[Part], state: CallState, args: Sequence[Any],
                 deadline_s: float) -> dict[int, dict[str, int]]:
        """Read until the call is decided; returns the bytes that came, by worker and reason."""
        received: dict[int, dict[str, int]] = {w: {} for w in workers}
        if len(parts) == 1:
            while not state.done:
                self._read(workers[0], parts[0], state, received[workers[0]], args, deadline_s)
            return received
        poller = zmq.Poller()
        by_socket = {}
        for worker, part in zip(workers, parts, strict=True):
            poller.register(part.connection.socket, zmq.POLLIN)
            by_socket[part.connection.socket] = (worker, part)
        while not state.done:
            ready = poller.poll(POLL_MS)
            for socket, _ in ready:
                worker, part = by_socket[socket]
                self._read(worker, part, state, received[worker], args, deadline_s)
            if not ready:
                self._check(workers, parts, state, deadline_s)
        return received

    def _check(self, workers: Sequence[int], parts: Sequence[Part], state: CallState, deadline_s: float) -> None:
        for worker, part in zip(workers, parts, strict=True):
            try:
                part.bound.link.check_alive()
            except GenieError as error:
                state.handle(Broke(worker, error))
        if time.monotonic() > deadline_s:
            state.handle(Broke(state.open_workers[0], WorkerTimeoutError(
                f"workers {state.open_workers} did not answer within {self._config.timeout_s:g} s; raise timeout_s")))

    def _read(self, worker: int, part: Part, state: CallState, received: dict[str, int], args: Sequence[Any],
              deadline_s: float) -> None:
        message, frames, header_bytes = part.connection.receive(deadline_s)
        if isinstance(message, m.Failure):
            if message.request in (part.request, 0):
                state.handle(Broke(worker, to_error(message, part.bound.link.address)))
            return
        if not isinstance(message, m.Result | m.Partial) or message.request != part.request:
            return
        inline = 0
        landed: list[tuple[int, Any]] = []
        spans: dict[int, torch.Tensor] = {}
        for index, value in message.values:
            if type(value) is tuple:
                if value[0] == m.ALIAS:
                    landed.append((index, view_of(spans[value[1]], value[2])))
                    continue
                if value[0] == m.INPUT_VIEW:
                    landed.append((index, view_of_input(args[part.bound.view_sources[index]], value[1])))
                    continue
                size = payload_bytes(value[1], frames)
                inline += size if type(value[1][3]) is bytes else 0
                reason = self._reason_down(part.bound, index)
                received[reason] = received.get(reason, 0) + size
                kind, view = value[0], value[-1]
                value = self._lane.land(value[1], frames, CPU)
                if kind == m.SPAN:
                    spans[index] = value
                    value = view_of(value, view)
            landed.append((index, value))
        received["control"] = received.get("control", 0) + header_bytes - inline
        state.handle(Answered(worker, message, tuple(landed)))

    def _reason_down(self, bound: BoundProgram, index: int) -> str:
        if index >= len(bound.return_names):
            return "state"
        name = bound.return_names[index]
        return "state" if name in self._static_mutations or name == self._final_rng else self._down_reason

    def _finish(self, session: Session, part: SessionPart, binding: Binding, parts: Sequence[Part],
                state: CallState, args: list[Any], seen: Seen | None, keep: bool) -> tuple[Any, ...]:
        named: dict[str, Any] = {}
        kept: dict[str, Kept] = {}
        updates: dict[int, Kept] = {}
        for worker, p in zip(binding.programs, parts, strict=True):
            values, bound = state.values[worker], p.bound
            for index, name in enumerate(bound.return_names):
                named[name] = values[index]
            for index, name in enumerate(bound.keep_names):
                if keep and index in bound.keep_updates:
                    updates[bound.keep_updates[index]] = (p, index, state.results[worker].kept[index])
                elif keep:
                    kept[name] = (p, index, state.results[worker].kept[index])
                else:
                    named.setdefault(name, values[len(bound.return_names) + index])
            if p.template.number:
                p.template.known = True
            if p.needs.incoming and seen is not None:
                acknowledge(session.residency, bound.link, seen.entries, p.needs.incoming)
        if self.plan.mutations:
            self._commit(session, part, args, named, updates, seen)
        if self._final_rng is not None:
            torch.set_rng_state(named[self._final_rng])
        placeholders: dict[str, torch.Tensor] = {}
        return tuple([self._output(session, o, args, named, kept, placeholders) for o in self.plan.outputs])

    def _output(self, session: Session, output: Any, args: list[Any], named: dict[str, Any],
                kept: dict[str, Kept], placeholders: dict[str, torch.Tensor]) -> Any:
        kind = output.kind
        if kind == "value":
            return named[output.name]
        if kind == "saved":
            if output.name not in kept:
                return named[output.name]
            if output.name not in placeholders:
                p, index, form = kept[output.name]
                if type(form) is not tuple:
                    return form
                placeholders[output.name] = placeholder(SavedHandle(p.bound.link, p.keeps[index][0], form))
            return placeholders[output.name]
        if kind == "input":
            value = args[output.index]
            handle = handle_of(value) if self.info.backward else None
            return value if handle is None else session.fetch(handle.link, handle.tensor_id, 0)
        return output.literal

    def _commit(self, session: Session, part: SessionPart, args: list[Any], named: dict[str, Any],
                updates: dict[int, Kept], seen: Seen | None) -> None:
        """The call has succeeded on all workers: now, and only now, the caller's tensors change."""
        with torch.no_grad():
            for index, name in self.plan.mutations:
                new = named[name] if name in named else args[self.plan.inputs.index(name)]
                args[index].copy_(new)
        if seen is None or part.statics is None:
            return
        place = {p: i for i, p in enumerate(part.statics.positions)}
        changed: list[int] = []
        for index, _ in self.plan.mutations:
            if index not in place:
                continue
            entry: Entry = seen.entries[place[index]]
            changed.append(place[index])
            if index in updates:
                p, at, form = updates[index]
                self._adopt_update(session, entry, args[index], p.bound.link, p.keeps[at], form)
        part.statics.expect_after_commit(args, seen, changed)

    def _adopt_update(self, session: Session, entry: Entry, tensor: torch.Tensor, link: WorkerLink,
                      handle: tuple[int, int], form: Any) -> None:
        """The worker's new value becomes the resident content, if it is laid out as the caller's tensor is."""
        _, shape, stride = form
        if shape == tuple(tensor.shape) and stride == tensor.stride():
            session.residency.committed(entry, tensor, handle, link.key)
        else:
            link.frees.append(handle)

    # -- trouble ----------------------------------------------------------------------------------------------

    def _abandon(self, session: Session, parts: Sequence[Part], call_id: int, state: CallState) -> None:
        """The call did not happen: tell the workers to forget it, and drop connections with replies under way."""
        for part in parts:
            unclaim(session.residency, part.bound.link, [*part.needs.fresh, *part.needs.changed])
            part.bound.link.frees.extend(part.keeps)
            part.bound.template = Template(None, part.template.references, part.bound.arguments, 0)
            settled = len(parts) == 1 and isinstance(state.error, GenieError) and not part.bound.link.lost \
                and not isinstance(state.error, WorkerTimeoutError)
            if settled:
                part.bound.link.give_back(part.connection)
                continue
            if not part.bound.link.lost:
                part.connection.send(m.Cancel(call_id))
            part.connection.close(linger_ms=200)

    def _after_loss(self, session: Session, part: SessionPart, args: list[Any],
                    error: WorkerLostError) -> tuple[Any, ...]:
        for link in session.links:
            if link.lost:
                session.lost(link)
        if any(handle_of(v) is not None for v in args):
            raise WorkerLostError(
                f"{error}; the activations that this backward needs were lost with it. Parameters and optimizer state "
                "are untouched: run the training step again", **error.facts) from error
        policy = self._config.on_worker_loss
        if policy == "error":
            raise error
        log.warning("%s: %s; %s", self.info.label, error, "running here" if policy == "local" else "trying once more")
        if policy == "local":
            return self._locally(session, "worker lost, on_worker_loss=local", args)
        session.telemetry.event("call repeated after a worker was lost")
        return self._attempt(session, part, args, time.perf_counter())

    def _locally(self, session: Session, reason: str, args: list[Any]) -> tuple[Any, ...]:
        session.telemetry.fallback(reason)
        return tuple(self._run_local(args))

    def _count(self, session: Session, binding: Binding, parts: Sequence[Part], state: CallState,
               received: dict[int, dict[str, int]], started_s: float, sent_s: float, answered_s: float) -> None:
        shares = []
        queue_s = 0.0
        for worker, p in zip(binding.programs, parts, strict=True):
            result = state.results[worker]
            shares.append(Share(p.bound.link.name, p.bound.num_fragments, result.compute_s, p.sent, received[worker]))
            queue_s = max(queue_s, result.queue_s)
        now_s = time.perf_counter()
        session.telemetry.call(shares, dispatch_s=(sent_s - started_s) + (now_s - answered_s),
                               wait_s=answered_s - sent_s, queue_s=queue_s)


class SessionPart:
    """What a graph knows about one session: its bindings, its parameters there, the workers that have them."""

    def __init__(self, session: Session) -> None:
        self._session = weakref.ref(session)
        self.bindings: dict[tuple[str, ...], Binding] = {}
        self.statics: StaticSet | None = None
        self.prefer: tuple[str, ...] = ()
        self.refusal = ""

    @property
    def session(self) -> Session:
        session = self._session()
        assert session is not None
        return session


def _collect_handles(args: Sequence[Any]) -> dict[int, SavedHandle]:
    handles: dict[int, SavedHandle] = {}
    for index, value in enumerate(args):
        handle = handle_of(value)
        if handle is not None:
            handles[index] = handle
    return handles


def materialize(args: Sequence[Any], get_session: Callable[[], Session]) -> list[Any]:
    """The arguments with every activation that stayed on a worker brought here. Raises: WorkerError."""
    values = list(args)
    for index, handle in _collect_handles(values).items():
        values[index] = get_session().fetch(handle.link, handle.tensor_id, 0)
    return values


def _drop_programs(session_ref: weakref.ref[Session], bindings: dict[tuple[str, ...], Binding]) -> None:
    """The graph was collected: its programs go with the next housekeeping."""
    session = session_ref()
    if session is None or session.closed:
        return
    for binding in bindings.values():
        for bound in binding.programs.values():
            bound.link.drops.append(binding.program_id)
