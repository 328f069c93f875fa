"""Loads programs and runs them, a slice of time at a go, so that clients share a worker fairly.

The engine owns no sockets. What must leave before a run has ended (a large output, a value another worker waits
for) is handed to `emit`, which the shell supplies.
"""
from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core import tensors
from genie_dynamo.core.errors import WorkerMemoryError
from genie_dynamo.core.fragment import decode
from genie_dynamo.core.program import FragmentProgram, WorkerProgram
from genie_dynamo.runtime.births import Lend
from genie_dynamo.runtime.flat import MISSING, FlatPlan, FlatRun, RunStatus
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.compression import installed
from genie_dynamo.runtime.lanes.copies import Work, copied_in, count_for
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames, cut, travels_in_pieces
from genie_dynamo.runtime.worker.assembly import Assembly
from genie_dynamo.runtime.worker.compiled import RUNS, CompiledFragment
from genie_dynamo.runtime.worker.records import RunRecord
from genie_dynamo.runtime.worker.rng import Generator
from genie_dynamo.runtime.worker.staging import Staging

STREAM_BYTES = 256 << 10
"""Outputs from this size on leave as soon as they are final, while the run goes on."""

ALIGNMENT_BYTES = 64
"""Where torch's own allocator puts tensors. A received frame lies anywhere, which costs matrix products time."""

SMALL_NODES = 16
"""A graph of at most this many ops runs in one go."""

Emit = Callable[[RunRecord, int, Any], bool]
"""`emit(run, value id, value)`: returns whether the value has been sent to the client."""


class Outlets(NamedTuple):
    """The lanes that values leave over, as far as they lend memory that they send without a copy.

    The first two: what lends so many bytes (or None for want of them); None where the lane lends nothing.
    """

    to_client: Callable[[bytes], Callable[[int], Any] | None]      # by connection
    to_peer: Callable[[str], Callable[[int], Any] | None]          # by address
    counters: Callable[[bytes], dict[str, int]]                    # of the lane that is a connection; empty for none
    memory: Callable[[bytes], dict[str, Any]]                      # of its pool


OF_INPUT = -1
"""As the holder of a SharedView: its memory is that of an input, which the client has."""


class SharedView(NamedTuple):
    """An output that shares memory with others. The first of them carries the memory, the others its return index."""

    memory: torch.Tensor | None
    holder: int
    view: tensors.View


class LoadedFragment:
    """A fragment ready to run: its flat plan, and Inductor's code where it was asked for and has come.

    Args: travels: value ids that leave and of which nothing stays here.
    """

    def __init__(self, program: FragmentProgram, compiler: str, device: torch.device,
                 namespaces: frozenset[str], wake: Callable[[], None], travels: Collection[int] = ()) -> None:
        spec = decode(program.spec)
        self.program = program
        self.num_nodes = len(spec.nodes)
        self.plan = FlatPlan(spec, device=device, extra_namespaces=namespaces, travels=frozenset(
            [index for index, value in enumerate(program.outputs) if value in travels]))
        self.compiled = None if compiler == "flat" else CompiledFragment(spec, compiler, device, namespaces, wake)


class FragmentRun:
    """One fragment within one run."""

    def __init__(self, fragment: LoadedFragment) -> None:
        self.fragment = fragment
        self.flat: FlatRun | None = None
        self.generator: Generator | None = None
        self.taken: set[int] = set()      # of its inputs, by value id


class LoadedProgram:
    """All fragments of a program, with what to do with each value that leaves one."""

    def __init__(self, program: WorkerProgram, fragments: tuple[LoadedFragment, ...]) -> None:
        self.program = program
        self.fragments = fragments
        self.return_index = {value: index for index, value in enumerate(program.returns)}
        self.peer_of = {value: address for value, address, _, _ in reversed(program.sends)}
        shared = {value for group in program.aliases for value in group} | {value for value, _ in program.input_views}
        self.leaves_early = {send[0] for send in program.sends} | (set(program.returns) - shared)
        self.small = _small(program, fragments)
        # A value that only fragments read is let go of when the last of them has it: what several parts of a batch
        # leave for their backward would add up otherwise.
        used_at_end = {*program.returns, *program.keeps, *program.state, *shared, *(v for _, v in program.input_views)}
        self.readers: Counter[int] = Counter()
        if len(fragments) > 1 or program.receives:
            self.readers.update({v: 0 for f in fragments for v in f.program.outputs if v not in used_at_end})
            self.readers.update(v for f in fragments for v in set(f.program.inputs) if v not in used_at_end)


