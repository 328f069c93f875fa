"""An ATen graph as plain data for placement: seconds per kind of device, memory, bytes per edge.

    {"nodes": [{"id", "seconds": {kind: number or None}, "memory_bytes", "colocation_group", "backward"}],
     "edges": [{"src", "dst", "bytes"}]}

Nodes are those that compute. A tuple does not travel: what takes an element out of it stays where it was made. A weight
counts as memory of its first reader, and its readers stay together.
"""
from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from torch import fx
from torch._ops import OpOverload

from genie_dynamo.core.errors import CostError
from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.passes.costs.analysis import analyze_costs
from genie_dynamo.passes.costs.estimate import node_seconds
from genie_dynamo.passes.costs.fit import CostFit
from genie_dynamo.passes.costs.graph_costs import GraphCosts, is_zero
from genie_dynamo.passes.costs.sizes import size_bytes, tensors_in


class HasKind(Protocol):
    """What is needed of a device here: genie.Device has it."""

    @property
    def kind(self) -> str: ...


def cost_graph(gm: fx.GraphModule, devices: Iterable[HasKind], hardware: Mapping[str, HardwareFacts],
               symbol_values: Mapping[str, int] | None = None, *, fits: Mapping[str, CostFit] | None = None,
               static_inputs: Sequence[str] = (), backward: bool = False,
               activations: bool = True) -> dict[str, Any]:
    """The cost graph of one call.

    Args:    hardware, fits: by kind of device.  static_inputs: names of parameters and buffers.
             backward: whether this is a backward graph.
             activations: whether a node's memory holds its result beside the weights that it reads first. False where
             what a call needs at its peak is kept free on every device instead.
    Returns: the JSON format of genie.CostGraph. A node's seconds are None on a kind without a rate for its dtype.
    Raises:  CostError for a kind without facts, or an unknown size.
    """
    kinds = sorted({device.kind for device in devices})
    missing = [kind for kind in kinds if kind not in hardware]
    if missing:
        raise CostError(f"no hardware facts for devices of kind {', '.join(missing)}; known are "
                        f"{', '.join(sorted(hardware)) or 'none'}: measure them, or take a datasheet")
    costs = analyze_costs(gm)
    seconds = {kind: _seconds(costs, hardware[kind], symbol_values, (fits or {}).get(kind)) for kind in kinds}
    columns = costs.values(symbol_values)
    position = {name: index for index, name in enumerate(costs.nodes)}
    groups, weights = _together(gm, frozenset(static_inputs))
    nodes = [{
        "id": name, "seconds": {kind: seconds[kind].get(name) for kind in kinds},
        "memory_bytes": (int(columns["allocated_bytes"][index]) if activations else 0) + weights.get(name, 0),
        "colocation_group": groups.get(name), "backward": backward,
    } for name, index in position.items()]
    edges = [{"src": source.name, "dst": node.name, "bytes": int(columns["output_bytes"][position[source.name]])}
             for node in gm.graph.nodes if node.name in position
             for source in node.all_input_nodes if source.name in position]
    return {"nodes": nodes, "edges": edges}


def _seconds(costs: GraphCosts, hardware: HardwareFacts, values: Mapping[str, int] | None,
             fit: CostFit | None) -> dict[str, float | None]:
    """Seconds by node; None where the hardware has no rate for the node's dtype."""
    dtypes = {(cost.is_matrix, cost.dtype) for cost in costs if not is_zero(cost.flops)}
    unsupported = {key for key in dtypes if not _supports(hardware, *key)}
    chosen = costs.without({c.name for c in costs
                            if (c.is_matrix, c.dtype) in unsupported and not is_zero(c.flops)})
    known = node_seconds(chosen, hardware, values, fit=fit)
    return {name: known.get(name) for name in costs.nodes}


def _supports(hardware: HardwareFacts, is_matrix: bool, dtype: str) -> bool:
    try:
        (hardware.matmul_rate if is_matrix else hardware.elementwise_rate)(dtype)
    except CostError:
        return False
    return True


def _together(gm: fx.GraphModule, static_inputs: frozenset[str]) -> tuple[dict[str, str], dict[str, int]]:
    """Colocation group by node, and bytes of the weights that a node is the first to read."""
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    weights: dict[str, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder" and node.name in static_inputs:
            readers = [user.name for user in node.users if user.op == "call_function"]
            if readers:
                held = sum(map(size_bytes, tensors_in(node.meta.get("val"))))
                weights[readers[0]] = weights.get(readers[0], 0) + int(held)
            # A view of a weight is no copy of it: who reads the view reads the weight.
            views = [user for user in node.users if isinstance(user.target, OpOverload) and user.target.is_view]
            readers += [user.name for view in views for user in view.users if user.op == "call_function"]
            for reader in readers[1:]:
                leader[find(reader)] = find(readers[0])
        elif node.target is operator.getitem and isinstance(node.args[0], fx.Node) and node.args[0].op != "placeholder":
            leader[find(node.name)] = find(node.args[0].name)
    return {name: find(name) for name in list(leader)}, weights
