"""Recording one op: its arguments as a key, the key's Call (found or made), and a Node.

The first time a key is seen, the op runs on meta tensors: that gives the layouts of its outputs, and eager's own
error where the arguments do not fit. After that recording is a dictionary look-up.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
    UnsupportedOperatorException,
)

from genie_dynamo.device import foreign, nodes
from genie_dynamo.device.memory import read, storage_of
from genie_dynamo.device.nodes import Call, Layout, Node, Slot, layout, layout_of
from genie_dynamo.passes.default_dtype import WORKERS_DEFAULT, dependent_dtype

Tensor = torch.Tensor
aten = torch.ops.aten

TENSOR, NUMBER, SCALAR, LITERAL = "tensor", "number", "scalar", "literal"

_VALUES_MATTER = ("arange", "linspace", "logspace", "range", "upsample", "_upsample", "histc")
"""Ops whose scalars decide a shape or dtype: for these they are part of the key."""

_MAX_KEYS = 4096


class DataDependentError(Exception):
    """The shapes of an op's outputs hang on the values of its inputs."""


def kind_of(type_name: str, op_name: str) -> str:
    """How an argument of a schema type enters a recorded call."""
    if "Tensor" in type_name:
        return TENSOR
    if "number" in type_name or "float" in type_name:
        return LITERAL if op_name.startswith(_VALUES_MATTER) else SCALAR
    if "int" in type_name:
        return NUMBER
    return LITERAL


