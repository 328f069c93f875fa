"""Running what was recorded: when, on which worker, and what is left afterwards.

A read runs every live recorded value in one program, so that the worker sees as large a graph as there is; what comes
down is what was read. Between reads the recording is cut after some thousand ops, each time at the same op of a loop,
so that the pieces repeat. A value that turned out to fail takes down what hangs on it, and nothing else.
"""
from __future__ import annotations

import logging
import re
import threading
import weakref
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from genie_dynamo import sessions
from genie_dynamo.core.errors import RemoteExecutionError, WorkerMemoryError
from genie_dynamo.core.fragment import encode
from genie_dynamo.core.plan import Output
from genie_dynamo.core.tensors import DTYPES
from genie_dynamo.device import memory as memories
from genie_dynamo.device.memory import new_tensor, value_in
from genie_dynamo.device.nodes import Call, Failed, Layout, Node, item_of, layout, uploaded
from genie_dynamo.device.record import getitem
from genie_dynamo.device.structure import Recording, Structure, Variant, collect
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.lower import lower_fragment
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.runtime.client.binding import BoundProgram, bind
from genie_dynamo.runtime.client.resident import Resident, Uploader, fetch, run_resident
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.workers import WorkerLink

log = logging.getLogger(__name__)

CUT_OPS = 2000
"""A recording of this many ops is cut where the last one was cut."""
MAX_OPS = 6000
"""A recording is never longer than this."""
INLINE_BYTES = 64 << 10
"""CPU tensors below this go up with the run that uses them, larger ones at once."""
MAX_STRUCTURES = 512


