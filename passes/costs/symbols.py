"""Values of a graph's symbols, read off the arguments of a call."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx


class SymbolBinding:
    """Where each symbol stands among the graph's inputs: read once from the graph, applied to every call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._ints: list[tuple[str, int]] = []
        self._dims: list[tuple[str, int, int]] = []
        seen: set[str] = set()
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        for position, node in enumerate(placeholders):
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr.is_Symbol:
                seen.add(name := str(value.node.expr))
                self._ints.append((name, position))
        for position, node in enumerate(placeholders):
            value = node.meta.get("val")
            if not isinstance(value, torch.Tensor):
                continue
            sizes: tuple[Any, ...] = tuple(value.shape)
            for dim, size in enumerate(sizes):
                if not isinstance(size, int) and size.node.expr.is_Symbol and str(size.node.expr) not in seen:
                    seen.add(name := str(size.node.expr))
                    self._dims.append((name, position, dim))

    @property
    def names(self) -> tuple[str, ...]:
        """The symbols that inputs have."""
        return tuple([name for name, _ in self._ints] + [name for name, *_ in self._dims])

    def __call__(self, inputs: Sequence[Any]) -> Mapping[str, int]:
        """Symbol values of one call of the graph."""
        values = {name: int(inputs[position]) for name, position in self._ints}
        values.update((name, int(inputs[position].shape[dim])) for name, position, dim in self._dims)
        return values


def bind_symbols(gm: fx.GraphModule, inputs: Sequence[Any]) -> Mapping[str, int]:
    """Symbol values of one call; see SymbolBinding for many."""
    return SymbolBinding(gm)(inputs)
