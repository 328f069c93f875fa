"""Nodes of the four ops that memories are read and written with; their layouts are known without trying them."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genie_dynamo.core import portable_ops as _portable_ops  # noqa: F401 - registers genie::laid_out
from genie_dynamo.device.nodes import Call, Layout, Node, Slot

aten = torch.ops.aten

_MAX_CALLS = 4096
calls: dict[Any, Call] = {}
"""By the layouts that decide them."""


def laid_out(node: Node) -> Node:
    """The value, sure to lie in memory as its layout says."""
    if node.call is None or node.call.exact:
        return node
    own = node.layout
    assert own is not None
    call = calls.get(own) or _made(own, torch.ops.genie.laid_out.default, 1, (own.stride,), own)
    return Node(call, (node,), (), own)


def as_strided(node: Node, out: Layout) -> Node:
    """The value's memory seen under another layout of the same dtype."""
    if node.layout is out:
        return node
    call = calls.get((out,)) or _made((out,), aten.as_strided.default, 1, (out.shape, out.stride, out.offset), out)
    return Node(call, (laid_out(node),), (), out)


def scattered(whole: Node, part: Node, where: Layout) -> Node:
    """The value with the elements of a layout replaced."""
    own = whole.layout
    assert own is not None
    key = (own, where)
    call = calls.get(key) or _made(key, aten.as_strided_scatter.default, 2,
                                    (where.shape, where.stride, where.offset), own)
    return Node(call, (laid_out(whole), part), (), own)


def copied(target: Node, value: Node, own: Layout) -> Node:
    """`value` cast, broadcast and laid out as `own`, which is the layout of `target` but for the offset."""
    key = (own, own, own)
    call = calls.get(key) or _made(key, aten.copy.default, 2, (), own)
    return Node(call, (laid_out(target), value), (), own)


def _made(key: Any, target: Any, num_tensors: int, numbers: Sequence[int | tuple[int, ...]], out: Layout) -> Call:
    """The call of a target that takes tensors first, then integers and lists of them."""
    flat: list[int] = []

    def slot(number: int) -> Slot:
        flat.append(number)
        return Slot("n", len(flat) - 1)

    rest = [[slot(n) for n in number] if isinstance(number, tuple) else slot(number) for number in numbers]
    tensors = [Slot("t", i) for i in range(num_tensors)]
    if len(calls) >= _MAX_CALLS:
        calls.clear()
    call = calls[key] = Call(target, (*tensors, *rest), {}, tuple(flat), (((), out),), exact=True)
    return call


__all__ = ["as_strided", "copied", "laid_out", "scattered"]
