"""What is recorded: layouts, calls and nodes, and what each storage of the device holds.

    tensor -> storage -> Memory -> node -> its inputs ...

A node is one value: of an op still to be run, of a CPU tensor to be sent, or resident on the worker. Nodes are held
by the memories that hold their values and by the nodes that read them, and by nothing else: a value that nobody can
reach any more is gone, recorded or resident.

A storage holds one current value. A view of it is that value read through a view op; a write to the storage, or to a
view of it, is a new value (`genie_dynamo/device/memory.py`). So the recorded graph is functional, and aliasing exact.
"""
from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from typing import Any

import torch

from genie_dynamo.core.tensors import contiguous_stride, numel

Tensor = torch.Tensor


class Layout:
    """Shape, stride, offset and dtype. Equal layouts are one object."""

    __slots__ = ("contiguous", "dtype", "offset", "shape", "size_bytes", "stride")

    def __init__(self, shape: tuple[int, ...], stride: tuple[int, ...], offset: int, dtype: torch.dtype) -> None:
        self.shape, self.stride, self.offset, self.dtype = shape, stride, offset, dtype
        self.contiguous = offset == 0 and stride == contiguous_stride(shape)
        self.size_bytes = numel(shape) * dtype.itemsize

    @property
    def extent(self) -> int:
        """Elements of storage that it spans, from the storage's start."""
        if not numel(self.shape):
            return self.offset
        return self.offset + 1 + sum((n - 1) * step for n, step in zip(self.shape, self.stride, strict=True))

    def __repr__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


_MAX_LAYOUTS = 100_000
layouts: dict[Any, Layout] = {}
"""By what they say."""
generation = [0]
"""Counts how often the layouts were forgotten: what is remembered by layout is then worth nothing."""


def layout(shape: Sequence[int], stride: Sequence[int], offset: int, dtype: torch.dtype) -> Layout:
    """The one object for a layout."""
    key = (tuple(shape), tuple(stride), offset, dtype)
    found = layouts.get(key)
    if found is None:
        if len(layouts) >= _MAX_LAYOUTS:
            layouts.clear()
            generation[0] += 1
        found = layouts[key] = Layout(*key)
    return found


def layout_of(tensor: Tensor) -> Layout:
    """A tensor's layout."""
    key: Any = (tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype)
    return layouts.get(key) or layout(*key)


class Slot:
    """In a call's arguments: the place of input `index`, of number `index`, or of scalar `index`."""

    __slots__ = ("index", "kind")

    def __init__(self, kind: str, index: int) -> None:
        self.kind, self.index = kind, index

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Slot) and (self.kind, self.index) == (other.kind, other.index)

    def __hash__(self) -> int:
        return hash((self.kind, self.index))

    def __repr__(self) -> str:
        return f"{self.kind}{self.index}"


def num_tensors(tree: Any) -> int:
    """How many inputs a call's arguments have places for."""
    if isinstance(tree, list | tuple):
        return sum(map(num_tensors, tree))
    if isinstance(tree, dict):
        return num_tensors(tuple(tree.values()))
    return int(type(tree) is Slot and tree.kind == "t")


_skeletons: dict[Any, int] = {}
_skeleton_numbers = itertools.count()


def _skeleton(target: Any, args: Any, kwargs: Any) -> int:
    """A number for what stays of a call when its inputs, numbers and scalars are left out."""
    key = (target, _typed(args), _typed(kwargs))
    found = _skeletons.get(key)
    if found is None:
        found = _skeletons[key] = next(_skeleton_numbers)
    return found


def _typed(tree: Any) -> Any:
    """The tree with its leaves' types, so that True, 1 and 1.0 stay apart."""
    if isinstance(tree, list | tuple):
        return (type(tree), tuple(map(_typed, tree)))
    if isinstance(tree, dict):
        return tuple((name, _typed(value)) for name, value in tree.items())
    return (type(tree), repr(tree) if isinstance(tree, complex) else tree)


class Call:
    """An op with all of its arguments but tensors and scalars, and the layouts of what it makes.

    args, kwargs   literals, with Slots for inputs ("t"), integers that shapes hang on ("n") and scalars ("s")
    numbers        the integers
    outs           (path of indices, layout) of each tensor it makes; path () where it makes one tensor
    exact          the worker's strides are sure to be those of `outs`
    random         it draws from the device's generator
    """

    __slots__ = ("args", "exact", "kwargs", "numbers", "outs", "random", "single", "skeleton", "target", "view")

    def __init__(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any], numbers: tuple[int, ...],
                 outs: tuple[tuple[tuple[int, ...], Layout], ...], *, exact: bool, random: bool = False,
                 view: bool = False) -> None:
        self.target, self.args, self.kwargs, self.numbers, self.outs = target, args, kwargs, numbers, outs
        self.exact, self.random, self.view = exact, random, view
        self.single: Layout | None = outs[0][1] if len(outs) == 1 and outs[0][0] == () else None
        self.skeleton = _skeleton(target, args, kwargs)


class Node:
    """One value. `value` is None while it is recorded, then what it was found to be: see Resident, Tensor, Lost."""

    __slots__ = ("__weakref__", "call", "inputs", "layout", "scalars", "value")

    def __init__(self, call: Call | None, inputs: tuple[Node, ...], scalars: tuple[Any, ...],
                 layout: Layout | None) -> None:
        self.call, self.inputs, self.scalars, self.layout = call, inputs, scalars, layout
        self.value: Any = None

    @property
    def exact(self) -> bool:
        """Whether the strides of the value are sure to be those of `layout`."""
        return self.call is None or self.call.exact


class Failed:
    """As a node's value: it cannot be had, and why."""

    __slots__ = ("error",)

    def __init__(self, error: BaseException) -> None:
        self.error = error


def uploaded(tensor: Tensor) -> Node:
    """A node for a plain CPU tensor that nobody else will change."""
    node = Node(None, (), (), layout_of(tensor))
    node.value = tensor
    return node


getitem_calls: dict[Any, Call] = {}
"""By index, and whether it is exact."""


def item_of(parent: Node, path: tuple[int, ...], out: Layout, exact: bool) -> Node:
    """The node of one of several outputs."""
    node = parent
    for depth, index in enumerate(path):
        last = depth == len(path) - 1
        key = (index, exact)
        call = getitem_calls.get(key)
        if call is None:
            call = getitem_calls[key] = Call(operator.getitem, (Slot("t", 0), index), {}, (), (), exact=exact)
        node = Node(call, (node,), (), out if last else None)
    return node
