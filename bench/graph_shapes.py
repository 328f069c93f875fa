"""Random cost graphs of the shapes that models have, and sets of devices: what placements are judged on.

    edges of a shape over n nodes -> seconds, transfers, memory, groups drawn by a seed -> CostGraph

Seconds and transfers are log-normal; processors take 3 to 20 times, other accelerators 0.5 to 3 times as long.
"""
from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device

Edges = list[tuple[int, int]]

_MEDIAN_S = math.exp(-7)                 # about a millisecond
_LINK_BYTES_PER_S = 1.25e10              # what sizes in bytes are drawn against
_LAYER = 4


def layers(count: int, draw: random.Random) -> Edges:
    """Nodes that read one to three of the layer before."""
    return [(draw.randrange((i // _LAYER - 1) * _LAYER, i // _LAYER * _LAYER), i)
            for i in range(_LAYER, count) for _ in range(draw.randint(1, 3))]


def residual(count: int, _: random.Random) -> Edges:
    """A chain with a way around every three nodes."""
    return [(i, i + 1) for i in range(count - 1)] + [(i, i + 3) for i in range(0, count - 3, 3)]


def branches(count: int, draw: random.Random) -> Edges:
    """One node, several beside each other, one that joins them, and again."""
    width, edges, last = draw.randint(3, 7), list[tuple[int, int]](), 0
    first = 1
    while first + width < count:
        for branch in range(first, first + width):
            edges += [(last, branch), (branch, first + width)]
        last, first = first + width, first + width + 1
    return edges + [(last, i) for i in range(first, count)]


def anyhow(count: int, draw: random.Random) -> Edges:
    """About two arguments for each node, from anywhere before it."""
    return [(i, j) for j in range(1, count) for i in range(j) if draw.random() < 2.2 / j]


def gathering(count: int, _: random.Random) -> Edges:
    """A tree whose leaves come first: reductions, late fusion."""
    return [(i, (i + count) // 2) for i in range(count - 1) if (i + count) // 2 > i]


def spreading(count: int, _: random.Random) -> Edges:
    """A tree whose root comes first: many heads on one trunk."""
    return [((i - 1) // 2, i) for i in range(1, count)]


def towers(count: int, draw: random.Random) -> Edges:
    """Two or three chains that meet near the end."""
    number = draw.choice([2, 3])
    length = (count - 3) // number
    edges = [(start + i, start + i + 1) for start in range(0, number * length, length) for i in range(length - 1)]
    edges += [(start + length - 1, number * length) for start in range(0, number * length, length)]
    return edges + [(i, i + 1) for i in range(number * length, count - 1)]


def grid(count: int, _: random.Random) -> Edges:
    """Each node reads its neighbours above and to the left: a recurrent net unrolled."""
    side = math.isqrt(count)
    return [(row * side + column, (row + 1) * side + column) for row in range(side - 1) for column in range(side)] + \
           [(row * side + column, row * side + column + 1) for row in range(side) for column in range(side - 1)]


def step(count: int, _: random.Random) -> Edges:
    """A chain forward and back, the way back reading what the way there has made: a training step."""
    return [(i, i + 1) for i in range(count - 1)] + [(i, count - 1 - i) for i in range(count // 2 - 1)]


def experts(count: int, _: random.Random) -> Edges:
    """Blocks of a router and four experts, with a way around."""
    edges, first = list[tuple[int, int]](), 0
    while first + 7 < count:
        edges += [(first, first + 1), (first, first + 6)]
        edges += [edge for e in range(first + 2, first + 6) for edge in ((first + 1, e), (e, first + 6))]
        first += 6
    return edges + [(i, i + 1) for i in range(first, count - 1)]


SHAPES: dict[str, Callable[[int, random.Random], Edges]] = {
    shape.__name__: shape
    for shape in (layers, residual, branches, anyhow, gathering, spreading, towers, grid, step, experts)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawn:
    """One graph with devices for it."""

    name: str
    graph: CostGraph
    devices: tuple[Device, ...]


def drawn(shape: str, count: int, devices: str, seed: int) -> Drawn:
    """A graph of a shape; everything but its size follows from the seed."""
    draw = random.Random(f"{shape} {count} {devices} {seed}")
    graph = _graph(SHAPES[shape](count, draw), count, draw, mixed=devices in ("mixed", "links"),
                   in_bytes=devices == "links", mirrored=shape == "step")
    total_bytes = sum(node.memory_bytes for node in graph.nodes)
    return Drawn(name=f"{shape}, {count} nodes, {devices}, seed {seed}", graph=graph,
                 devices=DEVICES[devices](total_bytes))


def _graph(edges: Edges, count: int, draw: random.Random, *, mixed: bool, in_bytes: bool, mirrored: bool) -> CostGraph:
    """mixed: some nodes cannot run on some kind.  mirrored: node i and node count - 1 - i may be bound together."""
    spread, ratio = draw.choice([0.3, 1.0, 1.5]), draw.choice([0.05, 0.3, 1.0, 3.0])
    bound = draw.choice([0.0, 0.0, 0.4])
    nodes = []
    for i in range(count):
        on_gpu = draw.lognormvariate(math.log(_MEDIAN_S), spread)
        seconds: dict[str, float | None] = {"gpu": on_gpu, "cpu": on_gpu * draw.uniform(3, 20),
                                            "tpu": on_gpu * draw.uniform(0.5, 3)}
        group = None
        if draw.random() < bound:
            group = f"g{min(i, count - 1 - i) if mirrored else i // 4}"
        elif mixed and draw.random() < 0.15:
            seconds[draw.choice(["gpu", "tpu"])] = None
        nodes.append(CostNode(id=f"n{i}", seconds=seconds, memory_bytes=draw.randint(1, 100), colocation_group=group,
                              backward=mirrored and i >= count // 2))
    moved = [draw.lognormvariate(math.log(_MEDIAN_S), 1) * ratio for _ in range(count)]
    return CostGraph(tuple(nodes), tuple(
        CostEdge(src=f"n{i}", dst=f"n{j}", size_bytes=int(moved[i] * _LINK_BYTES_PER_S)) if in_bytes else
        CostEdge(src=f"n{i}", dst=f"n{j}", seconds=moved[i]) for i, j in sorted(set(edges))))


def _gpu(number: int, memory_bytes: int | None = None, gbps: float | None = None,
         latency_s: float | None = None) -> Device:
    return Device(id=f"gpu{number}", kind="gpu", memory_bytes=memory_bytes, price_per_hour=2.0, network_gbps=gbps,
                  network_latency_s=latency_s)


def _cpu() -> Device:
    return Device(id="cpu", kind="cpu", pays_transfers=False, price_per_hour=0.1)


def _tpu(number: int, memory_bytes: int | None = None, gbps: float | None = None) -> Device:
    return Device(id=f"tpu{number}", kind="tpu", memory_bytes=memory_bytes, price_per_hour=1.0, network_gbps=gbps)


DEVICES: dict[str, Callable[[int], tuple[Device, ...]]] = {
    # Of what all nodes hold together; "tight": three that can hold it only together.
    "two and a cpu": lambda _: (_gpu(0), _gpu(1), _cpu()),
    "three": lambda _: (_gpu(0), _gpu(1), _gpu(2)),
    "tight": lambda total: tuple(_gpu(i, int(total * 0.42)) for i in range(3)),
    "mixed": lambda total: (_gpu(0, int(total * 0.55)), _gpu(1, int(total * 0.3)), _tpu(0, int(total * 0.4)), _cpu()),
    "links": lambda _: (_gpu(0, gbps=100, latency_s=1e-5), _gpu(1, gbps=10, latency_s=1e-4), _tpu(0, gbps=40),
                        _tpu(1, gbps=5)),
    "five": lambda _: tuple(_gpu(i) for i in range(5)),
}


def samples(sizes: tuple[int, ...], seeds: int) -> Iterator[Drawn]:
    """Graphs of every shape, with sizes and devices in turn."""
    for number, shape in enumerate(SHAPES):
        for seed in range(seeds):
            kinds = list(DEVICES)
            yield drawn(shape, sizes[(number + seed) % len(sizes)], kinds[(number + 2 * seed) % len(kinds)], seed)
