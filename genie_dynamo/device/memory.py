"""Storages of the device: reading a tensor's value, making a tensor for a value, writing one.

A device tensor is a plain torch.Tensor whose storage has no bytes; what it holds hangs on the storage object, which
torch keeps as long as any tensor uses it: `storage.genie` is a Node as long as nobody has looked at the storage in any
other way, then a Memory. Real views share the storage, so autograd, `_base` and Python see what they see elsewhere.
"""
from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKey

from genie_dynamo.device.moves import as_strided, copied, scattered
from genie_dynamo.device.nodes import Layout, Node, layout, layout_of

Tensor = torch.Tensor

storage_of: Any = torch.Tensor.untyped_storage
create: Callable[..., Tensor] = torch._C._acc.create_empty_tensor
in_child = False
"""Whether this process was forked from one that had the device."""


def refuse_in_child(*_: object) -> Any:
    """As CUDA does. Raises: RuntimeError."""
    raise RuntimeError("remote_accelerator cannot be used in a forked process, what is on it belongs to the parent: "
                       "let a DataLoader's dataset return CPU tensors, or start processes with the 'spawn' method")


def _forked() -> None:
    global create, in_child
    create, in_child = refuse_in_child, True


os.register_at_fork(after_in_child=_forked)
reference = weakref.ref
shifted: Any = torch._C._dynamo.guards._reinterpret_tensor  # type: ignore[attr-defined]

_MAX_VIEWS = 64


