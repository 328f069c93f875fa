"""The baseline of API remoting: every op that reaches the driver is one message, and tensors stay on the worker.

What a remoting library below the framework sees is one launch after another, without the graph they belong to. This is
that, on the same worker, protocol and lanes as everything else here, and not held back otherwise:

    weights       go up once and stay; results stay under handles until the client drops them
    launches      are not waited for: up to WINDOW of them are under way, as on an accelerator's stream
    views         cost nothing: they are the client's bookkeeping, and travel as sizes and strides of the next launch
    programs      of one op are sent once and serve every shape
    shapes        of results are computed once per signature
    reads         (`int(t)`, `t.tolist()`, `read(t)`) wait for what was launched before, and bring the bytes asked for

Inference only: autograd would record as on any tensor, but in-place ops are not there.
"""
from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from genie_dynamo.core import messages as m
from genie_dynamo.core.allowlist import target_name
from genie_dynamo.core.fragment import encode
from genie_dynamo.core.graph_spec import Device, GraphSpec, NodeSpec, Value
from genie_dynamo.core.program import FragmentProgram, WorkerProgram
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.client.connection import to_error
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.uploads import acknowledge, find_needs, send_fresh
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames

WINDOW = 64
TIMEOUT_S = 300.0
_EPOCH = 1
_AS_STRIDED = "aten::as_strided.default"
_GETITEM = "py::operator.getitem"
_CPU = torch.device("cpu")
_TENSOR, _VIEW, _NUMBER, _LIST = "T", "V", "N", "L"


class Resident:
    """Memory on the worker: what one launch has made, or an uploaded parameter."""

    __slots__ = ("__weakref__", "key", "layout", "owner")

    def __init__(self, owner: DriverLevel | None, key: tuple[int, int], meta: torch.Tensor) -> None:
        self.owner, self.key = owner, key
        self.layout = (meta.shape, meta.stride(), meta.storage_offset())

    def __del__(self) -> None:
        if self.owner is not None:
            self.owner.dropped.append((self.owner.last_request, self.key))


class RemoteTensor(torch.Tensor):
    """A tensor whose bytes are on the worker; here are its shape (`meta`) and the memory it is a view of."""

    meta: torch.Tensor
    memory: Resident

    @staticmethod
    def __new__(cls, meta: torch.Tensor, memory: Resident) -> RemoteTensor:
        made: RemoteTensor = torch.Tensor._make_wrapper_subclass(
            cls, meta.shape, strides=meta.stride(), storage_offset=meta.storage_offset(), dtype=meta.dtype,
            device=_CPU)
        made.meta, made.memory = meta, memory
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a remote tensor outside of its DriverLevel")


