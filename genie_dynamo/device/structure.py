"""Recorded nodes as a structure: what repeats from step to step, apart from the numbers in it.

    pending nodes -> (key, leaves, numbers) -> Structure -> fx graph -> plan -> program

Two recordings with one key differ at most in numbers (sizes, indices, scalars). The first program of a structure has
them as constants; where they turn out to change they become inputs of its next program, those that change alike as
one. So a cache that grows, or a learning rate that decays, soon runs the same program in every step.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from genie_dynamo.device.nodes import Call, Layout, Node
from genie_dynamo.device.record import fill, meta_of

CPU = torch.device("cpu")


class Recording(NamedTuple):
    """Nodes to be run, in order, and what they read and leave."""

    key: tuple[Any, ...]
    nodes: tuple[Node, ...]
    leaves: tuple[Node, ...]               # values that are there: resident, or of the CPU
    returned: tuple[int, ...]              # indices of the nodes that come down
    kept: tuple[int, ...]                  # and of those that stay
    numbers: tuple[Any, ...]


def collect(roots: Sequence[Node], returned: Sequence[Node], also: Sequence[Node] = ()) -> Recording:
    """Everything that the roots and the returned nodes need, in an order that depends on their structure alone.

    Args: roots: stay on the worker.  returned: come down.  also: are run, whether anybody wants their value or not.
    """
    place: dict[Node, int] = {}
    leaves: dict[Node, int] = {}
    nodes: list[Node] = []
    key: list[Any] = []
    numbers: list[Any] = []
    for root in (*roots, *returned, *also):
        if root in place or root.value is not None:
            continue
        stack = [root]
        while stack:
            node = stack[-1]
            if node in place:
                stack.pop()
                continue
            ready = True
            for source in node.inputs:
                if source.value is None and source not in place:
                    stack.append(source)
                    ready = False
            if not ready:
                continue
            stack.pop()
            call = node.call
            assert call is not None
            key.append(call.skeleton)
            for source in node.inputs:
                index = place.get(source)
                if index is None:
                    index = -1 - leaves.setdefault(source, len(leaves))
                key.append(index)
            if call.numbers:
                numbers += call.numbers
            if node.scalars:
                numbers += node.scalars
            place[node] = len(nodes)
            nodes.append(node)
    kept = tuple([place[node] for node in roots if node.value is None])
    down = tuple([place[node] for node in returned])
    kinds = tuple(map(_kind, numbers)) if 0.0 in numbers else tuple(map(type, numbers))
    key += ("|", kept, down, kinds)
    return Recording(tuple(key), tuple(nodes), tuple(leaves), down, kept, tuple(numbers))


class Split(NamedTuple):
    """A recording in two."""

    needed: Recording              # what a read needs; it keeps what of it is held, and what the rest will read
    num_left: int                  # nodes in the rest
    shared: tuple[Node, ...]       # leaves of both that are of the CPU


def split(roots: Sequence[Node], returned: Sequence[Node], also: Sequence[Node]) -> Split | None:
    """Take what the returned nodes need out of everything that lives.

    Returns: None where it has to be one recording: where something drawn is needed, for the order of draws holds for
             all, or where the rest reads an op of several outputs.
    """
    needed = collect((), returned)
    place = {node: index for index, node in enumerate(needed.nodes)}
    if any(node.call is not None and node.call.random for node in needed.nodes):
        return None
    kept = {node: None for node in roots if node in place}
    rest: set[Node] = set()
    shared: dict[Node, None] = {}
    stack = [node for node in (*roots, *also) if node not in place]
    while stack:
        node = stack.pop()
        if node in rest:
            continue
        if node.value is not None:
            if isinstance(node.value, torch.Tensor):
                shared[node] = None
            continue
        rest.add(node)
        for source in node.inputs:
            if source in place:
                if source.layout is None:
                    return None
                kept[source] = None
            else:
                stack.append(source)
    indices = tuple(sorted([place[node] for node in kept]))
    key = (*needed.key[:-3], indices, *needed.key[-2:])
    return Split(needed._replace(kept=indices, key=key), len(rest),
                 tuple([leaf for leaf in needed.leaves if leaf in shared]))


def _kind(number: Any) -> Any:
    """A number's type; -0.0 has one of its own, for it equals 0.0 and gives other results."""
    return "-0.0" if number == 0 and isinstance(number, float) and math.copysign(1.0, number) < 0 else type(number)


