"""State that stays on workers: how an argument that may be there travels, and what becomes of results that stay.

Arguments     known there and unchanged -> its handle; a view of such a tensor -> handle and view;
              else its content, which stays there under a new handle where the place it is met at is one of state
Results       a value that stays comes back whole the first time, or as the rows from which the caller rebuilds it;
              the caller's tensor is noted as resident. New contents of mutated inputs likewise

What stays is a cache of what the caller holds: every tensor of his is true at all times, and sent again when needed.
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import GenieError
from genie_dynamo.core.plan import Plan
from genie_dynamo.core.tensors import DTYPE_CODE, is_dense
from genie_dynamo.runtime.client.habits import MIN_STATE_BYTES, Habit
from genie_dynamo.runtime.client.recipes import Recipe
from genie_dynamo.runtime.client.residency import Entry, Residency, full_key
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.uploads import payload_bytes
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames

log = logging.getLogger(__name__)

NOT_KEPT = (0, 0)
MOVE_TIMEOUT_S = 10.0
"""How long a worker may take to take a request to send state to another, before the client sends its own copy."""
MOVE_GRACE_S = 2.0
MOVE_BYTES_PER_S = 10e6
"""A run waits for state that another worker sends as long as a slow network takes; then it is asked for here."""


KeptState = tuple[WorkerLink, tuple[int, int], Any]
"""A value of plan.state that stayed: where, under which handle, and its form."""


class Stored(NamedTuple):
    """A content that goes to a worker with a call, to stay there."""

    entry: Entry
    handle: tuple[int, int]


def move(session: Session, entry: Entry, tensor: torch.Tensor, link: WorkerLink) -> bool:
    """Let a worker that has the content send it to `link`; False where none can, and the caller's own has to go."""
    residency = session.residency
    source = next((x for x in session.links if x.key in entry.acked and not x.lost
                   and (x.key, link.key) not in residency.unreachable), None)
    if source is None:
        return False
    address, peer_key = _route_to(link)
    tensor_id, epoch = entry.tensor_id, entry.epoch
    try:
        source.ask(lambda request: m.Move(request, tensor_id, epoch, address, peer_key), MOVE_TIMEOUT_S)
    except GenieError as error:
        log.info("state could not go from %s to %s and is sent from here: %s", source.name, link.name, error)
        session.telemetry.event("state not moved between workers")
        return False
    residency.moving[tensor_id, epoch] = (source.key, link.key)
    session.telemetry.event("state moved between workers")
    session.telemetry.event("state moved between workers: bytes", tensor.nbytes)
    return True


def _route_to(link: WorkerLink) -> tuple[str, str]:
    """Where other workers find a worker: its address and key."""
    return link.address, link.server_key.decode() if link.server_key is not None else ""


def _is_foreign(tensor: torch.Tensor) -> bool:
    """Whether the memory is not torch's own (from_numpy, DLPack, a mapped file): its owner writes to it unseen."""
    return not tensor.untyped_storage().resizable()


