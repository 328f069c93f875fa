"""From a graph to its meaning: patterns, then what is seen only from above (modalities, stages, fusions, phase).

    semantics = annotate(gm)                         # a graph of any capture
    semantics = annotate(gm, part="backward")        # by provenance: what AOTAutograd derived from a forward
"""
from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import fx

from genie_dynamo.core.plan import GuardFacts
from genie_dynamo.core.semantics import TRUSTED_CONFIDENCE, PhaseRule, Region, SemanticGraph
from genie_dynamo.passes.semantics.engine import Clock, EngineReport, Found, run_patterns
from genie_dynamo.passes.semantics.evidence import weigh_names
from genie_dynamo.passes.semantics.flows import find_flows
from genie_dynamo.passes.semantics.fusion import Container, find_encoders, find_fusions
from genie_dynamo.passes.semantics.learned.opinion import HINT_CONFIDENCE, Hint, hints
from genie_dynamo.passes.semantics.modality import classify_inputs, flow, label
from genie_dynamo.passes.semantics.pattern import Pattern
from genie_dynamo.passes.semantics.reading import read_graph
from genie_dynamo.passes.semantics.registry import REGISTRY, Registry
from genie_dynamo.passes.semantics.stages import find_stages
from genie_dynamo.passes.semantics.view import GraphView, ViewNode
from genie_dynamo.passes.semantics.workload import find_phase_rule, find_workload

NodeCost = Callable[[str], tuple[float, float] | None]
"""(FLOPs, bytes moved) of a node by name, or None where nobody knows."""
Classifier = Callable[[GraphView, set[ViewNode]], Sequence[Hint]]
"""What nodes look like that no rule claims, given those that rules claim."""

log = logging.getLogger(__name__)
_DOUBTED = 0.65        # of a workload whose inputs may be something else


@dataclass(frozen=True, slots=True, kw_only=True)
class Annotator:
    """What annotation may use. The defaults are the process's registry and no costs."""

    registry: Registry = field(default_factory=lambda: REGISTRY)
    cost: NodeCost | None = None
    classifier: Classifier | None = hints
    clock: Clock = time.thread_time
    names: bool = True             # whether module paths and the names of inputs may count

    def annotate(self, gm: fx.GraphModule, *, part: str = "forward", roles: Mapping[str, str] | None = None,
                 guards: GuardFacts | None = None) -> SemanticGraph:
        """The meaning of a graph.

        Args:   part: "forward", "inference" or "backward", as AOTAutograd calls it.  roles: of inputs by name, for a
                graph that does not know them itself (reading.read_roles).
        """
        view = read_graph(gm, roles=roles, names=self.names)
        return self.annotate_view(view, part=part, guards=guards)[0]

    def annotate_view(self, view: GraphView, *, part: str = "forward",
                      guards: GuardFacts | None = None) -> tuple[SemanticGraph, EngineReport]:
        """The same for a view, with the report of the patterns."""
        report = run_patterns(view, self.registry.enabled(), disable=self.registry.disable, clock=self.clock)
        inputs = classify_inputs(view, report.found)
        masks = flow(view, inputs, report.found)
        rule = find_phase_rule(report.found) if part != "backward" else None
        phase = _phase(part, rule, report.found, view)
        regions, containers = self._regions(view, report.found, masks, phase)
        modalities = tuple(dict.fromkeys(reading.modality for reading in inputs.values()))
        workload, sure, why = find_workload(
            report.found, modalities, [c.variant for c in containers], [c.kind for c in containers])
        disabled = [f"pattern {status.pattern.name} {status.pattern.version} is disabled: {status.disabled}"
                    for status in self.registry.statuses() if status.disabled]
        warnings = [*disabled, *_doubts(regions), *(
            f"input {node.name} is taken for {reading.modality}: {reading.doubt}"
            for node, reading in inputs.items() if reading.doubt)]
        if any(reading.doubt for reading in inputs.values()):
            sure = min(sure, _DOUBTED)
        if sure < TRUSTED_CONFIDENCE:
            warnings.append(f"the workload is {workload} with confidence {sure:.2f} only: {why}")
        graph = SemanticGraph(
            workload=workload, confidence=sure, phase=phase, modalities=modalities, regions=regions,
            flows=find_flows(view, regions), guards=guards or GuardFacts(), warnings=tuple(warnings), phase_rule=rule,
            reason=why,
            num_nodes=sum(node.kind == "call" for node in view.nodes))
        return graph, report

    def _regions(self, view: GraphView, found: Sequence[Found], masks: Sequence[int],
                 phase: str) -> tuple[tuple[Region, ...], tuple[Container, ...]]:
        leaves = [self._leaf(view, f, masks, phase) for f in found]
        taken = [n for f in found if f.match.kind in (
            "patch_embedding", "state_space", "attention", "mlp", "positional")
                 for n in f.nodes if n.op == "conv"]
        stages = [Container(kind="conv_stage", variant=stage.role, nodes=stage.nodes, confidence=0.9,
                            reason=f"convolutions over {stage.dims} dims at {'x'.join(map(str, stage.size))}")
                  for stage in find_stages(view, taken)]
        fusions = find_fusions(view, found, masks)
        parts = [(f.match.kind, region.modality, f.nodes) for f, region in zip(found, leaves, strict=True)]
        parts += [("conv_stage", label(_mask(s.nodes, masks)), s.nodes) for s in stages]
        encoders = [encoder for _, encoder in find_encoders(parts, fusions, masks)]
        containers = (*encoders, *stages, *fusions)
        outer = [self._container(c, masks, phase) for c in containers]
        claimed = {n for f in found for n in f.nodes} | {n for c in containers for n in c.nodes}
        return _number([*leaves, *self._hinted(view, claimed, masks, phase), *outer]), containers

    def _leaf(self, view: GraphView, found: Found, masks: Sequence[int], phase: str) -> Region:
        match, names = found.match, tuple(node.name for node in found.nodes)
        confidence, reason = weigh_names(match.kind, match.confidence, match.reason, found.nodes)
        region = Region(
            region_id="", kind=match.kind, nodes=names, confidence=confidence, reason=reason,
            pattern=found.pattern.name, module_path=_common_path(found.nodes), phase=phase,
            modality=label(_mask(match.core, masks)),
            annotations=tuple({**match.annotations, **found.pattern.annotations}.items()))
        return self._priced(region)

    def _hinted(self, view: GraphView, claimed: set[ViewNode], masks: Sequence[int], phase: str) -> list[Region]:
        """What no rule claims and the classifier has a name for: never trusted."""
        found = self.classifier(view, claimed) if self.classifier is not None else ()
        return [self._priced(Region(
            region_id="", kind=hint.kind, nodes=tuple(n.name for n in hint.nodes), confidence=HINT_CONFIDENCE,
            reason=f"no rule claims it; the classifier takes it for {hint.kind} ({hint.probability:.2f})",
            pattern="classifier", module_path=_common_path(hint.nodes), phase=phase,
            modality=label(_mask(hint.nodes, masks)))) for hint in found]

    def _container(self, container: Container, masks: Sequence[int], phase: str) -> Region:
        return self._priced(Region(
            region_id="", kind=container.kind, nodes=tuple(n.name for n in container.nodes),
            confidence=container.confidence, reason=container.reason, pattern=container.kind, phase=phase,
            module_path=_common_path(container.nodes), modality=label(_mask(container.nodes, masks)),
            annotations=(("variant", container.variant),)))

    def _priced(self, region: Region) -> Region:
        if self.cost is None:
            return region
        costs = [self.cost(name) for name in region.nodes]
        known = [cost for cost in costs if cost is not None]
        if len(known) < len(costs):
            return region
        return replace(region, flops=sum(c[0] for c in known), bytes_moved=sum(c[1] for c in known))


