"""Where modalities or features meet, and the encoders before that.

    cross_attention       queries of one modality, keys of another
    sequence              values of one modality are put into the sequence of another (cat, masked_scatter, where)
    late_interaction      the product of two modalities' embeddings
    feature_interaction   products of a table's features with one another (dot products, factorisation machine)
"""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from genie_dynamo.passes.semantics.engine import Found
from genie_dynamo.passes.semantics.modality import names_of
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, operands

_MERGES = frozenset({"cat", "masked_scatter", "where", "index_write", "add", "stack", "copy"})
_ENCODES = frozenset({"attention", "mlp", "gated_mlp", "state_space", "recurrent", "patch_embedding", "norm"})
_DEPTH = frozenset({"attention", "state_space", "recurrent", "conv_stage"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Container:
    """A region that is made of, or lies across, others."""

    kind: str
    variant: str
    nodes: tuple[ViewNode, ...]
    confidence: float
    reason: str


def find_fusions(view: GraphView, found: Sequence[Found], masks: Sequence[int]) -> tuple[Container, ...]:
    """The points where values of different modalities, or the features of a table, meet."""
    fusions = [_cross(region, masks) for region in found if region.match.kind == "attention"]
    fusions += [_merge(node, masks) for op in sorted(_MERGES) for node in view.by_op.get(op, ())]
    inside = {node for region in found if region.match.kind == "attention" for node in region.match.core}
    fusions += [_product(view, node, masks) for node in view.by_op.get("matmul", ()) if node not in inside]
    fusions += [_factorised(view, node, masks) for node in view.by_op.get("sub", ())]
    return tuple(f for f in fusions if f is not None)


def _several(first: int, second: int) -> bool:
    """Two known modalities, neither of which holds the other."""
    return bool(first) and bool(second) and first & second not in (first, second)


def _cross(region: Found, masks: Sequence[int]) -> Container | None:
    core = region.match.core
    outside = [p for node in core for p in node.inputs if p not in core and p.is_float]
    if region.match.annotations.get("variant") != "cross" or len(outside) < 2:
        return None
    query, key = masks[outside[0].index], masks[outside[1].index]
    if not query or not key or query == key:
        return None
    return Container(kind="fusion", variant="cross_attention", nodes=region.nodes, confidence=0.9,
                     reason=f"queries are {'+'.join(names_of(query))}, keys {'+'.join(names_of(key))}")


def _merge(node: ViewNode, masks: Sequence[int]) -> Container | None:
    held = [masks[p.index] for p in dict.fromkeys(node.inputs) if p.is_float and masks[p.index]]
    pairs = [(a, b) for i, a in enumerate(held) for b in held[i + 1:] if _several(a, b)]
    if not pairs or not node.is_float:
        return None
    names = "+".join(names_of(pairs[0][0] | pairs[0][1]))
    return Container(kind="fusion", variant="sequence", nodes=(node,), confidence=0.9,
                     reason=f"{node.op} puts {names} into one value")


def _product(view: GraphView, node: ViewNode, masks: Sequence[int]) -> Container | None:
    pair = operands(node)
    if pair is None or pair[0].static or pair[1].static:
        return None
    first, second = masks[pair[0].index], masks[pair[1].index]
    if _several(first, second):
        return Container(kind="fusion", variant="late_interaction", nodes=(node,), confidence=0.92,
                         reason=f"the product of {'+'.join(names_of(first))} and {'+'.join(names_of(second))}")
    same = view.through_views(pair[0]) is view.through_views(pair[1])
    if same and names_of(first) == ("tabular",):
        return Container(kind="fusion", variant="feature_interaction", nodes=(node,), confidence=0.9,
                         reason="features of a table are multiplied with one another")
    return None


def _factorised(view: GraphView, node: ViewNode, masks: Sequence[int]) -> Container | None:
    """(sum of e)^2 - sum of e^2."""
    sides = [view.through_views(p) for p in node.inputs]
    if len(sides) != 2 or names_of(masks[node.index]) != ("tabular",) or {s.op for s in sides} != {"pow", "sum"}:
        return None
    return Container(kind="fusion", variant="feature_interaction", nodes=(*sides, node), confidence=0.9,
                     reason="the square of a sum less the sum of squares: all pairs of features")


def find_encoders(regions: Sequence[tuple[str, str, tuple[ViewNode, ...]]], fusions: Sequence[Container],
                  masks: Sequence[int]) -> tuple[tuple[str, Container], ...]:
    """(modality, encoder): what works on one modality alone before it meets another.

    Args:  regions: (kind, modality, nodes) of the leaf regions and stages.
    """
    if not any(f.variant != "feature_interaction" for f in fusions):
        return ()
    asking = {masks[f.nodes[-1].index] for f in fusions if f.variant == "cross_attention"}
    encoders = []
    for modality in ("text", "vision", "audio"):
        own = [(kind, nodes) for kind, of, nodes in regions if of == modality and (kind in _ENCODES or kind in _DEPTH)]
        queries = any(names_of(mask) == (modality,) for mask in asking)
        if queries or not any(kind in _DEPTH for kind, _ in own):
            continue
        nodes = tuple(sorted({n for _, group in own for n in group}, key=lambda n: n.index))
        encoders.append((modality, Container(
            kind="modality_encoder", variant=modality, nodes=nodes, confidence=0.9,
            reason=f"computes on {modality} alone, before it meets another modality")))
    return tuple(encoders)
