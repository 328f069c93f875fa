"""Positions put into values: rotary embedding, tables of sines, learned offsets.

    rotary      x * cos + cat(-x2, x1) * sin      or   cat(x1 cos - x2 sin, x2 cos + x1 sin)   or   complex products
    sinusoidal  cat or stack of sin and cos of positions times frequencies, added
    learned     x + a weight with one row per position
"""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, PURE_VIEWS, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import numel
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

_ANGLES = ELEMENTWISE | VIEWS | {"cat", "matmul", "floor_divide", "arange"}
_ACTIVATED = VIEWS | {"gelu", "relu", "silu", "layer_norm", "conv"}
_POOLED = VIEWS | {"avg_pool"}        # a convolution with a stride is added to as many means
_TABLE = VIEWS | {"interpolate", "cat"}
_SLICES = PURE_VIEWS | {"slice", "select", "cos", "sin"}
_HALVES = frozenset({"slice", "item", "chunk", "select", "view"})


def match_rotary(view: GraphView, node: ViewNode) -> Outcome:
    if node.op == "view_as_complex":
        return _complex(view, node)
    return _rotated_half(view, node) if node.op == "neg" else _two_products(view, node)


def _rotated_half(view: GraphView, node: ViewNode) -> Outcome:
    joined = next((u for u in node.users if u.op in ("cat", "stack") or
                   (u.op in PURE_VIEWS and any(w.op == "cat" for w in u.users))), None)
    if joined is not None and joined.op in PURE_VIEWS:
        joined = next(w for w in joined.users if w.op == "cat")
    if joined is None or len(joined.inputs) != 2:
        return NoMatch("the negated value is not joined with another half")
    chains = [_chain(n) for n in joined.inputs]
    source = next((n for n in chains[0] if n in chains[1]), None)
    if source is None:
        return NoMatch("the joined halves come from different values")
    product = next((u for u in view.forward(joined, PURE_VIEWS, 6) if u.op == "mul"), None)
    if product is None:
        return NoMatch("the rotated value is not multiplied")
    total = next((u for u in view.forward(product, PURE_VIEWS, 4) if u.op == "add"), None)
    if total is None:
        return NoMatch("the rotated product is not added to the plain one")
    core = {node, joined, product, total}
    core |= {p for p in total.inputs if p.op == "mul"}
    limit = set(view.backward(joined, _HALVES | {"neg", "unsqueeze"}, 8))
    inner = [n for n in limit if n.kind == "call" and n is not source and n.index > source.index and n.op != "view"]
    return Match(kind="positional", core=ordered(core), nodes=ordered(inner), confidence=0.97,
                 reason="x cos + rotated(x) sin", annotations={"variant": "rotary"})


def _chain(node: ViewNode) -> list[ViewNode]:
    """What a half is a part of, from the half upwards."""
    chain, limit = [node], 5
    while limit and chain[-1].op in _HALVES | {"neg", "unsqueeze"} and chain[-1].inputs:
        chain.append(chain[-1].inputs[0])
        limit -= 1
    return chain


def _two_products(view: GraphView, node: ViewNode) -> Outcome:
    if len(node.inputs) != 2:
        return NoMatch("not two halves")
    sums = [view.through(n, PURE_VIEWS, 3) for n in node.inputs]
    if {n.op for n in sums} != {"add", "sub"}:
        return NoMatch("the joined values are not a difference and a sum")
    products = [p for n in sums for p in n.inputs if p.op == "mul"]
    if len(products) != 4:
        return NoMatch("the joined values are not sums of products")
    factors = {f for p in products for f in p.inputs}
    if len(factors) != 4:
        return NoMatch("the products do not share their factors: no rotation")
    return Match(kind="positional", core=ordered([node, *sums, *products]), confidence=0.97, annotations={
        "variant": "rotary"}, reason="halves rotated by cos and sin")


def _complex(view: GraphView, node: ViewNode) -> Outcome:
    product = next((u for u in view.forward(node, VIEWS, 6) if u.op == "mul"), None)
    if product is None:
        return NoMatch("the complex value is not multiplied")
    back = next((u for u in view.forward(product, PURE_VIEWS, 4) if u.op == "view_as_real"), None)
    core = [node, product, *([back] if back is not None else [])]
    return Match(kind="positional", core=ordered(core), confidence=0.9, annotations={"variant": "rotary"},
                 reason="a product with complex unit numbers")


