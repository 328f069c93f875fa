"""Random cost graphs and devices for property tests."""
from __future__ import annotations

import random

from hypothesis import strategies as st

from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device

_SECONDS = st.sampled_from([0.0, 0.5, 1.0, 2.0, 3.25, 7.0])


@st.composite
def cost_graphs(draw: st.DrawFn, max_nodes: int = 6, groups: bool = True) -> CostGraph:
    count = draw(st.integers(1, max_nodes))
    nodes = []
    for i in range(count):
        on_gpu = draw(_SECONDS)
        on_cpu = draw(st.one_of(st.none(), _SECONDS))
        group = draw(st.sampled_from([None, None, None, "a", "b"])) if groups else None
        nodes.append(CostNode(id=f"n{i}", seconds={"gpu": on_gpu, "cpu": on_cpu}, colocation_group=group,
                              memory_bytes=draw(st.integers(0, 4)), backward=draw(st.booleans())))
    edges = []
    for i in range(count - 1):
        in_bytes, amount = draw(st.booleans()), draw(st.sampled_from([0, 1, 2, 5]))
        for j in draw(st.sets(st.integers(i + 1, count - 1), max_size=3)):
            edges.append(CostEdge(src=f"n{i}", dst=f"n{j}", size_bytes=amount * 125_000_000 if in_bytes else None,
                                  seconds=None if in_bytes else amount * 0.5))
    return CostGraph(tuple(nodes), tuple(edges))


@st.composite
def device_sets(draw: st.DrawFn, max_devices: int = 3) -> tuple[Device, ...]:
    """One GPU that can hold everything, and others."""
    devices = [Device(id="gpu0", kind="gpu", network_gbps=1.0, price_per_hour=3.0)]
    for i in range(1, draw(st.integers(1, max_devices))):
        kind = draw(st.sampled_from(["gpu", "cpu"]))
        devices.append(Device(
            id=f"{kind}{i}", kind=kind, memory_bytes=draw(st.sampled_from([None, 3, 8])),
            network_gbps=draw(st.sampled_from([None, 1.0, 2.0])), network_latency_s=draw(st.sampled_from([None, 0.25])),
            price_per_hour=draw(st.sampled_from([0.0, 1.0, 3.0])), pays_transfers=kind == "gpu" or draw(st.booleans())))
    return tuple(devices)


def layered(count: int, width: int, seed: int, transfer_ratio: float) -> CostGraph:
    """Layers of nodes that read one to three nodes of the layer before."""
    draw = random.Random(seed)
    seconds = [draw.lognormvariate(-7, 1) for _ in range(count)]
    nodes = tuple(CostNode(id=f"n{i}", seconds={"gpu": s, "cpu": s * draw.uniform(3, 20)},
                           memory_bytes=draw.randrange(1 << 24)) for i, s in enumerate(seconds))
    edges = []
    moved = [draw.lognormvariate(-7, 1) * transfer_ratio for _ in range(count)]
    for i in range(width, count):
        first = (i // width - 1) * width
        for j in sorted({draw.randrange(first, first + width) for _ in range(draw.randint(1, 3))}):
            edges.append(CostEdge(src=f"n{j}", dst=f"n{i}", seconds=moved[j]))
    return CostGraph(nodes, tuple(edges))


FOUR_GPUS = tuple(Device(id=f"gpu{i}", kind="gpu", memory_bytes=1 << 40, price_per_hour=2.0) for i in range(4))
CPU = Device(id="cpu", kind="cpu", pays_transfers=False, price_per_hour=0.1)
