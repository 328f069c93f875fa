"""MLP: linear, activation, linear; gated where two branches of the same input are multiplied.

    x -> W1 -> act -> W2                    x -> Wgate -> act -> * -> Wdown
                                            x -> Wup ------------^
"""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import ACTIVATIONS, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import FLOW, crossing, linear_source, next_linear
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear, operands

_UP = FLOW | {"conv"}
_LIMIT = 28
_TOWER_LIMIT = 16


def match_mlp(view: GraphView, node: ViewNode) -> Outcome:
    if node.static:
        return NoMatch("an activation of weights")
    down_path = next_linear(view, node, _UP, _LIMIT)
    if not down_path:
        return NoMatch("no linear layer reads the activation")
    down = down_path[-1]
    known = view.memo.get(("mlp", down.index))
    if known is None:
        known = view.memo["mlp", down.index] = _above(view, down)
    if isinstance(known, NoMatch):
        return known
    ups, inner = known
    if node not in inner:
        return NoMatch("the activation is beside the path between the linear layers")
    if _above_is_activated(view, ups[0]):
        return NoMatch("it continues a tower that starts further up")
    earlier = [n for n in inner if n.op == node.op and n.index < node.index]
    if node.op == "conv" or earlier:
        return NoMatch("another activation of the same layers is the anchor")
    gated = _gated(ups, inner)
    tower = [] if gated else _tower(view, down)
    calls = [n for n in (*inner, *tower) if n.op not in VIEWS]
    return Match(
        kind="gated_mlp" if gated else "mlp", core=ordered(n for n in calls if not is_linear(n)),
        nodes=ordered([*ups, *inner, *_around(ups), down, *tower]),
        confidence=0.9, annotations={"activation": node.op},
        reason="two branches of one input are multiplied between linear layers" if gated
        else "linear, activation, linear")


def _above(view: GraphView, down: ViewNode) -> tuple[tuple[ViewNode, ...], frozenset[ViewNode]] | NoMatch:
    """The linear layers above a linear layer with only elementwise ops between, and what is between."""
    pair = operands(down)
    assert pair is not None
    ups, queue, seen = [], [pair[0]], {pair[0]}
    limit = 64
    while queue and limit:
        node = queue.pop()
        limit -= 1
        if node.static:
            continue
        if is_linear(node):
            ups.append(node)
        elif node.op in FLOW or _depthwise(node):
            fresh = [p for p in dict.fromkeys(node.inputs) if p not in seen]
            seen.update(fresh)
            queue.extend(fresh)
        elif not node.is_int and node.dtype != "bool":
            return NoMatch(f"{node.op} flows in between the linear layers ({node.name})")
    if not ups:
        return NoMatch("no linear layer above the activation")
    if len({linear_source(view, up) for up in ups}) > 1:
        return NoMatch("the branches between the linear layers read different values: a recurrence or a merge")
    inner = crossing(view, ups, pair[0], _UP) - set(ups)
    return ordered(ups), frozenset(inner)


def _above_is_activated(view: GraphView, linear: ViewNode) -> bool:
    """Whether a linear layer reads the activation of another one."""
    node, activated = linear_source(view, linear), False
    for _ in range(12):
        if is_linear(node):
            return activated
        if node.op not in _UP or not node.inputs or node.static:
            return False
        activated |= node.op in ACTIVATIONS
        node = next((p for p in node.inputs if not p.static), node.inputs[0])
    return False


def _tower(view: GraphView, down: ViewNode) -> list[ViewNode]:
    """Further activations and linear layers below, while each is all that reads the one before."""
    found: list[ViewNode] = []
    for _ in range(_TOWER_LIMIT):
        path = next_linear(view, down, _UP, _LIMIT)
        if not path or not any(n.op in ACTIVATIONS for n in path) or any(
                n.op == "add" and sum(not p.static for p in n.inputs) > 1 for n in path):
            break
        found += path
        down = path[-1]
    return found


def _depthwise(node: ViewNode) -> bool:
    """A convolution that mixes positions and not channels, as in a mix-FFN."""
    if node.op != "conv" or len(node.inputs) < 2:
        return False
    weight = node.inputs[1].shape
    return weight is not None and len(weight) >= 3 and weight[1] == 1


def _gated(ups: tuple[ViewNode, ...], inner: frozenset[ViewNode]) -> bool:
    if any(node.op == "glu" for node in inner):
        return True
    products = [n for n in inner if n.op == "mul" and len(set(n.inputs)) == 2 and not any(p.static for p in n.inputs)]
    split = any(n.op in ("chunk", "slice") for n in inner)
    return bool(products) and (len(ups) >= 2 or split)


def _around(ups: tuple[ViewNode, ...]) -> list[ViewNode]:
    """Views that the linear layers read through and that nobody else needs."""
    return [p for up in ups for p in up.inputs if p.op in VIEWS and len(p.users) == 1]


MLP = Pattern(
    name="mlp", matcher=match_mlp, kinds=("mlp", "gated_mlp"), priority=20,
    anchors=("gelu", "silu", "relu", "tanh", "sigmoid", "erf", "elu", "leaky_relu", "mish", "hardswish", "quick_gelu",
             "relu6", "hardtanh", "prelu", "glu", "selu"))