class Op:
    """A functional op, or a view, that can be recorded."""

    def __init__(self, target: OpOverload, *, views: bool = False) -> None:
        self.target = target
        self.views = views
        schema = target._schema
        name = schema.name.partition("::")[2]
        self.kinds = tuple([kind_of(str(a.type), name) for a in schema.arguments])
        self.kind_by_name = {a.name: kind for a, kind in zip(schema.arguments, self.kinds, strict=True)}
        self.random = torch.Tag.nondeterministic_seeded in target.tags
        self.exact = _is_exact(target)
        self.cpu_indices = "index" in name
        self.calls: dict[Any, Call] = {}
        self._generation = nodes.generation[0]

    def gather(self, args: Sequence[Any], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], list[Node], list[Any]]:
        """`(key, inputs, scalars)` of a call. Raises: RuntimeError for a tensor of another device."""
        key: list[Any] = []
        inputs: list[Node] = []
        scalars: list[Any] = []
        for value, kind in zip(args, self.kinds, strict=False):
            if isinstance(value, Tensor):
                try:
                    node = storage_of(value).genie
                except (AttributeError, RuntimeError):     # not of the device, or without a storage
                    self._foreign(value, key, inputs)
                    continue
                if type(node) is not Node:
                    node = node.node if node.plain else read(value, node)
                inputs.append(node)
                key.append(node.layout)
            else:
                self._take(value, kind, key, inputs, scalars)
        for name, value in kwargs.items():
            key.append(name)
            self._take(value, self.kind_by_name[name], key, inputs, scalars)
        if torch.get_default_dtype() is not WORKERS_DEFAULT:
            key.append(torch.get_default_dtype())
        return tuple(key), inputs, scalars

    def _take(self, value: Any, kind: str, key: list[Any], inputs: list[Node], scalars: list[Any]) -> None:
        if kind is NUMBER and type(value) in (int, list, tuple):
            key.append(value if type(value) is int else tuple(value))
        elif type(value) is Node:
            inputs.append(value)
            key.append(value.layout)
        elif isinstance(value, Tensor):
            try:
                node = storage_of(value).genie
            except (AttributeError, RuntimeError):
                self._foreign(value, key, inputs)
                return
            if type(node) is not Node:
                node = node.node if node.plain else read(value, node)
            inputs.append(node)
            key.append(node.layout)
        elif (kind is SCALAR or kind is TENSOR) and type(value) in (int, float):
            key.append(type(value))           # a tensor argument that stands for a number comes as the number
            scalars.append(value)
        elif isinstance(value, list | tuple):
            key.append(len(value))
            for item in value:
                self._take(item, kind, key, inputs, scalars)
        elif isinstance(value, torch.Generator):
            raise RuntimeError("this op takes no torch.Generator on remote_accelerator; draw on the cpu, and move "
                               "what was drawn")
        elif kind is NUMBER:
            key.append(value)
        else:
            key.append((type(value), repr(value) if type(value) in (float, complex) else value))

    def _foreign(self, value: Tensor, key: list[Any], inputs: list[Node]) -> None:
        node = foreign.admit(value, self.target, indices=self.cpu_indices)
        inputs.append(node)
        key.append(node.layout)

    def call(self, key: tuple[Any, ...], args: Sequence[Any], kwargs: dict[str, Any], inputs: Sequence[Node]) -> Call:
        """The Call of a key. Raises: what eager raises for such arguments; DataDependentError."""
        if self._generation != nodes.generation[0] or len(self.calls) >= _MAX_KEYS:
            self.calls.clear()
            self._generation = nodes.generation[0]
        found = self.calls.get(key)
        if found is None:
            found = self.calls[key] = self._make(args, kwargs, inputs)
        return found

    def _make(self, args: Sequence[Any], kwargs: dict[str, Any], inputs: Sequence[Node]) -> Call:
        tree = Tree([node.layout for node in inputs])
        spec = tuple([tree.add(value, kind) for value, kind in zip(args, self.kinds, strict=False)])
        named = {name: tree.add(value, self.kind_by_name[name]) for name, value in kwargs.items()}
        try:
            result = infer(self.target, tree.filled(spec, tree.metas), tree.filled(named, tree.metas))
            outs = tuple(flat_layouts(result))
            self._say_dtype(spec, named, inputs, [out.dtype for _, out in outs])
        except DataDependentError:
            outs = ()
        exact = self.exact
        if not self.views and any(out.offset for _, out in outs):
            # The value lies somewhere inside a larger one: who looks at its memory has it moved first.
            outs = tuple([(path, layout(out.shape, out.stride, 0, out.dtype)) for path, out in outs])
            exact = False
        return Call(self.target, spec, named, tuple(tree.numbers), outs, exact=exact or self.views,
                    random=self.random)

    def _say_dtype(self, spec: tuple[Any, ...], named: dict[str, Any], inputs: Sequence[Node],
                   made: list[torch.dtype]) -> None:
        """What a result has by torch.set_default_dtype is named, since workers have a default of their own."""
        given = [node.layout.dtype for node in inputs if node.layout is not None]
        dtype = dependent_dtype(self.target, (*spec, *named.values()), made, given)
        if dtype is None:
            return
        if inputs or "dtype" not in self.kind_by_name:
            raise RuntimeError(f"{self.target} makes {dtype} out of integers by torch.set_default_dtype, which workers "
                               f"of remote_accelerator do not have: convert the integers first, x.to({dtype})")
        named["dtype"] = dtype

    def __call__(self, *args: Any, **kwargs: Any) -> Node:
        """Record a call; arguments may be tensors of the device or nodes. Raises: as eager would."""
        key, inputs, scalars = self.gather(args, kwargs)
        call = self.calls.get(key) or self.call(key, args, kwargs, inputs)
        return self.node(call, inputs, scalars)

    def node(self, call: Call, inputs: Sequence[Node], scalars: Sequence[Any]) -> Node:
        """The node of a call."""
        if call.random:
            from genie_dynamo.device import engine

            return engine.current.random_node(call, inputs, scalars)
        return Node(call, tuple(inputs), tuple(scalars), call.single)


class Tree:
    """Arguments of a call with Slots in place of what changes, and meta tensors to try the op with."""

    def __init__(self, inputs: Sequence[Layout | None]) -> None:
        self.numbers: list[int] = []
        self.scalars: list[Any] = []
        self._layouts = iter(inputs)
        self.metas: list[Tensor] = []

    def add(self, value: Any, kind: str) -> Any:
        if type(value) is Node or isinstance(value, Tensor):
            own = next(self._layouts)
            assert own is not None
            self.metas.append(meta_of(own))
            return Slot("t", len(self.metas) - 1)
        if isinstance(value, list | tuple):
            return [self.add(item, kind) for item in value]
        if (kind is SCALAR or kind is TENSOR) and type(value) in (int, float):
            self.scalars.append(value)
            return Slot("s", len(self.scalars) - 1)
        if kind is NUMBER and type(value) is int:
            self.numbers.append(value)
            return Slot("n", len(self.numbers) - 1)
        return value

    def filled(self, tree: Any, metas: Sequence[Tensor]) -> Any:
        """The arguments to try the op with."""
        return fill(tree, metas, self.numbers, self.scalars, torch.device("meta"))


