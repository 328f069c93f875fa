"""Bounded searches that several patterns share."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import ordered
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear, operands

FLOW = ELEMENTWISE | VIEWS
NORMALISE = frozenset({"layer_norm", "rms_norm", "group_norm", "mean", "sum", "var", "linalg_vector_norm",
                       "normalize"})
PROJECT = FLOW | NORMALISE | frozenset({"cat", "index_write", "copy", "stack"})
LOSSES = frozenset({
    "cross_entropy", "nll_loss", "mse_loss", "binary_cross_entropy", "ctc_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "cosine_embedding_loss", "triplet_margin_loss", "margin_ranking_loss",
    "hinge_embedding_loss", "soft_margin_loss", "gaussian_nll_loss", "poisson_nll_loss", "multi_margin_loss"})


@dataclass(frozen=True, slots=True)
class Projection:
    """The linear layers that a value comes from, and the nodes between."""

    linears: tuple[ViewNode, ...]
    path: tuple[ViewNode, ...]        # linears, and what lies between them and the value
    ends: tuple[ViewNode, ...]        # other non-static values that flow in


def projection(view: GraphView, value: ViewNode, *, ops: frozenset[str] = PROJECT, limit: int = 64) -> Projection:
    """Look up from `value` through `ops` to the nearest layers with weights."""
    linears: list[ViewNode] = []
    ends: list[ViewNode] = []
    seen = {value}
    queue, inner = [value], []
    while queue and limit:
        node = queue.pop(0)
        limit -= 1
        if is_linear(node):
            linears.append(node)
        elif node.static or node.kind != "call" or node.op not in ops:
            if not node.static:
                ends.append(node)
        else:
            inner.append(node)
            fresh = [p for p in dict.fromkeys(node.inputs) if p not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    live = set(linears)
    for node in ordered(inner):
        if any(producer in live for producer in node.inputs):
            live.add(node)
    return Projection(tuple(linears), ordered(live), tuple(ends))


def linear_source(view: GraphView, linear: ViewNode) -> ViewNode:
    """What a linear layer reads, behind views."""
    pair = operands(linear)
    assert pair is not None
    return view.through_views(pair[0])


def weight_of(linear: ViewNode, view: GraphView) -> ViewNode:
    """The weight of a linear layer, behind views."""
    pair = operands(linear)
    assert pair is not None
    return view.through_views(pair[1])


def next_linear(view: GraphView, node: ViewNode, ops: frozenset[str], limit: int = 16) -> tuple[ViewNode, ...]:
    """The path from `node` down through `ops` to the first linear layer, that included; empty where there is none."""
    paths: dict[ViewNode, ViewNode] = {}
    queue = [node]
    while queue and limit:
        current = queue.pop(0)
        for user in current.users:
            if user in paths:
                continue
            limit -= 1
            paths[user] = current
            if is_linear(user):
                steps = [user]
                while steps[-1] is not node:
                    steps.append(paths[steps[-1]])
                return tuple(reversed(steps[:-1]))
            if user.op in ops:
                queue.append(user)
    return ()


def crossing(view: GraphView, sources: Iterable[ViewNode], sink: ViewNode, ops: frozenset[str],
             limit: int = 128) -> set[ViewNode]:
    """Nodes on paths from `sources` to `sink` through `ops`; the ends included."""
    ends = set(sources)
    up = {n for n in view.backward(sink, ops, limit) if n.kind == "call"} | {sink}
    live = ends & up
    for node in ordered(up - ends):
        if any(producer in live for producer in node.inputs):
            live.add(node)
    return live | {sink}


def numel(node: ViewNode) -> int | None:
    """Elements at the captured sizes."""
    sizes = node.hint
    if sizes is None:
        return None
    count = 1
    for size in sizes:
        count *= size
    return count