def alias_of(tensor: Tensor, shape: Sequence[int], stride: Sequence[int], offset: Any,
             dtype: torch.dtype | None = None) -> Tensor:
    """A tensor over the same storage, made without dispatch. It is conjugated or negated where `tensor` is."""
    if dtype is not None and dtype != tensor.dtype:
        count = max(dtype.itemsize // tensor.dtype.itemsize, 1)
        first = shifted(tensor, (count,), (1,), -tensor.storage_offset())
        tensor = torch.ops.aten.view.dtype._op_dk(DispatchKey.CompositeExplicitAutograd, first, dtype)
    alias: Tensor = shifted(tensor, shape, stride, offset - tensor.storage_offset())
    return alias

fresh: list[weakref.ref[Any]] = []
"""Storages written since the last run, some more than once; what lives of them the next run has to make."""

lazy_bits = [False]
"""Whether a conjugate or negative view was ever made: then reads look for them."""


class Memory:
    """What one storage holds.

    node    its current value, which spans it from offset 0
    plain   every tensor over it has exactly the value's layout: the tensor need not be looked at
    views   layout -> the node that reads it out of `node`, as far as known
    """

    __slots__ = ("node", "plain", "reference", "views")

    def __init__(self, storage: Any, node: Node) -> None:
        self.node = node
        self.plain = True
        self.views: dict[Layout, Node] | None = None
        self.reference = reference(storage)

    def put(self, node: Node) -> None:
        """A new current value, of the same layout."""
        self.node = node
        self.views = None
        fresh.append(self.reference)


def new_tensor(node: Node) -> Tensor:
    """A tensor with a storage of its own that holds the node's value."""
    out: Any = node.layout
    tensor: Tensor = create(out.shape, out.dtype)
    if not out.contiguous:
        tensor = shifted(tensor, out.shape, out.stride, 0)
    storage: Any = storage_of(tensor)
    storage.genie = node
    fresh.append(reference(storage))
    return tensor


def new_view(tensor: Tensor, memory: Memory, node: Node) -> Tensor:
    """A tensor over the same storage, whose value `node` reads out of the current one."""
    out = node.layout
    assert out is not None
    memory.plain = False
    if memory.views is None or len(memory.views) >= _MAX_VIEWS:
        memory.views = {}
    memory.views[out] = node
    return alias_of(tensor, out.shape, out.stride, out.offset, out.dtype)


def memory_of(tensor: Tensor) -> Memory | None:
    """The memory of a tensor of the device; None for any other."""
    try:
        storage: Any = storage_of(tensor)
        found: Any = storage.genie
    except (AttributeError, NotImplementedError, RuntimeError):       # no storage, or of another device
        return None
    if type(found) is Node:
        found = storage.genie = Memory(storage, found)
    known: Memory = found
    return known


def read(tensor: Tensor, memory: Memory) -> Node:
    """The tensor's value now."""
    node = memory.node
    if memory.plain:
        return node
    seen = layout_of(tensor)
    if seen is not node.layout:
        known = memory.views.get(seen) if memory.views is not None else None
        node = known if known is not None else _read_view(memory, seen)
    if lazy_bits[0]:
        node = _resolve(tensor, node)
    return node


def _read_view(memory: Memory, seen: Layout) -> Node:
    node = as_strided(_in_dtype(memory.node, seen.dtype), seen)
    if memory.views is None or len(memory.views) >= _MAX_VIEWS:
        memory.views = {}
    memory.views[seen] = node
    return node


def _in_dtype(node: Node, dtype: torch.dtype) -> Node:
    """The memory of a value as a flat tensor of another dtype; the value itself where the dtype is its own."""
    from genie_dynamo.device.record import record

    own = node.layout
    assert own is not None
    if own.dtype == dtype:
        return node
    flat = as_strided(node, layout((own.extent,), (1,), 0, own.dtype))
    return record(torch.ops.aten.view.dtype, flat, dtype)


def _resolve(tensor: Tensor, node: Node) -> Node:
    from genie_dynamo.device.record import record

    if tensor.is_conj():
        node = record(torch.ops.aten.conj_physical.default, node)
    if tensor.is_neg():
        node = record(torch.ops.aten.neg.default, node)
    return node


def write(tensor: Tensor, value: Node) -> None:
    """Give the tensor, and so every view of its memory, new content: `value`, cast and broadcast as copy_ does."""
    storage: Any = storage_of(tensor)
    memory = storage.genie
    if type(memory) is Node:
        if value.layout is memory.layout:
            storage.genie = value
            fresh.append(reference(storage))
            return
        memory = storage.genie = Memory(storage, memory)
    own = memory.node.layout
    assert own is not None
    seen = own if memory.plain else layout_of(tensor)
    if lazy_bits[0] and (tensor.is_conj() or tensor.is_neg()):
        value = _unresolved(tensor, value, seen)
    made: Any = value.layout
    if seen is own:
        memory.put(value if made is own else copied(memory.node, value, own))
        return
    whole = _in_dtype(memory.node, seen.dtype)
    if made is None or made.shape != seen.shape or made.dtype != seen.dtype:
        value = copied(as_strided(whole, seen), value, layout(seen.shape, seen.stride, 0, seen.dtype))
    changed = scattered(whole, value, seen)
    if seen.dtype != own.dtype:
        changed = _back_in_dtype(changed, own)
    memory.put(changed)


def _unresolved(tensor: Tensor, value: Node, seen: Layout) -> Node:
    """What the memory has to hold so that a tensor that is conjugated or negated when it is read has this value."""
    from genie_dynamo.device.record import record

    if value.layout is not None and value.layout.dtype != seen.dtype:
        value = record(torch.ops.aten._to_copy.default, value, dtype=seen.dtype)
    return _resolve(tensor, value)


def _back_in_dtype(flat: Node, own: Layout) -> Node:
    from genie_dynamo.device.record import record

    return as_strided(record(torch.ops.aten.view.dtype, flat, own.dtype), own)


def is_ours(value: Any) -> bool:
    """Whether a value is a tensor of the device."""
    return (isinstance(value, Tensor) and value.layout is torch.strided
            and hasattr(storage_of(value), "genie"))


def node_of(tensor: Tensor) -> Node:
    """The current value of a tensor of the device."""
    found = storage_of(tensor).genie
    return found if type(found) is Node else read(tensor, found)


def value_in(storage: Any) -> Node:
    """The current value of a storage of the device."""
    found = storage.genie
    return found if type(found) is Node else found.node
