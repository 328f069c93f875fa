"""Annotations on their way through AOTAutograd: written on the Dynamo graph, read off the ATen graphs.

`meta["custom"]` is what AOTAutograd copies to every node that it derives, forward and backward. Here it holds, under
"genie", the id of the region: data that any copy of a graph keeps.
"""
from __future__ import annotations

import logging
from dataclasses import dataclass, field, replace

from torch import fx

from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.base import CaptureFacts, Match, NoMatch, Outcome
from genie_dynamo.passes.semantics.annotate import Annotator

_KEY = "genie"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class AnnotateSemantics:
    """The pass of the pipeline: mark each node with its region. The graph itself is not changed."""

    annotator: Annotator = field(default_factory=Annotator)

    @property
    def name(self) -> str:
        return "annotate_semantics"

    def run(self, gm: fx.GraphModule, facts: CaptureFacts) -> tuple[Outcome, ...]:
        try:
            graph = self.annotator.annotate(gm)
        except Exception as exc:     # a graph that is not understood still has to run
            log.warning("this graph is not annotated: %s", exc, exc_info=True)
            return (NoMatch(node="graph", reason=f"{type(exc).__name__}: {exc}"),)
        mark(gm, graph)
        gm.meta[_KEY] = graph
        for warning in graph.warnings:
            log.info("%s", warning)
        return tuple(Match(node=region.nodes[0], detail=region.region_id) for region in graph.regions)


def mark(gm: fx.GraphModule, graph: SemanticGraph) -> None:
    """Write the regions' ids on the nodes; a node in several gets the innermost."""
    region_of: dict[str, str] = {}
    for region in sorted(graph.regions, key=lambda r: -len(r.nodes)):
        region_of.update(dict.fromkeys(region.nodes, region.region_id))
    for node in gm.graph.nodes:
        if node.name in region_of:
            node.meta["custom"] = {**node.meta.get("custom", {}), _KEY: region_of[node.name]}


def marked(gm: fx.GraphModule) -> SemanticGraph | None:
    """What AnnotateSemantics found in this Dynamo graph; None where it did not run."""
    found = gm.meta.get(_KEY)
    return found if isinstance(found, SemanticGraph) else None


def region_id_of(node: fx.Node) -> str:
    """The region that a node of any derived graph belongs to, or ""."""
    return str(node.meta.get("custom", {}).get(_KEY, ""))


def carry_over(source: fx.GraphModule, gm: fx.GraphModule, part: str) -> None:
    """Give an ATen graph the meaning of the Dynamo graph that it comes from, to be read by `marked`."""
    graph = marked(source)
    if graph is not None:
        gm.meta[_KEY] = carried(gm, graph, part)


def carried(gm: fx.GraphModule, source: SemanticGraph, part: str) -> SemanticGraph:
    """The meaning of an ATen graph that AOTAutograd derived from an annotated one.

    Each region of the source keeps its id and holds the nodes that carry it. The phase of a backward is "backward";
    what has no mark (accumulation of gradients, views that AOTAutograd adds) is in no region.
    """
    members: dict[str, list[str]] = {}
    for node in gm.graph.nodes:
        region_id = region_id_of(node)
        if region_id and node.op == "call_function":
            members.setdefault(region_id, []).append(node.name)
    children: dict[str, list[str]] = {}
    for region in source.regions:
        if region.parent:
            children.setdefault(region.parent, []).extend(members.get(region.region_id, ()))
    phase = "backward" if part == "backward" else source.phase
    order = {node.name: index for index, node in enumerate(gm.graph.nodes)}
    regions = []
    for region in source.regions:
        names = dict.fromkeys([*members.get(region.region_id, ()), *children.get(region.region_id, ())])
        if names:
            regions.append(replace(region, nodes=tuple(sorted(names, key=order.__getitem__)), phase=phase, flops=None,
                                   bytes_moved=None))
    return replace(source, phase=phase, regions=tuple(regions), num_nodes=sum(
        node.op == "call_function" for node in gm.graph.nodes),
        phase_rule=None if part == "backward" else source.phase_rule)