class DriverLevel(TorchDispatchMode):
    """Inside, every op is a launch on the first worker of the session. One thread."""

    def __init__(self, session: Session) -> None:
        super().__init__()
        self.session = session
        self.link = session.links[0]
        self.counters: Counter[str] = Counter()      # bytes by direction and reason, launches, seconds
        self._connection = self.link.borrow()
        self._lane = ZmqFrames()
        self._programs: dict[Any, int] = {}
        self._shapes: dict[Any, Any] = {}
        self._open: deque[int] = deque()             # requests under way, oldest first
        self.last_request = 0
        self.dropped: deque[tuple[int, tuple[int, int]]] = deque()   # (last request that may use it, handle)

    # -- tensors ------------------------------------------------------------------------------------------------

    def place(self, module: torch.nn.Module) -> None:
        """Put a module's parameters and buffers onto the worker, once; the module then computes there."""
        found = dict.fromkeys([*module.parameters(), *module.buffers()])
        tensors, residency = list(found), self.session.residency
        entries = [residency.current(t, 0) for t in tensors]
        needs = find_needs(residency, self.link, entries, tensors)
        send_fresh(self._connection, self._lane, self.link, needs.fresh, self.session.telemetry,
                   deadline_s=time.monotonic() + TIMEOUT_S, progress="off")
        self._connection.ask(m.Have(self._connection.next_request(), ()), time.monotonic() + TIMEOUT_S)
        acknowledge(residency, self.link, entries, needs.incoming)
        self._kept_alive = tensors                   # the residency table frees what its owner drops
        remote = {t: self._uploaded(t, (e.tensor_id, e.epoch)) for t, e in zip(tensors, entries, strict=True)}
        for part in module.modules():
            for table in (part._parameters, part._buffers):
                for name, tensor in table.items():
                    if tensor is not None:
                        table[name] = remote[tensor]  # type: ignore[assignment]

    def _uploaded(self, tensor: torch.Tensor, key: tuple[int, int]) -> RemoteTensor:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        return RemoteTensor(meta, Resident(None, key, meta))

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy of a remote tensor, here."""
        assert isinstance(tensor, RemoteTensor)
        call = _Call((tensor,), {})
        with _disable_current_modes():
            request = self._launch(("read", call.structure), call.flat, 1,
                                   lambda: call.program("aten::clone.default", 1), read=True)
            return self._answer(request)

    # -- ops ----------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.ops.aten._local_scalar_dense.default:
            return self.read(args[0]).item()
        if func._schema.is_mutable:
            raise NotImplementedError(f"{func} changes a tensor in place; the baseline has functional ops alone")
        if func.is_view:
            if not isinstance(args[0], RemoteTensor):
                return func(*args, **kwargs)                        # of a tensor that has not gone up yet
            return self._view(func, args, kwargs)
        call = _Call(args, kwargs)
        outputs = self._shapes.get((func, call.signature))
        if outputs is None:
            found = _meta_of(func, args, kwargs)
            inputs = {v.meta.untyped_storage()._cdata: v for v in call.flat if isinstance(v, RemoteTensor)}
            if isinstance(found, torch.Tensor) and (source := inputs.get(found.untyped_storage()._cdata)) is not None:
                return RemoteTensor(found, source.memory)           # such as _unsafe_view
            outputs = self._shapes[func, call.signature] = tuple(
                [(out.shape, out.stride(), out.dtype) for out in ([found] if isinstance(found, torch.Tensor)
                                                                  else found)])
        keys = [(self.session.next_id(), _EPOCH) for _ in outputs]
        self._launch((func, call.structure), call.flat, len(outputs),
                     lambda: call.program(target_name(func), len(outputs)), keys=keys)
        made = [self._made(key, form) for key, form in zip(keys, outputs, strict=True)]
        return made[0] if len(func._schema.returns) == 1 else tuple(made)

    def _made(self, key: tuple[int, int], form: tuple[Any, Any, torch.dtype]) -> RemoteTensor:
        meta = torch.empty_strided(form[0], form[1], dtype=form[2], device="meta")
        return RemoteTensor(meta, Resident(self, key, meta))

    def _view(self, func: Any, args: Any, kwargs: Any) -> Any:
        """No message: the same memory, seen otherwise."""
        found, memory = _meta_of(func, args, kwargs), args[0].memory
        if isinstance(found, torch.Tensor):
            return RemoteTensor(found, memory)
        return [RemoteTensor(meta, memory) for meta in found]

    # -- messages -----------------------------------------------------------------------------------------------

    def _launch(self, key: Any, flat: Sequence[Any], num_outputs: int, build: Callable[[], GraphSpec], *,
                keys: Sequence[tuple[int, int]] = (), read: bool = False) -> int:
        program_id = self._programs.get(key)
        if program_id is None:
            program_id = self._programs[key] = self._load(build(), len(flat), num_outputs, read)
        frames: list[Any] = []
        arguments = []
        incoming = []
        for value in flat:
            if isinstance(value, RemoteTensor):
                arguments.append((m.RESIDENT, *value.memory.key))
                incoming.append(value.memory.key)
            elif isinstance(value, torch.Tensor):
                wire = self._lane.stage(value, frames)
                self.counters["up.inputs"] += value.nbytes
                arguments.append((m.INLINE, wire))
            else:
                arguments.append(value)
        while self.dropped and (not self._open or self.dropped[0][0] < self._open[0]):
            self.link.frees.append(self.dropped.popleft()[1])
        request = self.last_request = self._connection.next_request()
        header = pack(m.to_wire(m.Run(request, program_id, self.session.next_id(), tuple(arguments), tuple(keys),
                                      tuple(incoming), self.link.take_frees(), 0)))
        self._connection.run(header, frames, time.monotonic() + TIMEOUT_S)
        self.counters["up.control"] += len(header)
        self.counters["launches"] += 1
        self._open.append(request)
        if len(self._open) > WINDOW and not read:
            while len(self._open) > WINDOW // 2:
                self._receive()
        return request

    def _load(self, spec: GraphSpec, num_inputs: int, num_outputs: int, read: bool) -> int:
        program_id, inputs = self.session.next_id(), tuple(range(num_inputs))
        outputs = tuple(range(num_inputs, num_inputs + num_outputs))
        fragment = FragmentProgram(fragment_id=0, spec=encode(spec), inputs=inputs, outputs=outputs, rng=None)
        program = WorkerProgram(program_id=program_id, fragments=(fragment,), inputs=inputs, receives=(), sends=(),
                                returns=outputs if read else (), keeps=() if read else outputs)
        while self._open:
            self._receive()
        self._connection.ask(m.Load(self._connection.next_request(), program.to_wire()), time.monotonic() + TIMEOUT_S)
        return program_id

    def _answer(self, request: int) -> torch.Tensor:
        while True:
            answer, frames = self._receive()
            if answer.request == request:
                tensor = self._lane.land(answer.values[0][1][1], frames, _CPU)
                self.counters["down.outputs"] += tensor.nbytes
                return tensor

    def _receive(self) -> tuple[Any, Sequence[Any]]:
        """The next answer; seconds here are those that the client waits.

        Raises: what the worker reports; by then the answers to everything that was under way have been read.
        """
        started_s = time.perf_counter()
        answer, frames, header_bytes = self._connection.receive(time.monotonic() + TIMEOUT_S)
        self.counters["wait_s"] += time.perf_counter() - started_s  # type: ignore[assignment]
        self.counters["down.control"] += header_bytes
        if isinstance(answer, m.Failure):
            self._open.remove(answer.request)
            while self._open:
                later, _, _ = self._connection.receive(time.monotonic() + TIMEOUT_S)
                if isinstance(later, m.Result | m.Failure):
                    self._open.remove(later.request)
            raise to_error(answer, self.link.address)
        assert isinstance(answer, m.Result | m.Partial)
        if isinstance(answer, m.Result):
            self._open.remove(answer.request)
            self.counters["compute_s"] += answer.compute_s  # type: ignore[assignment]
        return answer, frames


class _Call:
    """The arguments of one launch, taken apart.

    structure   what the program of the op depends on: where tensors and ints stand, and everything else as it is
    flat        the tensors and ints, with the sizes, strides and offset of a view after its tensor
    signature   what the shapes of the results depend on
    """

    __slots__ = ("flat", "signature", "structure")

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self.flat: list[Any] = []
        signature: list[Any] = []
        items = [self._item(value, signature) for value in args]
        self.structure = (tuple(items), tuple([(k, self._item(v, signature)) for k, v in kwargs.items()]))
        self.signature = (self.structure, tuple(signature))

    def _item(self, value: Any, signature: list[Any]) -> Any:
        flat, kind = self.flat, type(value)
        position = len(flat)
        if kind is RemoteTensor:
            flat.append(value)
            layout = (value.shape, value.stride(), value.storage_offset())
            signature.append((layout, value.dtype))
            if layout == value.memory.layout:
                return (_TENSOR, position)
            flat += [*layout[0], *layout[1], layout[2]]
            return (_VIEW, position, len(layout[0]))
        if kind is int:
            flat.append(value)
            signature.append(value)
            return (_NUMBER, position)
        if kind is list or kind is tuple:
            return (_LIST, *[self._item(v, signature) for v in value])
        if isinstance(value, torch.Tensor):
            flat.append(value)
            signature.append((value.shape, value.stride(), value.dtype))
            return (_TENSOR, position)
        return Device.WORKER if kind is torch.device else value

    def program(self, name: str, num_outputs: int) -> GraphSpec:
        """The op as a graph of its own, with the nodes that make views before it."""
        nodes: list[NodeSpec] = []
        args = [self._reference(item, nodes) for item in self.structure[0]]
        kwargs = {key: self._reference(item, nodes) for key, item in self.structure[1]}
        nodes.append(NodeSpec("op", name, tuple(args), kwargs))
        results = [Value(len(self.flat) + len(nodes) - 1)]
        if num_outputs > 1:
            (op,) = results
            nodes += [NodeSpec(f"get{index}", _GETITEM, (op, index)) for index in range(num_outputs)]
            results = [Value(op.index + 1 + index) for index in range(num_outputs)]
        return GraphSpec(len(self.flat), tuple(nodes), tuple(results))

    def _reference(self, item: Any, nodes: list[NodeSpec]) -> Any:
        if type(item) is not tuple:
            return item
        if item[0] == _LIST:
            return [self._reference(part, nodes) for part in item[1:]]
        if item[0] != _VIEW:
            return Value(item[1])
        at, dim = item[1] + 1, item[2]
        sizes, strides = ([Value(start + i) for i in range(dim)] for start in (at, at + dim))
        nodes.append(NodeSpec(f"view{len(nodes)}", _AS_STRIDED,
                              (Value(item[1]), sizes, strides, Value(at + 2 * dim))))
        return Value(len(self.flat) + len(nodes) - 1)


def _meta_of(func: Any, args: Any, kwargs: Any) -> Any:
    """The op on tensors without content."""
    kwargs = {key: _meta(value) for key, value in kwargs.items()}
    if not any(isinstance(a, torch.Tensor | list | tuple) for a in args) and "device" in {
            a.name for a in func._schema.arguments}:
        kwargs["device"] = torch.device("meta")
    return func(*[_meta(value) for value in args], **kwargs)


def _meta(value: Any) -> Any:
    if isinstance(value, RemoteTensor):
        return value.meta
    if isinstance(value, torch.Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    if isinstance(value, list | tuple):
        return [_meta(item) for item in value]
    return torch.device("meta") if isinstance(value, torch.device) else value


