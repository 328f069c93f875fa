"""Recompute, keep or transfer: which values are cheaper to compute a second time than to keep or to send.

Both questions have one form. Some values are needed at a second place (the backward graph; another worker). Each is
either brought there at its price, or computed there again from values that have to be there in turn:

    minimise  sum of bring(v) over values brought + sum of again(v) over values computed again

For each value two variables, "it is there" and "it is computed there", whose costs are pairwise: a minimum cut.

    source --inf--> there(v) where v is needed          there(v) --bring(v)--> again(v)
    again(v) --again(v)--> sink                         again(v) --inf--> there(u) for each argument u of v

functorch's own min-cut partitioner prices values by bytes and bans what it holds to be dear; it has no term for the
seconds of computing again. So the cut is made here, and functorch's default partitioner carries it out by its policy
tags, which keeps its handling of random ops, symbols and effects.

Never computed again: random ops, ops that write to their arguments, ops with no result, and what reads an input that
the graph writes to. Inputs that the backward does not read anyway are not brought either: a caller may overwrite them
between forward and backward, as in eager.
"""
from __future__ import annotations

import math
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

import networkx
import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy

from genie_dynamo.core.hardware import HardwareFacts, LinkFacts
from genie_dynamo.passes.costs.analysis import analyze_costs
from genie_dynamo.passes.costs.estimate import node_seconds
from genie_dynamo.passes.costs.fit import CostFit
from genie_dynamo.passes.costs.graph_costs import GraphCosts
from genie_dynamo.passes.costs.sizes import size_bytes, tensors_in
from genie_dynamo.passes.facts import draws_random_numbers

NEVER = math.inf
_EPSILON_S = 1e-12
"""Of two equal choices the one that computes less wins."""
_BUDGET_ROUNDS = 24


def values_to_recompute(nodes: Collection[fx.Node], needed: Collection[fx.Node], bring: Callable[[fx.Node], float],
                        again: Callable[[fx.Node], float]) -> frozenset[fx.Node]:
    """The nodes that are cheaper computed again, of the whole that is needed.

    Args:   nodes: all that may be brought or computed.  needed: those of them that are wanted at the second place.
            bring, again: seconds; NEVER where it must not be.
    """
    graph = networkx.DiGraph()
    inside = frozenset(nodes)
    # A price above all sums of others stands for NEVER, so that a cut of finite weight always exists.
    prices = {node: (bring(node), again(node)) for node in nodes}
    forbidden = 1.0 + 2 * sum(p for pair in prices.values() for p in pair if p < NEVER)
    for node, (bring_s, again_s) in prices.items():
        graph.add_edge((node, "there"), (node, "again"), capacity=min(bring_s, forbidden))
        graph.add_edge((node, "again"), "sink", capacity=min(again_s + _EPSILON_S, 2 * forbidden))
        for argument in node.all_input_nodes:
            if argument in inside:
                graph.add_edge((node, "again"), (argument, "there"))
    for node in needed:
        graph.add_edge("source", (node, "there"))
    if "source" not in graph or "sink" not in graph:
        return frozenset()
    _, (reached, _) = networkx.minimum_cut(graph, "source", "sink")
    return frozenset(node for node in nodes if (node, "again") in reached)