def match_angles(view: GraphView, node: ViewNode) -> Outcome:
    """The table of cosines and sines, or of complex unit numbers."""
    if node.op == "polar":
        inner = [n for n in view.backward(node.inputs[-1], _ANGLES, 24) if n.kind == "call"]
        return Match(kind="positional", core=(node,), nodes=ordered([*inner, *node.inputs[-1:]]), confidence=0.9,
                     reason="complex unit numbers from angles", annotations={"variant": "rotary", "table": True})
    angles = node.inputs[0] if node.inputs else node
    base = view.through(angles, VIEWS, 6)
    sources = {base, *view.backward(base, _ANGLES, 24)}
    twins = {u for n in sources if n.kind == "call" for u in n.users if u.op == "sin"}
    twins |= {u for n in (angles, base) for u in view.forward(n, _SLICES, 12) if u.op == "sin"}
    twins |= {u for n in base.inputs for other in n.users if other.op == base.op and other.inputs == base.inputs
              for u in other.users if u.op == "sin"}        # the same product, written twice
    if not twins:
        return NoMatch("a cosine without the sine of the same angles")
    inner = [n for n in sources if n.kind == "call" and n.op in ("mul", "matmul", "cat", "div", "pow")
             and not (n.op == "matmul" and n.weighted)]        # a layer that makes the positions is not their table
    after = [u for n in [node, *twins] for u in n.users if u.op in ("mul", "cast")
             and all(p is n or p.kind != "call" for p in u.inputs)]
    joined = [u for n in [node, *twins] for u in n.users if u.op in ("cat", "stack")]
    variant = "sinusoidal" if joined else "rotary"
    return Match(kind="positional", core=ordered([node, *twins]), nodes=ordered([*inner, *after, *joined]),
                 confidence=0.9, reason="cosine and sine of positions times frequencies",
                 annotations={"variant": variant, "table": True})


def match_learned(view: GraphView, node: ViewNode) -> Outcome:
    """x + table, where the table, learned or computed beforehand, has a row per position."""
    if len(node.inputs) != 2:
        return NoMatch("not a sum of two values")
    x, offset = node.inputs if node.inputs[1].static else node.inputs[::-1]
    if x.static or not offset.static or offset.hint is None or not offset.is_float:
        return NoMatch("not the sum of a value and a table")
    table = [n for n in view.backward(offset, _TABLE, 24) if n.kind == "call"]
    kinds = ("parameter",) if offset.weighted else ("buffer",)
    sources = [n for n in (offset, *view.backward(offset, _TABLE, 24)) if n.op in kinds]
    if not sources or any(n.op not in _TABLE for n in (*table, *([offset] if offset.kind == "call" else ()))):
        return NoMatch("what is added is computed from weights, not read off one")
    source = max(sources, key=lambda n: numel(n) or 0)
    if len(offset.hint) < 2 or offset.hint[-2] <= 1 or x.hint is None or x.hint[-2:] != offset.hint[-2:]:
        return NoMatch("the weight has no row per position: a bias")
    if len(x.hint) != 3 or (numel(source) or 0) < (offset.hint[-2] * offset.hint[-1]):
        return NoMatch("the weight is broadcast over positions, or the value is no sequence")
    named = "a weight" if offset.weighted else "a constant table"
    return Match(kind="positional", core=(node,), nodes=ordered([*table, *([offset] if offset.kind == "call" else ())]),
                 confidence=0.85, reason=f"{named} with a row per position is added",
                 annotations={"variant": "learned" if offset.weighted else "constant"})


def match_convolved(view: GraphView, node: ViewNode) -> Outcome:
    """x + act(grouped convolution over time of x): positions by neighbourhood."""
    if node.rank != 3 or len(node.inputs) < 2 or node.static:
        return NoMatch("not a convolution over time")
    channels = node.hint[1] if node.hint else 0
    if node.inputs[1].hint is None or node.inputs[1].hint[1] >= channels:
        return NoMatch("not grouped: it mixes all channels")
    if (node.inputs[1].hint[2:] or (1,))[0] == 1:
        return NoMatch("it looks at one position only")
    if any(n.op == "conv" for n in view.backward(node, _ACTIVATED - {"conv"}, 8)):
        return NoMatch("a later one of several in a row")
    source = view.through_views(node.inputs[0])
    path = list(view.forward(node, _ACTIVATED, 192))
    total = next((n for n in path if n.op == "add" and any(
        view.through(p, _POOLED) is source for p in n.inputs)), None)
    if total is None:
        return NoMatch("its result is not added to its input")
    inner = [n for n in path if n.op in _ACTIVATED and node.index < n.index < total.index]
    return Match(kind="positional", core=(node, total), nodes=ordered(inner), confidence=0.88,
                 annotations={"variant": "convolutional"}, reason="a grouped convolution is added to its input")


CONVOLVED_POSITIONS = Pattern(name="convolved_positions", matcher=match_convolved, kinds=("positional",), priority=20,
                              anchors=("conv",))
ROTARY = Pattern(name="rotary", matcher=match_rotary, kinds=("positional",), priority=45,
                 anchors=("neg", "cat", "view_as_complex"))
ANGLES = Pattern(name="position_table", matcher=match_angles, kinds=("positional",), priority=25,
                 anchors=("cos", "polar"))
LEARNED_POSITIONS = Pattern(name="learned_positions", matcher=match_learned, kinds=("positional",), priority=15,
                            anchors=("add",))
