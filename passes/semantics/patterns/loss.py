"""Loss: a comparison with labels; optimizer update: new parameters from gradients and moments."""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import LOSSES
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

_STEP = ELEMENTWISE | VIEWS | {"_foreach_sqrt", "_foreach_div", "_foreach_add", "_foreach_mul", "_foreach_maximum"}
_SCALED = VIEWS | {"mul", "neg"}


def match_loss(view: GraphView, node: ViewNode) -> Outcome:
    before = [n for n in view.backward(node, VIEWS | {"log_softmax"}, 12)
              if n.op == "log_softmax" or (n.op in VIEWS and len(n.users) == 1 and n.kind == "call")]
    items = [u for u in node.users if u.op == "item"]
    return Match(kind="loss", core=ordered([node, *items]), nodes=ordered(before), confidence=0.97,
                 reason=f"the op {node.target}", annotations={"variant": node.op})


def match_optimizer(view: GraphView, node: ViewNode) -> Outcome:
    """Parameters moved by a step over roots of running squares (Adam and kin): one op, per tensor, or over lists."""
    if node.op.startswith("_fused_"):
        return Match(kind="optimizer_update", core=(node,), confidence=0.98, reason=f"the op {node.target}")
    divisor = node.inputs[-1] if node.inputs else node
    above = [divisor, *view.backward(divisor, _STEP, 24)]
    roots = [n for n in above if n.op in ("sqrt", "_foreach_sqrt")]
    if not roots or any(n.op in ("mean", "var") for n in above):
        return NoMatch("nothing is divided by the root of running squares")
    if node.op == "div":
        total = next((n for n in view.forward(node, _SCALED, 8) if n.op in ("add", "sub") and any(
            view.through_views(p).kind == "input" for p in n.inputs)), None)
        if total is None:
            return NoMatch("the quotient is no step of something that is given")
        return Match(kind="optimizer_update", core=(node, total), nodes=ordered(roots), confidence=0.8,
                     reason="a value that is given moves by a step over the root of running squares")
    return Match(kind="optimizer_update", core=(node,), nodes=ordered(roots), confidence=0.85,
                 reason="a step divided by the root of running squares")


LOSS = Pattern(name="loss", matcher=match_loss, kinds=("loss",), priority=30, anchors=tuple(sorted(LOSSES)))
OPTIMIZER = Pattern(
    name="optimizer_update", matcher=match_optimizer, kinds=("optimizer_update",), priority=30,
    anchors=("addcdiv", "_foreach_addcdiv", "div", "_fused_adam", "_fused_adamw", "_fused_sgd", "_fused_adagrad"))
