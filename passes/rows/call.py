"""One op as a rule sees it: its arguments by name, and along which dim each tensor among them has rows.

A value has rows along `dim` where cutting it there into k equal blocks gives what the graph gives for the k blocks of
the batch. A value without rows (`dim is None`) is the same for all of them; it can be cut along any dim all the same.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import fx

Together = Literal["sum", "mean", "max", "min", "any", "all", "same"]
"""How the results for parts make the result for the batch, where it has no rows."""

State = int | Together | None
"""Rows along a dim; made of all parts; or the same for every part."""


class MixesRows(Exception):
    """The op makes rows depend on each other, or nothing is known that says otherwise; the text is why."""


@dataclass(slots=True, eq=False)
class Leaf:
    """A tensor argument. `need` is what the op wants for a part: a block along that dim, or (None) all of it."""

    node: fx.Node
    value: torch.Tensor
    dim: int | None
    need: int | None

    @property
    def ndim(self) -> int:
        return self.value.dim()

    def size(self, dim: int) -> int:
        return int(self.value.shape[dim])


@dataclass(frozen=True, slots=True)
class Parts:
    """The op runs once for each part.

    outputs   a state per output
    change    other arguments for a part, by name
    divide    the result for a part is k times what it is in the batch
    """

    outputs: tuple[State, ...]
    change: Mapping[str, Any] = field(default_factory=dict)
    divide: bool = False


class Call:
    """Arguments of a node by their names in the op's schema.

    Args: dims: along which dim a node's value has rows, for those that have.  num_parts: k.
    """

    def __init__(self, node: fx.Node, dims: Mapping[fx.Node, int], num_parts: int) -> None:
        self.node, self.num_parts = node, num_parts
        self.op: torch._ops.OpOverload = node.target  # type: ignore[assignment]
        self.name = str(self.op.overloadpacket._qualified_op_name)
        self.out: Any = node.meta.get("val")
        self.leaves: list[Leaf] = []
        schema = self.op._schema.arguments
        given = {argument.name: value for argument, value in zip(schema, node.args, strict=False)}
        given.update(node.kwargs)
        self._names = frozenset(argument.name for argument in schema)
        self._defaults = {a.name: a.default_value for a in schema if a.has_default_value()}
        self._args = {name: self._read(value, dims) for name, value in given.items()}

    def _read(self, value: Any, dims: Mapping[fx.Node, int]) -> Any:
        if isinstance(value, fx.Node):
            held = value.meta.get("val")
            if not isinstance(held, torch.Tensor):
                return value
            dim = dims.get(value)
            leaf = Leaf(value, held, dim, dim)
            self.leaves.append(leaf)
            return leaf
        if isinstance(value, list | tuple):
            return [self._read(item, dims) for item in value]
        return value

    def __getitem__(self, name: str) -> Any:
        """An argument: a Leaf, a list, a literal, or its default. Raises: KeyError for a name the op has not."""
        if name in self._args:
            return self._args[name]
        if name not in self._names:
            raise KeyError(name)
        return self._defaults.get(name)

    def get(self, name: str, default: Any = None) -> Any:
        """An argument as above; `default` for a name the op has not."""
        return self[name] if name in self._names else default

    def __contains__(self, name: str) -> bool:
        return name in self._names

    @property
    def with_rows(self) -> Iterator[Leaf]:
        return (leaf for leaf in self.leaves if leaf.dim is not None)

    def leaf(self, name: str) -> Leaf:
        """A tensor argument that must be there."""
        value = self[name]
        if not isinstance(value, Leaf):
            raise MixesRows(f"{self.name} has no tensor {name}")
        return value

    @property
    def out_ndim(self) -> int:
        value = self.out[0] if isinstance(self.out, list | tuple) else self.out
        return int(value.dim())

    def part_of(self, size: int) -> int:
        """A size that counts rows, for one part. Raises: MixesRows where it cannot be cut into equal parts."""
        if not isinstance(size, int) or size % self.num_parts:
            raise MixesRows(f"{size} rows of {self.node.name} cannot be cut into {self.num_parts} equal parts")
        return size // self.num_parts

    def without_rows(self, *names: str) -> None:
        """These arguments must be the same for every part. Raises: MixesRows."""
        for name in names:
            value = self[name]
            for leaf in value if isinstance(value, list) else (value,):
                if isinstance(leaf, Leaf) and leaf.dim is not None:
                    raise MixesRows(f"{name} of {self.node.name} differs by row")

    def rows_at(self, dim: int, *names: str) -> None:
        """These tensors (where given) have rows along `dim`; those without rows are cut there. Raises: MixesRows."""
        for name in names:
            leaf = self[name]
            if isinstance(leaf, Leaf):
                self.align(leaf, dim)

    def align(self, leaf: Leaf, dim: int) -> None:
        """The op wants the block along `dim` of an argument. Raises: MixesRows where its rows are elsewhere."""
        if leaf.dim is not None and leaf.dim != dim:
            raise MixesRows(f"{leaf.node.name} has rows along dim {leaf.dim}, {self.node.name} wants them along {dim}")
        self.part_of(leaf.size(dim))
        leaf.need = dim


def wrap(dim: int, ndim: int) -> int:
    """A dim counted from the front."""
    return dim + ndim if dim < 0 else dim
