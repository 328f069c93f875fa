"""Which of the caller's tensors a worker holds, and whether the copies still are what the caller has.

A parameter, a buffer or a piece of state (an output or an input that may come back) is recognised by identity (a live
weak reference), and its content by a key of address and version. What the key cannot see is covered thus:

    fused optimizers (no version bump)    a global hook after every optimizer step
    `.data` edits of trainable tensors    a few sampled elements, compared in rotation; one hit re-sends all of them
    everything else                       invalidate(tensor)
"""
from __future__ import annotations

import hashlib
import itertools
import operator
import threading
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from genie_dynamo.core import tensors
from genie_dynamo.runtime.client.habits import Habit
from genie_dynamo.runtime.client.stale import is_stale

DIGEST_BYTES = 64 << 10
"""Contents from this size on are asked for by digest before they are sent for the first time."""

Tensor = torch.Tensor


def _nobody() -> None:
    """Stands for a weak reference whose tensor is gone."""


class Entry:
    """One tensor of the caller that workers may hold. `epoch` names the content it has now."""

    __slots__ = ("__weakref__", "acked", "address", "barred", "digest", "epoch", "habit", "key", "ref", "sample",
                 "sample_view", "sent", "step_committed", "tensor_id", "trainable")

    def __init__(self, tensor: Tensor, tensor_id: int, on_death: Callable[[Entry], None]) -> None:
        own = weakref.ref(self)

        def died(_: object) -> None:
            entry = own()
            if entry is not None:
                on_death(entry)

        self.ref: Callable[[], Tensor | None] = weakref.ref(tensor, died)
        self.address = id(tensor)
        self.tensor_id = tensor_id
        self.epoch = -1
        self.key: tuple[Any, ...] | None = None
        self.sent: dict[str, int] = {}      # worker key -> epoch that is on its way or there
        self.acked: dict[str, int] = {}     # worker key -> epoch that is there
        self.digest: bytes | None = None
        self.habit: Habit | None = None     # where it was first met, if it is state and no parameter or buffer
        self.barred = False                 # others share its memory, and not its version: it always travels
        self.trainable = tensor.requires_grad and tensor.is_leaf
        self.step_committed = False
        self.sample_view: Tensor | None = None
        self.sample: Tensor | None = None

    def let_go(self) -> None:
        """Be nobody's entry any more."""
        self.ref = _nobody
        self.sample_view = self.sample = None

    def take_sample(self, tensor: Tensor, num_samples: int) -> None:
        """Remember a few elements of a trainable tensor."""
        if not self.trainable or num_samples == 0 or tensor.numel() == 0:
            return
        plain = tensor.detach()
        if not tensors.is_dense(plain.shape, plain.stride()):
            return
        count = min(num_samples, plain.numel())
        self.sample_view = plain.as_strided((count,), (max(1, (plain.numel() - 1) // max(count - 1, 1)),))
        self.sample = self.sample_view.clone()

    def sample_differs(self) -> bool:
        # NaN differs from itself: a sample with NaN makes the tensor travel again, which is right, only slower.
        return self.sample is not None and self.sample_view is not None and not torch.equal(
            self.sample_view, self.sample)


def full_key(tensor: Tensor, version: int) -> tuple[Any, ...]:
    """Address, version and layout; and the memory, since a freed address is given out again (two assigned `.data`)."""
    return (tensor.data_ptr(), version, tensor.dtype, tuple(tensor.shape), tensor.stride(),
            StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]


class Residency:
    """A session's table of entries. Thread-safe; the steady state takes no lock."""

    def __init__(self, num_samples: int, free: Callable[[str, tuple[int, int]], None],
                 next_id: Callable[[], int]) -> None:
        self.stamp = 0
        """Grows with every event that a version counter does not show; cached checks are valid for one stamp."""
        self.lock = threading.RLock()
        self._entries: dict[int, Entry] = {}
        self._num_samples = num_samples
        self._free = free
        self._next_id = next_id
        self._epochs = itertools.count(1)
        self._rotation = 0
        self.moving: dict[tuple[int, int], tuple[str, str]] = {}
        """What is on its way between two workers: handle -> (from, to)."""
        self.unreachable: set[tuple[str, str]] = set()
        """Pairs of workers between which something got lost: it goes through here instead."""
        _instances.add(self)

    def next_epoch(self) -> int:
        """An epoch nobody has used in this session."""
        return next(self._epochs)

    def find(self, tensor: Tensor) -> Entry | None:
        """The entry of exactly this tensor object."""
        entry = self._entries.get(id(tensor))
        return entry if entry is not None and entry.ref() is tensor else None

    def current(self, tensor: Tensor, bumped: int) -> Entry:
        """The tensor's entry, with a new epoch if its content may have changed.

        Args: bumped: how much AOTAutograd has raised the version for this call already.
        """
        with self.lock:
            entry = self.find(tensor)
            if entry is None:
                entry = Entry(tensor, self._next_id(), self._died)
                self._entries[id(tensor)] = entry
            if entry.habit is not None or entry.barred:
                entry.habit, entry.barred = None, False        # met as state before, it is a parameter here
            key = full_key(tensor, tensor._version - bumped)
            if key != entry.key and is_stale(tensor):
                entry.key = key                                # whoever edits it has it brought here before
            elif key != entry.key:
                self._renew(entry, tensor, key)
            return entry

    def committed(self, entry: Entry, tensor: Tensor, handle: tuple[int, int], worker: str, *,
                  elsewhere: bool = False) -> None:
        """A call has changed the tensor, here and on `worker`, where the new content is under `handle`.

        Args: elsewhere: only there (see stale.py).
        """
        with self.lock:
            self._release(entry)
            entry.tensor_id, entry.epoch = handle
            epoch = entry.epoch
            entry.key = full_key(tensor, tensor._version)
            entry.digest = None
            entry.step_committed = True
            entry.sent = {worker: epoch}
            entry.acked = {worker: epoch}
            if not elsewhere:
                entry.take_sample(tensor, self._num_samples)

    def came_home(self, tensor: Tensor) -> None:
        """What was on a worker alone has been copied into the tensor."""
        with self.lock:
            entry = self.find(tensor)
            if entry is not None:
                entry.take_sample(tensor, self._num_samples)
                self.stamp += 1

    def track(self, tensor: Tensor, key: tuple[Any, ...], habit: Habit) -> Entry:
        """An entry for a tensor that may be state; no worker has it yet."""
        with self.lock:
            entry = self.find(tensor)
            if entry is not None and entry.key == key:
                return entry                                   # another thread was faster
            entry = Entry(tensor, self._next_id(), self._died)
            entry.epoch, entry.key, entry.habit = self.next_epoch(), key, habit
            self._entries[id(tensor)] = entry
            return entry

    def edited(self, entry: Entry, tensor: Tensor, key: tuple[Any, ...]) -> None:
        """The caller has changed the content: what workers hold is of no use."""
        with self.lock:
            self._renew(entry, tensor, key)
            entry.sent, entry.acked = {}, {}

    def placed(self, entry: Entry, worker: str) -> None:
        """The worker has the current content."""
        with self.lock:
            entry.sent[worker] = entry.acked[worker] = entry.epoch

    def born(self, tensor: Tensor, habit: Habit, handle: tuple[int, int], worker: str) -> None:
        """A call has returned the tensor, and the worker keeps it under the handle."""
        with self.lock:
            entry = Entry(tensor, handle[0], self._died)
            entry.epoch, entry.habit = handle[1], habit
            entry.key = full_key(tensor, tensor._version)
            entry.sent, entry.acked = {worker: entry.epoch}, {worker: entry.epoch}
            self._entries[id(tensor)] = entry

    def bar(self, tensor: Tensor) -> None:
        """The tensor shares memory with another in a way that its version does not show: never keep it anywhere."""
        with self.lock:
            entry = Entry(tensor, 0, self._died)
            entry.barred = True
            self._entries[id(tensor)] = entry

    def evicted(self, worker: str, handles: Iterable[tuple[int, int]]) -> None:
        """The worker had to let these go."""
        gone = set(handles)
        with self.lock:
            for entry in list(self._entries.values()):
                if (entry.tensor_id, entry.sent.get(worker, -1)) in gone:
                    entry.sent.pop(worker, None)
                    entry.acked.pop(worker, None)
                    if entry.habit is None:
                        self.stamp += 1

    def never_came(self, handle: tuple[int, int]) -> bool:
        """A worker lacks this; returns whether another was to send it, which then is not asked again."""
        pair = self.moving.get(handle)
        if pair is None:
            return False
        self.unreachable.add(pair)
        self.moving = {handle: way for handle, way in self.moving.items() if way != pair}
        return True

    def distrust(self, worker: str) -> None:
        """The worker lacks something that it was thought to have: send all again, and let it free what it has.

        Under new epochs: what is to be freed must not be what has just been sent.
        """
        with self.lock:
            for entry in list(self._entries.values()):
                if worker not in entry.sent or is_stale(entry.ref()):
                    continue                                   # a stale one has nothing but what is there
                self._release(entry)
                entry.epoch = self.next_epoch()
                entry.sent, entry.acked = {}, {}
            self.stamp += 1

    def touch(self, items: Iterable[Tensor]) -> None:
        """Whatever these tensors hold is to be sent again."""
        with self.lock:
            for tensor in items:
                entry = self.find(tensor)
                if entry is not None:
                    entry.key = None
            self.stamp += 1

    def forget(self, tensor: Tensor) -> None:
        """Know nothing of the tensor any more, and hold no reference to it, not even a weak one."""
        with self.lock:
            entry = self.find(tensor)
            if entry is not None:
                del self._entries[id(tensor)]
                self._release(entry)
                entry.let_go()
                self.stamp += 1

    def optimizer_stepped(self, items: Iterable[Tensor]) -> None:
        """After an optimizer's step. Fused ones change tensors without counting; the others are seen anyway."""
        with self.lock:
            for tensor in items:
                entry = self.find(tensor)
                if entry is None or entry.key is None:
                    continue
                if entry.step_committed:
                    entry.step_committed = False
                elif entry.key[1] == tensor._version:
                    entry.key = None
                    self.stamp += 1

    def worker_gone(self, worker: str) -> None:
        """Forget that the worker held anything."""
        with self.lock:
            for entry in list(self._entries.values()):
                entry.sent.pop(worker, None)
                entry.acked.pop(worker, None)
            self.stamp += 1

    def sample_round(self, entries: Sequence[Entry]) -> bool:
        """Compare one trainable tensor's sample, another one each call; True if an uncounted edit was found."""
        if not entries:
            return False
        self._rotation += 1
        if not entries[self._rotation % len(entries)].sample_differs():
            return False
        with self.lock:
            for entry in list(self._entries.values()):
                if entry.trainable:
                    entry.key = None
            self.stamp += 1
        return True

    def resident(self) -> list[dict[str, Any]]:
        """What lives where, for people."""
        with self.lock:
            rows = []
            for entry in list(self._entries.values()):
                tensor = entry.ref()
                if tensor is not None and entry.acked:
                    rows.append({"tensor_id": entry.tensor_id, "epoch": entry.epoch, "shape": tuple(tensor.shape),
                                 "bytes": tensor.numel() * tensor.element_size(), "workers": sorted(entry.acked),
                                 "why": "weights" if entry.habit is None else entry.habit.why})
            return rows

    def summary(self) -> list[dict[str, Any]]:
        """What lives where and why: one row for each worker and reason, with tensors and bytes."""
        rows: dict[tuple[str, str], dict[str, Any]] = {}
        for tensor in self.resident():
            for worker in tensor["workers"]:
                name = worker.partition("/")[0]
                row = rows.setdefault((name, tensor["why"]), {
                    "worker": name, "why": tensor["why"], "tensors": 0, "bytes": 0})
                row["tensors"] += 1
                row["bytes"] += tensor["bytes"]
        return [rows[key] for key in sorted(rows)]

    def _renew(self, entry: Entry, tensor: Tensor, key: tuple[Any, ...]) -> None:
        self._release(entry)
        entry.epoch = self.next_epoch()
        entry.key = key
        entry.digest = None
        entry.step_committed = False
        entry.take_sample(tensor, self._num_samples)

    def _release(self, entry: Entry) -> None:
        for worker, epoch in entry.sent.items():
            self._free(worker, (entry.tensor_id, epoch))

    def _died(self, entry: Entry) -> None:
        # Runs inside the garbage collector, in any thread: no lock is taken that a caller may hold.
        if self._entries.get(entry.address) is entry:
            self._entries.pop(entry.address, None)
        self._release(entry)
        if entry.habit is None:
            self.stamp += 1        # state comes and goes with every call; nobody relies on having looked at it


_instances: weakref.WeakSet[Residency] = weakref.WeakSet()


def forget_everywhere(tensor: Tensor) -> None:
    """No session knows anything of the tensor any more."""
    for table in list(_instances):
        table.forget(tensor)


def _after_optimizer_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    tables = list(_instances)
    if not tables:
        return
    touched = [p for group in optimizer.param_groups for p in group["params"]]
    touched += [v for state in optimizer.state.values() if isinstance(state, dict)
                for v in state.values() if isinstance(v, Tensor)]
    for table in tables:
        table.optimizer_stepped(touched)


register_optimizer_step_post_hook(_after_optimizer_step)


_expired: Any = torch.UntypedStorage._expired


class Seen:
    """What a StaticSet found when it last looked: entries, and the cheap keys under which they are unchanged."""

    __slots__ = ("_memory", "_memory_ids", "entries", "pointers", "sampled", "stamp", "versions")

    def __init__(self, entries: tuple[Entry, ...], versions: list[int], pointers: list[int], stamp: int) -> None:
        self.entries, self.versions, self.pointers, self.stamp = entries, versions, pointers, stamp
        self.sampled = [e for e in entries if e.sample is not None]
        # A sample holds the memory, so that its address cannot be given out again.
        self._memory: list[StorageWeakRef] = [e.key[-1] for e in entries if e.sample is None and e.key is not None]
        self._memory_ids = [memory.cdata for memory in self._memory]

    def memory_gone(self) -> bool:
        """Whether memory that was looked at has been freed: something else may be at its address now."""
        return any(map(_expired, self._memory_ids))


class StaticSet:
    """The parameters and buffers of one graph.

    `check` costs some ten microseconds for 150 of them while nothing has changed: it compares versions and addresses.
    """

    def __init__(self, residency: Residency, positions: Sequence[int], bumped: frozenset[int]) -> None:
        self._residency = residency
        self._pick: Callable[[Sequence[Any]], tuple[Any, ...]] = (
            operator.itemgetter(*positions) if len(positions) > 1 else lambda args: tuple(args[i] for i in positions))
        self._bumps = [1 if p in bumped else 0 for p in positions]
        self._seen: Seen | None = None
        self.positions = tuple(positions)

    def check(self, args: Sequence[Any]) -> Seen:
        """The state of all of them; the same object as last time if nothing has changed."""
        statics = self._pick(args)
        versions = [t._version for t in statics]
        pointers = list(map(Tensor.data_ptr, statics))
        seen, residency = self._seen, self._residency
        if (seen is not None and seen.versions == versions and seen.pointers == pointers
                and seen.stamp == residency.stamp and not seen.memory_gone()
                and not residency.sample_round(seen.sampled)):
            return seen
        with residency.lock:
            stamp = residency.stamp
            entries = tuple(map(residency.current, statics, self._bumps))
            seen = self._seen = Seen(entries, versions, pointers, stamp)
        return seen

    def expect_after_commit(self, args: Sequence[Any], seen: Seen, changed: Iterable[int]) -> None:
        """Some of them were changed by the call itself: note the versions the next call will find."""
        statics = self._pick(args)
        versions = list(seen.versions)
        for index in changed:
            versions[index] = statics[index]._version + self._bumps[index]
        self._seen = Seen(seen.entries, versions, seen.pointers, seen.stamp)


def digest_of(tensor: Tensor) -> bytes:
    """sha256 of the bytes that travel."""
    plain, _ = tensors.describe(tensor)
    return hashlib.sha256(tensors.view_memory(plain, plain.numel() * plain.element_size())).digest()