class StateRules:
    """What is known of one graph's state.

    Args: bumped: inputs whose version AOTAutograd raises before each call.
          keep_state: False where all of it travels with every call.
    """

    def __init__(self, plan: Plan, bumped: frozenset[int], keep_state: bool) -> None:
        index_of = {name: index for index, name in enumerate(plan.inputs)}
        targets = {name: index for index, name in reversed(plan.mutations)}
        outputs = {output.name for output in plan.outputs if output.kind == "value"}
        # A value that is an output too exists twice at the caller: it is made once and copied into the input.
        self.recipes = [Recipe(recipe, plan, targets.get(recipe.value) if recipe.value not in outputs else None)
                        for recipe in plan.rebuilds]
        self.targets = {name: index for name, index in targets.items() if name in plan.state}
        """Value -> position of the mutated input whose new content it is."""
        self.written = {r.value for r in self.recipes} & set(self.targets) - outputs
        """Values that are written into the mutated input as rows, and exist nowhere else at the caller."""
        self.active = keep_state
        sources = {index_of[name] for recipe in plan.rebuilds for name in recipe.names("input")}
        self._shared = [name for group in plan.aliases for name in group] + [name for name, _ in plan.input_views]
        self._structural = sources | set(self.targets.values())
        self._pieces = {piece for recipe in plan.rebuilds for piece in recipe.names("piece")} - outputs
        self._bumped = bumped
        statics = frozenset(plan.static_inputs)
        self._places = [index for index in sorted(self._structural) if index not in statics] or [
            index for index in range(len(plan.inputs)) if index not in statics]
        rebuilt = {recipe.value for recipe in self.recipes}
        self._inputs: dict[int, Habit] = {}
        self._outputs = {name: Habit("output", name in rebuilt or name in self.targets) for name in plan.state}
        self._lane = ZmqFrames()

    # -- arguments --------------------------------------------------------------------------------------------

    def argument(self, session: Session, link: WorkerLink, index: int, tensor: torch.Tensor, frames: list[Any],
                 sent: dict[str, int], stored: list[Stored]) -> Any:
        """How a tensor argument travels; None where it has to go as a plain value."""
        residency = session.residency
        entry = residency.find(tensor)
        if entry is None and tensor._base is None and tensor.nbytes < MIN_STATE_BYTES \
                and index not in self._structural:
            return None
        if tensor.is_inference() or tensor.layout is not torch.strided or tensor.device.type != "cpu":
            return None
        version = tensor._version - (index in self._bumped)
        if entry is None:
            return self._of_base(residency, link, tensor, version) or self._first_met(
                residency, link, index, tensor, version, frames, sent, stored)
        if entry.barred:
            return None
        key = full_key(tensor, version)
        if entry.key == key:
            if entry.habit is not None:
                entry.habit.came_back()
            if entry.acked.get(link.key) == entry.epoch:
                return (m.HELD, entry.tensor_id, entry.epoch)
            if entry.acked and tensor.nbytes >= MIN_STATE_BYTES and move(session, entry, tensor, link):
                stored.append(Stored(entry, (entry.tensor_id, entry.epoch)))
                return (m.MOVED, entry.tensor_id, entry.epoch, MOVE_GRACE_S + tensor.nbytes / MOVE_BYTES_PER_S)
        else:
            residency.edited(entry, tensor, key)
            if not self._on_trial(index, tensor):
                return None                                    # a buffer that the caller fills anew for each call
        if (tensor.nbytes < MIN_STATE_BYTES and index not in self._structural) or _is_foreign(tensor):
            return None
        return self._store(entry, link, tensor, "state", frames, sent, stored)

    def _first_met(self, residency: Residency, link: WorkerLink, index: int, tensor: torch.Tensor, version: int,
                   frames: list[Any], sent: dict[str, int], stored: list[Stored]) -> Any:
        habit = self._habit(index)
        size_bytes = tensor.nbytes
        if size_bytes < MIN_STATE_BYTES and (not habit.structural or size_bytes < 64):
            return None
        if _is_foreign(tensor):
            return None
        entry = residency.track(tensor, full_key(tensor, version), habit)
        if not self._on_trial(index, tensor):
            return None
        reason = "state" if habit.comes_back else "inputs"
        return self._store(entry, link, tensor, reason, frames, sent, stored)

    def _habit(self, index: int) -> Habit:
        habit = self._inputs.get(index)
        if habit is None:
            habit = self._inputs[index] = Habit("input", index in self._structural)
        return habit

    def _on_trial(self, index: int, tensor: torch.Tensor) -> bool:
        """A content that no worker has is met at a place: whether it is to stay where it goes."""
        habit = self._habit(index)
        wanted = habit.wanted
        habit.met(tensor.nbytes)
        return wanted

    def _store(self, entry: Entry, link: WorkerLink, tensor: torch.Tensor, reason: str, frames: list[Any],
               sent: dict[str, int], stored: list[Stored]) -> Any:
        wire = self._lane.stage(tensor, frames)
        sent[reason] = sent.get(reason, 0) + payload_bytes(wire, frames)
        stored.append(Stored(entry, (entry.tensor_id, entry.epoch)))
        return (m.STORE, entry.tensor_id, entry.epoch, wire)

    def _of_base(self, residency: Residency, link: WorkerLink, tensor: torch.Tensor, version: int) -> Any:
        """The tensor as a view of one that the worker has; None where it is not."""
        base = tensor._base
        if base is None or base.dtype != tensor.dtype or tensor.is_conj() or tensor.is_neg():
            return None
        entry = residency.find(base)
        if entry is None or entry.barred or entry.key != full_key(base, version) \
                or entry.acked.get(link.key) != entry.epoch or not is_dense(base.shape, base.stride()):
            return None
        if entry.habit is not None:
            entry.habit.came_back()
        view = (tuple(tensor.shape), tensor.stride(), tensor.storage_offset() - base.storage_offset())
        return (m.HELD, entry.tensor_id, entry.epoch, view)

    def reason_down(self, name: str) -> str:
        """As what a returned value counts."""
        if name in self._pieces:
            return "state"
        habit = self._outputs.get(name)
        return "state" if habit is not None and habit.comes_back else "outputs"

    # -- results ----------------------------------------------------------------------------------------------

    def handles(self, session: Session, names: Sequence[str]) -> tuple[tuple[int, int], ...]:
        """Handles for the values that are to stay on a worker now; empty where none is."""
        habits = self._outputs
        wanted = [habits[name].wanted for name in names]
        return tuple([(session.next_id(), 1) if keep else NOT_KEPT for keep in wanted]) if True in wanted else ()

    def begin(self, args: Sequence[Any]) -> list[torch.Tensor | None]:
        """What of the values that will be made here can be made while the worker runs; one for each recipe."""
        with torch.no_grad():
            return [recipe.begin(args) for recipe in self.recipes]

    def finish(self, session: Session, link: WorkerLink, names: Sequence[str], handles: Sequence[tuple[int, int]],
               result: m.Result, stored: Sequence[Stored], args: Sequence[Any], named: dict[str, Any],
               begun: Sequence[torch.Tensor | None] = ()) -> None:
        """All of what follows for a call of one worker that changes none of its inputs."""
        kept: dict[str, KeptState] = {}
        if handles or stored or result.evicted:
            self.arrived(session, link, names, handles, result, stored, kept)
        if self.recipes:
            with torch.no_grad():
                self.rebuild(session, args, named, kept, begun)
        self.settle(session, args, named, kept)

    def arrived(self, session: Session, link: WorkerLink, names: Sequence[str], handles: Sequence[tuple[int, int]],
                result: m.Result, stored: Sequence[Stored], kept: dict[str, KeptState]) -> None:
        """A worker has answered: what went along is there, what stays goes into `kept`, what had to go is forgotten."""
        for entry, handle in stored:
            session.residency.placed(entry, link.key)
            session.residency.moving.pop(handle, None)
        for name, handle, form in zip(names, handles, result.state, strict=bool(handles)):
            if form is not None:
                kept[name] = (link, handle, form)
        if result.evicted:
            session.residency.evicted(link.key, result.evicted)
            session.telemetry.event("evicted by a worker", len(result.evicted))

    def gave_up(self, link: WorkerLink, handles: Sequence[tuple[int, int]], stored: Sequence[Stored]) -> None:
        """The call did not happen: the worker is to free what it may have kept of it."""
        link.frees.extend([handle for handle in handles if handle != NOT_KEPT])
        link.frees.extend([handle for entry, handle in stored if entry.acked.get(link.key) != handle[1]])

    def holder(self, residency: Residency, args: Sequence[Any]) -> str | None:
        """The worker that has the first of the call's state that is anywhere, by key."""
        for index in self._places:
            entry = residency.find(args[index]) if isinstance(args[index], torch.Tensor) else None
            if entry is not None and entry.acked and not entry.barred:
                return next(iter(entry.acked))
        return None

    def rebuild(self, session: Session, args: Sequence[Any], named: dict[str, Any],
                kept: Mapping[str, KeptState], begun: Sequence[torch.Tensor | None] = ()) -> list[Recipe]:
        """Make the values that did not come whole; the recipes that write into inputs are returned, to be carried out.

        A value that cannot be made to the bit is fetched from the worker that keeps it, and counted.
        """
        writes = []
        for recipe, half in zip_longest(self.recipes, begun):
            link, handle, form = kept[recipe.value]
            if not recipe.applies(args, named):
                named[recipe.value] = self._whole(session, link, handle, "an index occurs twice")
            elif recipe.value in self.written:
                writes.append(recipe)
            else:
                made = recipe.make(args, named, half)
                if form != (DTYPE_CODE[made.dtype], tuple(made.shape), made.stride()):
                    made = self._whole(session, link, handle, "the layout differs")
                named[recipe.value] = made
        return writes

    @staticmethod
    def _whole(session: Session, link: WorkerLink, handle: tuple[int, int], why: str) -> torch.Tensor:
        session.telemetry.event(f"state came whole: {why}")
        return session.fetch(link, *handle)

    def settle(self, session: Session, args: Sequence[Any], named: Mapping[str, Any],
               kept: Mapping[str, KeptState]) -> None:
        """After everything has been committed: note which of the caller's tensors are resident now."""
        residency = session.residency
        for name in self._shared:
            if isinstance(named.get(name), torch.Tensor):
                residency.bar(named[name])
        for name, habit in self._outputs.items():
            target = self.targets.get(name)
            tensor = named.get(name) if target is None else args[target]
            if not isinstance(tensor, torch.Tensor):
                continue
            found = kept.get(name)
            if target is None:
                habit.met(tensor.nbytes)
            if found is None and (habit.small or target is not None):
                continue
            trackable = not tensor.is_inference() and tensor.layout is torch.strided
            if found is None:
                if trackable:
                    residency.track(tensor, full_key(tensor, tensor._version), habit)
                continue
            link, handle, form = found
            if not trackable or form != (DTYPE_CODE[tensor.dtype], tuple(tensor.shape), tensor.stride()):
                link.frees.append(handle)
            elif target is None:
                residency.born(tensor, habit, handle, link.key)
            else:
                self._overwritten(residency, target, tensor, habit, handle, link)

    def _overwritten(self, residency: Residency, target: int, tensor: torch.Tensor, habit: Habit,
                     handle: tuple[int, int], link: WorkerLink) -> None:
        entry = residency.find(tensor)
        if _is_foreign(tensor) or (entry is not None and entry.barred):
            link.frees.append(handle)
        elif entry is None:
            residency.born(tensor, habit, handle, link.key)
        else:
            residency.committed(entry, tensor, handle, link.key)
