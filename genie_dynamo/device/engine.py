"""Running what was recorded: when, on which worker, and what is left afterwards.

A read hands over what it needs as one program, then, where that is much, whatever else is recorded and lives; what
comes down is what was read, and nothing else is waited for. Between reads the recording is cut, and the piece handed to
the worker (`genie_dynamo/device/submitted.py`): after some thousand ops, each time at the same op of a loop, so that
the pieces repeat; and in a loop that reads in each step earlier, so that the worker computes while the step is
recorded. So a loss that is read comes when the forward is through, and the next step is recorded while the worker ends
this one. A value that turned out to fail takes down what hangs on it, and nothing else; it is raised by the read that
wants it.
"""
from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch

from genie_dynamo import sessions
from genie_dynamo.core.errors import GenieError, RemoteExecutionError, WorkerMemoryError
from genie_dynamo.core.tensors import DTYPES
from genie_dynamo.device import memory as memories
from genie_dynamo.device.failures import blamed, failed_leaves, raise_if_failed, spread_failure
from genie_dynamo.device.foreign import admission
from genie_dynamo.device.generator import Generator
from genie_dynamo.device.memory import new_tensor, value_in
from genie_dynamo.device.nodes import Call, Layout, Node, item_of, layout, layout_of, uploaded
from genie_dynamo.device.program import Program, Programs
from genie_dynamo.device.structure import Recording, collect, split
from genie_dynamo.device.submitted import Submissions, Submitted
from genie_dynamo.runtime.client.resident import Resident, Underway, Uploader, fetch
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.workers import WorkerLink

CUT_OPS = 2000
"""A recording of this many ops is cut where the last one was cut."""
MAX_OPS = 6000
"""A recording is never longer than this."""
EARLY_OPS = 96
"""After a read of a loop that is known, the first piece; each one after it is twice as long, up to CUT_OPS."""
ALONG_OPS = 48
"""What a read does not need is handed over with it from this many ops on; less waits for the next piece."""
MAX_UNDERWAY = 8
"""So many runs are handed over before the first of them is waited for."""
INLINE_BYTES = 64 << 10
"""CPU tensors below this go up with the run that uses them, larger ones at once."""


