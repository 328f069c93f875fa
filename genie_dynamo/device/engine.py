"""Running what was recorded: when, on which worker, and what is left afterwards.

A read runs every live recorded value in one program, so that the worker sees as large a graph as there is; what comes
down is what was read. Between reads the recording is cut, and the piece handed to the worker without waiting for it
(`genie_dynamo/device/submitted.py`): after some thousand ops, each time at the same op of a loop, so that the pieces
repeat; and in a loop that reads in each step earlier, so that the worker computes while the step is being recorded. A
value that turned out to fail takes down what hangs on it, and nothing else; it is raised by the read that wants it.
"""
from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import torch

from genie_dynamo import sessions
from genie_dynamo.core.errors import GenieError, RemoteExecutionError, WorkerMemoryError
from genie_dynamo.core.tensors import DTYPES
from genie_dynamo.device import memory as memories
from genie_dynamo.device.failures import blamed, failed_leaves, follows, gone, raise_if_failed, spread_failure
from genie_dynamo.device.foreign import admission
from genie_dynamo.device.memory import new_tensor, value_in
from genie_dynamo.device.nodes import Call, Layout, Node, item_of, layout, layout_of, uploaded
from genie_dynamo.device.program import Program
from genie_dynamo.device.record import getitem
from genie_dynamo.device.structure import Recording, Structure, Variant, collect
from genie_dynamo.device.submitted import Submitted
from genie_dynamo.runtime.client.resident import Answer, Resident, Underway, Uploader, fetch
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.workers import WorkerLink

log = logging.getLogger(__name__)

CUT_OPS = 2000
"""A recording of this many ops is cut where the last one was cut."""
MAX_OPS = 6000
"""A recording is never longer than this."""
EARLY_OPS = 96
"""After a read of a loop that is known, the first piece; each one after it is twice as long, up to CUT_OPS."""
MAX_UNDERWAY = 8
"""So many runs are handed over before the first of them is waited for."""
INLINE_BYTES = 64 << 10
"""CPU tensors below this go up with the run that uses them, larger ones at once."""
MAX_STRUCTURES = 512


