"""MLP: linear, activation, linear; gated where two branches of the same input are multiplied.

    x -> W1 -> act -> W2                    x -> Wgate -> act -> * -> (norm) -> Wdown
                                            x -> Wup ------------^
    x -> 1x1 conv -> act -> 1x1 conv        the same over the pixels of an image
"""
from __future__ import annotations

from dataclasses import dataclass

from genie_dynamo.passes.semantics.ops import ACTIVATIONS, PURE_VIEWS, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import FLOW, crossing, linear_source, next_linear
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear, operands

_RESPONSE = frozenset({"linalg_vector_norm", "mean"})
_UP = FLOW | {"conv"} | _RESPONSE
_NORMS = frozenset({"layer_norm", "rms_norm"})
_LIMIT = 28
_TOWER_LIMIT = 16


@dataclass(frozen=True, slots=True)
class _Block:
    """What is above one linear layer: those that it reads, and what lies between."""

    ups: tuple[ViewNode, ...]
    inner: frozenset[ViewNode]
    normalised: bool               # a norm over features lies between


def match_mlp(view: GraphView, node: ViewNode) -> Outcome:
    if node.static:
        return NoMatch("an activation of weights")
    down_path = next_linear(view, node, _UP | _NORMS, _LIMIT)
    if not down_path:
        return _pointwise(view, node)
    down = down_path[-1]
    block = view.memo.get(("mlp", down.index))
    if block is None:
        block = view.memo["mlp", down.index] = _above(view, down)
    if isinstance(block, NoMatch):
        return block
    if node not in block.inner:
        return NoMatch("the activation is beside the path between the linear layers")
    gated = _gated(block)
    if block.normalised and not gated and not _joins_residual(view, down):
        return NoMatch("a normalised activation without a gate, and its result joins no residual stream: no linear "
                       "layer reads it as it is")
    if _above_is_activated(view, block.ups[0]):
        return NoMatch("it continues a tower that starts further up")
    earlier = [n for n in block.inner if n.op == node.op and n.index < node.index]
    if node.op == "conv" or earlier:
        return NoMatch("another activation of the same layers is the anchor")
    tower = [] if gated else _tower(view, down)
    # Where a norm lies between, its nodes are its own: the block is known by what remains.
    shared = block.normalised or any(n.op in _RESPONSE for n in block.inner)
    core = [n for n in (*block.inner, *tower) if n.op in ACTIVATIONS or (
        not shared and n.op not in VIEWS and not is_linear(n))]
    return Match(
        kind="gated_mlp" if gated else "mlp", core=ordered(core),
        nodes=ordered([*block.ups, *block.inner, *_around(block.ups), down, *tower]),
        confidence=0.9, annotations={"activation": node.op},
        reason="two branches of one input are multiplied between linear layers" if gated
        else "linear, activation, linear")


def _above(view: GraphView, down: ViewNode) -> _Block | NoMatch:
    """The linear layers above a linear layer with only elementwise ops and norms between, and what is between."""
    pair = operands(down)
    assert pair is not None
    ups, queue, seen, normalised = [], [pair[0]], {pair[0]}, False
    limit = 64
    while queue and limit:
        node = queue.pop()
        limit -= 1
        if node.static:
            continue
        normalised |= node.op in _NORMS or (node.op == "mean" and any(u.op == "rsqrt" for u in view.forward(
            node, frozenset({"add"}), 4)))
        if is_linear(node):
            ups.append(node)
        elif node.op in FLOW or node.op in _RESPONSE or node.op in _NORMS or _depthwise(node):
            fresh = [p for p in dict.fromkeys(node.inputs) if p not in seen]
            seen.update(fresh)
            queue.extend(fresh)
        elif not node.is_int and node.dtype != "bool":
            return NoMatch(f"{node.op} flows in between the linear layers ({node.name})")
    if not ups:
        return NoMatch("no linear layer above the activation")
    if len({_read_by(view, up) for up in ups}) > 1:
        return NoMatch("the branches between the linear layers read different values: a recurrence or a merge")
    inner = crossing(view, ups, pair[0], _UP | _NORMS) - set(ups)
    return _Block(ordered(ups), frozenset(inner), normalised)


def _read_by(view: GraphView, linear: ViewNode) -> ViewNode:
    """What a linear layer reads; of two in a row, as an adapter of low rank has them, what the first one reads."""
    source = linear_source(view, linear)
    return linear_source(view, source) if is_linear(source) else source


def _joins_residual(view: GraphView, down: ViewNode) -> bool:
    """Whether the result is added to another value: a block's, not a head's."""
    return any(n.op == "add" and sum(not p.static for p in dict.fromkeys(n.inputs)) > 1
               for n in view.forward(down, VIEWS, 8))


def _above_is_activated(view: GraphView, linear: ViewNode) -> bool:
    """Whether a linear layer reads the activation of another one."""
    node, activated = linear_source(view, linear), False
    for _ in range(12):
        if is_linear(node):
            return activated and view.through(node.inputs[0], PURE_VIEWS).op not in ("select", "slice")
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


def _gated(block: _Block) -> bool:
    if any(node.op == "glu" for node in block.inner):
        return True
    products = [n for n in block.inner if n.op == "mul" and len(set(n.inputs)) == 2 and
                not any(p.static for p in n.inputs) and not _scales(n)]
    split = any(n.op in ("chunk", "slice") for n in block.inner)
    return bool(products) and (len(block.ups) >= 2 or split)


def _scales(node: ViewNode) -> bool:
    """A product with one number per position or channel: part of a norm, no gate."""
    shapes = [p.hint for p in node.inputs]
    return shapes[0] is not None and shapes[1] is not None and len(shapes[0]) == len(shapes[1]) and \
        shapes[0] != shapes[1]


def _around(ups: tuple[ViewNode, ...]) -> list[ViewNode]:
    """Views that the linear layers read through and that nobody else needs."""
    return [p for up in ups for p in up.inputs if p.op in VIEWS and len(p.users) == 1]


def _pointwise(view: GraphView, node: ViewNode) -> Outcome:
    """Two convolutions over one pixel each, and nothing but the activation between."""
    source = view.through_views(node.inputs[0]) if node.inputs else node
    below = [n for n in view.forward(node, VIEWS, 8) if n.op not in VIEWS]
    if not (_over_one_pixel(source) and len(below) == 1 and _over_one_pixel(below[0])):
        return NoMatch("no linear layer reads the activation")
    if any(n.op in ("sigmoid", "hardsigmoid") for n in below[0].users):
        return NoMatch("its result is a gate: channels weighed by what they hold on average")
    between = [n for n in view.forward(source, VIEWS | {node.op}, 8) if n.index < below[0].index]
    return Match(kind="mlp", core=(source, node, below[0]), nodes=ordered(between), confidence=0.85,
                 annotations={"activation": node.op}, reason="two convolutions over single pixels, activated between")


def _over_one_pixel(node: ViewNode) -> bool:
    if node.op != "conv" or len(node.inputs) < 2 or node.hint is None:
        return False
    weight = node.inputs[1].hint
    channels = node.inputs[0].hint
    return weight is not None and len(weight) == 4 and weight[2:] == (1, 1) and channels is not None and \
        weight[1] == channels[1]


MLP = Pattern(
    name="mlp", matcher=match_mlp, kinds=("mlp", "gated_mlp"), priority=20,
    anchors=("gelu", "silu", "relu", "tanh", "sigmoid", "erf", "elu", "leaky_relu", "mish", "hardswish", "quick_gelu",
             "relu6", "hardtanh", "prelu", "glu", "selu", "expm1"))
