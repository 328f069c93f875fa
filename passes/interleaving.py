"""Stages of a training step over parts of its batch -> an order of nodes that bounds how many parts are under way.

    worker 0   F0 F1 B0 F2 B1 F3 B2 B3        of two stages: at most two parts hold activations here
    worker 1      F0 B0 F1 B1 F2 B2 F3 B3     and one here

One forward, one backward (1F1B): a worker that comes back to a part later on does not start a further part before it
has come back to an earlier one. Without an order of its own, the first worker would do all forwards first, as nothing
keeps it from it, and hold the activations of every part.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import fx

from genie_dynamo.passes.facts import draws_random_numbers
from genie_dynamo.passes.rows.split import SplitGraph


@dataclass(slots=True, eq=False)
class _Block:
    """What one worker does of one part in one go. visit: how often the part has changed workers before."""

    part: int
    visit: int
    worker: str
    nodes: list[fx.Node] = field(default_factory=list)
    before: set[_Block] = field(default_factory=set)
    seconds: float = 0.0
    end_s: float = -1.0


def interleaved(split: SplitGraph, worker_of: Mapping[str, str], seconds: Mapping[str, float]) -> SplitGraph:
    """The split graph with its nodes in 1F1B order; as it is, where no worker comes back to a part.

    Args:  worker_of, seconds: by name of the nodes of `split.gm`.
    """
    order = one_forward_one_backward(split, worker_of, seconds)
    if order is None:
        return split
    graph, made = fx.Graph(split.gm), dict[fx.Node, fx.Node]()
    moved = set(order)
    nodes = list(split.gm.graph.nodes)
    first = [n for n in nodes if n.op in ("placeholder", "get_attr")]
    for node in [*first, *order, *(n for n in nodes if n not in moved and n not in first)]:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = node.name
    gm = fx.GraphModule(split.gm, graph)
    gm.graph.lint()
    return replace(split, gm=gm, in_order=True)


def one_forward_one_backward(split: SplitGraph, worker_of: Mapping[str, str],
                             seconds: Mapping[str, float]) -> list[fx.Node] | None:
    """The computing nodes in 1F1B order; None where no worker comes back to a part, or random numbers keep theirs."""
    nodes = [n for n in split.gm.graph.nodes if n.name in worker_of and n.target is not torch.ops.aten.copy_.default]
    if any(map(draws_random_numbers, nodes)):
        return None                        # they keep the order of the program
    blocks = _blocks(nodes, split, worker_of, seconds)
    windows = _windows(blocks, split.num_parts)
    if not windows:
        return None
    return [node for block in _simulated(blocks, windows) for node in block.nodes]


def _blocks(nodes: Sequence[fx.Node], split: SplitGraph, worker_of: Mapping[str, str],
            seconds: Mapping[str, float]) -> list[_Block]:
    """Nodes by part, visit and worker. No edge leads to an earlier part, nor within a part to an earlier visit."""
    part: dict[fx.Node, int] = {}
    inside = set(nodes)
    for node in reversed(nodes):           # what a part needs of later ones is done for it
        part[node] = min([split.part[node.name], *(part[user] for user in node.users if user in inside)])
    visit = _visits(nodes, part, worker_of)
    found: dict[tuple[int, int, str], _Block] = {}
    block_of: dict[fx.Node, _Block] = {}
    for node in nodes:
        sources = [s for s in node.all_input_nodes if s in inside]
        key = part[node], visit[node], worker_of[node.name]
        block = block_of[node] = found.setdefault(key, _Block(*key))
        block.nodes.append(node)
        block.seconds += seconds.get(node.name, 0.0)
        block.before |= {block_of[s] for s in sources} - {block}
    return list(found.values())


def _visits(nodes: Sequence[fx.Node], part: Mapping[fx.Node, int],
            worker_of: Mapping[str, str]) -> dict[fx.Node, int]:
    """How often a part has changed workers before each node; as late as what reads the node allows, so that labels
    and masks are made where they are used and start nothing."""
    visit: dict[fx.Node, int] = {}
    for node in nodes:
        here = worker_of[node.name]
        visit[node] = max((visit[s] + (worker_of[s.name] != here) for s in node.all_input_nodes
                           if s in visit and part[s] == part[node]), default=0)
    for node in reversed(nodes):
        here = worker_of[node.name]
        latest = [visit[u] - (worker_of[u.name] != here) for u in node.users if u in visit and part[u] == part[node]]
        visit[node] = max(visit[node], min(latest, default=visit[node]))
    return visit


def _windows(blocks: Sequence[_Block], num_parts: int) -> dict[str, int]:
    """Worker -> how many parts it may have started and not come back to, for workers that come back.

    Of S stages the first is S parts ahead of its backward, the last none: half the visits in between, and one.
    """
    visits: dict[str, list[int]] = {}
    for block in blocks:
        if 0 <= block.part < num_parts:
            visits.setdefault(block.worker, []).append(block.visit)
    return {worker: 1 + (max(of) - min(of) + 1) // 2 for worker, of in visits.items() if max(of) > min(of)}


def _simulated(blocks: Sequence[_Block], windows: Mapping[str, int]) -> list[_Block]:
    """The blocks in the order in which the workers start them: late visits first, then early parts."""
    waiting = list(blocks)
    last_visit = {w: max(b.visit for b in blocks if b.worker == w) for w in windows}
    first_visit = {w: min(b.visit for b in blocks if b.worker == w) for w in windows}
    came_back = {(b.part, b.worker): b for b in blocks if b.visit == last_visit.get(b.worker)}
    free_s = dict.fromkeys((b.worker for b in blocks), 0.0)
    order: list[_Block] = []
    while waiting:
        def start_s(block: _Block) -> float:
            return max([free_s[block.worker], *(b.end_s for b in block.before)])

        ready = [b for b in waiting if all(other.end_s >= 0 for other in b.before)]
        allowed = []
        for block in ready:
            earlier = came_back.get((block.part - windows.get(block.worker, 0), block.worker))
            starts = block.worker in windows and block.visit == first_visit[block.worker]
            if not starts or earlier is None or earlier.end_s >= 0:
                allowed.append(block)
        # Where only blocks beyond the window are left, a part waits for a later one: then the window gives way.
        chosen = min(allowed or ready, key=lambda b: (start_s(b), -b.visit, b.part))
        chosen.end_s = free_s[chosen.worker] = start_s(chosen) + chosen.seconds
        waiting.remove(chosen)
        order.append(chosen)
    return order
