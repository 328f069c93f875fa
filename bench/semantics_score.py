"""Predicted regions against true ones: precision and recall per kind.

A predicted region is right if most of its computing nodes, of those that truth puts into a region at all, lie in one
true region of its kind. A true region is found if a right prediction lies in it.
"""
from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bench.semantics_samples import Sample
from bench.semantics_truth import LAYERS, Key, Truth, optimizer_truth, truths_of
from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.semantics.annotate import Annotator
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

# Ops that place, mask or convert: they lie between regions, and say nothing about them.
PLUMBING = frozenset({
    "arange", "zeros", "ones", "tensor", "new_ones", "le", "ge", "gt", "lt", "eq", "and", "or", "not", "cat", "copy",
    "_assert_scalar", "scalar_tensor", "full", "_log_api_usage_once", "_local_scalar_dense", "all", "index",
    "ones_like", "zeros_like", "empty", "cumsum", "sum", "where", "view", "transpose", "expand", "unsqueeze",
    "squeeze", "identity", "cast", "item", "dropout", "chunk", "select", "slice", "repeat", "roll", "pad"})
_BUT_OF = {"kv_cache": frozenset({"cat", "copy", "index", "cumsum"}),
           "positional": frozenset({"cat", "copy", "index", "cumsum"}), "loss": frozenset({"sum"}),
           "optimizer_update": frozenset({"copy"})}


@dataclass(slots=True)
class Tally:
    """Counts of one kind."""

    right: int = 0
    predicted: int = 0
    found: int = 0
    true: int = 0

    def add(self, other: Tally) -> None:
        self.right += other.right
        self.predicted += other.predicted
        self.found += other.found
        self.true += other.true

    @property
    def precision(self) -> float | None:
        return self.right / self.predicted if self.predicted else None

    @property
    def recall(self) -> float | None:
        return self.found / self.true if self.true else None


@dataclass(slots=True)
class Score:
    """Tallies by kind, and what was wrong in words."""

    kinds: dict[str, Tally] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Outcome:
    """Sums over graphs of one capture, with or without names."""

    kinds: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    graphs: dict[str, int] = field(default_factory=lambda: defaultdict(int))     # judged, by what was judged
    wrong: dict[str, list[str]] = field(default_factory=lambda: defaultdict(list))
    silent: list[str] = field(default_factory=list)      # wrong as a whole, and no warning says so
    regions: list[str] = field(default_factory=list)

    def judge(self, what: str, sample: Sample, graph: SemanticGraph, found: object, true: object) -> None:
        """Compare a fact about the whole graph."""
        self.graphs[what] += 1
        if found != true:
            said = f"{sample.subject} ({sample.form}): {found}, not {true}"
            self.wrong[what].append(said)
            if not graph.warnings:
                self.silent.append(f"{what} of {said}")


def evaluate(sample: Sample, outcomes: Mapping[tuple[str, bool], Outcome]) -> None:
    """Add one sample to the sums, with names and without."""
    truths = optimizer_truth(sample.origins) if sample.form == "optimizer" else \
        truths_of(sample.origins, sample.modalities)
    for named in (True, False):
        view = sample.view(named)
        graph, _ = Annotator(names=named).annotate_view(view)
        outcome = outcomes[sample.capture, named]
        for layer, kinds in LAYERS.items():
            _judge_layer(sample, layer, kinds, view, graph, truths[layer], outcome)
        if sample.workload:
            outcome.judge("workload", sample, graph, graph.workload, sample.workload)
        if sample.modalities is not None:
            outcome.judge("modality", sample, graph, sorted(graph.modalities), sorted(sample.modalities))
        if sample.phase:
            outcome.judge("phase", sample, graph, graph.phase, sample.phase)


def _judge_layer(sample: Sample, layer: str, kinds: frozenset[str], view: GraphView, graph: SemanticGraph,
                 truth: Truth, outcome: Outcome) -> None:
    if layer == "stage" and not truth:
        return                             # where no class says what a stage is, stages are not judged
    if layer in ("fusion", "encoder") and sample.modalities is None:
        return
    counted = frozenset(node.name for node in view.nodes if node.kind == "call" and _counts(layer, node, truth))
    if sample.form == "labelled":
        kinds &= {"loss"}                  # the rest was judged without labels
    regions = [(region.kind, region.nodes) for region in graph.regions if region.kind in kinds and region.trusted]
    if layer == "stage":
        regions = [region for region in regions if counted & frozenset(region[1])]     # others are not judged
    part = score(regions, truth, counted, kinds)
    for kind, tally in part.kinds.items():
        outcome.kinds[kind].add(tally)
    outcome.regions += [f"{sample.subject} ({sample.form}, {sample.capture}): {wrong}" for wrong in part.wrong]


def _counts(layer: str, node: ViewNode, truth: Truth) -> bool:
    if layer == "stage":
        return node.op == "conv" and node.name in truth
    if layer == "fusion":
        return True
    return node.op not in PLUMBING or node.op in _BUT_OF.get(truth.get(node.name, ("",))[0], ())


def score(regions: Iterable[tuple[str, tuple[str, ...]]], truth: Truth, counted: frozenset[str],
          kinds: frozenset[str]) -> Score:
    """Compare.

    Args:  regions: (kind, node names).  truth: node name -> (kind, instance).  counted: nodes that compute; the others
           (views, conversions) say nothing about a region.  kinds: those that truth knows.
    """
    result = Score({kind: Tally() for kind in kinds})
    instances: dict[Key, set[str]] = {}
    for name, key in truth.items():
        if name in counted:
            instances.setdefault(key, set()).add(name)
    hit: set[Key] = set()
    for kind, names in regions:
        if kind not in kinds:
            continue
        inside = [name for name in names if name in counted]
        votes = Counter(truth[name] for name in inside if name in truth)
        best: tuple[Key | None, int] = votes.most_common(1)[0] if votes else (None, 0)
        result.kinds[kind].predicted += 1
        if best[0] is not None and best[0][0] == kind and best[1] * 2 >= sum(votes.values()):
            result.kinds[kind].right += 1
            hit.add(best[0])
        else:
            result.wrong.append(f"not a {kind}: {names[0]}..{names[-1]} is {best[0]}")
    for key in instances:
        if key[0] in kinds:
            result.kinds[key[0]].true += 1
            result.kinds[key[0]].found += key in hit
            if key not in hit:
                result.wrong.append(f"missed {key[0]} {key[1]}: {sorted(instances[key])[:4]}")
    return result
