"""A graph over parts of its batch -> which worker runs which stage, so that parts follow each other.

    cuts that balance the workers' loads -> each timed on a clock, part by part -> the best, where it beats the others

Every part of a node runs where the node was placed, so a weight lies on one worker. But where layers are too coarse for
stages that balance, some parts of an inference may take one cut and the others the next (`_Cuts`): the layer between
the two lies on both workers then. The clock (timeline.py) knows that a stage computes while the last part's result
travels.
"""
from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence

from torch import fx

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.errors import PlacementError
from genie_dynamo.core.hardware import LinkFacts
from genie_dynamo.core.placement import Placement, Policy, Transfer
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.interleaving import interleaved
from genie_dynamo.passes.partition import (
    MARGIN,
    MIN_GAIN_S,
    Alternative,
    Partition,
    WorkerFacts,
    partition,
    price,
    views_with_readers,
)
from genie_dynamo.passes.placement.interfaces import Limits, PlacementStrategy
from genie_dynamo.passes.placement.problem import build_problem
from genie_dynamo.passes.placement.timeline import Schedule, Timeline
from genie_dynamo.passes.rows.split import SplitGraph
from genie_dynamo.passes.stage_cuts import stage_cuts

SHARED_LAYERS_GAIN = 0.97
"""Two cuts must be estimated to take at most this share of what one takes: they hold some weights twice."""


