"""Which regions read which: the edges between regions, through the nodes that belong to none.

A residual stream holds what every block before has added to it. Of the regions that a value holds only those are kept
that no other of them has already read, so that a chain of blocks is a chain of edges.
"""
from __future__ import annotations

from collections.abc import Sequence

from genie_dynamo.core.semantics import Region
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

_ACROSS = ("conv_stage", "fusion")       # they lie across others, and have the nodes that no other has


def find_flows(view: GraphView, regions: Sequence[Region]) -> tuple[tuple[str, str], ...]:
    """(region that makes a value, region that reads it), each pair once, in the order of the graph."""
    owner: dict[str, int] = {}
    for number, region in sorted(enumerate(regions), key=lambda pair: pair[1].kind in _ACROSS):
        if region.kind != "modality_encoder":
            for name in region.nodes:
                owner.setdefault(name, number)
    before = [0] * len(regions)                      # bit set of the regions that each one has read, near or far
    held: dict[ViewNode, tuple[int, ...]] = {}
    found: dict[tuple[int, int], None] = {}
    for node in view.nodes:
        if node.kind != "call":
            continue
        sources = tuple(dict.fromkeys(s for p in node.inputs for s in held.get(p, ())))
        if len(sources) > 1:
            sources = tuple(s for s in sources if not _covered(s, sources, before))
        own = owner.get(node.name)
        if own is None:
            held[node] = sources
            continue
        held[node] = (own,)
        for source in sources:
            if source != own:
                found[source, own] = None
                before[own] |= before[source] | 1 << source
    return tuple((regions[a].region_id, regions[b].region_id) for a, b in found)


def _covered(source: int, others: Sequence[int], before: Sequence[int]) -> bool:
    """Whether another region has read this one, and not the other way round too."""
    return any(before[o] >> source & 1 and not before[source] >> o & 1 for o in others if o != source)
