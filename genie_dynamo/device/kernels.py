"""The device's kernels: one Python function per overload, made from the op's schema.

    functional   record, and a new tensor for each output
    view         a real view of the storage; the view op is recorded as how to read it
    in place     record the functional twin, and write its outputs to the tensors that the op changes
    out=         the same, after out has been given the right shape

What no schema says stands in special.py.
"""
from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._ops import OpOverload

from genie_dynamo.device import engine as engines
from genie_dynamo.device.memory import (
    Memory,
    alias_of,
    fresh,
    is_ours,
    lazy_bits,
    memory_of,
    new_tensor,
    new_view,
    read,
    write,
)
from genie_dynamo.device.moves import as_strided, scattered
from genie_dynamo.device.nodes import Call, Layout, Node, item_of, layout
from genie_dynamo.device.quick import make_recorder
from genie_dynamo.device.record import (
    DataDependentError,
    Op,
    Tree,
    infer,
    op,
    record,
)
from genie_dynamo.device.twins import Twin, twin_of

Tensor = torch.Tensor
Kernel = Callable[..., Any]

engine = engines.current
recorder = make_recorder(engine)

MAX_KNOWN = 4096
"""Kinds of calls that one kernel remembers."""


def functional(target: OpOverload) -> Kernel:
    """The kernel of an op that makes new tensors."""
    own = op(target)
    gather, calls = own.gather, own.calls

    def kernel(*args: Any, **kwargs: Any) -> Any:
        key, inputs, scalars = gather(args, kwargs)
        call = calls.get(key) or own.call(key, args, kwargs, inputs)
        if len(fresh) > engine.next_cut:
            engine.maybe_cut(call)
        if call.single is None or call.random:
            return outputs_of(own, call, inputs, scalars)
        return new_tensor(Node(call, tuple(inputs), tuple(scalars), call.single))

    return recorder.functional(kernel, own)


def outputs_of(own: Op, call: Call, inputs: Sequence[Node], scalars: Sequence[Any]) -> Any:
    """New tensors for all outputs of a call, in the structure that the op's schema gives them."""
    node = own.node(call, inputs, scalars)
    if call.single is not None:
        return new_tensor(node)
    if not call.outs and not any("List" in str(r.type) for r in own.target._schema.returns):
        tensors = engine.tensors_of(node)
        return tensors[0] if len(tensors) == 1 else tuple(tensors)
    return structured(own.target, {path: new_tensor(item_of(node, path, out, call.exact))
                                   for path, out in call.outs})


def structured(target: OpOverload, leaves: dict[tuple[int, ...], Any]) -> Any:
    """Outputs by path, as the schema's structure: a list, or a tuple of tensors, lists and None."""
    returns = target._schema.returns
    if len(returns) == 1:
        return [leaves[path] for path in sorted(leaves)]
    parts: list[Any] = []
    for index, returned in enumerate(returns):
        if "List" in str(returned.type):
            parts.append([leaves[path] for path in sorted(leaves) if path[0] == index])
        else:
            parts.append(leaves.get((index,)))
    return tuple(parts)


def view(target: OpOverload) -> Kernel:
    """The kernel of a view op: its first argument is what is viewed."""
    own = Op(target, views=True)
    gather, calls = own.gather, own.calls

    def kernel(*args: Any, **kwargs: Any) -> Any:
        tensor = args[0]
        memory = memory_of(tensor)
        assert memory is not None
        key, inputs, scalars = gather(args, kwargs)
        call = calls.get(key) or own.call(key, args, kwargs, inputs)
        if lazy_bits[0] and (tensor.is_conj() or tensor.is_neg()):
            return _lazy_view(target, tensor, memory, call)
        if call.single is not None:
            if memory.views is not None and call.single in memory.views:
                return _alias(tensor, call.single)
            return new_view(tensor, memory, Node(call, tuple(inputs), tuple(scalars), call.single))
        node = Node(call, tuple(inputs), tuple(scalars), None)
        return structured(target, {path: new_view(tensor, memory, item_of(node, path, out, True))
                                   for path, out in call.outs})

    return recorder.view(kernel, own)


def _alias(tensor: Tensor, out: Layout) -> Tensor:
    return alias_of(tensor, out.shape, out.stride, out.offset, out.dtype)


def _lazy_view(target: OpOverload, tensor: Tensor, memory: Memory, call: Call) -> Any:
    """A view of a view that is conjugated or negated when it is read: it is so too."""
    memory.plain = False
    seen = {path: _alias(tensor, out) for path, out in call.outs}
    return seen[()] if call.single is not None else structured(target, seen)


