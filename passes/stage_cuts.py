"""Graph -> contiguous stages by its weights: candidates for a pipeline.

    weights in the order in which the graph first reads them:   w0 w1 w2 | w3 w4 | w5
                                                                stage 0    1       2

Every node that reads a weight runs where the weight is, forward and backward alike; every other node where most of
what it reads is already. So the backward of a layer is where its activations are, and only what crosses a cut moves.
A search over nodes alone finds such cuts in a forward graph; in a graph with loss and backward it seldom does.
"""
from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Mapping, Sequence

from torch import fx
from torch._ops import OpOverload

from genie_dynamo.core.cost_graph import CostGraph, Device

_NEAR = 1         # cuts this many steps beside the balanced ones are offered too; a step is what one node reads


def stage_cuts(gm: fx.GraphModule, graph: CostGraph, devices: Sequence[Device],
               weights: Collection[str]) -> Iterator[dict[str, str]]:
    """Node -> device, for two stages up to one per device, the balanced cuts first.

    Args:  weights: names of the inputs that are no rows of the batch.
    """
    nodes = [n for n in gm.graph.nodes if n.name in graph.index]
    read_by = _readers(gm, weights)
    own: dict[str, int] = {}
    for node in nodes:                           # weights that one node reads first (with its bias) go together
        new = [w for w in read_by.get(node.name, ()) if w not in own]
        own.update(dict.fromkeys(new, max(own.values(), default=-1) + 1))
    num_units = max(own.values(), default=-1) + 1
    if num_units < 2:
        return
    bytes_of = {e.src: e.size_bytes or 0 for e in graph.edges}
    finest = _follow(nodes, graph, read_by, own, bytes_of)
    for count in range(2, min(len(devices), num_units) + 1):
        used = devices[:count]
        load = [0.0] * num_units
        for node in nodes:
            seconds = graph.nodes[graph.index[node.name]].seconds
            load[finest[node.name]] += max((seconds.get(d.kind) or 0.0 for d in used), default=0.0)
        for cuts in _near(_balanced(load, count), num_units):
            stage = {w: sum(number >= cut for cut in cuts) for w, number in own.items()}
            placed = _follow(nodes, graph, read_by, stage, bytes_of)
            if _possible(placed, graph, used):
                yield {name: used[number].id for name, number in placed.items()}


def _readers(gm: fx.GraphModule, weights: Collection[str]) -> dict[str, list[str]]:
    """Node -> the weights that it reads, as they are or through views."""
    comes_from: dict[fx.Node, str] = {n: n.name for n in gm.graph.nodes if n.op == "placeholder" and n.name in weights}
    read_by: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        held = [comes_from[s] for s in node.all_input_nodes if s in comes_from]
        if held and node.op == "call_function":
            read_by[node.name] = held
            if len(node.all_input_nodes) == 1 and _is_view(node):
                comes_from[node] = held[0]
    return read_by


def _follow(nodes: Sequence[fx.Node], graph: CostGraph, read_by: Mapping[str, Sequence[str]], stage: Mapping[str, int],
            bytes_of: Mapping[str, int]) -> dict[str, int]:
    """The stage of each node: of its weight, of its colocation group, or where most of what it reads is already."""
    placed: dict[str, int] = {}
    group: dict[str, int] = {}
    holds: dict[str, set[int]] = {}              # value -> stages that have it
    for node in nodes:
        sources = [s.name for s in node.all_input_nodes if s.name in placed]
        bound = graph.nodes[graph.index[node.name]].colocation_group
        if bound is not None and bound in group:
            here = group[bound]
        elif node.name in read_by:
            here = max(stage[w] for w in read_by[node.name])
        else:
            weight: dict[int, float] = {}
            for name in sources:
                for number in holds[name]:
                    weight[number] = weight.get(number, 0.0) + bytes_of.get(name, 0) + 1
            # Of equal claims that of what was made first: an activation stays where it is, its gradient comes.
            first = placed[sources[0]] if sources else 0
            oldest = min((placed[name] for name in sources), default=first)
            here = max(weight, key=lambda number: (weight[number], number == oldest)) if weight else first
        if bound is not None:
            group.setdefault(bound, here)
        placed[node.name] = here
        holds[node.name] = {here}
        for name in sources:
            holds[name].add(here)
    for node in reversed(nodes):                 # a view goes where it is read: what it is a view of moves once
        there = {placed[user.name] for user in node.users if user.name in placed}
        if len(there) == 1 and len(node.all_input_nodes) == 1 and _is_view(node) and node.name not in read_by:
            placed[node.name] = there.pop()
    return placed


def _is_view(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target.is_view


def _balanced(load: Sequence[float], count: int) -> tuple[int, ...]:
    """Where to cut, so that the heaviest of `count` stages is as light as can be: binary search over its load."""
    low, high = max(load), sum(load)
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if len(_cuts(load, middle)) < count else (middle, high)
    cuts = _cuts(load, high)
    spare = [n for n in range(1, len(load)) if n not in cuts]
    return tuple(sorted((*cuts, *spare[len(spare) - (count - 1 - len(cuts)):])))


def _cuts(load: Sequence[float], limit: float) -> tuple[int, ...]:
    """Cuts of stages that are filled one after the other up to a limit."""
    cuts, filled = [], 0.0
    for number, seconds in enumerate(load):
        if filled and filled + seconds > limit * (1 + 1e-9):
            cuts.append(number)
            filled = 0.0
        filled += seconds
    return tuple(cuts)


def _near(cuts: tuple[int, ...], count: int) -> Iterator[tuple[int, ...]]:
    """The cuts, and those next to them."""
    yield cuts
    if len(cuts) > 2:
        return                                  # too many combinations, and the balanced one is close
    for steps in itertools.product(range(-_NEAR, _NEAR + 1), repeat=len(cuts)):
        moved = tuple(cut + step for cut, step in zip(cuts, steps, strict=True))
        if any(steps) and all(a < b for a, b in itertools.pairwise((0, *moved, count))):
            yield moved


def _possible(placed: Mapping[str, int], graph: CostGraph, devices: Sequence[Device]) -> bool:
    """Whether every stage is there, can be run and fits."""
    held = [0] * len(devices)
    for name, number in placed.items():
        node = graph.nodes[graph.index[name]]
        if node.seconds.get(devices[number].kind) is None:
            return False
        held[number] += node.memory_bytes
    return set(placed.values()) == set(range(len(devices))) and all(
        d.memory_bytes is None or size <= d.memory_bytes for d, size in zip(devices, held, strict=True))