def annotate(gm: fx.GraphModule, **options: Any) -> SemanticGraph:
    """The meaning of a graph, with the process's patterns; see Annotator.annotate."""
    return Annotator().annotate(gm, **options)


def _phase(part: str, rule: PhaseRule | None, found: Sequence[Found], view: GraphView) -> str:
    if part == "backward":
        return "backward"
    if any(f.match.kind == "optimizer_update" for f in found) and not any(
            f.match.kind in ("attention", "mlp", "gated_mlp", "logits_head") for f in found):
        return "optimizer"
    if rule is not None:
        return rule.phase(_sizes(view)) if rule.symbolic else rule.phase()
    return "forward"


def _sizes(view: GraphView) -> dict[str, int]:
    """Symbol -> size in the captured call."""
    return {dim: size for node in view.nodes if node.shape is not None and node.hint is not None
            for dim, size in zip(node.shape, node.hint, strict=True) if isinstance(dim, str)}


def _mask(nodes: Iterable[ViewNode], masks: Sequence[int]) -> int:
    mask = 0
    for node in nodes:
        mask |= masks[node.index]
    return mask


def _common_path(nodes: Sequence[ViewNode]) -> str:
    """The innermost module that holds all the nodes that know theirs."""
    paths = [node.path.split(".") for node in nodes if node.path]
    if not paths:
        return ""
    common = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        common.append(parts[0])
    return ".".join(common)


def _number(regions: Sequence[Region]) -> tuple[Region, ...]:
    """Give ids by kind and order, and each leaf its container."""
    counts: Counter[str] = Counter()
    named = []
    for region in regions:
        named.append(replace(region, region_id=f"{region.kind}.{counts[region.kind]}"))
        counts[region.kind] += 1
    holder: dict[str, str] = {}
    for kind in ("conv_stage", "modality_encoder"):
        for region in named:
            if region.kind == kind:
                holder.update(dict.fromkeys(region.nodes, region.region_id))
    return tuple(replace(r, parent=holder.get(r.nodes[0], "")) if r.kind not in (
        "modality_encoder", "fusion") and holder.get(r.nodes[0]) != r.region_id else r for r in named)


def _doubts(regions: Iterable[Region]) -> list[str]:
    return [f"{r.region_id} at {r.nodes[0]} has confidence {r.confidence:.2f}, below {TRUSTED_CONFIDENCE}: {r.reason}; "
            "it is treated as ordinary nodes" for r in regions if not r.trusted]


__all__ = ["Annotator", "Classifier", "NodeCost", "Pattern", "annotate"]