# ---------------------------------------------------------------- between forward and backward
@dataclass(frozen=True, slots=True, kw_only=True)
class CostPartition:
    """AOTAutograd's partition function: what the backward recomputes is decided by seconds.

    keep_s_per_byte   what a byte kept from forward to backward costs: 0 on the worker that runs both and has room.
                      What a backward on another worker reads is decided when both are placed (passes/crossing.py)
    budget_bytes      bytes that may be kept at most, where they can be: the price of a byte is then raised until the
                      kept ones fit. Values that cannot be computed again are kept all the same.
    """

    hardware: HardwareFacts
    fit: CostFit | None = None
    keep_s_per_byte: float = 0.0
    budget_bytes: int | None = None
    symbol_values: Mapping[str, int] | None = None

    def __call__(self, joint_module: fx.GraphModule, joint_inputs: Any, *, num_fwd_outputs: int,
                 **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        from torch._functorch.partitioners import default_partition

        for node in self.recomputed(joint_module):
            node.meta["recompute"] = CheckpointPolicy.MUST_RECOMPUTE
        return default_partition(joint_module, joint_inputs, num_fwd_outputs=num_fwd_outputs, **options)

    def recomputed(self, joint: fx.GraphModule) -> frozenset[fx.Node]:
        """Forward nodes that the backward computes again. None where the graph has its own checkpoints or writes."""
        if any("recompute" in node.meta or writes_to_arguments(node) for node in joint.graph.nodes):
            return frozenset()
        costs = analyze_costs(joint)
        seconds = node_seconds(costs, self.hardware, self.symbol_values, fit=self.fit)
        kept_bytes = tensor_bytes(joint, costs, self.symbol_values)
        forward = _forward_nodes(joint)
        needed = [node for node in forward if any(user not in forward and user.op != "output" for user in node.users)]

        def choose(price: float) -> frozenset[fx.Node]:
            def bring(node: fx.Node) -> float:
                if node.op == "placeholder":
                    return 0.0 if node in needed else NEVER
                return kept_bytes[node] * price if node in kept_bytes else NEVER

            return values_to_recompute(
                forward, needed, bring, lambda node: seconds[node.name] if may_run_again(node) else NEVER)

        price = self.keep_s_per_byte
        if self.budget_bytes is None:
            return choose(price)
        return _within(self.budget_bytes, choose, price, lambda again: _kept(forward, needed, again, kept_bytes))


def _within(budget_bytes: int, choose: Callable[[float], frozenset[fx.Node]], price: float,
            kept: Callable[[frozenset[fx.Node]], float]) -> frozenset[fx.Node]:
    """The choice at the lowest price of a byte at which what is kept fits; at the highest where none does."""
    best = choose(price)
    if kept(best) <= budget_bytes:
        return best
    low, high = max(price, 1e-15), 1.0
    best = choose(high)
    for _ in range(_BUDGET_ROUNDS):
        middle = math.sqrt(low * high)
        chosen = choose(middle)
        if kept(chosen) <= budget_bytes:
            best, high = chosen, middle
        else:
            low = middle
    return best


def _kept(forward: Collection[fx.Node], needed: Collection[fx.Node], again: frozenset[fx.Node],
          sizes: Mapping[fx.Node, float]) -> float:
    """Bytes of what is brought: what is needed, or read by what is computed again, and is not itself."""
    wanted = {*needed, *(a for node in again for a in node.all_input_nodes)}
    return sum(sizes.get(node, 0.0) for node in wanted if node in forward and node not in again)


def _forward_nodes(joint: fx.GraphModule) -> dict[fx.Node, None]:
    """Nodes up to the last of the forward, without what depends on gradients: the rule of the default partitioner."""
    nodes = list(joint.graph.nodes)
    last = max((i for i, node in enumerate(nodes) if node.meta.get("partitioner_tag") == "is_forward"), default=-1)
    forward: dict[fx.Node, None] = {}
    for index, node in enumerate(nodes):
        is_input = node.op == "placeholder" and not str(node.target).startswith("tangents")
        if is_input or (node.op == "call_function" and index <= last
                        and all(a in forward or a.op == "get_attr" for a in node.all_input_nodes)):
            forward[node] = None
    return forward


def tensor_bytes(gm: fx.GraphModule, costs: GraphCosts, values: Mapping[str, int] | None) -> dict[fx.Node, float]:
    """Bytes of each node whose result is one tensor: a tuple is neither kept nor sent."""
    sizes = dict(zip(costs.nodes, costs.values(values)["output_bytes"].tolist(), strict=True))
    return {node: sizes[node.name] for node in gm.graph.nodes
            if node.name in sizes and isinstance(node.meta.get("val"), torch.Tensor)}


def may_run_again(node: fx.Node) -> bool:
    """Whether a second run gives the same bits and has no effect. Of ops that others have registered nobody knows."""
    return (node.op == "call_function" and _is_known(node.target) and not draws_random_numbers(node)
            and not writes_to_arguments(node) and not isinstance(node.target, torch._ops.HigherOrderOperator)
            and any(True for _ in tensors_in(node.meta.get("val"))))


def _is_known(target: Any) -> bool:
    return target is operator.getitem or (
        isinstance(target, torch._ops.OpOverload) and target.namespace in ("aten", "prims", "genie"))


def writes_to_arguments(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


# ---------------------------------------------------------------- in forward graphs
def duplicates(gm: fx.GraphModule, worker_of: Mapping[str, int], seconds: Mapping[int, Mapping[str, float]],
               link: Callable[[int, int], LinkFacts], *, input_link: LinkFacts | None = None,
               symbol_values: Mapping[str, int] | None = None,
               stays: Collection[str] = ()) -> dict[int, tuple[str, ...]]:
    """Nodes that a worker should compute itself rather than receive from another.

    Args:    worker_of: node name -> worker, a complete placement.  seconds: worker -> node name -> seconds there.
             link: (from, to) -> the way between two workers.  input_link: from where the graph's inputs are to a
             worker that none of its own nodes gives a reason to have them; None: they are not brought for this.
             stays: inputs that are never brought for this: weights.
    Returns: worker -> names of nodes to run there too, in order. A node without a time on a worker is not run there.
    Raises:  KeyError for a node without a worker.
    """
    size = tensor_bytes(gm, analyze_costs(gm), symbol_values)
    written = {a for node in gm.graph.nodes if writes_to_arguments(node) for a in node.all_input_nodes}
    found: dict[int, tuple[str, ...]] = {}
    for worker in sorted(set(worker_of.values())):
        own = {node for node in gm.graph.nodes if worker_of.get(node.name) == worker}
        wanted = {a for node in own for a in node.all_input_nodes}
        others = [node for node in gm.graph.nodes if node.op == "placeholder" or (
            node.name in worker_of and node not in own)]

        def bring(node: fx.Node, worker: int = worker, wanted: Collection[fx.Node] = wanted) -> float:
            if node.op == "placeholder":
                if node in wanted:
                    return 0.0
                if input_link is None or node.name in stays:
                    return NEVER
                return input_link.transfer_s(input_bytes(node))
            return link(worker_of[node.name], worker).transfer_s(size[node]) if node in size else NEVER

        def again(node: fx.Node, worker: int = worker) -> float:
            safe = may_run_again(node) and not any(a in written for a in node.all_input_nodes)
            return seconds[worker].get(node.name, NEVER) if safe else NEVER

        chosen = values_to_recompute(others, [node for node in others if node in wanted], bring, again)
        if chosen:
            found[worker] = tuple(node.name for node in gm.graph.nodes if node in chosen)
    return found


def input_bytes(node: fx.Node) -> float:
    """Bytes of an input with fixed sizes; one with symbols is not brought a second time."""
    size = sum(map(size_bytes, tensors_in(node.meta.get("val"))))
    return float(size) if isinstance(size, int) else NEVER