@dataclasses.dataclass(frozen=True, slots=True)
class _Cuts:
    """Where nodes of the whole graph are placed: by the first for most parts, by the second for `num_second` of them.

    With one cut both are the same. What belongs to no part goes by the first.
    """

    first: Mapping[str, str]
    second: Mapping[str, str]
    num_second: int
    method: str

    def of_split(self, split: SplitGraph) -> dict[str, str]:
        """Worker of each node of the graph over parts; parts of the second cut are spread evenly among the others."""
        share, count = self.num_second, split.num_parts
        second = {part for part in range(count) if (part + 1) * share // count > part * share // count}
        return {name: (self.second if split.part.get(name) in second else self.first)[origin]
                for name, origin in split.origin.items() if origin in self.first}


@dataclasses.dataclass(frozen=True, slots=True)
class _Pipeline:
    """One way to place the stages, timed."""

    cuts: _Cuts
    split: SplitGraph                        # with its nodes in the order in which they are to run
    schedule: Schedule
    device_of: Mapping[str, str]             # node of `split` -> worker
    loads_s: Mapping[str, float]

    @property
    def bottleneck_s(self) -> float:
        return max(self.loads_s.values())


def pipeline_partition(gm: fx.GraphModule, facts: GraphFacts, split: SplitGraph, workers: Sequence[WorkerFacts],
                       lanes: Sequence[LinkFacts], policy: Policy, strategy: PlacementStrategy,
                       limits: Limits, *, aware: bool = True) -> Partition:
    """Place the graph, as a pipeline where that is estimated to be the best.

    Under max_throughput the time that counts is that of the busiest worker: calls follow each other without a gap.

    Raises:  PlacementError where it fits in no way.
    """
    part_limits = dataclasses.replace(limits, time_limit_s=limits.time_limit_s / 3 if limits.time_limit_s else None)
    unsplit: Partition | None = None
    bound_s = limits.latency_bound_s
    refusal: PlacementError | None = None
    try:
        unsplit = partition(gm, facts, workers, lanes, "min_cost" if policy == "min_cost" else "min_latency", strategy,
                            part_limits, aware=aware)
    except PlacementError as error:
        refusal = error
    if policy == "min_cost":
        # Several workers for one call cost more than one of them: a pipeline is for calls that one cannot do in time.
        if unsplit is not None:
            return unsplit
        limits = part_limits = dataclasses.replace(part_limits, latency_bound_s=None)
    whole, devices = price(gm, facts, workers, lanes, aware=aware)
    timeline = Timeline(build_problem(_priced_parts(split, facts, workers, lanes), devices))
    weights = [n.name for n in gm.graph.nodes if n.op == "placeholder" and n.name not in split.output_dims]
    staged = [views_with_readers(gm, placed) for placed in stage_cuts(gm, whole, devices, weights)]
    found = ((views_with_readers(gm, placed), method)
             for placed, method in _candidates(whole, devices, strategy, part_limits))
    ones = itertools.chain(((placed, "stages by weights") for placed in staged), found)
    best = min((_timed(timeline, split, _Cuts(placed, placed, 0, method)) for placed, method in ones),
               key=lambda timed: _time(timed, policy), default=None)
    if best is not None and facts.kind == "inference":
        for cuts in _between(whole, devices, staged, split.num_parts):
            if timeline.parts_what_is_one(_devices(timeline, cuts.of_split(split))):
                continue        # a weight that is read through one view would be sent with every call
            timed = _timed(timeline, split, cuts)
            if _time(timed, policy) < _time(best, policy) * (1.0 if best.cuts.num_second else SHARED_LAYERS_GAIN):
                best = timed
    if best is None:
        if unsplit is not None:
            none = Alternative(name=f"{split.num_parts} parts of the batch", est_s=None, chosen=False,
                               reason="no cut leaves the busiest worker with less than the whole graph")
            return dataclasses.replace(unsplit, alternatives=(*unsplit.alternatives, none))
        assert refusal is not None
        raise refusal
    if bound_s is not None and best.schedule.makespan_s > bound_s:
        assert refusal is not None
        raise refusal
    return _chosen(best, unsplit, split, timeline, policy)


def _priced_parts(split: SplitGraph, facts: GraphFacts, workers: Sequence[WorkerFacts],
                  lanes: Sequence[LinkFacts]) -> CostGraph:
    return price(split.gm, facts, workers, lanes)[0]


def _candidates(graph: CostGraph, devices: Sequence[Device], strategy: PlacementStrategy,
                limits: Limits) -> Iterator[tuple[Mapping[str, str], str]]:
    """Placements whose busiest device is as little busy as can be; what moves counts with its weight, and more."""
    for share in (1.0, 3.0, 10.0):
        slower = [dataclasses.replace(d, network_gbps=(d.network_gbps or 1e3) / share,
                                      network_latency_s=(d.network_latency_s or 0.0) * share) for d in devices]
        try:
            found = strategy.place(graph, slower, "max_throughput", dataclasses.replace(
                limits, time_limit_s=limits.time_limit_s / 3 if limits.time_limit_s else None))
        except PlacementError:
            return
        if len(set(found.device.values())) > 1:
            yield found.device, found.method


def _between(graph: CostGraph, devices: Sequence[Device], staged: Sequence[Mapping[str, str]],
             num_parts: int) -> Iterator[_Cuts]:
    """Two neighbouring cuts for different parts, so that loads balance which no single cut balances.

    What the two place differently lies on both workers, as far as their memory allows.

    Args:  staged: of stage_cuts, the balanced one of each number of stages before those beside it.
    """
    balanced: dict[frozenset[str], Mapping[str, str]] = {}
    for second in staged:
        first = balanced.setdefault(frozenset(second.values()), second)
        if first is second or any(d.memory_bytes is not None and d.memory_bytes < sum(
                n.memory_bytes for n in graph.nodes if d.id in (first[n.id], second[n.id])) for d in devices):
            continue
        loads = list(zip(_loads(graph, devices, first), _loads(graph, devices, second), strict=True))
        count = min(range(num_parts), key=lambda k: max((num_parts - k) * a + k * b for a, b in loads))
        if count:
            yield _Cuts(first, second, count, f"stages by weights, {count} parts by another cut")


def _loads(graph: CostGraph, devices: Sequence[Device], device_of: Mapping[str, str]) -> list[float]:
    """Seconds of computing on each device."""
    seconds = {device.id: 0.0 for device in devices}
    kinds = {device.id: device.kind for device in devices}
    for node in graph.nodes:
        seconds[device_of[node.id]] += node.seconds[kinds[device_of[node.id]]] or 0.0
    return list(seconds.values())


def _timed(timeline: Timeline, split: SplitGraph, cuts: _Cuts) -> _Pipeline:
    nodes = timeline.problem.graph.nodes
    device_of = cuts.of_split(split)
    device_N = _devices(timeline, device_of)
    seconds = {node.id: timeline.seconds[index][device_N[index]] for index, node in enumerate(nodes)}
    split = interleaved(split, device_of, seconds)
    position = {node.name: index for index, node in enumerate(split.gm.graph.nodes)}
    if split.in_order:
        schedule = timeline.replay(device_N, [(position[node.id], position[node.id] + 1) for node in nodes], {})
    else:
        schedule = timeline.run(device_N, [-position[node.id] for node in nodes])
    loads = [0.0] * timeline.problem.num_devices
    for index, device in enumerate(device_N):
        loads[device] += timeline.seconds[index][device]
    for _, src, dst, start, end in schedule.transfers:
        loads[src] += end - start
        loads[dst] += end - start
    names = [device.id for device in timeline.problem.devices]
    return _Pipeline(cuts, split, schedule, device_of, dict(zip(names, loads, strict=True)))


def _devices(timeline: Timeline, device_of: Mapping[str, str]) -> list[int]:
    """Positions of the nodes' devices."""
    number = {device.id: index for index, device in enumerate(timeline.problem.devices)}
    return [number[device_of[node.id]] for node in timeline.problem.graph.nodes]


def _time(pipeline: _Pipeline, policy: Policy) -> float:
    return pipeline.bottleneck_s if policy == "max_throughput" else pipeline.schedule.makespan_s


def _chosen(best: _Pipeline, unsplit: Partition | None, split: SplitGraph, timeline: Timeline,
            policy: Policy) -> Partition:
    est_s = _time(best, policy)
    used = [d.id for d in timeline.problem.devices if d.id in set(best.device_of.values())]
    moved_s = sum(end - start for *_, start, end in best.schedule.transfers)
    row = Alternative(name=f"{split.num_parts} parts of the batch through {len(used)} workers ({best.cuts.method})",
                      est_s=est_s, chosen=True, reason=f"transfers take {moved_s * 1e3:.3g} ms, beside the computing")
    # What more workers have to win, parts need not where the whole batch takes as many.
    margin, least_s = (MARGIN, MIN_GAIN_S) if unsplit is None or len(unsplit.workers) < len(used) else (1.0, 0.0)
    if unsplit is not None and not (est_s <= margin * unsplit.est_s and unsplit.est_s - est_s >= least_s):
        must = f", and a pipeline must win {1 - MARGIN:.0%} and {MIN_GAIN_S * 1e3:g} ms" if margin < 1 else ""
        reason = f"{est_s * 1e3:.3g} ms against {unsplit.est_s * 1e3:.3g} ms{must}; {row.reason}"
        rejected = dataclasses.replace(row, chosen=False, reason=reason)
        return dataclasses.replace(unsplit, alternatives=(*unsplit.alternatives, rejected))
    others = tuple(dataclasses.replace(
        a, chosen=False, reason=a.reason or f"{(a.est_s or 0.0) * 1e3:.3g} ms against {est_s * 1e3:.3g} ms")
        for a in (unsplit.alternatives if unsplit is not None else ()))
    number = {name: index for index, name in enumerate(used)}
    names = [d.id for d in timeline.problem.devices]
    nodes = timeline.problem.graph.nodes
    placement = Placement(
        device={n.id: best.device_of[n.id] for n in nodes}, policy=policy, objective_value=est_s, lower_bound=None,
        method=best.cuts.method, seconds=0.0,
        loads_s=best.loads_s, start_s={n.id: s for n, s in zip(nodes, best.schedule.start_N, strict=True)},
        transfers=tuple(Transfer(node=nodes[n].id, src=names[a], dst=names[b], start_s=s, end_s=e)
                        for n, a, b, s, e in best.schedule.transfers),
        makespan_s=best.schedule.makespan_s)
    return Partition(
        workers=tuple(used),
        assign={name: number[device] for name, device in {**best.cuts.first, **best.device_of}.items()},
        seconds={n.id: n.seconds[best.device_of[n.id]] or 0.0 for n in nodes},
        memory_bytes={n.id: n.memory_bytes for n in nodes}, est_s=est_s, alternatives=(*others, row),
        placement=placement, pinned=False, split=best.split)
