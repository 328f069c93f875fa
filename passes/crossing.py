"""What a backward reads on another worker than that which made it: a copy kept there, sent there, or computed again.

    forward   w0: v = f(u)   w1: g(v)          the backward of g reads v on w1
    kept      w1 has received v in the forward, and keeps its copy
    moved     w0 sends v to w1 while the forward still computes; w1 keeps it
    again     the backward computes f(u) on w1, from what is there

The cheapest by seconds, for all values of a worker together: the minimum cut of costs/recompute.py, with the lane
between the two workers as the price of moving. Where the backward runs is decided before (following.py). Without this
such a value went through the client.
"""
from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import fx

from genie_dynamo.core.hardware import LinkFacts
from genie_dynamo.passes.costs.analysis import analyze_costs
from genie_dynamo.passes.costs.recompute import (
    NEVER,
    input_bytes,
    may_run_again,
    tensor_bytes,
    values_to_recompute,
    writes_to_arguments,
)
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.following import Homes, follow
from genie_dynamo.passes.kept import Crossing, Crossings
from genie_dynamo.passes.partition import CLIENT, Partition, WorkerFacts, lane_between, price
from genie_dynamo.passes.twice import Link, Rewritten


def crossed(found: Partition, gm: fx.GraphModule, facts: GraphFacts, backward: fx.GraphModule,
            workers: Sequence[WorkerFacts], lanes: Sequence[LinkFacts],
            symbol_values: Mapping[str, int] | None = None) -> Partition:
    """The placement of a forward, with what its backward reads elsewhere brought to where it is read.

    Args:    found: of the forward `gm`, over several workers, not over parts of the batch.
    Raises:  CostError.
    """
    homes = Homes()
    homes.settle(found, gm, aware=True)
    had: dict[str, list[int]] = {}
    for value, worker in _where_values_are(found.over(gm), found):
        had.setdefault(value, []).append(worker)
    there = follow(backward, homes, had)
    costs, _ = price(gm, facts, workers, lanes, symbol_values)
    seconds = {index: {n.id: s for n in costs.nodes if (s := n.seconds.get(name)) is not None}
               for index, name in enumerate(found.workers)}
    client = [lane for lane in lanes if CLIENT in (lane.start, lane.end)]
    prices = _Prices(found, gm, facts, homes, backward, seconds, lane_between(lanes, found.workers),
                     max(client, key=lambda lane: lane.transfer_s(1 << 20)) if client else None, symbol_values)
    decisions: list[Crossing] = []
    again: dict[int, list[fx.Node]] = {}
    copies: list[tuple[str, int]] = []
    for worker in range(len(found.workers)):
        needed = [node for node in prices.nodes if node.op == "call_function" and node.name in prices.saved
                  and homes.of_value.get(node.name) != worker and prices.bring(node, worker) < NEVER
                  and any(there.get(user.name) == worker for user in prices.saved[node.name].users)]
        if needed:
            computed = values_to_recompute(prices.nodes, needed, functools.partial(prices.bring, worker=worker),
                                           functools.partial(prices.again, worker=worker))
            again[worker] = [node for node in prices.nodes if node in computed]
            wanted = {*needed, *(a for node in computed for a in node.all_input_nodes)}
            decisions += [prices.decision(node, worker, node in computed, wanted | computed) for node in needed]
            copies += [(node.name, worker) for node in prices.nodes
                       if node in wanted and node not in computed and not prices.is_there(node, worker)]
    if not decisions:
        return found
    forward, assign = _with_copies(prices, copies)
    new = {_copy_name(*copy): copy[0] for copy in copies}
    old = found.twice
    twice = Rewritten(gm=forward, assign=assign, origin={**found.origin, **new},
                      again=old.again if old is not None else {}, kept=old.kept if old is not None else {})
    over, placed = _over_backward(prices, there, again, copies)
    return dataclasses.replace(found, assign=assign, twice=twice, crossings=Crossings(
        backward=over, assign=placed, copies=len(copies), decisions=tuple(decisions)))


