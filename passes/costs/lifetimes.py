"""How long the memory of a graph's values lives: from the node that makes it to the last reader of any view of it."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from genie_dynamo.passes.costs.sizes import Size, tensors_in, touched_bytes


@dataclass(frozen=True, slots=True)
class Span:
    """Memory that a node allocates, and when it can go: positions among the nodes that compute."""

    birth: int
    death: int          # the last reader; one past the last node where it is an output
    size_bytes: Size


class Lifetimes:
    """Memory by storage: views share it, inputs own theirs."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._owner: dict[int, str] = {}
        self._bytes: dict[int, Size] = {}
        self._last_use: dict[int, str] = {}
        self._outputs: set[int] = set()
        for node in gm.graph.nodes:
            if node.op == "output":
                self._outputs = {key for source in node.all_input_nodes for key in _storages(source)}
                continue
            for source in node.all_input_nodes:
                for key in _storages(source):
                    self._last_use[key] = node.name
            for tensor in tensors_in(node.meta.get("val")):
                self._register(node.name, tensor)

    def _register(self, name: str, tensor: torch.Tensor) -> None:
        key = _storage(tensor)
        if key not in self._owner:
            self._owner[key] = name
            self._bytes[key] = touched_bytes(tensor)
            self._last_use[key] = name

    def allocated_bytes(self, node: fx.Node) -> Size:
        """New memory of a node's results; 0 for views and in-place ops."""
        return sum(self._bytes[key] for key in dict.fromkeys(_storages(node)) if self._owner[key] == node.name)

    def spans(self, names: Sequence[str]) -> tuple[Span, ...]:
        """The lives of all memory that the named nodes allocate."""
        position = {name: index for index, name in enumerate(names)}
        end = len(names)
        return tuple(
            Span(position[owner], end if key in self._outputs else position.get(self._last_use[key], end),
                 self._bytes[key])
            for key, owner in self._owner.items() if owner in position)


def _storages(node: fx.Node) -> list[int]:
    return [_storage(tensor) for tensor in tensors_in(node.meta.get("val"))]


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