def fill(tree: Any, inputs: Sequence[Any], numbers: Sequence[Any], scalars: Sequence[Any],
         device: torch.device) -> Any:
    """A tree with its slots filled, and the device that the caller meant replaced."""
    if type(tree) is Slot:
        return (inputs if tree.kind == "t" else numbers if tree.kind == "n" else scalars)[tree.index]
    if isinstance(tree, list):
        return [fill(item, inputs, numbers, scalars, device) for item in tree]
    if isinstance(tree, tuple):
        return tuple([fill(item, inputs, numbers, scalars, device) for item in tree])
    if isinstance(tree, dict):
        return {name: fill(item, inputs, numbers, scalars, device) for name, item in tree.items()}
    if isinstance(tree, torch.device):
        foreign.check_ordinal(tree)
        return device
    return tree


def meta_of(own: Layout) -> Tensor:
    """A meta tensor of a layout."""
    if own.offset:
        return torch.empty((own.extent,), dtype=own.dtype, device="meta").as_strided(own.shape, own.stride, own.offset)
    return torch.empty_strided(own.shape, own.stride, dtype=own.dtype, device="meta")


_FORMAT_OF_THE_CPU = frozenset({aten.convolution.default, aten.convolution_backward.default})
"""Their meta kernels know nothing of channels_last; as fake tensors of the CPU they do."""


def infer(target: OpOverload, args: Any, kwargs: dict[str, Any]) -> Any:
    """What the op makes of meta tensors. Raises: eager's errors; DataDependentError."""
    if target is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None:
        raise DataDependentError(str(target))          # its meta kernel says so in a plain RuntimeError
    if target.namespace == "aten" and target not in _FORMAT_OF_THE_CPU:
        try:
            return target(*args, **kwargs)
        except NotImplementedError:
            pass
    mode = FakeTensorMode(allow_non_fake_inputs=target not in _FORMAT_OF_THE_CPU)     # else no dtypes are compared
    with mode:
        moved = [_as_fake(mode, leaf) for leaf in (args, kwargs)]
        try:
            return target(*moved[0], **moved[1])
        except (DynamicOutputShapeException, DataDependentOutputException, UnsupportedOperatorException,
                NotImplementedError) as error:
            raise DataDependentError(str(target)) from error


def _as_fake(mode: FakeTensorMode, value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cpu")
    if isinstance(value, list | tuple):
        return [_as_fake(mode, item) for item in value]
    if isinstance(value, dict):
        return {name: _as_fake(mode, item) for name, item in value.items()}
    return torch.device("cpu") if isinstance(value, torch.device) else value


def flat_layouts(result: Any, path: tuple[int, ...] = ()) -> Iterator[tuple[tuple[int, ...], Layout]]:
    """`(path, layout)` of every tensor in an op's result."""
    if isinstance(result, Tensor):
        yield path, layout_of(result)
    elif isinstance(result, list | tuple):
        for index, item in enumerate(result):
            yield from flat_layouts(item, (*path, index))


def _is_exact(target: OpOverload) -> bool:
    """Whether the meta kernel is the same code that decides the strides elsewhere."""
    if target.namespace != "aten":
        return torch.Tag.needs_exact_strides in target.tags
    name = target._schema.name.partition("::")[2]
    if name in ("copy", "as_strided_scatter", "clone", "zeros", "ones", "full", "empty", "empty_strided", "_to_copy",
                "zeros_like", "ones_like", "full_like", "empty_like", "embedding", "select_backward",
                "slice_backward") or name.startswith(("_foreach_", "_fused_")) or torch.Tag.pointwise in target.tags:
        return True
    from torch._decomp import global_decomposition_table

    if target in global_decomposition_table["meta"]:
        return False
    return bool(torch._C._dispatch_has_kernel_for_dispatch_key(target._name, "Meta"))


ops: dict[Any, Op] = {}


def op(target: OpOverload) -> Op:
    """The Op of an overload."""
    found = ops.get(target)
    if found is None:
        found = ops[target] = Op(target)
    return found


def record(target: Any, *args: Any, **kwargs: Any) -> Node:
    """Record a call of an overload; see Op.__call__."""
    return op(target)(*args, **kwargs)

