"""Optimizer update: a parameter, or a list of them, moved by a step that depends on something of its own shape.

    p += -lr * g                    p -= lr * m / (sqrt(v) + eps)            _foreach_add_(ps, gs), _fused_adamw_(...)

In place, or as AOTAutograd writes it, copy_(p, p + ...); or returned, as functional training steps do. The moments
that a step is made of belong to the update.
"""
from __future__ import annotations

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

_LISTS = ("_foreach_add", "_foreach_sub", "_foreach_mul", "_foreach_div", "_foreach_addcdiv", "_foreach_addcmul",
          "_foreach_lerp", "_foreach_copy")
_FUSED = ("_fused_adam", "_fused_adamw", "_fused_sgd", "_fused_adagrad")
_ONES = ("add", "sub", "addcdiv", "addcmul", "lerp", "copy", "mul", "where")
_LEARNT = frozenset({"matmul", "conv", "attention", "embedding", "embedding_bag", "softmax"})
_STEP_LIMIT = 256


def match_optimizer(view: GraphView, node: ViewNode) -> Outcome:
    if node.op in _FUSED:
        return _match(view, node, (node,), 0.98, f"the op {node.target}")
    if node.op in _LISTS:
        return _of_list(view, node)
    base, written = _written(view, node)
    if base is None:
        return _returned(view, node)
    if written.op == "item" and written.inputs[0].op.startswith("_foreach"):
        return NoMatch("one of a list of parameters that move together")
    if any(u.inplace and u.args and u.args[0] is node for u in node.users):
        return NoMatch("the parameter moves on")
    step = _step(view, written)
    moved = any(n.kind != "call" and n is not base and n.hint == base.hint and n.is_float for n in step)
    if base not in step and base is not written:
        return NoMatch("the new value does not depend on the old one: it is set, not moved")
    if not moved:
        return NoMatch("nothing of the parameter's shape moves it")
    if base.op == "parameter":
        return _match(view, node, (node,), 0.92, "a parameter moves by a step")
    return _unknown_role(view, node)


def _written(view: GraphView, node: ViewNode) -> tuple[ViewNode | None, ViewNode]:
    """(what a node writes in place, the node that has the new value); (None, node) where it writes nothing given."""
    if not node.inplace or not node.args or not isinstance(node.args[0], ViewNode):
        return None, node
    base = _base(node.args[0])
    if base.kind == "call" or not base.is_float:
        return None, node
    value = node.args[1] if node.op == "copy" and len(node.args) > 1 else node
    return base, value if isinstance(value, ViewNode) else node


def _base(node: ViewNode) -> ViewNode:
    """What was there before any write in place."""
    for _ in range(8):
        if node.kind != "call" or not node.inplace or not node.args:
            return node
        first = node.args[0][0] if isinstance(node.args[0], tuple) and node.args[0] else node.args[0]
        if not isinstance(first, ViewNode):
            return node
        node = first
    return node


def _step(view: GraphView, node: ViewNode) -> list[ViewNode]:
    """What a new value is made of: elementwise work on gradients and moments, and where those come from."""
    seen, queue = {node}, [node]
    while queue and len(seen) < _STEP_LIMIT:
        current = queue.pop()
        if current.kind != "call":
            continue
        # What a copy overwrites is no part of what it makes.
        for producer in current.inputs[1:] if current.op == "copy" else current.inputs:
            if producer not in seen:
                seen.add(producer)
                queue.append(producer)
    return list(seen)


def _of_list(view: GraphView, node: ViewNode) -> Outcome:
    first = node.args[0] if node.args else ()
    targets = [t for t in first if isinstance(t, ViewNode)] if isinstance(first, tuple) else []
    copies = [u for item in node.users if item.op == "item" for u in item.users
              if u.op == "copy" and u.inplace and len(u.args) > 1 and u.args[1] is item]
    bases = [_base(t) for t in targets] if node.inplace else [_base(c.args[0]) for c in copies]
    if not bases or not any(base.op == "parameter" for base in bases):
        return NoMatch("no list of parameters is written")
    if node.inplace and any(u.inplace and u.op in _LISTS and _lists(u, bases) for u in _later(view, node)):
        return NoMatch("the parameters move on")
    items = [c.args[1] for c in copies]
    return _match(view, node, (node, *items, *copies), 0.92, "a list of parameters moves by a step")


def _later(view: GraphView, node: ViewNode) -> list[ViewNode]:
    known: list[ViewNode] | None = view.memo.get("foreach")
    if known is None:
        known = view.memo["foreach"] = [n for n in view.nodes if n.inplace and n.op in _LISTS]
    return [n for n in known if n.index > node.index]


def _lists(node: ViewNode, bases: list[ViewNode]) -> bool:
    first = node.args[0]
    return isinstance(first, tuple) and any(isinstance(t, ViewNode) and _base(t) is bases[0] for t in first)


def _returned(view: GraphView, node: ViewNode) -> Outcome:
    """A new parameter that leaves the graph: p + step, where both have one shape."""
    if node.op not in ("add", "sub", "addcdiv") or node.inplace:
        return NoMatch("nothing that is given is written")
    leaves = any(u.op == "output" for u in view.forward(node, VIEWS, 8))
    base = next((view.through_views(p) for p in node.inputs[:1] if view.through_views(p).kind != "call"), None)
    if not leaves or base is None or not base.is_float or base.hint is None or base.hint != node.hint:
        return NoMatch("no sum of what is given and a step leaves the graph")
    step = _step(view, node)
    if not any(n.kind != "call" and n is not base and n.hint == base.hint and n.is_float for n in step):
        return NoMatch("nothing of its shape moves it")
    if base.op == "parameter":
        return _match(view, node, (node,), 0.85, "a parameter moves by a step, and leaves the graph")
    return _unknown_role(view, node)


def _unknown_role(view: GraphView, node: ViewNode) -> Outcome:
    """Whether what moves is a parameter does not show: only where the step has the root of running squares."""
    if any(op in view.by_op for op in _LEARNT):
        return NoMatch("what moves is no parameter, and the graph does more than that")
    step = _step(view, node)
    roots = [n for n in step if n.op in ("sqrt", "rsqrt", "_foreach_sqrt")]
    if not roots or any(n.op in ("mean", "var") for n in step):
        return NoMatch("what moves is no parameter, as far as the graph shows")
    if node.op not in ("addcdiv", "add", "sub", "copy"):
        return NoMatch("a moment, not what it moves")
    return _match(view, node, (node,), 0.8, "a value that is given moves by a step over the root of running squares")


def _match(view: GraphView, node: ViewNode, core: tuple[ViewNode, ...], sure: float, reason: str) -> Match:
    step = [n for n in _step(view, node) if n.kind == "call" and (
        n.op in ELEMENTWISE or n.op in VIEWS or n.op.startswith("_foreach") or n.op in ("fma", "copy", "full_like"))]
    return Match(kind="optimizer_update", core=ordered(core), nodes=ordered(step), confidence=sure, reason=reason)


OPTIMIZER = Pattern(name="optimizer_update", matcher=match_optimizer, kinds=("optimizer_update",), priority=30,
                    anchors=(*_ONES, *_LISTS, *_FUSED))
