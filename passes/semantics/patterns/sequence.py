"""State-space blocks: a state that decays along a sequence by an exponential, in a scan or step by step.

    dt = softplus(...); decay = exp(A dt) with A = -exp(weight); state = decay * state + ...
    decay = exp(-c * gate * softplus(weight))
    state = exp(state - exp(weight) - maximum) * state + exp(key - maximum) * value
"""
from __future__ import annotations

from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.ops import ACTIVATIONS, ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear, operands

_FLOW = ELEMENTWISE | VIEWS
_OWN = ACTIVATIONS | {"exp", "cumsum"}
_STOP = frozenset({"layer_norm", "rms_norm", "group_norm", "embedding", "attention", "output"})
_BLOCK_LIMIT = 60_000
_WRITES = VIEWS | {"index_write"}


def match_state_space(view: GraphView, node: ViewNode) -> Outcome:
    decay = _decay(view, node)
    if isinstance(decay, NoMatch):
        return decay
    out = _out_projection(view, node)
    if out is None:
        return NoMatch("no linear layer takes the state's result")
    block, source = _block(view, node, out)
    past = any(n.kind in ("input", "constant") and n.op in ("input", "buffer") and n.is_float and n.rank >= 2
               and n is not source for b in block for n in b.inputs)
    kept = any(_leaves(view, user) for b in block if b is not out for user in b.users if user not in block)
    annotations: dict[str, Scalar] = {"variant": decay, "past": past, "kept": kept}
    if source.shape is not None and source.rank >= 3:
        annotations["query_length"] = source.shape[-2]
    return Match(kind="state_space", core=ordered([node, *(n for n in block if n.op in _OWN)]),
                 nodes=ordered(block), confidence=0.94, annotations=annotations,
                 reason="a state decays by an exponential that the input controls")


def _leaves(view: GraphView, node: ViewNode) -> bool:
    """Whether a value is kept for later calls: it, or what the last step makes of it, leaves the graph or is written
    into what does."""
    ends = [node] if node.op in ("output", "copy", "index_write") else list(view.forward(node, _FLOW, 24))
    return any(n.op in ("output", "copy") or (n.op == "index_write" and any(
        m.op in ("output", "copy") for m in view.forward(n, _WRITES, 512))) for n in ends)


def _decay(view: GraphView, node: ViewNode) -> str | NoMatch:
    if node.op == "exp":
        return _logarithmic(view, node)
    if node.static:
        below = list(view.forward(node, _FLOW, 24))
        if any(n.op == "exp" and not n.static for n in below):
            return "gated recurrence"
        return NoMatch("softplus of a weight that no exponential uses")
    for product in view.forward(node, VIEWS | {"clamp", "add"}, 16):
        if product.op != "mul":
            continue
        rates = [view.through(p, VIEWS | {"neg"}, 8) for p in product.inputs if p.static]
        if any(r.op == "exp" and r.weighted for r in rates):
            return "selective scan"
    return NoMatch("no product with rates that are the exponential of a weight")


def _logarithmic(view: GraphView, node: ViewNode) -> str | NoMatch:
    """Rates that are added to the exponent of a state: it decays by exp(rate) from step to step."""
    if not node.static or not node.weighted:
        return NoMatch("not the exponential of a weight")
    for total in view.forward(node, VIEWS | {"neg"}, 16):
        if total.op in ("add", "sub") and not total.static:
            below = list(view.forward(total, frozenset({"sub", "maximum"}) | VIEWS, 16))
            if any(n.op == "exp" and any(u.op == "mul" for u in n.users) for n in below):
                return "exponents"
    return NoMatch("the exponential of a weight, and no exponent of a state that it is added to")


def _out_projection(view: GraphView, node: ViewNode) -> ViewNode | None:
    """The first linear layer below, in order of the graph, through whatever the scan is made of."""
    seen, queue, best = {node}, [node], None
    while queue and len(seen) < _BLOCK_LIMIT:
        for user in queue.pop().users:
            if user in seen or (user.op in _STOP and user.op != "layer_norm" and user.op != "rms_norm"):
                continue
            seen.add(user)
            if is_linear(user):
                best = user if best is None or user.index < best.index else best
            else:
                queue.append(user)
    return best


def _block(view: GraphView, node: ViewNode, out: ViewNode) -> tuple[set[ViewNode], ViewNode]:
    """Everything between the block's normalised input and its out projection."""
    source = _block_input(view, node)
    seen, queue = {out}, [out]
    while queue and len(seen) < _BLOCK_LIMIT:
        current = queue.pop()
        for producer in current.inputs:
            if producer in seen or producer.static or producer.kind != "call" or producer.index <= source.index:
                continue
            seen.add(producer)
            queue.append(producer)
    return seen, source


def _block_input(view: GraphView, node: ViewNode) -> ViewNode:
    """What the block's first linear layer reads: up the main path, past inner layers and convolutions."""
    start = node
    if node.static:
        start = next((n for n in view.forward(node, _FLOW, 24) if not n.static), node)
    queue, seen, top = [start], {start}, start
    limit = 96
    while queue and limit:
        current = queue.pop()
        limit -= 1
        if is_linear(current):
            pair = operands(current)
            assert pair is not None
            source = view.through_views(pair[0])
            if top is start or source.index < top.index:
                top = source
            if _outer(view, source):
                continue
            queue.append(source)
            seen.add(source)
            continue
        for producer in current.inputs:
            # A state is read out of what holds those of all blocks, into which others have written.
            if producer not in seen and not producer.static and producer.kind == "call" and \
                    producer.op not in ("index_write", "copy") and not _outer(view, producer):
                seen.add(producer)
                queue.append(producer)
    return top


def _outer(view: GraphView, node: ViewNode) -> bool:
    """A normalised value, or the residual stream: the block's own input. What a linear layer made is inside."""
    source = _normalised(node)
    if source is not None:
        return not is_linear(view.through_views(source))
    return node.op in _STOP


def _normalised(node: ViewNode) -> ViewNode | None:
    """The value that this one is the normalised form of."""
    for _ in range(3):
        if node.op in ("layer_norm", "rms_norm", "group_norm"):
            return node.inputs[0]
        if node.op not in ("item", "mul", "add"):
            return None
        if any(p.op == "rsqrt" for p in node.inputs):
            return next((p for p in node.inputs if p.op != "rsqrt"), None)
        following = next((p for p in node.inputs if not p.static and p.op in (
            "item", "mul", "add", "layer_norm", "rms_norm")), None)
        if following is None:
            return None
        node = following
    return None


STATE_SPACE = Pattern(name="state_space", matcher=match_state_space, kinds=("state_space",), priority=38,
                      anchors=("softplus", "exp"))
