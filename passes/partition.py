"""ATen graph -> which worker runs which node, by cost.

    graph -> cost graph -> placement under the policy -> {node: worker}, and what else was considered

A graph stays on one worker unless its parts are worth more apart: moving a tensor and speaking to one more worker cost
time that the estimate must win back with a margin. Pure: facts about workers and lanes are passed in.
"""
from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.errors import ConfigError, PlacementError
from genie_dynamo.core.hardware import HardwareFacts, LinkFacts
from genie_dynamo.core.placement import Placement, Policy
from genie_dynamo.passes.colocation import together
from genie_dynamo.passes.costs.analysis import analyze_costs
from genie_dynamo.passes.costs.cost_graph import cost_graph
from genie_dynamo.passes.costs.fit import CostFit
from genie_dynamo.passes.costs.shipped import shipped_fit
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.held import Held, with_held
from genie_dynamo.passes.kept import Crossings
from genie_dynamo.passes.placement.interfaces import Limits, PlacementStrategy
from genie_dynamo.passes.placement.problem import build_problem
from genie_dynamo.passes.placement.timeline import Timeline
from genie_dynamo.passes.rows.split import SplitGraph
from genie_dynamo.passes.semantics.carry import marked
from genie_dynamo.passes.twice import Rewritten, rewritten

MARGIN = 0.85
"""A cut must be estimated to take at most this share of the time that the best single worker takes."""

MIN_GAIN_S = 0.5e-3
"""And to win at least this much: what one more worker costs a call in messages and wake-ups."""

CLIENT = "client"
"""How a lane names the process that calls."""

_DEFAULT_LATENCY_S, _DEFAULT_BYTES_PER_S = 1e-4, 1e9       # of lanes that were not measured

