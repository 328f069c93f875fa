"""Logits head: the linear layer whose result leaves the graph, or is compared with labels."""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import ACTIVATIONS, ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import LOSSES, weight_of
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear

_AFTER = (ELEMENTWISE - {"exp"}) | VIEWS | {"softmax", "log_softmax"}
_SQUASH = frozenset({"sigmoid", "tanh", "softplus", "logsigmoid", "clamp"})
_HIDDEN = ACTIVATIONS - _SQUASH
_CAPS = frozenset({"div", "mul", "tanh", "add", "sub"}) | VIEWS
_ENDS = LOSSES | {"output", "argmax", "topk"}


def match_head(view: GraphView, node: ViewNode) -> Outcome:
    if not is_linear(node):
        return NoMatch("not a linear layer")
    seen, queue, labels, path = {node}, [node], False, []
    while queue:
        current = queue.pop()
        if len(seen) > 32:
            return NoMatch("much is computed from the result")
        for user in current.users:
            if user in seen:
                continue
            seen.add(user)
            if user.op in LOSSES:
                labels = True
            if user.op in _ENDS:
                continue
            if user.op in _HIDDEN:
                return NoMatch(f"its result is activated by {user.op}: features, not scores")
            mixed = [p for p in user.inputs if not p.static and p not in seen]
            if user.op not in _AFTER or mixed:
                return NoMatch(f"the result goes on into {user.op} ({user.name})")
            path.append(user)
            queue.append(user)
    table = weight_of(node, view)
    tied = any(user.op == "embedding" for user in table.users)
    after = [n for n in path if n.op in _CAPS]
    return Match(kind="logits_head", core=(node,), nodes=ordered(after), annotations={"tied": tied},
                 confidence=0.97 if tied or labels else 0.92,
                 reason="a linear layer with the embedding's table leaves the graph" if tied
                 else "a linear layer that is compared with labels" if labels else "a linear layer leaves the graph")


LOGITS_HEAD = Pattern(name="logits_head", matcher=match_head, kinds=("logits_head",), priority=25, anchors=("matmul",))
