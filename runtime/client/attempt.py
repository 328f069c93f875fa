"""One attempt to run a graph on its workers.

    arguments -> where each must be -> messages -> answers -> commit -> outputs

An attempt changes the caller's tensors only after all workers have answered, so it can be repeated elsewhere when one
of them is lost.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import GenieError, WorkerLostError, WorkerTimeoutError
from genie_dynamo.core.plan import Plan
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.client import stale
from genie_dynamo.runtime.client.answers import Answers, Part
from genie_dynamo.runtime.client.binding import RNG_ARGUMENT, Binding, BoundProgram, Template, bind
from genie_dynamo.runtime.client.calls import CallState
from genie_dynamo.runtime.client.connection import Connection
from genie_dynamo.runtime.client.residency import Seen, StaticSet
from genie_dynamo.runtime.client.saved import SavedHandle, collect_handles, hooks_active
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.state import StateRules, Stored
from genie_dynamo.runtime.client.steady import ChangedError, steady_call
from genie_dynamo.runtime.client.uploads import Needs, find_needs, payload_bytes, send_contents, send_fresh, unclaim
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames
from genie_dynamo.runtime.telemetry import Share

CPU = torch.device("cpu")


class GraphInfo(NamedTuple):
    """What the backend knows about a graph beyond its plan."""

    backward: bool
    bumped: frozenset[int]            # inputs whose version AOTAutograd raises before each call
    label: str                        # for logs: "forward 3"
    partial: bool = False             # eager code of the same function follows: the graph ended in a break


class SessionPart:
    """What a graph knows about one session: its bindings, its parameters there, the workers that have them."""

    def __init__(self) -> None:
        self.bindings: dict[tuple[str, ...], Binding] = {}
        self.statics: StaticSet | None = None
        self.prefer: tuple[str, ...] = ()
        self.refusal = ""


class Attempts:
    """Runs one graph, whose plan is cut for `plan.num_workers` workers. Knows nothing of what to do when that fails."""

    def __init__(self, plan: Plan, specs: dict[int, bytes], info: GraphInfo, config: Config,
                 workers: Sequence[str] = ()) -> None:
        self.plan = plan
        self._workers = tuple(workers)
        self.info = info
        self._specs = specs
        self._config = config
        self._lane = ZmqFrames()
        self._rules = StateRules(plan, info.bumped, config.awareness == "full" and not info.backward)
        self._answers = Answers(plan, self._rules, backward=info.backward, timeout_s=config.timeout_s)
        self._blind = config.awareness == "blind"
        self._up_reason = "gradients" if info.backward else "inputs"
        self._stays = frozenset(plan.stays)
        self._saves = bool(plan.saved_values())
        self._steady = (plan.num_workers == 1 and not plan.mutations and plan.final_rng is None
                        and not info.backward and not self._blind)

    def run(self, session: Session, part: SessionPart, args: list[Any], started_s: float) -> tuple[Any, ...]:
        """One attempt; `started_s` is when the call began. Raises: whatever stops it; then nothing has changed."""
        handles = collect_handles(args) if self.info.backward else {}
        binding = self._choose(session, part, handles, args)
        if self._steady and (settled := binding.settled_template()) is not None:
            # Looking at many parameters takes as long as a small run: the worker begins meanwhile.
            expected = settled.seen
            try:
                return steady_call(session, binding.first, settled, self._rules, args, self._config.timeout_s,
                                   started_s, lambda: self._look(session, part, args) is expected)
            except ChangedError:
                session.telemetry.event("parameters changed, call begun anew")
        seen = self._look(session, part, args)
        if self._steady and (template := binding.steady_template(seen)) is not None:
            template.held += 1
            return steady_call(session, binding.first, template, self._rules, args, self._config.timeout_s, started_s)
        return self._general(session, part, binding, args, handles, seen, started_s)

    def _general(self, session: Session, part: SessionPart, binding: Binding, args: list[Any],
                 handles: dict[int, SavedHandle], seen: Seen | None, started_s: float) -> tuple[Any, ...]:
        deadline_s = time.monotonic() + self._config.timeout_s
        call_id = session.next_call()
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
            received = self._answers.collect(list(binding.programs), parts, state, args, deadline_s)
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
        outputs = self._answers.finish(session, part.statics, binding, parts, state, args, seen, keep)
        self._count(session, binding, parts, state, received, started_s, sent_s, answered_s)
        return outputs

    def _choose(self, session: Session, part: SessionPart, handles: dict[int, SavedHandle],
                args: Sequence[Any]) -> Binding:
        """Workers for this call: where the saved activations are, else the least busy ones."""
        count = self.plan.num_workers
        key: tuple[str, ...]
        if count == 1:
            if handles:
                link = next(iter(handles.values())).link
                link.check_alive()
            else:
                # The worker that the graph was placed on, where it lives; else any: its loss must not stop the graph.
                placed = [x for x in session.links if x.name in self._workers and not x.lost] if self._workers else ()
                link = placed[0] if placed else self._near_state(session, args) or session.pick(part.prefer)
            links, key = [link], (link.key,)
        else:
            session.pick()       # replaces lost workers
            links = self._named(session) if self._workers else [x for x in session.links if not x.lost][:count]
            if len(links) < count:
                raise WorkerLostError(f"the plan needs {count} workers, {len(links)} are left")
            key = tuple([link.key for link in links])
        binding = part.bindings.get(key)
        if binding is None or not binding.usable:
            with session.residency.lock:
                binding = part.bindings.get(key)
                if binding is None or not binding.usable:
                    binding = bind(session, self.plan, self._specs, links, self._config.worker_compiler,
                                   self._config.timeout_s, self._config.require_lane)
                    part.bindings[key] = binding
            part.prefer = tuple({*part.prefer, *(link.name for link in links)})
        return binding

    def _near_state(self, session: Session, args: Sequence[Any]) -> WorkerLink | None:
        """The worker that has the state of this call; None where it is nowhere, or there is no choice."""
        if len(session.links) < 2 or not self._rules.active:
            return None
        key = self._rules.holder(session.residency, args)
        return next((link for link in session.links if link.key == key and not link.lost), None)

    def _named(self, session: Session) -> list[WorkerLink]:
        """The workers that the plan was made for. Raises: WorkerLostError where one of them has not come back."""
        session.pick()
        by_name = {link.name: link for link in session.links if not link.lost}
        missing = [name for name in self._workers if name not in by_name]
        if missing:
            raise WorkerLostError(f"the plan runs on {', '.join(self._workers)}, and {', '.join(missing)} cannot be "
                                  "reached; the graph is placed anew with its next call")
        return [by_name[name] for name in self._workers]

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
        stored: list[Stored] = []
        try:
            frames: list[Any] = []
            sent: dict[str, int] = {}
            template = bound.template
            if seen is not None and template.seen is not seen:
                needs, template = self._refresh(session, bound, args, seen, part, connection, deadline_s)
            encoded: list[Any] = [] if template.known else list(template.references)
            for slot, index in template.others:
                value = self._encode(session, link, args, index, handles, frames, sent, lane, stored)
                if template.known:
                    encoded.append(value)
                else:
                    encoded[slot] = value
            keeps = self._keeps(session, bound) if keep else ()
            state = self._rules.handles(session, bound.state_names) if bound.state_names else ()
            request = connection.next_request()
            header = pack(m.to_wire(
                m.Run(request, bound.program.program_id, call_id, tuple(encoded), keeps, tuple(needs.incoming),
                      link.take_frees(), -template.number if template.known else template.number, state)))
            connection.run(header, frames, deadline_s, streaming=self.plan.num_workers == 1)
            inline = sum(sent.values()) - (sum(map(len, frames)) if frames else 0)
            sent["control"] = len(header) - inline
            for _ in send_contents(connection, lane, link, needs.changed, session.telemetry):
                pass
        except BaseException:
            unclaim(session.residency, link, [*needs.fresh, *needs.changed])
            connection.close()
            raise
        return Part(bound, connection, request, needs, keeps, sent, template, state, stored)

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
        if any(stale.is_stale(t) and e.acked.get(bound.link.key) != e.epoch for _, e, t in chosen):
            stale.bring_home()          # another worker has them: they go the long way
        needs = find_needs(session.residency, bound.link, [e for _, e, _ in chosen], [t for _, _, t in chosen])
        if needs.fresh:
            send_fresh(connection, self._lane, bound.link, needs.fresh, session.telemetry, deadline_s=deadline_s,
                       progress=session.config.progress)
        if needs.incoming:
            return needs, Template(seen, references, bound.arguments, 0)
        # All of it is known to be there: the next calls may reuse the references without another look.
        # What lives there alone (epoch 0) has a new handle in every step, and is named in every call.
        memorable = bool(chosen) and all(entry.epoch for _, entry, _ in chosen)
        bound.template = Template(seen, references, bound.arguments, session.next_id() if memorable else 0)
        return needs, bound.template

    def _encode(self, session: Session, link: WorkerLink, args: Sequence[Any], index: int,
                handles: dict[int, SavedHandle], frames: list[Any], sent: dict[str, int], lane: ZmqFrames,
                stored: list[Stored]) -> Any:
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
            if stale.is_stale(value):
                stale.bring_home()      # it travels as an ordinary value here
            if self._blind and index in self.plan.static_inputs:
                reason = "weights"
            if self._rules.active:
                argument = self._rules.argument(session, link, index, value, frames, sent, stored)
                if argument is not None:
                    return argument
        wire = lane.stage(value, frames)
        sent[reason] = sent.get(reason, 0) + payload_bytes(wire, frames)
        return (m.INLINE, wire)

    def _keeps(self, session: Session, bound: BoundProgram) -> tuple[tuple[int, int], ...]:
        """Handles for what stays. Epoch 0 is for what exists nowhere else, and must not be evicted."""
        if not bound.keep_names:
            return ()
        again = {i for i, position in bound.keep_updates.items() if position not in self._stays}
        return tuple([(session.next_id(), 1 if i in again else 0) for i in range(len(bound.keep_names))])

    def _abandon(self, session: Session, parts: Sequence[Part], call_id: int, state: CallState) -> None:
        """The call did not happen: tell the workers to forget it, and drop connections with replies under way."""
        for part in parts:
            unclaim(session.residency, part.bound.link, [*part.needs.fresh, *part.needs.changed])
            part.bound.link.frees.extend(part.keeps)
            self._rules.gave_up(part.bound.link, part.state, part.stored)
            part.bound.template = Template(None, part.template.references, part.bound.arguments, 0)
            settled = len(parts) == 1 and isinstance(state.error, GenieError) and not part.bound.link.lost \
                and not isinstance(state.error, WorkerTimeoutError)
            if settled:
                part.bound.link.give_back(part.connection)
                continue
            if not part.bound.link.lost:
                part.connection.send(m.Cancel(call_id))
            part.connection.close(linger_ms=200)

    def _count(self, session: Session, binding: Binding, parts: Sequence[Part], state: CallState,
               received: dict[int, dict[str, int]], started_s: float, sent_s: float, answered_s: float) -> None:
        shares = []
        queue_s = 0.0
        for worker, p in zip(binding.programs, parts, strict=True):
            result = state.results[worker]
            p.bound.last_compute_s = result.compute_s
            shares.append(Share(p.bound.link.name, p.bound.num_fragments, result.compute_s, p.sent, received[worker]))
            queue_s = max(queue_s, result.queue_s)
        now_s = time.perf_counter()
        session.telemetry.call(shares, dispatch_s=(sent_s - started_s) + (now_s - answered_s),
                               wait_s=answered_s - sent_s, queue_s=queue_s)