class Mutation:
    """A kernel that changes some of its arguments: in place, or those given as out=."""

    def __init__(self, target: OpOverload, twin: Twin, known: dict[Any, Call]) -> None:
        """Args: known: calls that change the first argument in place and nothing else, and were found to be right."""
        self.target, self.twin, self._known = target, twin, known
        self.op = op(twin.target)
        self._names = [a.name for a in target._schema.arguments]
        self._try = op(target)
        self._checked: dict[Any, tuple[Layout | None, ...]] = {}
        self._drops = twin.drops
        needed = {a.name for a in twin.target._schema.arguments if not a.has_default_value()}
        self._defaults = {a.name: a.default_value for a in target._schema.arguments
                          if a.has_default_value() and a.name in needed}
        same = [a.name for a in twin.target._schema.arguments] == self._names
        self._direct = same and twin.changed == ("self",) and not self._defaults and len(target._schema.returns) < 2

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._direct:
            key, inputs, scalars = self._try.gather(args, kwargs)
            known = self._known.get(key)
            if known is not None:
                if len(fresh) > engine.next_cut:
                    engine.maybe_cut(known)
                node = self.op.node(known, inputs, scalars)
                if known.single is not None:
                    write(args[0], node)
                    return args[0]
                for tensor, (path, out) in zip(args[0], known.outs, strict=True):
                    write(tensor, item_of(node, path, out, known.exact))
                return None
            result = self._general(args, kwargs)
            if self._checked.get(key) is not None and not any(self._checked[key]):
                if len(self._known) > MAX_KNOWN:
                    self._known.clear()
                self._known[key] = self.op.call(key, args, kwargs, inputs)
            return result
        return self._general(args, kwargs)

    def _general(self, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        given = dict(zip(self._names, args, strict=False)) | kwargs
        changed: list[Tensor] = []
        for name in self.twin.changed:
            value = given.get(name)
            if isinstance(value, list | tuple):
                changed += value
            elif value is not None:
                changed.append(value)
        self._check(args, kwargs, changed)
        passed = self._defaults | {name: value for name, value in given.items() if name not in self._drops}
        for option in self.twin.options:
            passed[option] = changed[0].dtype if option == "dtype" else changed[0].device
        positional = [passed.pop(name) for name in self.twin.positional if name in passed]
        key, inputs, scalars = self.op.gather(positional, passed)
        call = self.op.calls.get(key) or self.op.call(key, positional, passed, inputs)
        if len(fresh) > engine.next_cut:
            engine.maybe_cut(call)
        node = self.op.node(call, inputs, scalars)
        if call.single is not None:
            values = [(call.single, node)]
        else:
            values = [(out, item_of(node, path, out, call.exact)) for path, out in call.outs]
        others = values[: len(values) - len(changed)]
        for tensor, (_, value) in zip(changed, values[len(others):], strict=True):
            write(tensor, value)
        return self.twin.result(given, [new_tensor(value) for _, value in others])

    def _check(self, args: Sequence[Any], kwargs: dict[str, Any], changed: Sequence[Tensor]) -> None:
        """Try the op itself on meta tensors: it may refuse, and with out= it may resize."""
        for tensor in changed:
            if not is_ours(tensor):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, "
                    f"remote_accelerator:0 and {tensor.device}! (in {self.target}, which writes to the latter)")
        key, inputs, _ = self._try.gather(args, kwargs)
        found = self._checked.get(key)
        if found is None:
            if len(self._checked) > 4096:
                self._checked.clear()
            found = self._checked[key] = self._tried(args, kwargs, inputs, len(changed))
        for tensor, wanted in zip(changed, found, strict=True):
            if wanted is not None:
                resize(tensor, wanted.shape, wanted.stride, warn=True)

    def _tried(self, args: Sequence[Any], kwargs: dict[str, Any], inputs: Sequence[Node],
               count: int) -> tuple[Layout | None, ...]:
        tree = Tree([node.layout for node in inputs])
        spec = tuple([tree.add(value, kind) for value, kind in zip(args, self._try.kinds, strict=False)])
        named = {name: tree.add(value, self._try.kind_by_name[name]) for name, value in kwargs.items()}
        given = dict(zip(self._names, tree.filled(spec, tree.metas), strict=False)) | tree.filled(named, tree.metas)
        metas: list[Tensor] = []
        for name in self.twin.changed:
            value = given.get(name)
            metas += value if isinstance(value, list) else [value] if value is not None else []
        before = [(m.shape, m.stride()) for m in metas]
        try:
            infer(self.target, tree.filled(spec, tree.metas), tree.filled(named, tree.metas))
        except DataDependentError:
            return (None,) * count
        return tuple([
            None if (m.shape, m.stride()) == was else layout(m.shape, m.stride(), 0, m.dtype)
            for m, was in zip(metas, before, strict=True)])


def resize(tensor: Tensor, shape: Sequence[int], stride: Sequence[int], *, warn: bool = False) -> None:
    """Give a tensor another shape, as resize_ does where nothing else looks at its memory."""
    memory = memory_of(tensor)
    assert memory is not None
    if warn and tensor.numel():
        warnings.warn(f"An output with one or more elements was resized since it had shape {list(tensor.shape)}, "
                      f"which does not match the required output shape {list(shape)}.", stacklevel=3)
    wanted = layout(shape, stride, 0, tensor.dtype)
    old = read(tensor, memory)
    assert old.layout is not None
    if wanted is old.layout:
        return
    if not memory.plain and wanted.extent > memory.node.layout.extent:  # type: ignore[union-attr]
        raise NotImplementedError(
            "resize_ of a tensor of remote_accelerator that has views, to more than its memory; make a new tensor")
    value = record(torch.ops.aten.empty_strided.default, list(shape), list(stride), dtype=tensor.dtype,
                   device=torch.device("cpu"))
    count = min(wanted.extent, old.layout.extent)
    if count and tensor.numel():
        flat = layout((count,), (1,), 0, tensor.dtype)
        value = scattered(value, as_strided(memory.node, flat), flat)
    tensor.data = new_tensor(value)


def mutation(target: OpOverload) -> Kernel | None:
    """The kernel of an op that changes arguments; None where nothing is known to be the same without."""
    twin = twin_of(target)
    if twin is None:
        return None
    known: dict[Any, Call] = {}
    made: list[Mutation] = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        if not made:
            made.append(Mutation(target, twin, known))
        return made[0](*args, **kwargs)

    return recorder.in_place(kernel, op(target), known)


__all__ = ["functional", "mutation", "outputs_of", "recorder", "resize", "view"]