class Engine:
    """The device: one per process, on the first worker of the process's session."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.programs = Programs()
        self.counters = {"ops": 0, "runs": 0, "programs": 0, "cuts": 0, "replays": 0}
        self.next_cut = CUT_OPS                        # of so many ops, `maybe_cut` is to be asked
        self._repeats = False                          # the last long recording that was read is one that came before
        self._anchor: Call | None = None
        self._underway = Submissions()
        self._uploader = Uploader()
        self._generator = Generator()

    # -- recording --------------------------------------------------------------------------------------------

    def maybe_cut(self, call: Call) -> None:
        """Hand over what was recorded, if it is long. Called before a node is made: nothing may be half recorded."""
        count = len(memories.fresh)
        if self.next_cut < CUT_OPS:
            if not admission.depth:                    # inside a capture somebody may want the graph
                self._cut()
                self.next_cut = min(2 * self.next_cut, CUT_OPS)
                return
            self.next_cut = CUT_OPS
        if count > MAX_OPS or (count > CUT_OPS and call is self._anchor):
            self._anchor = call
            self._cut()

    def _cut(self) -> None:
        """Hand over everything recorded that lives. Raises: WorkerError."""
        with self.lock:
            self.counters["cuts"] += 1
            roots, holders = self._roots()
            if not roots and not self._also():
                return
            if admission.spread is not None:
                self._list_again(holders)
                self.run(())
                return
            try:
                recording = self._rest(roots)
                if failed_leaves(recording, *self.place()):
                    self.run(())
                    return
                self._submit(recording, holders)
            except GenieError:
                self._undo()
                self.run(())
            finally:
                self._list_again(holders)

    def random_node(self, call: Call, inputs: Sequence[Node], scalars: Sequence[Any]) -> Node:
        """The node of an op that draws: after the one that drew last."""
        with self.lock:
            return self._generator.node(call, inputs, scalars)

    def upload(self, tensor: torch.Tensor, *, stays: bool = False) -> Node:
        """A node for the present content of a CPU tensor.

        Args: stays: more than one run will want it.
        """
        node = uploaded(tensor.detach().clone())
        if admission.spread is not None:
            return node
        if stays or tensor.numel() * tensor.element_size() >= INLINE_BYTES:
            with self.lock:
                self._put(node, *self.place())
        return node

    @property
    def random_tail(self) -> Node | None:
        """The node that drew last and has not run."""
        return self._generator.tail

    # -- the generator ----------------------------------------------------------------------------------------

    def seed(self, seed: int) -> None:
        """Start the generator anew."""
        self.set_rng_state(torch.Generator().manual_seed(seed).get_state())

    def rng_state(self) -> torch.Tensor:
        """The generator's state, as that of a CPU generator."""
        with self.lock:
            self._settle_random()
            return self.value_of(self._generator.state(*self.place())).clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Continue from a state."""
        with self.lock:
            self._settle_random()
            self._generator.start_from(state)

    def _settle_random(self) -> None:
        if self._generator.tail is not None or self._underway:
            self.run(())

    # -- running ----------------------------------------------------------------------------------------------

    def place(self) -> tuple[Session, WorkerLink]:
        """The session and the worker that the device stands for now. Raises: WorkerLostError, RuntimeError."""
        if memories.in_child:
            memories.refuse_in_child()
        session = sessions.session()
        session.check_open()
        if session.links[0].lost:
            session.replace_lost()
        session.links[0].check_alive()
        return session, session.links[0]

    def run(self, returned: Sequence[Node]) -> list[torch.Tensor]:
        """Have the returned nodes run, and wait for their values; where there are none, for all that is recorded.

        Returns: those values, here.
        Raises:  what an op raised, where a returned value hangs on it; WorkerError.
        """
        settle = not returned
        with self.lock:
            while True:
                for node in returned:
                    raise_if_failed(node)
                todo = [node for node in returned if node.value is None]
                roots, holders = self._roots()
                recording: Recording | None = None
                alone = not self._underway
                came: list[Any] = []
                try:
                    recording, left = self._next(roots, todo, settle)
                    if recording is not None:
                        if self._spread(recording, failed_leaves(recording, *self.place())):
                            continue
                        submitted = self._hand_over(recording, holders)
                        if left >= ALONG_OPS:
                            self._hand_over(self._rest(roots), holders)
                        alone = len(self._underway) <= 1
                        came = self._returned_by(submitted)
                    if settle:
                        self._underway.wait_for_all()
                    for node in returned:
                        if type(node.value) is Resident:
                            self._underway.wait_for_maker(node.value)
                except GenieError as error:
                    self._undo()
                    if not alone:
                        settle = True          # with what was sent before: which of them fails is to be found out
                        continue
                    if recording is None or not isinstance(error, RemoteExecutionError | WorkerMemoryError):
                        raise
                    self._spread(recording, blamed(recording, error))
                    continue
                except BaseException:
                    self._undo(wait=False)
                    raise
                finally:
                    self._list_again(holders)
                self.next_cut = min(EARLY_OPS, CUT_OPS) if self._repeats else CUT_OPS
                here = dict(zip(todo, came, strict=True))
                return [here[node] if node in here else self.value_of(node) for node in returned]

    def value_of(self, node: Node) -> torch.Tensor:
        """The value of a node, here."""
        raise_if_failed(node)
        value = node.value
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if value is None or self._underway.maker(value) is not None:
            return self.run((node,))[0]
        session, link = self.place()
        value.check(session, link)
        return fetch(session, value)

    def recorded(self) -> Recording:
        """What is recorded and lives, as the next run would run it; it is not run."""
        with self.lock:
            roots, holders = self._roots()
            self._list_again(holders)
            return self._rest(roots)

    def _roots(self) -> tuple[list[Node], list[Any]]:
        """The nodes that live storages hold and that still have to be run, and those storages."""
        count = len(memories.fresh)
        listed = memories.fresh[:count]
        del memories.fresh[:count]            # in place, and what other threads have added meanwhile stays
        self.counters["ops"] += count
        roots: dict[Node, None] = {}
        holders = []
        for reference in listed:
            storage = reference()
            if storage is None:
                continue
            node = value_in(storage)
            if node.value is None:
                holders.append(storage)
                roots[node] = None
            elif isinstance(node.value, torch.Tensor) and admission.spread is None:
                self._put(node, *self.place())
        return list(roots), holders

    def _next(self, roots: Sequence[Node], todo: Sequence[Node], settle: bool) -> tuple[Recording | None, int]:
        """What is to be handed over now, if anything, and how many nodes are left then."""
        also = self._also()
        if todo and not settle and admission.spread is None:
            parts = split(roots, todo, also)
            if parts is not None:
                for leaf in parts.shared:
                    self._put(leaf, *self.place())
                return parts.needed, parts.num_left
        if not (roots or todo or also):
            return None, 0
        recording = collect(roots, todo, also)
        if not todo and not settle and len(recording.nodes) < ALONG_OPS:
            return None, 0
        return recording, 0

    def _rest(self, roots: Sequence[Node]) -> Recording:
        return collect([node for node in roots if node.value is None], (), self._also())

    def _also(self) -> tuple[Node, ...]:
        """What has to run whether anybody wants its value or not."""
        tail = self._generator.tail
        return () if tail is None else (tail,)

    def _list_again(self, holders: Sequence[Any]) -> None:
        """Storages whose value is still to be made wait for the next run."""
        again = [weakref.ref(storage) for storage in holders if value_in(storage).value is None]
        memories.fresh += again
        self.counters["ops"] -= len(again)

    def _hand_over(self, recording: Recording, holders: Sequence[Any]) -> tuple[Submitted | None, Sequence[Any]]:
        """Send it. Returns: what is under way and which of its values come down; or None, and those values."""
        if admission.spread is not None:
            return None, self._run_spread(recording, admission.spread)
        known = recording in self.programs
        submitted, program = self._submit(recording, holders)
        if len(recording.nodes) > EARLY_OPS or not known:
            self._repeats = known
        return submitted, program.returned

    def _returned_by(self, handed_over: tuple[Submitted | None, Sequence[Any]]) -> list[Any]:
        submitted, returned = handed_over
        if submitted is None:
            return list(returned)
        if not returned:
            return []
        values = self._underway.wait_for(submitted).values
        return [values[i] for i in returned]

    def _run_spread(self, recording: Recording, spread: Any) -> list[Any]:
        """Run it over several workers: what it leaves comes here."""
        values: list[Any] = spread.run(recording, self.value_of)
        self.counters["runs"] += 1
        self._generator.tail = None
        for index, value in zip(recording.kept, values[len(recording.returned):], strict=True):
            _landed(recording.nodes[index], value)
        return values[: len(recording.returned)]

    def _submit(self, recording: Recording, holders: Sequence[Any]) -> tuple[Submitted, Program]:
        """Send a recording to the worker; what it leaves counts as resident from here on."""
        while len(self._underway) >= MAX_UNDERWAY:
            self._underway.wait_for_first()
        session, link = self.place()
        numbers, program = self.programs.find(session, link, recording)
        self.counters["programs"] = self.programs.num_made
        random = program.random
        keeps = [Resident(session, link, _size_of(recording.nodes[i].layout)) for i in recording.kept]
        if random:
            keeps.append(Resident(session, link, 0))
        leaves = [leaf.value for leaf in recording.leaves]
        state = self._generator.state(session, link) if random else None
        in_order = program.in_order(keeps)
        run = Underway(session, program.bound, [*leaves, *numbers], None if state is None else state.value, in_order,
                       session.config.timeout_s)
        self.counters["runs"] += 1
        submitted = Submitted(run, recording, keeps, in_order, holders,
                              (state, self._generator.tail) if random else None)
        self._underway.add(submitted)
        if random:
            self._generator.leave(keeps[-1])
        return submitted, program

    def _undo(self, *, wait: bool = True) -> None:
        """Take back what is under way and has failed, and record it again.

        Args: wait: see Submissions.close.
        """
        for failed in self._underway.close(wait=wait):
            self._list_again(failed.undo())
            if failed.generator is not None:
                self._generator.take_back(*failed.generator)

    def _put(self, node: Node, session: Session, link: WorkerLink) -> None:
        node.value = self._uploader.put(session, link, node.value, session.config.timeout_s)

    def _spread(self, recording: Recording, broken: set[Node]) -> bool:
        """Fail what hangs on broken nodes; whether there is any."""
        if broken:
            self._generator.tail = spread_failure(recording, broken)(self._generator.tail)
        return bool(broken)

    # -- ops whose shapes hang on values ----------------------------------------------------------------------

    def tensors_of(self, node: Node) -> list[torch.Tensor]:
        """Run an op whose shapes hang on values, to learn them: its outputs, whose values stay on the worker.

        Raises: what the op raises; WorkerError.
        """
        assert node.call is not None
        count = len(node.call.target._schema.returns)
        unknown = layout((), (), 0, torch.float32)
        parts = [node] if count == 1 else [item_of(node, (i,), unknown, False) for i in range(count)]
        with self.lock:
            for part in parts:
                part.layout = unknown
            holders = [new_tensor(part) for part in parts]       # what nobody holds would not be run
            self.run(())
            for part in parts:
                raise_if_failed(part)
                if isinstance(part.value, torch.Tensor):
                    part.layout = layout_of(part.value)
                else:
                    code, shape, stride = part.value.form
                    part.layout = layout(shape, stride, 0, DTYPES[code])
            del holders
        return [new_tensor(part) for part in parts]


def _landed(node: Node, value: torch.Tensor) -> None:
    """The node's value is here; it lies in memory as the node says."""
    own = node.layout
    if own is not None and value.stride() != own.stride and value.shape == own.shape:
        value = torch.empty_strided(own.shape, own.stride, dtype=own.dtype, device="cpu").copy_(value)
    node.value, node.call, node.inputs, node.scalars = value, None, (), ()


def _size_of(own: Layout | None) -> int:
    return own.extent * own.dtype.itemsize if own is not None else 0


current = Engine()
