"""Formulas by op: `@formula("matmul", "aten::mm")` registers one, `find` looks one up.

A formula gets a `Call` (the op's arguments with fake tensors for values) and answers `Work`. Names are those of op
packets ("aten::mm"), so that one formula serves all overloads and the in-place form ("aten::add_") where it says so.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from genie_dynamo.core.errors import CostError
from genie_dynamo.passes.costs.sizes import Size, numel, tensors_in, touched_bytes

MATRIX_FAMILIES = frozenset({"matmul", "conv", "conv_backward", "attention", "attention_backward", "rnn"})
"""Families whose flops are multiply-adds of matrix units; those of the others are weighted elementwise operations."""


@dataclass(frozen=True, slots=True)
class Work:
    """What one call of an op does. Sizes are numbers or sympy expressions."""

    flops: Size
    bytes_read: Size
    bytes_written: Size
    workspace_bytes: Size = 0
    assumption: str = ""       # what the formula had to suppose, for people


@dataclass(frozen=True, slots=True)
class Call:
    """An op with the values of its arguments.

    args, kwargs: fake tensors, SymInts and literals, as the op's schema has them.  out: the value of the result.
    """

    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    out: Any
    inputs: tuple[torch.Tensor, ...] = field(default=())       # every distinct tensor argument
    outputs: tuple[torch.Tensor, ...] = field(default=())

    def arg(self, position: int, name: str, default: Any = None) -> Any:
        """An argument by position or keyword."""
        if len(self.args) > position:
            return self.args[position]
        return self.kwargs.get(name, default)

    def tensor(self, position: int, name: str = "") -> torch.Tensor:
        value = self.arg(position, name)
        if not isinstance(value, torch.Tensor):
            raise CostError(f"{self.name}: argument {position} has to be a tensor with a known shape, got "
                            f"{type(value).__name__}", op=self.name)
        return value

    def tensors(self, position: int, name: str = "") -> tuple[torch.Tensor, ...]:
        """The tensors of a list argument."""
        return tuple(tensors_in(self.arg(position, name, ())))

    @property
    def out_numel(self) -> Size:
        return sum(numel(out) for out in self.outputs)

    @property
    def in_numel(self) -> Size:
        """Elements of the largest role: the first tensor argument."""
        return numel(self.inputs[0]) if self.inputs else 0

    def work(self, flops: Size, *, read: Size = None, written: Size = None, workspace: Size = 0,
             assumption: str = "") -> Work:
        """Work that reads all arguments and writes all results, but for what is given."""
        return Work(flops, bytes_of(self.inputs) if read is None else read,
                    bytes_of(self.outputs) if written is None else written, workspace, assumption)


Formula = Callable[[Call], Work]


@dataclass(frozen=True, slots=True)
class Entry:
    """A family and its formula."""

    family: str
    formula: Formula


_ENTRIES: dict[str, Entry] = {}


def bytes_of(tensors: tuple[torch.Tensor, ...]) -> Size:
    """Bytes of memory behind the tensors."""
    return sum(touched_bytes(tensor) for tensor in tensors)


def formula(family: str, *names: str) -> Callable[[Formula], Formula]:
    """Register a formula for op packets such as "aten::mm". An op has one formula.

    Raises: CostError where one of them has a formula already.
    """
    def register(function: Formula) -> Formula:
        for name in names:
            if name in _ENTRIES:
                raise CostError(f"{name} has a cost formula already (family {_ENTRIES[name].family})", op=name)
            _ENTRIES[name] = Entry(family, function)
        return function

    return register


def find(name: str) -> Entry | None:
    """The entry of an op packet."""
    return _ENTRIES.get(name)


def registered() -> tuple[str, ...]:
    """Names of all ops with a formula of their own."""
    return tuple(sorted(_ENTRIES))


def base_name(name: str) -> str:
    """`aten::add_` -> `add`: without namespace and in-place mark."""
    short = name.rpartition("::")[2]
    return short[:-1] if short.endswith("_") and not short.endswith("__") else short
