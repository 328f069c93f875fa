"""Normalisation: one op, or the chain of a root mean square.

    x -> pow 2 -> mean -> + eps -> rsqrt -> * x -> (* weight)
    x -> norm over positions -> / its mean over channels -> * x        (global response)
"""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

_STATISTIC = frozenset({"mean", "var", "var_mean"})


def match_norm(view: GraphView, node: ViewNode) -> Outcome:
    if node.op in ("rsqrt", "sqrt"):
        return _chain(view, node)
    if node.op == "linalg_vector_norm":
        return _response(view, node)
    if node.static and node.op == "batch_norm":
        return NoMatch("weights are normalised, not values")
    items = tuple(user for user in node.users if user.op == "item")
    return Match(kind="norm", core=(node, *items), confidence=0.99, reason=f"the op {node.target}",
                 annotations={"variant": node.op})


def _chain(view: GraphView, node: ViewNode) -> Outcome:
    if node.static:
        return _frozen(view, node)
    above = list(view.backward(node, frozenset({"add", "clamp", "maximum"}) | VIEWS, 8))
    statistic = next((n for n in above if n.op in _STATISTIC), None)
    if statistic is None:
        return NoMatch("not the root of a mean or variance")
    scale = next((user for user in node.users if user.op in ("mul", "div")), None)
    if scale is None:
        return NoMatch("nothing is scaled by the root")
    first = _first(statistic)
    middle = [n for n in above if n.index > statistic.index and n.kind == "call"]
    after: list[ViewNode] = []
    current = scale
    while len(after) < 4:
        following = [u for u in current.users if u.op in ("mul", "add", "cast") and
                     all(p is current or p.static for p in u.inputs)]
        if len(current.users) != 1 or not following:
            break
        current = following[0]
        after.append(current)
    return Match(kind="norm", core=ordered([first, statistic, *middle, node, scale, *after]), confidence=0.96,
                 reason="a value over the root of its mean square", annotations={"variant": "rms_norm"})


def _response(view: GraphView, node: ViewNode) -> Outcome:
    mean = next((user for user in node.users if user.op == "mean"), None)
    share = next((user for user in node.users if user.op == "div" and mean is not None and any(
        p is mean or mean in p.inputs for p in user.inputs[1:])), None)
    if mean is None or share is None:
        return NoMatch("lengths that are not compared with their mean")
    scaled = [user for user in share.users if user.op == "mul"]
    between = [p for p in share.inputs if p.op == "add"]
    return Match(kind="norm", core=ordered([node, mean, share, *between, *scaled]), confidence=0.9,
                 reason="values scaled by their length over the mean length", annotations={
                     "variant": "response_norm"})


def _frozen(view: GraphView, node: ViewNode) -> Outcome:
    """x * (weight / sqrt(variance)) + (bias - mean * ...): a batch norm whose statistics are constants."""
    if not node.weighted and not any(p.op == "buffer" for p in view.backward(node, VIEWS | {"add"}, 6)):
        return NoMatch("the root of a constant")
    scaled = [u for u in view.forward(node, VIEWS | {"mul", "sub", "neg"}, 12) if not u.static]
    product = next((u for u in scaled if u.op == "mul"), None)
    if product is None:
        return NoMatch("the root of a weight, and nothing is scaled by it")
    total = [u for u in product.users if u.op == "add" and all(p is product or p.static for p in u.inputs)]
    return Match(kind="norm", core=ordered([product, *total]), confidence=0.85, annotations={"variant": "batch_norm"},
                 reason="a value scaled by constants over the root of a constant variance")


def _first(statistic: ViewNode) -> ViewNode:
    """The square under the mean, or the statistic."""
    source = statistic.inputs[0]
    return source if source.op in ("pow", "mul") else statistic


NORM = Pattern(name="norm", matcher=match_norm, kinds=("norm",), priority=30,
               anchors=("layer_norm", "rms_norm", "group_norm", "batch_norm", "rsqrt", "sqrt", "linalg_vector_norm"))
