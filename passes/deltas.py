"""Which values of an ATen graph the caller can make from what it holds, and the few rows that must travel for it.

    cat([input, rows], dim)                        an append (also below views and crops: slice(cat([input, rows])))
    copy_(input, index_copy(input, dim, i, rows))  a write into a mutated input

From the value upwards, nodes are followed while they only move data (core/rebuild.py: MOVES) and lead to an input of
the graph; where they no longer do, the node is a piece that travels. A value is rebuilt if its pieces are smaller.

Contract: the graph is not changed. Each recipe's pieces are nodes of the graph; no recipe reads an input that another
mutation of the same call writes to.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from genie_dynamo.core.rebuild import MOVES, Rebuild, Step

MIN_SAVING_BYTES = 64
"""A recipe that saves less is not worth the handle it needs."""


def find_deltas(values: Iterable[fx.Node], mutated: Mapping[fx.Node, str]) -> tuple[Rebuild, ...]:
    """A recipe for each of `values` that has one.

    Args: mutated: inputs that the call writes to -> the value that becomes their content.
    """
    found = []
    for value in dict.fromkeys(values):
        if value.op != "call_function":
            continue
        writer = _Writer()
        if not writer.reaches_input(value):
            continue
        writer.write(value)
        recipe = Rebuild(value=value.name, steps=tuple(writer.steps))
        foreign = [node for node in writer.inputs if mutated.get(node, value.name) != value.name]
        sent = sum(map(_bytes, writer.pieces))
        if writer.steps and not foreign and _bytes(value) - sent >= MIN_SAVING_BYTES:
            found.append(recipe)
    return tuple(found)


class _Writer:
    """Writes one recipe."""

    def __init__(self) -> None:
        self.steps: list[Step] = []
        self.pieces: dict[fx.Node, None] = {}
        self.inputs: dict[fx.Node, None] = {}
        self._reaches: dict[fx.Node, bool] = {}
        self._step_of: dict[fx.Node, int] = {}

    def reaches_input(self, node: fx.Node) -> bool:
        """Whether data of an input lies in the value, moved and nothing more."""
        if node not in self._reaches:
            if node.op == "placeholder":
                self._reaches[node] = isinstance(node.meta.get("val"), torch.Tensor)
            else:
                self._reaches[node] = _moves(node) and any(map(self.reaches_input, node.all_input_nodes))
        return self._reaches[node]

    def write(self, node: fx.Node) -> tuple[str, Any]:
        """The reference to a node's value, with the steps that make it."""
        if node.op == "placeholder":
            self.inputs[node] = None
            return ("input", node.name)
        if not self.reaches_input(node):
            self.pieces[node] = None
            return ("piece", node.name)
        if node not in self._step_of:
            step = Step(op=str(node.target), args=tuple(map(self._argument, node.args)))
            self._step_of[node] = len(self.steps)
            self.steps.append(step)
        return ("step", self._step_of[node])

    def _argument(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            return self.write(value)
        if isinstance(value, list | tuple):
            return ("list", *map(self._argument, value))
        return value


def _moves(node: fx.Node) -> bool:
    if node.op != "call_function" or str(node.target) not in MOVES or node.kwargs:
        return False
    if str(node.target) == "aten.index_put.default":
        # Adding up is not moving; and rows of several index tensors are not checked for repeats.
        accumulates = len(node.args) > 3 and node.args[3]
        indices: Any = node.args[1]
        return not accumulates and sum(index is not None for index in indices) == 1
    return all(_plain(argument) for argument in node.args)


def _plain(argument: Any) -> bool:
    if isinstance(argument, list | tuple):
        return all(map(_plain, argument))
    return argument is None or isinstance(argument, bool | int | float | fx.Node)


def _bytes(node: fx.Node) -> int:
    """The size by the sizes of the captured call; a size that nobody knows counts as one."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor):
        return 9
    count = 1
    for size in value.shape:
        count *= size if isinstance(size, int) else size.node.hint or 1
    return count * value.element_size()
