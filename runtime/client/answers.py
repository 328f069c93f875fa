"""What workers answer to a call: read until it is decided, then commit and make the caller's outputs."""
from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import GenieError, WorkerTimeoutError
from genie_dynamo.core.plan import Plan
from genie_dynamo.core.tensors import view_of, view_of_input
from genie_dynamo.runtime.client import stale
from genie_dynamo.runtime.client.binding import Binding, BoundProgram, Template
from genie_dynamo.runtime.client.calls import Answered, Broke, CallState
from genie_dynamo.runtime.client.connection import POLL_MS, Connection, to_error
from genie_dynamo.runtime.client.recipes import Recipe
from genie_dynamo.runtime.client.residency import Entry, Seen, StaticSet
from genie_dynamo.runtime.client.saved import SavedHandle, handle_of, placeholder
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.state import KeptState, StateRules, Stored
from genie_dynamo.runtime.client.uploads import Needs, acknowledge, payload_bytes
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.lanes.copies import copied_in
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames

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
    state: tuple[tuple[int, int], ...]      # handles for bound.state_names; empty: nothing stays
    stored: list[Stored]                    # contents that went along, to stay


Kept = tuple[Part, int, Any]
"""A value that stayed on a worker: whose it is, its index among the kept, and its form."""


class Answers:
    """Reads the answers to one graph's calls."""

    def __init__(self, plan: Plan, rules: StateRules, *, backward: bool, timeout_s: float) -> None:
        self._plan = plan
        self._rules = rules
        self._backward = backward
        self._timeout_s = timeout_s
        self._lane = ZmqFrames()
        self._down_reason = "gradients" if backward else "outputs"
        self._final_rng = plan.final_rng
        self._stays = frozenset(plan.stays)
        self._static_mutations = {name: i for i, name in plan.mutations if i in set(plan.static_inputs)}

    def collect(self, workers: Sequence[int], parts: Sequence[Part], state: CallState, args: Sequence[Any],
                deadline_s: float) -> dict[int, dict[str, int]]:
        """Read until the call is decided; returns the bytes that came, by worker and reason."""
        received: dict[int, dict[str, int]] = {w: {} for w in workers}
        if len(parts) == 1:
            while not state.done:
                self._read(workers[0], parts[0], state, received[workers[0]], args, deadline_s)
            return received
        while not state.done:
            ready = self._ready([(w, p) for w, p in zip(workers, parts, strict=True) if w in state.open_workers])
            for worker, part in ready:
                self._read(worker, part, state, received[worker], args, deadline_s)
            if not ready:
                self._check(workers, parts, state, deadline_s)
        return received

    def _ready(self, parts: Sequence[tuple[int, Part]]) -> list[tuple[int, Part]]:
        """Those of which something can be read; none where nothing has come for a while."""
        poller = zmq.Poller()
        by_handle: dict[Any, tuple[int, Part]] = {}
        for worker, part in parts:
            handle = part.connection.wait_handle()
            if handle is None:
                return [(worker, part)]
            poller.register(handle, zmq.POLLIN)
            by_handle[handle] = (worker, part)
        return [by_handle[handle] for handle, _ in poller.poll(POLL_MS)]

    def _check(self, workers: Sequence[int], parts: Sequence[Part], state: CallState, deadline_s: float) -> None:
        for worker, part in zip(workers, parts, strict=True):
            try:
                part.bound.link.check_alive()
            except GenieError as error:
                state.handle(Broke(worker, error))
        if time.monotonic() > deadline_s:
            state.handle(Broke(state.open_workers[0], WorkerTimeoutError(
                f"workers {state.open_workers} did not answer within {self._timeout_s:g} s; raise timeout_s")))

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
        if name in self._static_mutations or name == self._final_rng:
            return "state"
        reason = self._rules.reason_down(name)
        return self._down_reason if reason == "outputs" else reason

    def finish(self, session: Session, statics: StaticSet | None, binding: Binding, parts: Sequence[Part],
               state: CallState, args: list[Any], seen: Seen | None, keep: bool) -> tuple[Any, ...]:
        """Everything has come: commit, and return the outputs in the plan's order."""
        named: dict[str, Any] = {}
        kept: dict[str, Kept] = {}
        updates: dict[int, Kept] = {}
        state_kept: dict[str, KeptState] = {}
        for worker, p in zip(binding.programs, parts, strict=True):
            values, bound, result = state.values[worker], p.bound, state.results[worker]
            for index, name in enumerate(bound.return_names):
                named[name] = values[index]
            for index, name in enumerate(bound.keep_names):
                if keep and index in bound.keep_updates:
                    updates[bound.keep_updates[index]] = (p, index, result.kept[index])
                elif keep:
                    kept[name] = (p, index, result.kept[index])
                else:
                    named.setdefault(name, values[len(bound.return_names) + index])
            if p.template.number:
                p.template.known = True
            if p.needs.incoming and seen is not None:
                acknowledge(session.residency, bound.link, seen.entries, p.needs.incoming)
            self._rules.arrived(session, bound.link, bound.state_names, p.state, result, p.stored, state_kept)
        with torch.no_grad():
            writes = self._rules.rebuild(session, args, named, state_kept)
            if self._plan.mutations:
                self._commit(session, statics, args, named, updates, seen, writes)
            if self._rules.active:
                self._rules.settle(session, args, named, state_kept)
            if self._plan.mutations and seen is not None and statics is not None:
                self._expect(statics, args, seen)
        if self._final_rng is not None:
            torch.set_rng_state(named[self._final_rng])
        placeholders: dict[str, torch.Tensor] = {}
        return tuple([self._output(session, o, args, named, kept, placeholders) for o in self._plan.outputs])

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
            handle = handle_of(value) if self._backward else None
            return value if handle is None else session.fetch(handle.link, handle.tensor_id, 0)
        return output.literal

    def _commit(self, session: Session, statics: StaticSet | None, args: list[Any], named: dict[str, Any],
                updates: dict[int, Kept], seen: Seen | None, writes: Sequence[Recipe]) -> None:
        """The call has succeeded on all workers: now, and only now, the caller's tensors change."""
        by_value = {recipe.value: recipe for recipe in writes}
        place = {p: i for i, p in enumerate(statics.positions)} if seen is not None and statics is not None else {}
        entries = {index: seen.entries[at] for index, at in place.items()} if seen is not None else {}
        home = self._fetch_home(session, args, updates, entries) if self._stays else {}
        for index, name in self._plan.mutations:
            if index in home:
                if len(home) < len(self._stays):
                    stale.comes_down(session, args[index])
                copied_in(args[index].copy_(home[index]).nbytes)
            elif index in self._stays and index in updates:
                p, at, _ = updates.pop(index)
                session.residency.committed(entries[index], args[index], p.keeps[at], p.bound.link.key, elsewhere=True)
                stale.mark(session, args[index], p.bound.link, p.keeps[at])
            elif name in named:
                copied_in(args[index].copy_(named[name]).nbytes)
            elif name in by_value:
                by_value[name].write(args[index], args, named)
            else:
                args[index].copy_(args[self._plan.inputs.index(name)])
        for index, (p, at, form) in updates.items():
            if index in entries:
                self._adopt_update(session, entries[index], args[index], p.bound.link, p.keeps[at], form)
            else:
                p.bound.link.frees.append(p.keeps[at])

    def _expect(self, statics: StaticSet, args: list[Any], seen: Seen) -> None:
        place = {p: i for i, p in enumerate(statics.positions)}
        statics.expect_after_commit(args, seen, [place[index] for index, _ in self._plan.mutations if index in place])

    def _fetch_home(self, session: Session, args: Sequence[Any], updates: Mapping[int, Kept],
                    entries: Mapping[int, Entry]) -> dict[int, torch.Tensor]:
        """New contents that cannot stay on their worker alone. They come before anything changes: a fetch can fail."""
        home = {}
        try:
            for index in self._stays & updates.keys():
                (p, at, form), tensor = updates[index], args[index]
                if index in entries:
                    entries[index].sample = entries[index].sample_view = None       # a second way to the memory
                if index not in entries or form[1] != tuple(tensor.shape) or form[2] != tensor.stride() \
                        or not stale.may_be_stale(tensor):
                    home[index] = session.fetch(p.bound.link, *p.keeps[at])
        except BaseException:
            for p, at, _ in updates.values():
                p.bound.link.frees.append(p.keeps[at])
            session.residency.touch([args[index] for index in entries])             # which takes new samples
            raise
        return home

    def _adopt_update(self, session: Session, entry: Entry, tensor: torch.Tensor, link: WorkerLink,
                      handle: tuple[int, int], form: Any) -> None:
        """The worker's new value becomes the resident content, if it is laid out as the caller's tensor is."""
        _, shape, stride = form
        if shape == tuple(tensor.shape) and stride == tensor.stride():
            session.residency.committed(entry, tensor, handle, link.key)
        else:
            link.frees.append(handle)