class SmallProgram(NamedTuple):
    """A program that is one short fragment: nothing is gained by running it in slices or sending its result early."""

    plan: FlatPlan
    inputs: tuple[int, ...]          # value ids, in the plan's order
    returns: tuple[int, ...]         # positions among the plan's outputs, in the program's order


def _small(program: WorkerProgram, fragments: Sequence[LoadedFragment]) -> SmallProgram | None:
    first = fragments[0]
    links = (program.sends, program.receives, program.keeps, program.aliases, program.input_views)
    if len(fragments) > 1 or first.compiled is not None or first.program.rng is not None or any(links) \
            or first.num_nodes > SMALL_NODES:
        return None
    outputs = {value: position for position, value in enumerate(first.program.outputs)}
    if not outputs.keys() >= set(program.returns):
        return None
    return SmallProgram(first.plan, first.program.inputs, tuple([outputs[v] for v in program.returns]))


class Engine:
    """The worker's toolbox (see worker/toolbox.py) and its executor."""

    def __init__(self, *, device: torch.device, num_threads: int, namespaces: frozenset[str] = frozenset(),
                 wake: Callable[[], None] = lambda: None, staging: Staging | None = None) -> None:
        self.device = device
        self.num_threads = num_threads
        self.lane = ZmqFrames() if staging is None else ZmqFrames(lambda tensor, _: staging.up(tensor))
        self._staging = staging
        self._namespaces = namespaces
        self._wake = wake
        self._refused: dict[str, str] = {}
        self.outlets: Outlets | None = None
        self.num_repeated = 0            # runs that were recognised (worker/steady.py)
        self.peer_lanes: Callable[[], dict[str, Any]] = dict      # which lanes go to other workers, for people

    # -- toolbox ----------------------------------------------------------------------------------------------

    def land(self, wire: Any, frames: Sequence[Any]) -> torch.Tensor:
        return self.lane.land(wire, frames, self.device)

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor in memory of this worker, aligned as kernels like it: for what is kept, or written to."""
        if not tensor.data_ptr() % ALIGNMENT_BYTES and not native.is_foreign(tensor):
            return tensor
        copied_in(tensor.nbytes)
        return tensor.clone()

    def announced_bytes(self, wire: Any) -> int:
        return tensors.form_of(wire).size_bytes

    def assemble(self, wire: Any) -> Assembly:
        return Assembly(wire)

    def _writable(self, inputs: list[Any]) -> list[Any]:
        """What a graph that may write to its inputs gets instead of a client's pages."""
        return [self.own(x) if isinstance(x, torch.Tensor) and native.is_foreign(x) else x for x in inputs]

    def stage(self, value: Any, frames: list[Any]) -> Any:
        if isinstance(value, torch.Tensor):
            return (m.INLINE, self.lane.stage(self._on_host(value), frames))
        if isinstance(value, SharedView):
            if value.holder == OF_INPUT:
                return (m.INPUT_VIEW, value.view)
            if value.memory is None:
                return (m.ALIAS, value.holder, value.view)
            return (m.SPAN, self.lane.stage(self._on_host(value.memory), frames), value.view)
        return value

    def cut(self, tensor: torch.Tensor) -> Sequence[tuple[Any, Any, int]]:
        """A large tensor in pieces (lanes/zmq_frames.py); nothing of one that travels as a whole."""
        return tuple(cut(self._on_host(tensor))) if travels_in_pieces(tensor) else ()

    def _on_host(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor if self._staging is None or tensor.is_cpu else self._staging.down(tensor)

    def begin_stage(self, value: Any) -> bool:
        """Whether a final value is now on its way to the host, where `stage` will find it: sending it can wait."""
        return self._staging is not None and isinstance(value, torch.Tensor) and not value.is_cpu \
            and self._staging.begin(value)

    def form(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return (tensors.DTYPE_CODE[value.dtype], tuple(value.shape), value.stride())
        return value

    def content_bytes(self, tensor: torch.Tensor) -> Any:
        plain, _ = tensors.describe(tensor)
        size_bytes = plain.numel() * plain.element_size()
        return tensors.view_memory(plain, size_bytes) if size_bytes else b""

    def content_size(self, tensor: torch.Tensor) -> int:
        """Bytes that travel of a tensor: of one that is expanded, those that differ."""
        return tensors.numel(tensors.core_shape(tuple(tensor.shape), tensor.stride())) * tensor.element_size()

    def size_bytes(self, tensor: Any) -> int:
        return tensor.untyped_storage().nbytes() if isinstance(tensor, torch.Tensor) else 0

    def view(self, tensor: torch.Tensor, view: Any) -> torch.Tensor:
        return tensors.view_within(tensor, view)

    def works_for(self, work: Work) -> None:
        """What is copied from here on is for a session."""
        count_for(work)

    def lane_counters(self, connection: bytes) -> dict[str, int]:
        return self.outlets.counters(connection) if self.outlets is not None else {}

    def lane_memory(self, connection: bytes) -> dict[str, Any]:
        return self.outlets.memory(connection) if self.outlets is not None else {}

    def facts(self) -> dict[str, Any]:
        return {
            "device": str(self.device), "threads": self.num_threads, "torch": str(torch.__version__),
            "pid": os.getpid(), "memory_bytes": resident_set_bytes(), "cpu_seconds": time.process_time(),
            "repeated_runs": self.num_repeated, "compiler_refusals": dict(self._refused), "compilers": dict(RUNS),
            "codecs": installed(),
            "peer_lanes": self.peer_lanes(),
            "staged_bytes": dict(self._staging.counted) if self._staging is not None else {},
        }

    def load(self, program: WorkerProgram) -> LoadedProgram:
        travels = _travels(program)
        fragments = tuple(
            LoadedFragment(f, program.compiler, self.device, self._namespaces, self._wake, travels)
            for f in program.fragments)
        return LoadedProgram(program, fragments)

    def is_small(self, loaded: LoadedProgram) -> bool:
        return loaded.small is not None

    def profile(self, loaded: LoadedProgram) -> tuple[tuple[float, ...] | None, ...]:
        """Node seconds of the last timed runs of each fragment, and begin to take them anew."""
        return tuple([fragment.plan.profile() for fragment in loaded.fragments])

    # -- running ----------------------------------------------------------------------------------------------

    def run_now(self, loaded: LoadedProgram, env: dict[int, Any], resident_bytes: int,
                connection: bytes) -> tuple[Sequence[Any], float]:
        """Run a small program on `env` (by value id): its values in the program's order, and the seconds it took.

        Args:   connection: that the values will leave over.
        Raises: as `advance`.
        """
        small = loaded.small
        assert small is not None
        started = time.perf_counter()
        lends = self.outlets.to_client(connection) if small.plan.wants_lender and self.outlets is not None else None
        try:
            inputs = [env[v] for v in small.inputs]
            outputs = small.plan.run(self._writable(inputs) if small.plan.may_write else inputs,
                                     None if lends is None else lambda _, size_bytes: lends(size_bytes))
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                raise _out_of_memory(error, resident_bytes) from error
            raise
        return [outputs[p] for p in small.returns], time.perf_counter() - started

    def advance(self, run: RunRecord, until_s: float, emit: Emit) -> RunStatus:
        """Run until everything is done, an input is missing, or the monotonic clock passes `until_s`.

        Raises: whatever an op raises; torch's allocation failures as WorkerMemoryError.
        """
        started = time.perf_counter()
        try:
            if run.state is None:
                run.queue_s = time.monotonic() - run.received_s
                run.state = [FragmentRun(f) for f in run.loaded.fragments]
                run.readers = dict(run.loaded.readers)
            return self._advance(run, until_s, emit)
        except (MemoryError, RuntimeError) as error:
            if _is_out_of_memory(error):
                raise _out_of_memory(error, run.session.resident_bytes) from error
            raise
        finally:
            run.compute_s += time.perf_counter() - started

    def _advance(self, run: RunRecord, until_s: float, emit: Emit) -> RunStatus:
        blocked: list[FragmentRun] = []
        remaining: list[FragmentRun] = run.state
        for position, part in enumerate(remaining):
            status = self._advance_fragment(run, part, until_s, emit)
            if status is RunStatus.YIELDED:
                run.state = blocked + remaining[position:]
                return status
            if status is RunStatus.WAITING:
                blocked.append(part)
        run.state = blocked
        if not blocked:
            return RunStatus.DONE
        progressed = len(blocked) < len(remaining)
        return self._advance(run, until_s, emit) if progressed and not run.pending else RunStatus.WAITING

    def _advance_fragment(self, run: RunRecord, part: FragmentRun, until_s: float, emit: Emit) -> RunStatus:
        program, env = part.fragment.program, run.env
        if program.rng is not None and part.generator is None:
            start = env.get(program.rng[0])
            if start is None:
                return RunStatus.WAITING
            part.generator = Generator(start, self.device)
        compiled = part.fragment.compiled
        if part.flat is None and compiled is not None:
            status = self._run_compiled(run, part, emit)
            if status is not None:
                return status
        if part.flat is None:
            self._own_inputs(part, env)
            part.flat = part.fragment.plan.start([env.get(value, MISSING) for value in program.inputs],
                                                 self._lender(run, part.fragment))
        else:
            self._own_inputs(part, env)
            _supply(part.flat, program, env)
        _let_go(run, part)
        on_output = self._on_output(run, program, emit)
        with part.generator or nullcontext():
            status = part.flat.resume(until_s, on_output)
        if status is RunStatus.DONE:
            self._publish_rng(run, part, emit)
            outputs = part.flat.outputs
            assert outputs is not None
            for value_id, value in zip(program.outputs, outputs, strict=True):
                if run.wants(value_id):
                    env.setdefault(value_id, value)
            if compiled is not None:
                compiled.flat_took(part.flat.busy_s)
        return status

    def _lender(self, run: RunRecord, fragment: LoadedFragment) -> Lend | None:
        """Who lends memory for a fragment's outputs: for each the lane that it takes first."""
        outlets = self.outlets
        if outlets is None or not fragment.plan.wants_lender:
            return None
        client, loaded, outputs = outlets.to_client(run.connection), run.loaded, fragment.program.outputs
        stays = {value for value, (_, epoch) in zip(run.program.state, run.message.state, strict=False) if epoch}

        def lend(index: int, size_bytes: int) -> Any:
            value = outputs[index]
            if value in stays:
                return None
            lends = client if value in loaded.return_index else outlets.to_peer(loaded.peer_of[value])
            return lends(size_bytes) if lends is not None else None

        return lend

    def _own_inputs(self, part: FragmentRun, env: dict[int, Any]) -> None:
        if part.fragment.plan.may_write:
            for value_id in part.fragment.program.inputs:
                value = env.get(value_id)
                if isinstance(value, torch.Tensor) and native.is_foreign(value):
                    env[value_id] = self.own(value)

    def _run_compiled(self, run: RunRecord, part: FragmentRun, emit: Emit) -> RunStatus | None:
        """Run Inductor's code where it is there and wanted; None where the flat plan should run."""
        program, compiled = part.fragment.program, part.fragment.compiled
        assert compiled is not None
        inputs = [run.env.get(value, MISSING) for value in program.inputs]
        if any(value is MISSING for value in inputs):
            return RunStatus.WAITING
        choice = compiled.choose(inputs)
        if choice == "wait":
            return RunStatus.WAITING
        if choice == "flat":
            if compiled.refusal:
                self._refused[str(program.fragment_id)] = compiled.refusal
            return None
        if part.fragment.plan.may_write:
            inputs = self._writable(inputs)
        with part.generator or nullcontext():
            outputs = compiled.run(inputs)
        self._publish_rng(run, part, emit)
        on_output = self._on_output(run, program, emit)
        for index, (value_id, value) in enumerate(zip(program.outputs, outputs, strict=True)):
            if on_output is not None:
                on_output(index, value)
            if run.wants(value_id):
                run.env.setdefault(value_id, value)
        _let_go(run, part)
        return RunStatus.DONE

    def _on_output(self, run: RunRecord, program: FragmentProgram, emit: Emit) -> Callable[[int, Any], None] | None:
        early: set[int] = run.loaded.leaves_early
        if not early:
            return None
        outputs, env = program.outputs, run.env

        def on_output(index: int, value: Any) -> None:
            value_id = outputs[index]
            if value_id in early and value_id not in env:
                if run.wants(value_id):
                    env[value_id] = value
                emit(run, value_id, value)

        return on_output

    def _publish_rng(self, run: RunRecord, part: FragmentRun, emit: Emit) -> None:
        rng = part.fragment.program.rng
        if rng is not None and part.generator is not None:
            run.env[rng[1]] = state = part.generator.client_state()
            if rng[1] in run.loaded.leaves_early:
                emit(run, rng[1], state)

    def _kept(self, value: Any) -> Any:
        """What stays here must not lie in a client's pages."""
        return self.own(value) if isinstance(value, torch.Tensor) and native.is_foreign(value) else value

    def results(self, run: RunRecord,
                sent: set[int]) -> tuple[tuple[tuple[int, Any], ...], tuple[Any, ...], tuple[Any, ...]]:
        """`((return index, value) not sent yet, kept values, values of program.state)` of a run that is done."""
        program, env = run.program, run.env
        kept = tuple([self._kept(env[v]) for v in program.keeps])
        state = tuple([self._kept(env[v]) for v in program.state]) if run.message.state else ()
        if program.aliases or program.input_views:
            _share(run)
        values = tuple([(i, env[v]) for i, v in enumerate(program.returns) if v not in sent])
        return values, kept, state


def _travels(program: WorkerProgram) -> frozenset[int]:
    """Values that leave, and whose memory is the receiver's alone from then on: nothing here reads or keeps them.

    But for those of `program.state` that a run gives a handle.
    """
    stays = {*program.keeps, *(value for group in program.aliases for value in group),
             *(value for value, _ in program.input_views), *(value for f in program.fragments for value in f.inputs)}
    return frozenset({*program.returns, *(send[0] for send in program.sends)} - stays)


def _share(run: RunRecord) -> None:
    """Outputs that share memory leave as views of one span, so that they share it at the client too."""
    env, place = run.env, run.loaded.return_index
    for value_id, source_id in run.program.input_views:
        value, source = env[value_id], env[source_id]
        if value.untyped_storage().data_ptr() == source.untyped_storage().data_ptr() and not value.is_conj():
            offset_bytes = (value.storage_offset() * value.element_size()
                            - source.storage_offset() * source.element_size())
            view = (tensors.DTYPE_CODE[value.dtype], tuple(value.shape), value.stride(), offset_bytes)
            env[value_id] = SharedView(None, OF_INPUT, view)
    for group in run.program.aliases:
        by_storage: dict[int, list[int]] = {}
        for value_id in sorted(group, key=place.__getitem__):
            value = env[value_id]
            if isinstance(value, torch.Tensor) and not value.is_conj() and not value.is_neg():
                by_storage.setdefault(value.untyped_storage().data_ptr(), []).append(value_id)
        for ids in by_storage.values():
            if len(ids) > 1:
                memory, views = tensors.span_of([env[v] for v in ids])
                for number, (value_id, view) in enumerate(zip(ids, views, strict=True)):
                    env[value_id] = SharedView(memory if number == 0 else None, place[ids[0]], view)


def _let_go(run: RunRecord, part: FragmentRun) -> None:
    """Values that this fragment was the last to take are its alone now."""
    if not run.readers:
        return
    for value_id in part.fragment.program.inputs:
        if value_id in run.env and value_id in run.readers and value_id not in part.taken:
            part.taken.add(value_id)
            run.readers[value_id] -= 1
            if not run.readers[value_id]:
                del run.env[value_id]


def _supply(flat: FlatRun, program: FragmentProgram, env: dict[int, Any]) -> None:
    """Hand over the inputs that came since the run stopped."""
    for index, value_id in enumerate(program.inputs):
        if flat.is_missing(index) and value_id in env:
            flat.supply(index, env[value_id])


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    return "can't allocate memory" in str(error) or "out of memory" in str(error)


def _out_of_memory(error: BaseException, resident_bytes: int) -> WorkerMemoryError:
    return WorkerMemoryError(
        f"out of memory on the worker: {error}; this session keeps {resident_bytes / 2**30:.2f} GiB resident there and "
        f"the process uses {resident_set_bytes() / 2**30:.2f} GiB; use a smaller batch or another worker",
        resident_bytes=resident_bytes,
    )


def resident_set_bytes() -> int:
    """This process's resident set."""
    try:
        with open("/proc/self/statm") as statm:  # noqa: PTH123 - a hot path of get_stats
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


__all__ = ["Engine", "LoadedProgram", "resident_set_bytes"]
