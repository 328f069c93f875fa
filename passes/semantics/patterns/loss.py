"""Loss: a comparison with labels; optimizer update: new parameters from gradients and moments."""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import LOSSES
from genie_dynamo.passes.semantics.view import GraphView, ViewNode


def match_loss(view: GraphView, node: ViewNode) -> Outcome:
    before = [n for n in view.backward(node, VIEWS | {"log_softmax"}, 12)
              if n.op == "log_softmax" or (n.op in VIEWS and len(n.users) == 1 and n.kind == "call")]
    items = [u for u in node.users if u.op == "item"]
    return Match(kind="loss", core=ordered([node, *items]), nodes=ordered(before), confidence=0.97,
                 reason=f"the op {node.target}", annotations={"variant": node.op})


def match_optimizer(view: GraphView, node: ViewNode) -> Outcome:
    """Parameters divided by roots of running squares (Adam and kin), as one op, per tensor or over lists."""
    if node.op.startswith("_fused_"):
        return Match(kind="optimizer_update", core=(node,), confidence=0.98, reason=f"the op {node.target}")
    roots = [n for n in view.backward(node, ELEMENTWISE | VIEWS | {"item"}, 24) if n.op.endswith("sqrt")]
    if not roots:
        return NoMatch("no root of running squares divides the step")
    return Match(kind="optimizer_update", core=(node,), nodes=ordered(roots), confidence=0.85,
                 reason="a step divided by the root of running squares")


LOSS = Pattern(name="loss", matcher=match_loss, kinds=("loss",), priority=30, anchors=tuple(sorted(LOSSES)))
OPTIMIZER = Pattern(
    name="optimizer_update", matcher=match_optimizer, kinds=("optimizer_update",), priority=30,
    anchors=("addcdiv", "_foreach_addcdiv", "_fused_adam", "_fused_adamw", "_fused_sgd", "_fused_adagrad"))
