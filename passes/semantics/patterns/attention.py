"""Attention: values weighed by the softmax of products of queries and keys.

    q = x Wq    k = y Wk    v = y Wv            one op: scaled_dot_product_attention, genie::sdpa, aten's variants,
          \\      /           |                  or the chain  q k^T -> scale, mask, bias -> softmax -> (dropout) -> v
           scores -> softmax -> out -> Wo

Self: keys come from what queries come from. Grouped: keys are repeated for several query heads. Sliding window: the
mask compares positions with one shifted by a constant.
"""
from __future__ import annotations

from dataclasses import dataclass

from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.ops import ELEMENTWISE, PURE_VIEWS, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import (
    PROJECT,
    Projection,
    crossing,
    linear_source,
    next_linear,
    numel,
    projection,
)
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, operands

_SCORES = ELEMENTWISE | VIEWS | {"cat", "and", "or", "gather", "index"}
_WEIGHTS = VIEWS | {"mul", "where", "softmax", "sub", "add", "div", "sum"}
_COMPARE = frozenset({"gt", "ge", "lt", "le"})
_MASKS = ELEMENTWISE | VIEWS | _COMPARE | {"and", "or", "not", "index", "eq", "ne", "cat"}


@dataclass(frozen=True, slots=True)
class Core:
    """The heart of one attention: where its operands are, before any pattern around it is looked at."""

    nodes: tuple[ViewNode, ...]
    query: ViewNode
    key: ViewNode
    value: ViewNode
    out: ViewNode
    mask: tuple[ViewNode, ...]
    fused: bool
    causal: bool


def find_core(view: GraphView, node: ViewNode) -> Core | NoMatch:
    """The attention at an anchor; remembered, since several patterns start from it."""
    known = view.memo.get(("attention", node.index))
    if known is None:
        known = _fused(node) if node.op != "softmax" else _unfused(view, node)
        view.memo["attention", node.index] = known
    return known


def _fused(node: ViewNode) -> Core | NoMatch:
    if len(node.inputs) < 3:
        return NoMatch(f"{node.target} with {len(node.inputs)} tensors; query, key and value are needed")
    out = next((user for user in node.users if user.op == "item" and user.args[1] == 0), node)
    mask = node.kwargs.get("attn_mask") or (node.args[3] if len(node.args) > 3 else None)
    query, key, value = node.inputs[:3]
    causal = node.kwargs.get("is_causal") is True or any(
        argument is True for argument in node.args[4:6])
    return Core((node, out) if out is not node else (node,), query, key, value, out,
                (mask,) if isinstance(mask, ViewNode) else (), True, causal)


def _unfused(view: GraphView, node: ViewNode) -> Core | NoMatch:
    products = [n for n in _nearest(view, node, _SCORES) if n.op == "matmul" and n.rank >= 3]
    scores = next((n for n in products if _multiplies(view, n, learned=False)), None) or \
        next((n for n in products if _multiplies(view, n, learned=True)), None)
    if scores is None:
        return NoMatch("no product of two activations above the softmax: a router, a gate or a classifier")
    weighing = next((n for n in view.forward(node, _WEIGHTS, 24) if n.op == "matmul"), None)
    if weighing is None:
        return NoMatch("nothing is weighed by the softmax")
    pair, factors = operands(scores), operands(weighing)
    assert pair is not None and factors is not None
    behind = crossing(view, [node], weighing, _WEIGHTS)
    value = factors[1] if factors[0] in behind or factors[0] is node else factors[0]
    if value.weighted and value.static:
        return NoMatch("the softmax weighs the rows of a weight: a mixture of learned vectors")
    core = crossing(view, [scores], weighing, _SCORES | {"softmax", "sum"})
    mask = tuple(p for n in core if n.op in ("add", "where", "maximum") for p in n.inputs if p not in core)
    return Core(ordered(core), pair[0], pair[1], value, weighing, mask, False, False)


def _nearest(view: GraphView, node: ViewNode, ops: frozenset[str]) -> list[ViewNode]:
    """What ends the paths up from `node` through `ops`, nearest first."""
    seen, queue, ends, limit = {node}, list(node.inputs), [], 48
    while queue and limit:
        current = queue.pop(0)
        if current in seen:
            continue
        seen.add(current)
        limit -= 1
        if current.op in ops:
            queue.extend(current.inputs)
        else:
            ends.append(current)
    return ends


def _multiplies(view: GraphView, node: ViewNode, *, learned: bool) -> bool:
    """A product of two activations; `learned`: one may be computed from weights alone, as learned queries are."""
    pair = operands(node)
    if pair is None or (pair[0].static and pair[1].static):
        return False
    static = [p for p in pair if p.static and p.weighted]
    return not static or (learned and view.through(static[0], _SCORES, 12).op == "matmul")


