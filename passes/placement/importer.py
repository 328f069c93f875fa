"""Read the instance format of Tarnawski et al. (NeurIPS 2020; public code package dnn-partitioning, MIT).

    {"maxFPGAs", "maxSizePerFPGA", "maxCPUs",
     "nodes": [{"id", "name", "supportedOnFpga", "fpgaLatency", "cpuLatency", "size", "colorClass"?, "isBackwardNode"}],
     "edges": [{"sourceId", "destId", "cost"}]}

Accelerators become devices of kind "acc" with that memory; processor pools have kind "cpu", no memory limit and pay no
transfers. Latencies and costs are taken as seconds, in whatever unit the file has them.
"""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device
from genie_dynamo.core.errors import CostGraphError


def import_instance(data: Mapping[str, Any]) -> tuple[CostGraph, tuple[Device, ...]]:
    """The cost graph and the devices of a parsed instance.

    Raises: CostGraphError where fields are missing or the graph contradicts itself.
    """
    try:
        nodes = tuple(_node(n) for n in data["nodes"])
        edges = tuple(CostEdge(src=str(e["sourceId"]), dst=str(e["destId"]), seconds=e["cost"]) for e in data["edges"])
        memory_bytes = int(data["maxSizePerFPGA"])
        devices = [Device(id=f"acc{i}", kind="acc", memory_bytes=memory_bytes) for i in range(data["maxFPGAs"])]
        devices += [Device(id=f"cpu{i}", kind="cpu", pays_transfers=False) for i in range(data["maxCPUs"])]
    except (KeyError, TypeError) as exc:
        raise CostGraphError(f"not a placement instance: {type(exc).__name__} {exc}") from exc
    return CostGraph(nodes, edges), tuple(devices)


def read_instance(path: str | Path) -> tuple[CostGraph, tuple[Device, ...]]:
    """`import_instance` of a file."""
    return import_instance(json.loads(Path(path).read_text()))


def _node(data: Mapping[str, Any]) -> CostNode:
    color = data.get("colorClass")
    return CostNode(
        id=str(data["id"]),
        seconds={"acc": data["fpgaLatency"] if data["supportedOnFpga"] else None, "cpu": data["cpuLatency"]},
        memory_bytes=int(data["size"]), colocation_group=None if color is None else str(color),
        backward=bool(data["isBackwardNode"]))
