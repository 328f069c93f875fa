"""Loss: what compares with labels, or reduces a whole graph to the number that leaves it."""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import FLOW, LOSSES
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear

_REDUCTIONS = frozenset({"mean", "sum"})
_COMPARED = FLOW | _REDUCTIONS | {
    "log_softmax", "softmax", "logsumexp", "gather", "index", "eq", "ne", "gt", "lt", "xlogy", "linalg_vector_norm",
    "one_hot", "scalar_tensor"}


def match_loss(view: GraphView, node: ViewNode) -> Outcome:
    if node.op in _REDUCTIONS:
        return _reduced(view, node)
    before = [n for n in view.backward(node, VIEWS | {"log_softmax"}, 12)
              if n.op == "log_softmax" or (n.op in VIEWS and len(n.users) == 1 and n.kind == "call")]
    items = [u for u in node.users if u.op == "item"]
    after = [n for n in view.forward(node, FLOW | _REDUCTIONS, 12) if n.op in FLOW | _REDUCTIONS and n.rank == 0]
    return Match(kind="loss", core=ordered([node, *items]), nodes=ordered([*before, *after]), confidence=0.97,
                 reason=f"the op {node.target}", annotations={"variant": node.op})


def _reduced(view: GraphView, node: ViewNode) -> Outcome:
    """The last reduction of a loss that is written out: it leaves one number, and the number leaves the graph."""
    if node.rank != 0 or not node.is_float or not node.inputs or node.inputs[0].rank == 0:
        return NoMatch("not a reduction to one number")
    if node.static and not node.weighted:
        return NoMatch("a number that the input does not change")
    below = list(view.forward(node, FLOW, 16))
    if not any(n.op == "output" for n in below):
        return NoMatch("the number is used within the graph")
    above = [n for n in view.backward(node, _COMPARED, 48) if n.kind == "call"]
    if any(n.op in LOSSES for n in above):
        return NoMatch("it sums up what another op compared")
    if any(n.op == "argmax" for n in above):
        return NoMatch("it counts what is right: a report")
    inner = [n for n in above if n.op in _COMPARED and not is_linear(n) and n.op not in ("copy", "item")]
    after = [n for n in below if n.op in FLOW and n.rank == 0]
    return Match(kind="loss", core=(node,), nodes=ordered([*inner, *after]), confidence=0.75,
                 annotations={"variant": "written_out"},
                 reason="everything is reduced to one number that leaves the graph")


LOSS = Pattern(name="loss", matcher=match_loss, kinds=("loss",), priority=30,
               anchors=(*sorted(LOSSES), *sorted(_REDUCTIONS)))