def match_attention(view: GraphView, node: ViewNode) -> Outcome:
    core = find_core(view, node)
    if isinstance(core, NoMatch):
        return core
    q, k, v = (projection(view, operand) for operand in (core.query, core.key, core.value))
    if node.op == "multi_head_attention_forward":
        variant = "self" if core.query is core.key else "cross"
        return Match(kind="attention", core=core.nodes, confidence=0.97, reason="one op with its projections",
                     annotations={"variant": variant, "fused": True})
    after = next_linear(view, core.out, VIEWS)
    variant, why = _variant(view, core, q, k)
    annotations: dict[str, Scalar] = {"variant": variant, "fused": core.fused}
    groups = _groups(core)
    if groups > 1:
        annotations["query_heads_per_key"] = groups
    window, compared = _mask_facts(view, core)
    if window:
        annotations["window"] = window
    if core.causal or compared:
        annotations["causal"] = True
    form = "one op" if core.fused else "product, softmax, product"
    return Match(kind="attention", core=core.nodes, nodes=(*q.path, *k.path, *v.path, *after),
                 confidence=0.97 if core.fused else 0.92, reason=f"{form}; {why}", annotations=annotations)


def _variant(view: GraphView, core: Core, q: Projection, k: Projection) -> tuple[str, str]:
    """Self or cross, and why."""
    if not k.linears or not q.linears:
        return _without_projection(view, core, q, k)
    query_sources = {linear_source(view, n) for n in q.linears}
    key_sources = {linear_source(view, n) for n in k.linears}
    if query_sources & key_sources:
        return "self", "queries and keys are projections of the same values"
    behind = {n for source in key_sources for n in view.backward(source, PROJECT | {"conv"}, 24)}
    before = {n for source in query_sources for n in view.backward(source, _LOCAL, 12)} | query_sources
    if behind & query_sources or any(n in before for n in key_sources):
        return "self", "keys are made from what queries are made from"
    shared = {n for n in before if not n.static and n.kind == "call"} & (behind | key_sources)
    if any(n.is_float and n.rank >= 3 for n in shared):
        return "self", "queries and keys share their source"
    return "cross", "queries and keys come from different values"


_LOCAL = ELEMENTWISE | VIEWS | {"layer_norm", "rms_norm"}


def _without_projection(view: GraphView, core: Core, q: Projection, k: Projection) -> tuple[str, str]:
    if q.linears and core.key.static:
        return "cross", "keys are learned"
    if q.linears and any(n.kind == "input" for n in k.ends):
        return "cross", "keys come whole from an input: a cache of another sequence"
    if k.linears:
        return "cross", "queries are learned"
    starts = {view.through_views(core.query), view.through_views(core.key)}
    return ("self", "queries and keys are the same values") if len(starts) == 1 else \
        ("cross", "queries and keys are different values without projections")


def _groups(core: Core) -> int:
    """Query heads per key head."""
    q, k = core.query.hint, core.key.hint
    if core.fused and q is not None and k is not None and len(q) == len(k) == 4 and k[1] and q[1] > k[1]:
        return q[1] // k[1]
    node, limit = core.key, 12
    while limit and node.op in VIEWS and node.inputs:
        source = node.inputs[0]
        if node.op in ("expand", "repeat") and not source.static:
            grown, was = numel(node), numel(source)
            batch = node.hint[0] if node.hint else 1
            if grown and was and grown > was and (source.rank < 1 or not source.hint or source.hint[0] == batch):
                return grown // was
        node, limit = source, limit - 1
    return 1


def _mask_facts(view: GraphView, core: Core) -> tuple[int, bool]:
    """(window or 0, whether positions are compared at all)."""
    window, compared = 0, False
    for mask in core.mask:
        known = view.memo.get(("mask", mask.index))
        if known is None:
            known = view.memo["mask", mask.index] = _read_mask(view, mask)
        window, compared = window or known[0], compared or known[1]
    return window, compared


def _read_mask(view: GraphView, mask: ViewNode) -> tuple[int, bool]:
    window, compared = 0, mask.op == "tril"
    for node in [mask, *view.backward(mask, _MASKS, 48)]:
        compared |= node.op in ("tril", "triu")
        if node.op not in _COMPARE:
            continue
        sides = [view.through(n, PURE_VIEWS | {"slice"}) for n in node.inputs]
        constants = [a for a in node.args if isinstance(a, int) and not isinstance(a, bool)]
        for side in sides:
            shift = next((a for a in side.args if isinstance(a, int) and not isinstance(a, bool)), 0)
            if side.op == "sub" and len(side.inputs) == 1 and shift > 0 and len(sides) == 2:
                window = shift
            elif side.op == "abs" and constants and constants[0] > 0:
                window = constants[0]
        compared |= len(sides) == 2 and all(n.is_int or n.dtype == "" for n in sides)
    return window, compared


ATTENTION = Pattern(
    name="attention", matcher=match_attention, kinds=("attention",), priority=40,
    anchors=("attention", "softmax", "multi_head_attention_forward"))
