"""Mixture of experts: who decides (router), and the experts that compute.

    router   x -> linear -> (softmax | sigmoid) -> topk, or the best one by one -> weights and indices of experts
    experts  tokens gathered by expert -> grouped product -> act -> grouped product -> scattered back
             or a product per expert with its slice of one weight, joined again; or one batch of products
"""
from __future__ import annotations

from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.ops import ACTIVATIONS, ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import FLOW, crossing, next_linear, weight_of
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear, operands

_SCORES = ELEMENTWISE | VIEWS | {"softmax", "sum", "gather", "index", "index_write", "zeros_like"}
_DISPATCH = VIEWS | frozenset({
    "sort", "floor_divide", "floordiv", "index", "histc", "cumsum", "index_write", "copy", "argsort", "eq", "one_hot",
    "nonzero", "arange", "remainder", "cat", "where", "empty_like", "bincount", "zeros_like", "clamp"})
_ROUTES = frozenset({"grouped_matmul", "index_add", "index", "one_hot", "sort", "eq", "index_write", "matmul"})
_ROUTES_BEST = frozenset({"grouped_matmul", "index_add", "sort", "one_hot"})     # the best one is picked elsewhere too
_COMBINE = ELEMENTWISE | VIEWS | {"index", "index_write", "index_add", "sum", "grouped_matmul", "copy", "zeros_like"}


def match_router(view: GraphView, node: ViewNode) -> Outcome:
    scored = [n for n in view.backward(node, _SCORES, 24) if is_linear(n)]
    if not scored:
        return NoMatch("the best are taken of values that no linear layer scored")
    linear = max(scored, key=lambda n: n.index)
    best = node.op != "topk"
    indices = [node] if node.op == "argmax" else [u for u in node.users if u.op == "item" and u.args[1] == 1]
    routed = [n for i in indices for n in view.forward(i, _DISPATCH, 40) if n.op in (_ROUTES_BEST if best else _ROUTES)]
    if not routed:
        return NoMatch("the indices route nothing: the best of a distribution")
    between = [n for n in view.backward(node, _SCORES, 24) if n.index > linear.index and n.op in _SCORES]
    after = [n for n in view.forward(node, frozenset({"item", "softmax", "sum", "div", "add", "cast", "mul"}), 12)
             if n.op in ("item", "softmax", "sum", "div", "mul") and not _after_experts(n)]
    chosen = 1 if best else node.args[1] if len(node.args) > 1 else node.kwargs.get("k", 0)
    annotations: dict[str, Scalar] = {"experts": _last(linear), "chosen": chosen if isinstance(chosen, int) else 0}
    return Match(kind="moe_router", core=ordered([linear, node]), nodes=ordered([*between, *after]), confidence=0.95,
                 reason="a linear layer scores, the best are chosen, their indices route", annotations=annotations)


def _last(node: ViewNode) -> int | str:
    return node.shape[-1] if node.shape else 0


def _after_experts(node: ViewNode) -> bool:
    return any(p.op in ("grouped_matmul", "view") and p.rank > 2 for p in node.inputs)


def match_experts(view: GraphView, node: ViewNode) -> Outcome:
    if node.op == "cat":
        return _one_by_one(view, node)
    if node.op == "matmul":
        return _all_at_once(view, node)
    above = list(view.backward(node, FLOW, 32))
    if any(n.op == "grouped_matmul" for n in above):
        return NoMatch("a later product of experts that another anchor has")
    inner = _below(node)
    products = [node, *(n for n in inner if n.op == "grouped_matmul")]
    before = [n for n in view.backward(node, _DISPATCH, 48) if n.op in _DISPATCH and n.kind == "call"]
    weight = node.inputs[1].hint if len(node.inputs) > 1 else None
    annotations: dict[str, Scalar] = {"experts": weight[0] if weight else 0}
    return Match(kind="moe_experts", core=ordered(products), nodes=ordered([*inner, *before]), confidence=0.95,
                 reason="products grouped by expert", annotations=annotations)


def _one_by_one(view: GraphView, node: ViewNode) -> Outcome:
    products = [view.through_views(value) for value in node.inputs]
    if len(products) < 2 or len(set(products)) < len(products) or not all(map(is_linear, products)):
        return NoMatch("what is joined are not products, one per expert")
    stacks = {weight_of(product, view) for product in products}
    stack = next(iter(stacks))
    if len(stacks) > 1 or stack.rank != 3:
        return NoMatch("the products do not share one stack of weights")
    return Match(kind="moe_experts", core=ordered([*products, node]), confidence=0.9,
                 annotations={"experts": len(products)}, reason="a product per slice of one weight, joined again")


def _all_at_once(view: GraphView, node: ViewNode) -> Outcome:
    """Every expert computes on a batch of its own: products with a stack of weights, activated between."""
    if not _stacked(node):
        return NoMatch("not a product of as many values as the weight has matrices")
    if any(_stacked(n) for n in view.backward(node, FLOW, 16)):
        return NoMatch("a later product of experts that another anchor has")
    path = next_linear(view, node, FLOW, 24)
    inner = crossing(view, [node], path[-1], FLOW) if path and _stacked(path[-1]) else set()
    if not any(n.op in ACTIVATIONS for n in inner):
        return NoMatch("no second stack of weights below an activation")
    core = [n for n in inner if n.op not in VIEWS]
    weight = node.inputs[-1].hint
    return Match(kind="moe_experts", core=ordered(core), nodes=ordered(inner), confidence=0.92,
                 annotations={"experts": weight[0] if weight else 0},
                 reason="two products with stacks of weights, one matrix per expert, activated between")


def _stacked(node: ViewNode) -> bool:
    """A batch of products, each with its own matrix of one weight."""
    pair = operands(node) if is_linear(node) else None
    if pair is None or pair[0].hint is None or pair[1].hint is None:
        return False
    return len(pair[0].hint) == len(pair[1].hint) == 3 and pair[0].hint[0] == pair[1].hint[0] > 1


def _below(node: ViewNode) -> list[ViewNode]:
    """What is computed from a product, up to the sum with the residual stream."""
    found: list[ViewNode] = []
    seen, queue = {node}, [node]
    while queue and len(found) < 64:
        for user in queue.pop(0).users:
            residual = user.op == "add" and len(user.inputs) == 2 and user.rank == 3
            if user in seen or user.op not in _COMBINE or residual:
                continue
            seen.add(user)
            found.append(user)
            queue.append(user)
    return found


ROUTER = Pattern(name="moe_router", matcher=match_router, kinds=("moe_router",), priority=35,
                 anchors=("topk", "maximum", "argmax"))
EXPERTS = Pattern(name="moe_experts", matcher=match_experts, kinds=("moe_experts",), priority=35,
                  anchors=("grouped_matmul", "cat", "matmul"))
