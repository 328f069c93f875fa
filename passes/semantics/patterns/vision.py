"""Patch embedding and pooling: where an image becomes tokens, and where many positions become few."""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, PURE_VIEWS, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear, operands


def match_patch_embedding(view: GraphView, node: ViewNode) -> Outcome:
    if (node.rank != 4 and node.rank != 5) or len(node.inputs) < 2:
        return NoMatch("not a convolution over space")
    weight, stride = node.inputs[1].hint, conv_stride(node)
    if weight is None or len(weight) < 4 or weight[2] < 2 or stride < 2:
        return NoMatch("neither a kernel nor a stride over several pixels")
    tokens = []
    for user in view.forward(node, PURE_VIEWS, 8):
        if user.op in PURE_VIEWS:
            tokens.append(user)
    flat = next((n for n in tokens if n.rank == 3), None)
    if flat is None:
        return NoMatch("its result stays an image: a stage of convolutions")
    after = list(view.forward(flat, PURE_VIEWS | {"layer_norm", "item"}, 12))
    if after and all(n.op in ("matmul", "layer_norm", "item") or n.op in PURE_VIEWS for n in after) and \
            any(n.op == "matmul" for n in after):
        return NoMatch("its tokens are only projected: keys and values of fewer positions")
    return Match(kind="patch_embedding", core=(node,), nodes=ordered(tokens), confidence=0.95,
                 annotations={"kernel": weight[2], "stride": stride},
                 reason="patches of pixels become a sequence of tokens")


def conv_stride(node: ViewNode) -> int:
    value = node.args[3] if len(node.args) > 3 else node.kwargs.get("stride", 1)
    value = value[0] if isinstance(value, tuple) and value else value
    return value if isinstance(value, int) else 1


def match_pooling(view: GraphView, node: ViewNode) -> Outcome:
    if node.op == "tanh":
        return _first_token(view, node)
    if node.op in ("max_pool", "avg_pool"):
        if node.inputs and _masks(view, node.inputs[0]):
            return NoMatch("a mask, brought to fewer positions")
        items = tuple(u for u in node.users if u.op == "item" and u.args[1] == 0)
        return Match(kind="pooling", core=(node, *items), confidence=0.97, reason=f"the op {node.target}",
                     annotations={"variant": node.op})
    source = node.inputs[0] if node.inputs else node
    if source.static or source.rank < 3 or not source.is_float:
        return NoMatch("not a mean over positions")
    if source.op == "pow" or any(u.op in ("add", "sub") and any(w.op == "rsqrt" for w in u.users) for u in node.users):
        return NoMatch("the statistic of a normalisation")
    dims = _dims(node)
    if not dims:
        return NoMatch("a mean over everything: a loss or a report")
    positions = {d % source.rank for d in dims}
    image = source.rank == 4 and positions == {2, 3}
    if source.rank == 4 and positions in ({2}, {3}):
        return _one_side(view, node, source)
    sequence = source.rank == 3 and (positions == {1} or (positions == {2} and _channels_first(view, source)))
    frames = source.rank == 4 and positions == {1} and not _channels_first(view, source) and \
        view.through_views(source).op != "softmax"         # the mean of heads' weights
    if not image and not sequence and not frames:
        return NoMatch(f"a mean over dims {sorted(positions)} of {source.rank}: not over positions")
    return Match(kind="pooling", core=(node,), confidence=0.9, annotations={"variant": "mean"},
                 reason="a mean over positions")


def _masks(view: GraphView, value: ViewNode) -> bool:
    """Whether whole numbers or truths were cast to what is pooled."""
    node = value
    while node.op in VIEWS and node.inputs:
        node = node.inputs[0]
        if node.is_int or node.dtype == "bool":
            return True
    return False


def _one_side(view: GraphView, node: ViewNode, source: ViewNode) -> Outcome:
    """A mean over rows and then one over columns: one pooling in two steps."""
    if source.op == "mean" and source.rank == 4:
        return NoMatch("the second step of a mean over both sides of an image")
    second = next((u for u in view.forward(node, VIEWS, 4) if u.op == "mean"), None)
    if second is None or not second.inputs or second.inputs[0].rank != node.rank:
        return NoMatch("a mean over one side of an image alone")
    return Match(kind="pooling", core=(node, second), confidence=0.9, annotations={"variant": "mean"},
                 reason="a mean over rows, then over columns")


def _channels_first(view: GraphView, node: ViewNode) -> bool:
    """Whether positions come last, as a convolution leaves them."""
    return view.through(node, ELEMENTWISE | VIEWS | {"batch_norm"}).op == "conv"


def _first_token(view: GraphView, node: ViewNode) -> Outcome:
    """tanh of a linear layer over one token of the sequence, as BERT pools."""
    linear = view.through_views(node.inputs[0]) if node.inputs else node
    pair = operands(linear) if is_linear(linear) else None
    if pair is None:
        return NoMatch("not the tanh of a linear layer")
    token = view.through(pair[0], PURE_VIEWS)
    if token.op not in ("select", "slice") or not token.inputs or token.inputs[0].rank != 3:
        return NoMatch("the linear layer reads the whole sequence")
    return Match(kind="pooling", core=(linear, node), nodes=(token,), confidence=0.94,
                 annotations={"variant": "first_token"}, reason="tanh of a linear layer over one token")


def _dims(node: ViewNode) -> tuple[int, ...]:
    value = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", ())
    values = value if isinstance(value, tuple) else (value,)
    return tuple(v for v in values if isinstance(v, int) and not isinstance(v, bool))


PATCH_EMBEDDING = Pattern(name="patch_embedding", matcher=match_patch_embedding, kinds=("patch_embedding",),
                          priority=35, anchors=("conv",))
POOLING = Pattern(name="pooling", matcher=match_pooling, kinds=("pooling",), priority=20,
                  anchors=("max_pool", "avg_pool", "mean", "tanh"))