class Variant:
    """A program of a structure: which of the numbers are its inputs.

    groups   for each such input the positions of the numbers that it stands for
    """

    def __init__(self, graph: fx.GraphModule, groups: tuple[tuple[int, ...], ...], constants: tuple[Any, ...]) -> None:
        self.graph = graph
        self.groups = groups
        self._firsts = tuple([group[0] for group in groups])
        self._fixed = tuple([i for i in range(len(constants)) if not any(i in g for g in map(frozenset, groups))])
        self._constants = [constants[i] for i in self._fixed]
        self.programs: dict[str, Any] = {}             # worker incarnation -> whatever runs it there

    def inputs(self, numbers: tuple[Any, ...]) -> list[Any] | None:
        """The values of its number inputs; None where the program is not for these numbers."""
        if [numbers[i] for i in self._fixed] != self._constants:
            return None
        for group in self.groups:
            first = numbers[group[0]]
            if any(numbers[i] != first for i in group[1:]):
                return None
        return [numbers[i] for i in self._firsts]


MAX_SEEN = 8


class Structure:
    """Everything known of the recordings with one key."""

    def __init__(self) -> None:
        self._variants: list[Variant] = []
        self._seen: list[tuple[Any, ...]] = []         # some of the numbers that came

    def variant(self, recording: Recording) -> tuple[Variant, list[Any]]:
        """The program for a recording, and the values of its number inputs."""
        numbers = recording.numbers
        for variant in self._variants:
            inputs = variant.inputs(numbers)
            if inputs is not None:
                return variant, inputs
        self._seen = [*self._seen[:1], *self._seen[1:][-MAX_SEEN + 2:], numbers]
        groups: dict[tuple[Any, ...], list[int]] = {}
        for position, history in enumerate(zip(*self._seen, strict=True)):
            if any(value != history[0] for value in history[1:]):
                groups.setdefault((type(history[0]), *history), []).append(position)
        found = tuple(map(tuple, groups.values()))
        variant = Variant(build(recording, found), found, numbers)
        # The latest is the most general one; an older one may still be the right one for numbers that come back.
        self._variants = [variant, *self._variants[:1]]
        return variant, [numbers[group[0]] for group in found]


def build(recording: Recording, groups: Sequence[Sequence[int]] = (), *, described: bool = False) -> fx.GraphModule:
    """The recording as a graph: its inputs are the leaves and the groups of numbers, its outputs first what comes
    down, then what stays.

    Args: described: give every node `meta["val"]`, not only the outputs.
    """
    graph = fx.Graph()
    leaves: dict[Node, fx.Node] = {}
    for index, leaf in enumerate(recording.leaves):
        leaves[leaf] = _described(graph.placeholder(f"value_{index}"), leaf.layout)
    symbols: dict[int, fx.Node] = {}
    for index, group in enumerate(groups):
        symbol = graph.placeholder(f"number_{index}")
        symbol.meta["val"] = recording.numbers[group[0]]
        symbols.update(dict.fromkeys(group, symbol))
    at = 0
    built: list[fx.Node] = []
    place: dict[Node, fx.Node] = dict(leaves)
    outputs = {*recording.returned, *recording.kept}
    for index, node in enumerate(recording.nodes):
        call = node.call
        assert call is not None
        mine = [symbols.get(at + i, recording.numbers[at + i]) for i in range(len(call.numbers) + len(node.scalars))]
        at += len(mine)
        made = _call(graph, call, [place[source] for source in node.inputs], mine)
        if described and node.layout is None:
            if call.outs:
                made.meta["val"] = _parts_of(call.outs)
        elif described or index in outputs:
            _described(made, node.layout)
        place[node] = made
        built.append(made)
    graph.output(tuple([built[i] for i in (*recording.returned, *recording.kept)]))
    return fx.GraphModule(torch.nn.Module(), graph)


def _call(graph: fx.Graph, call: Call, inputs: Sequence[fx.Node], numbers: Sequence[Any]) -> fx.Node:
    integers, scalars = numbers[: len(call.numbers)], numbers[len(call.numbers):]
    args = fill(call.args, inputs, integers, scalars, CPU)
    kwargs = fill(call.kwargs, inputs, integers, scalars, CPU)
    return graph.create_node("call_function", call.target, args, kwargs)


def _described(node: fx.Node, own: Layout | None) -> fx.Node:
    if own is not None:
        node.meta["val"] = meta_of(own)
    return node


def _parts_of(outs: Sequence[tuple[tuple[int, ...], Layout]]) -> tuple[Any, ...]:
    """Meta tensors of an op's several outputs, in its structure; None where an output is left out."""
    parts: list[Any] = [None] * (1 + max(path[0] for path, _ in outs))
    for index in range(len(parts)):
        inside = [(path[1:], own) for path, own in outs if path[0] == index]
        if inside:
            parts[index] = _parts_of(inside) if inside[0][0] else meta_of(inside[0][1])
    return tuple(parts)
