"""Blocks that carry a state along a sequence: state-space models and recurrences.

    state space   dt = softplus(...); decay = exp(A dt) with A = -exp(weight); state = decay * state + ...
                  or decay = exp(-c * gate * softplus(weight))
    recurrent     one op (LSTM, GRU, RNN), or cells: tanh and sigmoid of W x + U h, h fed to the next step
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
    kept = any(_leaves(user) for b in block if b is not out for user in b.users if user not in block)
    annotations: dict[str, Scalar] = {"variant": decay, "past": past, "kept": kept}
    if source.shape is not None and source.rank >= 3:
        annotations["query_length"] = source.shape[-2]
    return Match(kind="state_space", core=ordered([node, *(n for n in block if n.op in _OWN)]),
                 nodes=ordered(block), confidence=0.94, annotations=annotations,
                 reason="a state decays by an exponential that the input controls")


def _leaves(node: ViewNode) -> bool:
    """Whether a value is kept for later calls: it leaves the graph, or is copied into what does."""
    for _ in range(6):
        if node.op in ("output", "copy"):
            return True
        if node.op not in VIEWS or len(node.users) != 1:
            return any(user.op in ("output", "copy") for user in node.users) and node.op in VIEWS
        node = node.users[0]
    return False


def _decay(view: GraphView, node: ViewNode) -> str | NoMatch:
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
            if producer not in seen and not producer.static and producer.kind == "call" and \
                    not _outer(view, producer):
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


def match_recurrent(view: GraphView, node: ViewNode) -> Outcome:
    if node.op in ("lstm", "gru", "rnn"):
        items = tuple(u for u in node.users if u.op == "item")
        return Match(kind="recurrent", core=(node, *items), confidence=0.98, reason=f"the op {node.target}",
                     annotations={"variant": node.op, **_state_of_op(view, node, items)})
    return _cell(view, node)


def _state_of_op(view: GraphView, node: ViewNode, items: tuple[ViewNode, ...]) -> dict[str, Scalar]:
    """Whether the state comes in and goes out, and how many steps the call adds."""
    data = node.inputs[0]
    states = [p for p in node.inputs[1:] if p.is_float and not p.weighted and p.rank in (2, 3)]
    past = any(view.through_views(p).kind != "call" or not view.through_views(p).static for p in states)
    last = [item for item in items if item.args[1] != 0] if len(items) > 1 else []
    steps = data.shape[0 if _time_first(node, data) else 1] if data.shape is not None and data.rank == 3 else 1
    return {"past": past, "kept": any(_kept(view, item) for item in last), "query_length": steps}


def _kept(view: GraphView, item: ViewNode) -> bool:
    """Whether a layer's last state leaves the graph, alone or stacked with those of other layers."""
    return any(n.op == "output" for n in view.forward(item, VIEWS | {"stack", "cat"}, 12))


def _time_first(node: ViewNode, data: ViewNode) -> bool:
    """The ops' last flag is batch_first; the kernel that they become on a CPU has time first."""
    if node.target.startswith("mkldnn"):
        return True
    flags = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, bool)]
    return not (flags and flags[-1])


def _cell(view: GraphView, node: ViewNode) -> Outcome:
    """One step: the candidate of a cell, whose linear layers read the input and the state before."""
    if node.static:
        return NoMatch("a tanh of weights")
    linears = [n for n in view.backward(node, _FLOW, 24) if n.op == "matmul"]
    sources = {view.through_views(p[0]) for n in linears if (p := operands(n)) is not None}
    if len(sources) < 2:
        return NoMatch("not the sum of what two linear layers make of an input and a state")
    after = list(view.forward(node, _FLOW, 24))
    if not any(n.op == "matmul" or n.op in ("output", "stack", "cat") for n in after):
        return NoMatch("the state goes nowhere")
    gates = [n for n in view.backward(node, _FLOW, 24) if n.op in ("sigmoid", "chunk", "item", "add")]
    hidden = [s for s in sources if _is_state(view, s)]
    if not hidden:
        return NoMatch("none of the linear layers reads a state of the step before")
    inner = [n for n in after if n.op in ELEMENTWISE]
    return Match(kind="recurrent", core=ordered([node, *linears]), nodes=ordered([*gates, *inner]), confidence=0.9,
                 reason="a step of a recurrence: tanh of input and state", annotations={"variant": "cell"})


def _is_state(view: GraphView, node: ViewNode) -> bool:
    """Fresh zeros, an input, or what an earlier tanh made."""
    if node.op in ("zeros", "new_zeros", "zeros_like", "full") or (node.kind == "input" and node.op == "input"):
        return True
    return any(n.op == "tanh" for n in [node, *view.backward(node, _FLOW, 12)])


STATE_SPACE = Pattern(name="state_space", matcher=match_state_space, kinds=("state_space",), priority=38,
                      anchors=("softplus",))
RECURRENT = Pattern(name="recurrent", matcher=match_recurrent, kinds=("recurrent",), priority=36,
                    anchors=("lstm", "gru", "rnn", "tanh"))