class Engine:
    """The device: one per process, on the first worker of the process's session."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.structures: dict[tuple[Any, ...], Structure] = {}
        self.counters = {"ops": 0, "runs": 0, "programs": 0, "cuts": 0, "replays": 0}
        self.next_cut = CUT_OPS                        # of so many ops, `maybe_cut` is to be asked
        self._repeats = False                          # the last long recording that was read is one that came before
        self._anchor: Call | None = None
        self._underway: list[Submitted] = []           # in the order in which they were sent
        self._uploader = Uploader()
        self._rng_state: Node | None = None            # the generator's state before ...
        self._rng_tail: Node | None = None             # ... the random nodes up to this one

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
            tail = self._rng_tail
            if not roots and tail is None:
                return
            if admission.spread is not None:
                _list_again(holders)
                self.run(())
                return
            try:
                recording = collect(roots, (), () if tail is None else (tail,))
                if failed_leaves(recording, *self.place()):
                    self.run(())
                    return
                self._submit(recording, holders)
                if len(self._underway) > MAX_UNDERWAY:
                    self._answer_of_first()
            except GenieError:
                self._undo()
                self.run(())
            finally:
                _list_again(holders)

    def random_node(self, call: Call, inputs: Sequence[Node], scalars: Sequence[Any]) -> Node:
        """The node of an op that draws: after the one that drew last."""
        with self.lock:
            tail = self._rng_tail
            ordered = (*inputs, tail) if tail is not None and tail.value is None else tuple(inputs)
            node = Node(call, ordered, tuple(scalars), call.single)
            self._rng_tail = node
        return node

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
        return self._rng_tail

    # -- the generator ----------------------------------------------------------------------------------------

    def seed(self, seed: int) -> None:
        """Start the generator anew."""
        with self.lock:
            self._settle_random()
            self.set_rng_state(torch.Generator().manual_seed(seed).get_state())

    def rng_state(self) -> torch.Tensor:
        """The generator's state, as that of a CPU generator."""
        with self.lock:
            self._settle_random()
            return self.value_of(self._generator()).clone()

    def set_rng_state(self, state: torch.Tensor) -> None:
        """Continue from a state."""
        with self.lock:
            self._settle_random()
            self._rng_state, self._rng_tail = uploaded(state.detach().clone().cpu()), None

    def _settle_random(self) -> None:
        if self._rng_tail is not None or self._underway:
            self.run(())

    def _generator(self) -> Node:
        if self._rng_state is not None and gone(self._rng_state, *self.place()):
            log.warning("the state of remote_accelerator's generator was lost with its worker; it starts anew from "
                        "torch.initial_seed()")
            self._rng_state = None
        if self._rng_state is None:
            self._rng_state = uploaded(torch.Generator().manual_seed(torch.initial_seed()).get_state())
        return self._rng_state

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
        """Run everything recorded that lives; the values of the returned nodes, here.

        Raises: what an op raised, where a returned value hangs on it; WorkerError.
        """
        with self.lock:
            while True:
                for node in returned:
                    raise_if_failed(node)
                todo = [node for node in returned if node.value is None]
                roots, holders = self._roots()
                tail = self._rng_tail
                alone = not self._underway
                recording = None
                came: list[Any] = []
                try:
                    if roots or todo or tail is not None:
                        recording = collect(roots, todo, () if tail is None else (tail,))
                        if self._spread(recording, failed_leaves(recording, *self.place())):
                            continue
                        came = self._run_recording(recording, holders)
                    elif self._underway:
                        self._wait()
                except GenieError as error:
                    self._undo()
                    if not alone:
                        continue               # with what was sent before: which of them fails is to be found out
                    if recording is None or not isinstance(error, RemoteExecutionError | WorkerMemoryError):
                        raise
                    self._spread(recording, blamed(recording, error))
                    continue
                except BaseException:
                    self._undo(wait=False)
                    raise
                finally:
                    _list_again(holders)
                self.next_cut = min(EARLY_OPS, CUT_OPS) if self._repeats else CUT_OPS
                here = dict(zip(todo, came, strict=True))
                return [here[node] if node in here else self.value_of(node) for node in returned]

    def value_of(self, node: Node) -> torch.Tensor:
        """The value of a node, here."""
        raise_if_failed(node)
        value = node.value
        if isinstance(value, torch.Tensor):
            return value.detach().clone()
        if value is None:
            return self.run((node,))[0]
        if self._underway:
            self.run(())                       # the value is there when they have been answered, and they may fail
            return self.value_of(node)
        session, link = self.place()
        value.check(session, link)
        return fetch(session, value)

    def recorded(self) -> Recording:
        """What is recorded and lives, as the next run would run it; it is not run."""
        with self.lock:
            roots, holders = self._roots()
            _list_again(holders)
            return collect(roots, (), () if self._rng_tail is None else (self._rng_tail,))

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

    def _run_recording(self, recording: Recording, holders: Sequence[Any]) -> list[Any]:
        if admission.spread is not None:
            return self._run_spread(recording, admission.spread)
        known = recording.key in self.structures
        program = self._submit(recording, holders)
        values = self._wait().values
        if len(recording.nodes) > EARLY_OPS or not known:
            self._repeats = known
        return [values[i] for i in program.returned]

    def _run_spread(self, recording: Recording, spread: Any) -> list[Any]:
        """Run it over several workers: what it leaves comes here."""
        values: list[Any] = spread.run(recording, self.value_of)
        self.counters["runs"] += 1
        self._rng_tail = None
        for index, value in zip(recording.kept, values[len(recording.returned):], strict=True):
            _landed(recording.nodes[index], value)
        return values[: len(recording.returned)]

    def _submit(self, recording: Recording, holders: Sequence[Any]) -> Program:
        """Send a recording to the worker; what it leaves counts as resident from here on."""
        session, link = self.place()
        _, numbers, program = self._program(session, link, recording)
        random = program.random
        keeps = [Resident(session, link, _size_of(recording.nodes[i].layout)) for i in recording.kept]
        if random:
            keeps.append(Resident(session, link, 0))
        leaves = [leaf.value for leaf in recording.leaves]
        state = self._generator() if random else None
        in_order = program.in_order(keeps)
        run = Underway(session, program.bound, [*leaves, *numbers], None if state is None else state.value, in_order,
                       session.config.timeout_s)
        self.counters["runs"] += 1
        self._underway.append(Submitted(run, recording, keeps, in_order, holders,
                                        (state, self._rng_tail) if random else None))
        if random:
            self._rng_state = Node(None, (), (), None)
            self._rng_state.value = keeps[-1]
            self._rng_tail = None
        return program

    def _wait(self) -> Answer:
        """The answer of the last of the runs under way, when all have come. Raises: what has stopped one of them."""
        while True:
            answer = self._answer_of_first()
            if not self._underway:
                return answer

    def _answer_of_first(self) -> Answer:
        answer = self._underway[0].run.wait()
        self._underway.pop(0).answered(answer)
        return answer

    def _undo(self, *, wait: bool = True) -> None:
        """Take back what is under way, and record it again: one of them has failed.

        Args: wait: for each to end, so that its values are freed after they have come to be.
        """
        while self._underway:
            last = self._underway.pop()
            if not last.run.over and wait:
                with suppress(GenieError):
                    last.run.wait()
            elif not last.run.over:
                last.run.abandon()
            _list_again(last.undo())
            if last.generator is not None:
                self._rng_state, tail = last.generator
                self._rejoin(tail)

    def _rejoin(self, tail: Node | None) -> None:
        """Let the random nodes that were recorded since follow `tail` again."""
        first = self._rng_tail
        if first is None or tail is None:
            self._rng_tail = tail or first
            return
        while (before := follows(first)) is not None:
            first = before
        first.inputs = (*first.inputs, tail)

    def _program(self, session: Session, link: WorkerLink,
                 recording: Recording) -> tuple[Variant, list[Any], Program]:
        structure = self.structures.get(recording.key)
        if structure is None:
            if len(self.structures) >= MAX_STRUCTURES:
                self.structures.clear()
            structure = self.structures[recording.key] = Structure()
        variant, numbers = structure.variant(recording)
        program = variant.programs.get(link.key)
        if program is None:
            program = variant.programs[link.key] = Program(session, link, variant, recording)
            self.counters["programs"] += 1
        return variant, numbers, program

    def _put(self, node: Node, session: Session, link: WorkerLink) -> None:
        node.value = self._uploader.put(session, link, node.value, session.config.timeout_s)

    def _spread(self, recording: Recording, broken: set[Node]) -> bool:
        """Fail what hangs on broken nodes; whether there is any."""
        if broken:
            self._rng_tail = spread_failure(recording, broken)(self._rng_tail)
        return bool(broken)

    # -- ops whose shapes hang on values ----------------------------------------------------------------------

    def tensors_of(self, node: Node) -> list[torch.Tensor]:
        """Run an op whose shapes hang on values, to learn them: its outputs, whose values stay on the worker.

        Raises: what the op raises; WorkerError.
        """
        assert node.call is not None
        count = len(node.call.target._schema.returns)
        unknown = layout((), (), 0, torch.float32)
        parts = [node] if count == 1 else [item_of(node, (i,), unknown, False, getitem) for i in range(count)]
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


def _list_again(holders: Sequence[Any]) -> None:
    """Storages whose value is still to be made wait for the next run."""
    memories.fresh += [weakref.ref(storage) for storage in holders if value_in(storage).value is None]


def _size_of(own: Layout | None) -> int:
    return own.extent * own.dtype.itemsize if own is not None else 0


current = Engine()
