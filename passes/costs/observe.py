"""Measured seconds of nodes, as rows that fits are made of and that are kept."""
from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Mapping

from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.core.observations import Observation
from genie_dynamo.passes.costs.graph_costs import GraphCosts


def observations(costs: GraphCosts, symbol_values: Mapping[str, int], seconds: Mapping[str, float], *, model: str,
                 hardware: HardwareFacts) -> tuple[Observation, ...]:
    """Rows of one graph's run, one for all nodes that do the same.

    Args:    seconds: by node name; nodes without one (subgraphs' own, what was not timed) are left out.
    Returns: rows with the median of the seconds.
    """
    values = costs.values(symbol_values)
    alike: dict[tuple[str, str, str, float, float], list[float]] = defaultdict(list)
    for index, cost in enumerate(costs):
        if cost.name in seconds:
            moved = float(values["bytes_read"][index] + values["bytes_written"][index])
            alike[cost.op, cost.family, cost.dtype, float(values["flops"][index]), moved].append(seconds[cost.name])
    return tuple(
        Observation(model=model, machine=hardware.name, kind=hardware.kind, num_threads=hardware.num_threads or 0,
                    op=op, family=family, dtype=dtype, flops=flops, bytes_moved=moved,
                    seconds=statistics.median(times), count=len(times))
        for (op, family, dtype, flops, moved), times in alike.items())