UNEQUAL = 1.2
"""Workers that are estimated to differ by more than this are not taken one for the other."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerFacts:
    """One worker as placement sees it."""

    name: str
    hardware: HardwareFacts
    memory_bytes: int | None = None          # what it may hold; None: not known, no limit
    price_per_hour: float | None = None      # None: not known; min_cost needs it
    fit: CostFit | None = None               # refined from what was observed there; None: the one that is shipped
    slowness: float = 1.0                    # how many times what is estimated it was seen to take (passes/drift.py)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alternative:
    """A way to place the graph that was considered."""

    name: str
    est_s: float | None                      # None where it is impossible
    chosen: bool
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """Workers for the nodes of one graph. `workers` are names; `assign` holds positions in it."""

    workers: tuple[str, ...]
    assign: Mapping[str, int]
    seconds: Mapping[str, float]             # estimate of each node where it was placed
    memory_bytes: Mapping[str, int]
    est_s: float                             # of a call, messages to and from the client not counted
    alternatives: tuple[Alternative, ...]
    placement: Placement | None              # None where one worker was chosen
    pinned: bool                             # whole, but not every worker will do: some cannot, or are much slower
    split: SplitGraph | None = None          # the graph over parts of its batch, which `assign` speaks of too
    twice: Rewritten | None = None           # the graph with ops applied on several workers, of which it speaks too
    crossings: Crossings | None = None       # of a forward: what its backward reads elsewhere

    def over(self, gm: fx.GraphModule) -> fx.GraphModule:
        """What runs in place of the graph: over parts of its batch, with ops applied twice, or itself."""
        return self.split.gm if self.split is not None else self.twice.gm if self.twice is not None else gm

    @property
    def origin(self) -> Mapping[str, str]:
        """Node that runs -> node of the graph; what is not there is itself."""
        return self.split.origin if self.split is not None else self.twice.origin if self.twice is not None else {}


def partition(gm: fx.GraphModule, facts: GraphFacts, workers: Sequence[WorkerFacts], lanes: Sequence[LinkFacts],
              policy: Policy, strategy: PlacementStrategy, limits: Limits, *,
              symbol_values: Mapping[str, int] | None = None, aware: bool = True,
              held: Held | None = None) -> Partition:
    """Place the graph.

    Under max_throughput a cut competes with whole calls on whichever worker is free, since that moves nothing.

    Args:    workers: in the order in which the plan numbers them.  lanes: those between workers count.
             symbol_values: sizes of this call, for dynamic graphs.  aware: whether placement sees regions.
             held: inputs that lie on workers already.
    Raises:  PlacementError where it fits on no worker and in no cut, or (min_cost) nothing is fast enough; the message
             has the numbers. ConfigError where min_cost lacks a price.
    """
    graph, devices = price(gm, facts, workers, lanes, symbol_values, aware=aware)
    alternatives = [_single(graph, device, held.moving_s(device) if held is not None else 0.0) for device in devices]
    possible = [a for a in alternatives if a.est_s is not None]
    best = min(possible, key=lambda a: a.est_s or 0.0) if possible else None
    rival = best
    if policy == "max_throughput" and len(possible) > 1:
        rival = _spread(possible)
        alternatives.append(rival)
    placed: Placement | None = None
    if policy == "min_cost":
        check_prices({device.id: device.price_per_hour for device in devices})
    try:
        there = graph if held is None else with_held(graph, gm, held, devices)
        placed = strategy.place(there, devices, policy, limits)
        cut = _cut(there, placed)
        if there is not graph:
            placed = replace(placed, device={node: placed.device[node] for node in graph.index})
        if policy == "min_cost" and len(set(placed.device.values())) == 1:
            # The cheapest that is fast enough, which need not be the fastest.
            rival = best = next(a for a in possible if a.name == next(iter(placed.device.values())))
    except PlacementError as error:
        if best is None or policy == "min_cost":
            raise
        cut = Alternative(name="cut", est_s=None, chosen=False, reason=str(error))
    use_cut = placed is not None and _worth(placed, rival)
    pinned = not use_cut and (policy == "min_cost" or len(possible) < len(devices) or (
        policy == "min_latency" and best is not None and _slowest(possible) > UNEQUAL * (best.est_s or 0.0)))
    alternatives = _judged(alternatives, cut, rival, use_cut)
    if use_cut:
        assert placed is not None
        device_of: Mapping[str, str] = views_with_readers(gm, placed.device)
    else:
        assert best is not None
        device_of = dict.fromkeys(graph.index, best.name)
    used = [w.name for w in workers if w.name in set(device_of.values())]
    number = {name: index for index, name in enumerate(used)}
    assign = {node: number[device] for node, device in device_of.items()}
    seconds = {n.id: n.seconds[device_of[n.id]] or 0.0 for n in graph.nodes}
    est_s = next(a.est_s for a in alternatives if a.chosen) or 0.0
    twice: Rewritten | None = None
    if use_cut:
        times = {index: {n.id: s for n in graph.nodes if (s := n.seconds.get(name)) is not None}
                 for name, index in number.items()}
        twice = _rewritten(gm, facts, assign, times, lanes, used, symbol_values)
        if twice is not None and twice.again and policy != "max_throughput":
            # What is not sent may have travelled beside the computing: then to compute it takes longer. Both are
            # scheduled by the same rule; the placement's own schedule may be in an order that was searched for.
            def plain_s(gm: fx.GraphModule, assign: Mapping[str, int]) -> float:
                return _makespan_s(gm, assign, facts, workers, lanes, used, symbol_values)

            if plain_s(twice.gm, twice.assign) > plain_s(gm, assign):
                twice = rewritten(gm, facts, assign, times, None)
    if twice is not None:
        assign = {**assign, **twice.assign}
        seconds.update((new, times[twice.assign[new]].get(old, 0.0)) for new, old in twice.origin.items()
                       if not new.endswith("_kept"))
    return Partition(
        workers=tuple(used), assign=assign, seconds=seconds, memory_bytes={n.id: n.memory_bytes for n in graph.nodes},
        est_s=est_s, alternatives=tuple(alternatives), placement=placed if use_cut else None, pinned=pinned,
        twice=twice)


def lane_between(lanes: Sequence[LinkFacts], names: Sequence[str]) -> Callable[[int, int], LinkFacts]:
    """The lane between two workers by their positions; where none was measured, the slowest that was."""
    known = {frozenset((lane.start, lane.end)): lane for lane in lanes}
    between = [lane for lane in lanes if CLIENT not in (lane.start, lane.end)]
    slowest = max(between, key=lambda lane: lane.transfer_s(1 << 20)) if between else LinkFacts(
        start="", end="", latency_s=_DEFAULT_LATENCY_S, bytes_per_s=_DEFAULT_BYTES_PER_S, source="not measured")
    return lambda start, end: known.get(frozenset((names[start], names[end])), slowest)


def _rewritten(gm: fx.GraphModule, facts: GraphFacts, assign: Mapping[str, int],
               seconds: Mapping[int, Mapping[str, float]], lanes: Sequence[LinkFacts], names: Sequence[str],
               symbol_values: Mapping[str, int] | None) -> Rewritten | None:
    client = [lane for lane in lanes if CLIENT in (lane.start, lane.end)]
    input_link = max(client, key=lambda lane: lane.transfer_s(1 << 20)) if client else None
    return rewritten(gm, facts, assign, seconds, lane_between(lanes, names), input_link=input_link,
                     symbol_values=symbol_values)


def _makespan_s(gm: fx.GraphModule, assign: Mapping[str, int], facts: GraphFacts, workers: Sequence[WorkerFacts],
                lanes: Sequence[LinkFacts], names: Sequence[str], symbol_values: Mapping[str, int] | None) -> float:
    graph, devices = price(gm, facts, workers, lanes, symbol_values)
    position = {device.id: index for index, device in enumerate(devices)}
    timeline = Timeline(build_problem(graph, devices))
    return timeline.run([position[names[assign[node.id]]] for node in graph.nodes]).makespan_s


def price(gm: fx.GraphModule, facts: GraphFacts, workers: Sequence[WorkerFacts], lanes: Sequence[LinkFacts],
          symbol_values: Mapping[str, int] | None = None, *,
          aware: bool = True) -> tuple[CostGraph, list[Device]]:
    """The graph's costs on each worker, and the workers as devices whose kinds are their names.

    Args:    aware: whether regions bind nodes to each other.
    Raises:  CostError.
    """
    peak_bytes = int(analyze_costs(gm).totals(symbol_values).peak_bytes)
    devices = [_device(worker, lanes, peak_bytes) for worker in workers]
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    fits = {w.name: fit for w in workers if (fit := w.fit or shipped_fit(w.hardware.kind)) is not None}
    plain = cost_graph(gm, devices, {w.name: w.hardware for w in workers}, symbol_values, fits=fits,
                       static_inputs=[names[i] for i in facts.static_inputs], backward=facts.kind == "backward",
                       activations=False)
    for worker in workers:
        if worker.slowness != 1.0:
            for row in plain["nodes"]:
                if row["seconds"][worker.name] is not None:
                    row["seconds"][worker.name] *= worker.slowness
    return CostGraph.from_json(together(gm, plain, marked(gm) if aware else None)), devices


def _device(worker: WorkerFacts, lanes: Sequence[LinkFacts], peak_bytes: int) -> Device:
    """The worker with its slowest lane to another worker. What the whole graph needs at its peak is kept free."""
    own = [lane for lane in lanes if worker.name in (lane.start, lane.end) and CLIENT not in (lane.start, lane.end)]
    return Device(
        id=worker.name, kind=worker.name,
        memory_bytes=None if worker.memory_bytes is None else max(0, worker.memory_bytes - peak_bytes),
        network_gbps=min((lane.bytes_per_s for lane in own), default=_DEFAULT_BYTES_PER_S) * 8 / 1e9,
        price_per_hour=worker.price_per_hour,
        network_latency_s=max((lane.latency_s for lane in own), default=_DEFAULT_LATENCY_S))


def check_prices(prices: Mapping[str, float | None]) -> None:
    """Raises: ConfigError that names the workers without a price, which min_cost cannot do without."""
    unknown = [name for name, price in prices.items() if price is None]
    if unknown:
        raise ConfigError(f"policy min_cost needs the price of every worker, and {', '.join(unknown)} "
                          f"{'has' if len(unknown) == 1 else 'have'} none; say price_per_hour in cluster.yaml")


def _single(graph: CostGraph, device: Device, moving_s: float) -> Alternative:
    """All of it on one worker, to which what lies elsewhere has to move."""
    cannot = [node.id for node in graph.nodes if node.seconds.get(device.kind) is None]
    held = sum(node.memory_bytes for node in graph.nodes)
    if cannot:
        return Alternative(name=device.id, est_s=None, chosen=False,
                           reason=f"it cannot run {cannot[0]} and {len(cannot) - 1} more nodes")
    if device.memory_bytes is not None and held > device.memory_bytes:
        return Alternative(name=device.id, est_s=None, chosen=False,
                           reason=f"the weights are {held / 2**30:.3g} GiB, {device.id} has "
                                  f"{device.memory_bytes / 2**30:.3g} GiB for them beside the call's own peak")
    seconds = sum(node.seconds[device.kind] or 0.0 for node in graph.nodes)
    return Alternative(name=device.id, est_s=seconds + moving_s, chosen=False,
                       reason=f"{moving_s * 1e3:.3g} ms of it to move state there" if moving_s else "")


def _slowest(possible: Sequence[Alternative]) -> float:
    return max(a.est_s or 0.0 for a in possible)


def _spread(possible: Sequence[Alternative]) -> Alternative:
    """Whole calls on whichever worker is free: each worker carries its part of the calls, and nothing moves."""
    rate = sum(1 / max(a.est_s or 0.0, 1e-12) for a in possible)
    return Alternative(name=f"whole calls spread over {len(possible)} workers", est_s=1 / rate, chosen=False,
                       reason="seconds per call while several calls run")


def _cut(graph: CostGraph, placed: Placement) -> Alternative:
    moved = sum(edge.size_bytes or 0 for edge in {e.src: e for e in graph.edges
                                                  if placed.device[e.src] != placed.device[e.dst]}.values())
    used = sorted(set(placed.device.values()))
    est_s = placed.makespan_s or placed.objective_value
    if len(used) < 2:
        return Alternative(name=f"a cut ({placed.method})", est_s=est_s, chosen=False,
                           reason="none was found that is better than " + ", ".join(f"all of it on {u}" for u in used))
    return Alternative(name=f"cut over {len(used)} workers ({placed.method})", est_s=est_s, chosen=False,
                       reason=f"{moved / 1e6:.3g} MB move between workers")


def _worth(placed: Placement, best: Alternative | None) -> bool:
    if len(set(placed.device.values())) < 2:
        return best is None
    if best is None or best.est_s is None:
        return True
    cut_s = placed.objective_value if placed.policy == "max_throughput" else placed.makespan_s or placed.objective_value
    if placed.policy == "min_cost":
        return True        # the objective weighs the price itself
    return cut_s <= MARGIN * best.est_s and best.est_s - cut_s >= MIN_GAIN_S


def views_with_readers(gm: fx.GraphModule, device_of: Mapping[str, str]) -> dict[str, str]:
    """A view of an input costs nothing anywhere: it is made where it is read, so that the input goes there alone."""
    chosen = dict(device_of)
    for node in reversed(gm.graph.nodes):
        readers = {chosen[user.name] for user in node.users if user.name in chosen}
        if (node.name in chosen and len(readers) == 1 and all(i.op == "placeholder" for i in node.all_input_nodes)
                and isinstance(node.target, torch._ops.OpOverload) and node.target.is_view):
            chosen[node.name] = readers.pop()
    return chosen


def _judged(singles: Sequence[Alternative], cut: Alternative, best: Alternative | None,
            use_cut: bool) -> list[Alternative]:
    rows = []
    for row in itertools.chain(singles, [cut]):
        chosen = row is cut if use_cut else row is best
        reason = row.reason
        if not chosen and row.est_s is not None and best is not None and best.est_s is not None:
            winner_s = cut.est_s if use_cut and cut.est_s is not None else best.est_s
            less = f"{row.est_s * 1e3:.3g} ms against {winner_s * 1e3:.3g} ms"
            margin = "" if use_cut or row is not cut else f", and a cut must win {1 - MARGIN:.0%} and " \
                                                          f"{MIN_GAIN_S * 1e3:g} ms"
            reason = "; ".join(filter(None, (less + margin, reason)))
        rows.append(Alternative(name=row.name, est_s=row.est_s, chosen=chosen, reason=reason))
    return rows