class _Prices:
    """What it costs to have a value of the forward on a worker, while the backward runs there."""

    def __init__(self, found: Partition, gm: fx.GraphModule, facts: GraphFacts, homes: Homes, backward: fx.GraphModule,
                 seconds: Mapping[int, Mapping[str, float]], link: Link, input_link: LinkFacts | None,
                 symbol_values: Mapping[str, int] | None) -> None:
        self.found, self.homes, self.seconds, self.link, self.input_link = found, homes, seconds, link, input_link
        self.over, self.backward = found.over(gm), backward
        self.size = {node.name: size for node, size in tensor_bytes(gm, analyze_costs(gm), symbol_values).items()}
        self.nodes = [node for node in gm.graph.nodes if node.op in ("placeholder", "call_function")]
        self.saved = {node.name: node for node in backward.graph.nodes if node.op == "placeholder"}
        names = [node.name for node in self.nodes if node.op == "placeholder"]
        self.static = {names[index] for index in facts.static_inputs}
        self._inside = frozenset(self.nodes)
        self._written = {a for node in self.nodes if writes_to_arguments(node) for a in node.all_input_nodes}
        self.on = _where_values_are(self.over, found)

    def is_there(self, node: fx.Node, worker: int) -> bool:
        """Whether the backward has the value there without a copy of it."""
        if node.op == "placeholder":
            return node.name in self.static or not isinstance(node.meta.get("val"), torch.Tensor)
        return node.name in self.saved and self.homes.of_value.get(node.name) == worker

    def bring(self, node: fx.Node, worker: int) -> float:
        """Seconds until it is there; what the forward has brought, or made, is."""
        if node in self._written:
            return NEVER
        if node.op == "placeholder":
            if node.name in self.static or not isinstance(node.meta.get("val"), torch.Tensor):
                return 0.0 if node.name in self.saved else NEVER
            if (node.name, worker) in self.on:
                return 0.0
            return self.input_link.transfer_s(input_bytes(node)) if self.input_link is not None else NEVER
        if node.name not in self.size or node.name not in self.found.assign:
            return NEVER
        if (node.name, worker) in self.on:
            return 0.0
        return self.link(self.found.assign[node.name], worker).transfer_s(self.size[node.name])

    def again(self, node: fx.Node, worker: int) -> float:
        safe = may_run_again(node) and all(a in self._inside and a not in self._written for a in node.all_input_nodes)
        return self.seconds[worker].get(node.name, NEVER) if safe else NEVER

    def decision(self, node: fx.Node, worker: int, is_again: bool, others: Collection[fx.Node]) -> Crossing:
        """What is done about a value, and what the other ways would take beside all that is there for `others`."""
        move_s = self.bring(node, worker)
        again_s = self._all_again(node, worker, {other: 0.0 for other in others if other is not node})
        return Crossing(name=node.name, worker=worker, how="again" if is_again else "moved" if move_s else "kept",
                        size_bytes=int(self.size[node.name]), move_s=move_s,
                        again_s=again_s if again_s < NEVER else None)

    def _all_again(self, node: fx.Node, worker: int, known: dict[fx.Node, float]) -> float:
        """Seconds with the cheapest way to each argument; what several of them need counts several times."""
        chain = [node]
        while chain:
            last = chain[-1]
            own_s = self.again(last, worker)
            unknown = [a for a in last.all_input_nodes if a not in known] if own_s < NEVER else []
            if unknown:
                chain += unknown
                continue
            known[last] = own_s + sum(min(known[a], self.bring(a, worker)) for a in last.all_input_nodes) \
                if own_s < NEVER else NEVER
            chain.pop()
        return known[node]