class Engine:
    """The device: one per process, on the first worker of the process's session."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.structures: dict[tuple[Any, ...], Structure] = {}
        self.counters = {"ops": 0, "runs": 0, "programs": 0, "cuts": 0}
        self._anchor: Call | None = None
        self._uploader = Uploader()
        self._rng_state: Node | None = None            # the generator's state before ...
        self._rng_tail: Node | None = None             # ... the random nodes up to this one

    # -- recording --------------------------------------------------------------------------------------------

    def maybe_cut(self, call: Call) -> None:
        """Run what was recorded, if it is long. Called before a node is made: nothing may be half recorded."""
        if len(memories.fresh) > MAX_OPS or call is self._anchor:
            self._anchor = call
            self.counters["cuts"] += 1
            self.run(())

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
        if stays or tensor.numel() * tensor.element_size() >= INLINE_BYTES:
            with self.lock:
                self._put(node, *self.place())
        return node

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
        if self._rng_tail is not None:
            self.run(())

    def _generator(self) -> Node:
        if self._rng_state is None:
            self._rng_state = uploaded(torch.Generator().manual_seed(torch.initial_seed()).get_state())
        return self._rng_state

    # -- running ----------------------------------------------------------------------------------------------

    def place(self) -> tuple[Session, WorkerLink]:
        """The session and the worker that the device stands for now. Raises: WorkerLostError."""
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
                    _raise_if_failed(node)
                todo = [node for node in returned if node.value is None]
                roots, holders = self._roots()
                tail = self._rng_tail
                if not roots and not todo and tail is None:
                    return [self.value_of(node) for node in returned]
                try:
                    recording = collect(roots, todo, () if tail is None else (tail,))
                    if self._spread(recording, {leaf for leaf in recording.leaves if type(leaf.value) is Failed}):
                        continue
                    came = self._run_recording(recording)
                except (RemoteExecutionError, WorkerMemoryError) as error:
                    self._fail(recording, error)
                    continue
                finally:
                    _list_again(holders)
                here = dict(zip(todo, came, strict=True))
                return [here[node] if node in here else self.value_of(node) for node in returned]

    def value_of(self, node: Node) -> torch.Tensor:
        """The value of a node, here."""
        _raise_if_failed(node)
        value = node.value
        if isinstance(value, torch.Tensor):
            return value
        if value is None:
            return self.run((node,))[0]
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
            elif isinstance(node.value, torch.Tensor):
                self._put(node, *self.place())
        return list(roots), holders

    def _run_recording(self, recording: Recording) -> list[Any]:
        session, link = self.place()
        for leaf in recording.leaves:
            if type(leaf.value) is Resident:
                leaf.value.check(session, link)
        _, numbers, program = self._program(session, link, recording)
        random = program.random
        keeps = [Resident(session, link, _size_of(recording.nodes[i].layout)) for i in recording.kept]
        if random:
            keeps.append(Resident(session, link, 0))
        leaves = [leaf.value for leaf in recording.leaves]
        state = self._generator().value if random else None
        if type(state) is Resident:
            state.check(session, link)
        answer = run_resident(session, program.bound, [*leaves, *numbers], state, program.in_order(keeps),
                              session.config.timeout_s)
        self.counters["runs"] += 1
        self._commit(recording, program, keeps, answer.forms, random=random)
        return [answer.values[i] for i in program.returned]

    def _commit(self, recording: Recording, program: Program, keeps: Sequence[Resident], forms: Sequence[Any],
                *, random: bool) -> None:
        for resident, form in zip(program.in_order(keeps), forms, strict=True):
            resident.form = form
        for index, resident in zip(recording.kept, keeps, strict=False):
            _adopt(recording.nodes[index], resident)
        if random:
            self._rng_state = Node(None, (), (), None)
            self._rng_state.value = keeps[-1]
            self._rng_tail = None

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

    def _fail(self, recording: Recording, error: BaseException) -> None:
        """An op of the recording has raised: it, and what hangs on it, cannot be had. The rest is tried again."""
        notes = " ".join([str(error), *getattr(error, "__notes__", ())])
        found = re.search(r"in node (\w+) = ", notes)
        variant = self.structures[recording.key].variant(recording)[0]
        names = [n.name for n in variant.graph.graph.nodes if n.op == "call_function"]
        broken = [recording.nodes[names.index(found[1])]] if found and found[1] in names else recording.nodes
        for node in broken:
            node.value = Failed(error)
            node.inputs = ()
        self._spread(recording, set(broken))

    def _spread(self, recording: Recording, broken: set[Node]) -> bool:
        """Fail what hangs on broken nodes; whether there is any."""
        if not broken:
            return False
        for node in recording.nodes:
            causes = [source for source in node.inputs if source in broken and source is not self._before(node)]
            if causes:
                broken.add(node)
                node.value = Failed(causes[0].value.error)
                node.inputs = ()
        if self._rng_tail is not None and type(self._rng_tail.value) is Failed:
            self._rng_tail = None
        return True

    def _before(self, node: Node) -> Node | None:
        """The random node that a random node only has to follow."""
        assert node.call is not None
        if not node.call.random or not node.inputs:
            return None
        last = node.inputs[-1]
        return last if last.call is not None and last.call.random and last.value is None else None

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
                _raise_if_failed(part)
                code, shape, stride = part.value.form
                part.layout = layout(shape, stride, 0, DTYPES[code])
            del holders
        return [new_tensor(part) for part in parts]


class Program:
    """A variant, planned and loaded on one worker."""

    def __init__(self, session: Session, link: WorkerLink, variant: Variant, recording: Recording) -> None:
        graph = variant.graph
        facts = GraphFacts(kind="inference", static_inputs=(), bumped=frozenset(),
                           num_outputs=len(recording.returned))
        plan = plan_graph(graph, facts)
        self.random = plan.final_rng is not None
        if plan.final_rng is not None:
            plan = replace(plan, outputs=(*plan.outputs, Output(kind="saved", name=plan.final_rng)))
        specs = {f.fragment_id: encode(lower_fragment(graph, node_names=f.node_names, inputs=f.inputs,
                                                      outputs=f.outputs)) for f in plan.fragments}
        self.plan = plan
        binding = bind(session, plan, specs, [link], session.config.worker_compiler, session.config.timeout_s)
        self.bound: BoundProgram = binding.first
        names = [o.name for o in plan.outputs]
        self.returned = tuple([self.bound.return_names.index(n) for n in names[: len(recording.returned)]])
        kept = names[len(recording.returned):]
        self._order = tuple([kept.index(name) for name in self.bound.keep_names])

    def in_order(self, keeps: Sequence[Resident]) -> list[Resident]:
        """What the program keeps, in its own order."""
        return [keeps[i] for i in self._order]


def _list_again(holders: Sequence[Any]) -> None:
    """Storages whose value is still to be made wait for the next run."""
    memories.fresh += [weakref.ref(storage) for storage in holders if value_in(storage).value is None]


_INEXACT = Call(None, (), {}, (), (), exact=False)


def _adopt(node: Node, resident: Resident) -> None:
    """The node's value is there now: what it was made of is no longer needed."""
    _, shape, stride = resident.form
    own = node.layout
    matches = own is not None and own.shape == shape and own.stride == stride
    node.call = None if matches and node.exact else _INEXACT
    node.value = resident
    node.inputs = ()
    node.scalars = ()


def _raise_if_failed(node: Node) -> None:
    if type(node.value) is Failed:
        raise node.value.error


def _size_of(own: Layout | None) -> int:
    return own.extent * own.dtype.itemsize if own is not None else 0


current = Engine()
