"""A placement as a plan: what runs where in which order, for cost graphs, whose nodes are no code."""
from __future__ import annotations

import hashlib
import heapq
from collections.abc import Sequence
from dataclasses import dataclass

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.errors import PlanError
from genie_dynamo.core.placement import Placement
from genie_dynamo.core.plan import Fragment, Output, Plan, verify_plan


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledPlan(Plan):
    """A plan of a cost graph's nodes. `devices`: names of the workers that fragments number; `placement`: why there."""

    devices: tuple[str, ...]
    placement: Placement

    def __str__(self) -> str:
        workers = "  ".join(f"{number}={name}" for number, name in enumerate(self.devices))
        # Not super(): a dataclass with slots is made anew, and is another class than the one named here.
        return f"{self.placement}\nworkers: {workers}\n{Plan.__str__(self)}"


def scheduled_plan(graph: CostGraph, devices: Sequence[Device], placement: Placement) -> ScheduledPlan:
    """The graph's nodes in runs, each on one device for as long as dependencies allow.

    Where the placement has a schedule, nodes of a device follow its times. Outputs are the nodes that nobody reads.

    Raises: PlanError where the placement is not of this graph or these devices.
    """
    names = [device.id for device in devices]
    unplaced = [n.id for n in graph.nodes if placement.device.get(n.id) not in names]
    if unplaced or len(placement.device) != len(graph.nodes):
        raise PlanError(f"the strategy's placement is of another graph or other devices: {len(unplaced)} nodes have no "
                        f"device, such as {unplaced[0] if unplaced else 'none'}; {len(placement.device)} are placed, "
                        f"the graph has {len(graph.nodes)}")
    used = [name for name in names if name in set(placement.device.values())]
    worker = {node: used.index(device) for node, device in placement.device.items()}
    makers: dict[str, dict[str, None]] = {node.id: {} for node in graph.nodes}
    for edge in graph.edges:
        makers[edge.dst][edge.src] = None
    read = {edge.src for edge in graph.edges}
    runs = _runs(graph, makers, worker, placement)
    home = {node: number for number, run in enumerate(runs) for node in run}
    leaving = {edge.src for edge in graph.edges if home[edge.src] != home[edge.dst]}
    fragments = tuple(
        Fragment(fragment_id=number, worker=worker[run[0]], node_names=tuple(run),
                 inputs=tuple(dict.fromkeys(m for node in run for m in makers[node] if home[m] != number)),
                 outputs=tuple(node for node in run if node in leaving or node not in read))
        for number, run in enumerate(runs))
    plan = ScheduledPlan(
        graph_id=hashlib.sha256(str(graph.to_json()).encode()).hexdigest(), inputs=(), static_inputs=(),
        outputs=tuple(Output(kind="value", name=node.id) for node in graph.nodes if node.id not in read), mutations=(),
        fragments=fragments, num_workers=max(1, len(used)), devices=tuple(used), placement=placement)
    verify_plan(plan, {node: tuple(sources) for node, sources in makers.items()})
    return plan


def _runs(graph: CostGraph, makers: dict[str, dict[str, None]], worker: dict[str, int],
          placement: Placement) -> list[list[str]]:
    """Nodes in an order that stays on a worker while it can."""
    users: dict[str, list[str]] = {node.id: [] for node in graph.nodes}
    for node, sources in makers.items():
        for source in sources:
            users[source].append(node)
    waits = {node: len(sources) for node, sources in makers.items()}
    rank = {node.id: (placement.start_s.get(node.id, 0.0), number) for number, node in enumerate(graph.nodes)}
    ready: dict[int, list[tuple[tuple[float, int], str]]] = {}
    for node, missing in waits.items():
        if not missing:
            heapq.heappush(ready.setdefault(worker[node], []), (rank[node], node))
    runs: list[list[str]] = []
    at = -1
    for _ in graph.nodes:
        if not ready.get(at):
            at = min((w for w, heap in ready.items() if heap), key=lambda w: ready[w][0])
            runs.append([])
        _, node = heapq.heappop(ready[at])
        runs[-1].append(node)
        for user in users[node]:
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready.setdefault(worker[user], []), (rank[user], user))
    return runs
