"""Seconds of a graph's nodes on a device: a roofline, and corrections of it where ops have been observed.

    roofline     overhead + max(flops / rate, bytes / rate)
    with a fit   a * overhead + b * flops / rate + c * bytes / rate, with a, b, c per op (see fit.py)

The fit adds where the roofline takes the larger: measured ops overlap arithmetic and memory only in part, and the sum
is linear in what is fitted. Views and scalars cost dispatch alone.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.passes.costs.fit import CostFit
from genie_dynamo.passes.costs.graph_costs import Array, GraphCosts, NodeCost


@dataclass(frozen=True, slots=True)
class Terms:
    """Per node: seconds of dispatch, arithmetic and memory, each as if it were all there is."""

    overhead_s: Array
    arithmetic_s: Array
    memory_s: Array

    def roofline(self) -> Array:
        return self.overhead_s + np.maximum(self.arithmetic_s, self.memory_s)


def node_seconds(costs: GraphCosts, hardware: HardwareFacts, symbol_values: Mapping[str, int] | None = None, *,
                 fit: CostFit | None = None) -> dict[str, float]:
    """Estimated seconds by node name.

    Raises: CostError for a size that is unknown or a dtype that the hardware has no rate for.
    """
    nodes = list(costs)
    terms = terms_of(nodes, costs.values(symbol_values), hardware)
    seconds = terms.roofline() if fit is None else fit.seconds([(c.op, c.family) for c in nodes], terms.overhead_s,
                                                                terms.arithmetic_s, terms.memory_s)
    return dict(zip(costs.nodes, seconds.tolist(), strict=True))


def terms_of(nodes: Sequence[NodeCost], values: Mapping[str, Array], hardware: HardwareFacts) -> Terms:
    """The parts of the estimate for all nodes of a graph."""
    flops, moved = values["flops"], values["bytes_read"] + values["bytes_written"]
    rates: dict[tuple[bool, str], float] = {}
    for cost, operations in zip(nodes, flops, strict=True):
        key = (cost.is_matrix, cost.dtype)
        if operations and key not in rates:
            rates[key] = hardware.matmul_rate(cost.dtype) if cost.is_matrix else hardware.elementwise_rate(cost.dtype)
    rate = np.array([rates.get((cost.is_matrix, cost.dtype), np.inf) for cost in nodes])
    overhead = np.array([0.0 if cost.op.startswith("python::") else hardware.op_overhead_s for cost in nodes])
    memory = moved / np.array([hardware.memory_rate(each) for each in moved.tolist()] or [1.0][:len(nodes)])
    return Terms(overhead, flops / rate, memory)
