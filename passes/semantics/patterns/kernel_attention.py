"""Attention without a softmax: queries, keys and values of linear layers meet in two products.

    f(q k^T) v        f elementwise: a power, an activation, an angle
    f(q) (g(k)^T v)   the same in the other order, as linear attention has it

A product that decays along the sequence by an exponential is a state-space block's.
"""
from __future__ import annotations

from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import (
    FLOW,
    Projection,
    crossing,
    linear_source,
    next_linear,
    projection,
)
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, operands

_DECAYS = frozenset({"exp", "cumsum", "softmax"})
_LIMIT = 24


def match_kernel_attention(view: GraphView, node: ViewNode) -> Outcome:
    first = _of_activations(node)
    if first is None:
        return NoMatch("not a product of two activations")
    weighing = next((n for n in view.forward(node, FLOW, _LIMIT) if _of_activations(n) is not None), None)
    if weighing is None:
        return NoMatch("no second product of activations reads the first")
    between = crossing(view, [node], weighing, FLOW)
    others = [p for p in operands(weighing) or () if p not in between]
    if len(others) != 1:
        return NoMatch("the second product reads the first twice")
    parts = [projection(view, value) for value in (*first, *others)]
    if not all(part.linears for part in parts):
        return NoMatch("queries, keys and values are not all projections")
    sources = [{linear_source(view, n) for n in part.linears} for part in parts]
    if not sources[0] & sources[1] and not sources[1] & sources[2] and not sources[0] & sources[2]:
        return NoMatch("three values of three sources: none are keys and values of one sequence")
    if any(n.op in _DECAYS for n in _beside(view, between, parts)):
        return NoMatch("what lies between the products decays along the sequence, or is a softmax")
    own = sources[0] & sources[1] & sources[2]
    annotations: dict[str, Scalar] = {"variant": "self" if own else "cross", "fused": False, "softmax": False}
    path = [n for part in parts for n in part.path]
    return Match(kind="attention", core=ordered(between), annotations=annotations, confidence=0.8,
                 nodes=ordered([*path, *next_linear(view, weighing, FLOW | {"linalg_vector_norm"})]),
                 reason="queries, keys and values in two products, without a softmax")


def _of_activations(node: ViewNode) -> tuple[ViewNode, ViewNode] | None:
    """The factors of a batch of products of values that the input reaches."""
    pair = operands(node)
    if pair is None or node.rank < 3 or pair[0].static or pair[1].static:
        return None
    return pair


def _beside(view: GraphView, between: set[ViewNode], parts: list[Projection]) -> set[ViewNode]:
    """What scales or masks the values between the products, and the values themselves."""
    starts = {p for n in between for p in n.inputs if p not in between}
    return starts | {n for start in starts for n in view.backward(start, FLOW, _LIMIT)} - {
        n for part in parts for n in part.linears}


KERNEL_ATTENTION = Pattern(name="kernel_attention", matcher=match_kernel_attention, kinds=("attention",), priority=10,
                           anchors=("matmul",))
