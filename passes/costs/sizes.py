"""Sizes of fake tensors as numbers or sympy expressions. No guards are added: only `SymInt.node.expr` is read."""
from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

Size = Any
"""An int where the graph fixes it, else a sympy expression over the graph's symbols."""


def size_of(value: Any) -> Size:
    """The size behind an int or a SymInt."""
    if isinstance(value, int):
        return int(value)
    expr = value.node.expr
    return int(expr) if expr.is_Integer else expr


def product(values: Iterable[Size]) -> Size:
    result: Size = 1
    for value in values:
        result = result * value
    return result


def shape_of(tensor: torch.Tensor) -> tuple[Size, ...]:
    return tuple(size_of(dim) for dim in tensor.shape)


def numel(tensor: torch.Tensor) -> Size:
    return product(shape_of(tensor))


def size_bytes(tensor: torch.Tensor) -> Size:
    """Bytes of all elements: what moves when the tensor is sent."""
    return numel(tensor) * tensor.dtype.itemsize


def hinted_bytes(tensor: torch.Tensor) -> int:
    """Bytes of all elements for the sizes of the call that is being compiled."""
    sizes: tuple[Any, ...] = tuple(tensor.shape)
    count = product(size if isinstance(size, int) else size.node.hint or 1 for size in sizes)
    return int(count) * tensor.dtype.itemsize


def touched_bytes(tensor: torch.Tensor) -> Size:
    """Bytes of memory behind the elements: a dimension of stride 0 (expand) is read once."""
    if tensor.layout is not torch.strided:
        return size_bytes(tensor)
    sizes = [size_of(dim) for dim, step in zip(tensor.shape, tensor.stride(), strict=True)
             if not (isinstance(step, int) and step == 0)]
    return product(sizes) * tensor.dtype.itemsize


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """All tensors in nested lists, tuples and dicts, in order."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