def _where_values_are(over: fx.GraphModule, found: Partition) -> dict[tuple[str, int], fx.Node]:
    """(value of the forward, worker that has it during the forward) -> the node of what runs that it has it as."""
    made: dict[tuple[str, int], fx.Node] = {}
    received: dict[tuple[str, int], fx.Node] = {}
    for node in over.graph.nodes:
        worker = found.assign.get(node.name)
        if worker is None or node.op != "call_function":
            continue
        made[found.origin.get(node.name, node.name), worker] = node
        received.update(((found.origin.get(a.name, a.name), worker), a) for a in node.all_input_nodes)
    return {**received, **made}


def _copy_name(value: str, worker: int) -> str:
    return f"{value}_kept_on_{worker}"


def _with_copies(prices: _Prices, copies: Sequence[tuple[str, int]]) -> tuple[fx.GraphModule, dict[str, int]]:
    """What the forward runs, with copies of values as outputs after its own: aliases made where they are kept."""
    over = prices.over
    graph, values = fx.Graph(over), dict[fx.Node, fx.Node]()
    for node in over.graph.nodes:
        if node.op != "output":
            values[node] = _again_in(graph, node, node.name, values)
    assign = dict(prices.found.assign)
    named = {node.name: node for node in over.graph.nodes}
    anywhere = {value: node for (value, _), node in prices.on.items()}
    made: list[fx.Node] = []
    for value, worker in copies:
        source = prices.on.get((value, worker)) or named.get(value) or anywhere[value]
        copy = graph.call_function(torch.ops.aten.alias.default, (values[source],))
        copy.name, copy.meta = _copy_name(value, worker), dict(source.meta)
        assign[copy.name] = worker
        made.append(copy)
    output = over.graph.output_node()
    (results,) = output.args
    graph.output((*fx.map_arg(tuple(results), values.__getitem__), *made)).meta = dict(output.meta)  # type: ignore[arg-type]
    return _module(over, graph), assign


def _over_backward(prices: _Prices, there: Mapping[str, int], again: Mapping[int, Sequence[fx.Node]],
                   copies: Sequence[tuple[str, int]]) -> tuple[fx.GraphModule, dict[str, int]]:
    """The backward, reading copies and what it computes again; and where each of its nodes runs."""
    backward, assign = prices.backward, dict(there)
    graph, values = fx.Graph(backward), dict[fx.Node, fx.Node]()
    inputs = [node for node in backward.graph.nodes if node.op == "placeholder"]
    for node in inputs:
        values[node] = _again_in(graph, node, node.name, values)
    forward = {node.name: node for node in prices.nodes}
    here: dict[int, dict[str, fx.Node]] = {worker: {} for worker in again}      # by name of the forward's value
    for value, worker in copies:
        copy = graph.placeholder(_copy_name(value, worker))
        copy.meta = dict(forward[value].meta)
        here[worker][value], assign[copy.name] = copy, worker
    for worker, computed in again.items():
        own: dict[fx.Node, fx.Node] = {}
        for node in computed:
            own.update((a, here[worker].get(a.name) or values[prices.saved[a.name]]) for a in node.all_input_nodes)
            made = _again_in(graph, node, f"{node.name}_again_on_{worker}", own)
            made.meta.pop("seq_nr", None)          # it differentiates nothing
            here[worker][node.name], assign[made.name] = made, worker
    for node in backward.graph.nodes:
        if node.op == "placeholder":
            continue
        local = here.get(there.get(node.name, -1), {})
        reads = {a: local.get(a.name, values[a]) if a.op == "placeholder" else values[a] for a in node.all_input_nodes}
        values[node] = _again_in(graph, node, node.name, reads)
    return _module(backward, graph), assign


def _again_in(graph: fx.Graph, node: fx.Node, name: str, values: Mapping[fx.Node, fx.Node]) -> fx.Node:
    made = graph.node_copy(node, values.__getitem__)
    made.name = name
    return made


def _module(root: fx.GraphModule, graph: fx.Graph) -> fx.GraphModule:
    made = fx.GraphModule(root, graph)
    made.meta.update(root.meta)
    return made
