"""Regions, phase, modality and workload against ground truth, over architectures; and how pass time grows with a graph.

Accuracy: every architecture in three captures, with module paths and names and without. Error rates are what the
targets bound: 1 - precision and 1 - recall per kind.
"""
from __future__ import annotations

import contextlib
import io
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import nn

from bench.harness import Case, Series, Settings, Target
from bench.semantics_held_out import HELD_OUT
from bench.semantics_score import Tally, score
from bench.semantics_truth import TruthNode, truth_of
from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.semantics.annotate import Annotator
from genie_dynamo.passes.semantics.reading import read_graph
from genie_dynamo.passes.semantics.view import GraphView, ViewNode
from tests.models import architectures, handwritten
from tests.models.captures import Capture, compiled_captures, frames_of, modules_of, recorded_capture

LIMIT_ERROR = 0.05
LIMIT_GPT2_S = 0.1
LIMIT_JSON_S = 1e-3
KINDS = frozenset({
    "attention", "kv_cache", "mlp", "gated_mlp", "moe_router", "moe_experts", "embedding", "norm", "positional",
    "logits_head", "conv_stage", "patch_embedding", "pooling", "state_space", "recurrent"})
_WORKLOAD = {"decoder": "llm", "encoder": "llm", "seq2seq": "llm", "moe": "llm", "state_space": "llm",
             "vision": "vision", "audio": "audio", "multimodal": "multimodal"}
_MODALITIES = {"llm": {"text"}, "vision": {"vision"}, "audio": {"audio"}, "multimodal": {"text", "vision"},
               "recsys": {"tabular"}, "unknown": {"tabular"}}
_KEEPS_INSIDE = ("recurrent_gemma",)       # whose modules hold the cache, so that no output shows it
# Ops that place, mask or convert: they lie between regions, and say nothing about them.
_PLUMBING = frozenset({
    "arange", "zeros", "ones", "tensor", "new_ones", "le", "ge", "gt", "lt", "eq", "and", "or", "not", "cat", "copy",
    "_assert_scalar", "scalar_tensor", "full", "_log_api_usage_once", "_local_scalar_dense", "all", "index",
    "ones_like", "zeros_like", "empty", "cumsum", "sum", "where", "view", "transpose", "expand", "unsqueeze",
    "squeeze", "identity", "cast", "item", "dropout", "chunk", "select", "slice", "repeat", "roll", "pad"})


@dataclass(slots=True)
class Outcome:
    """Sums over architectures of one capture, with or without names."""

    kinds: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    graphs: int = 0
    wrong_workload: list[str] = field(default_factory=list)
    wrong_modality: list[str] = field(default_factory=list)
    wrong_phase: list[str] = field(default_factory=list)
    silent: list[str] = field(default_factory=list)
    regions: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class Subject:
    """A model, one call, and what is true of it as a whole."""

    name: str
    model: nn.Module
    inputs: Mapping[str, Any]
    workload: str
    modalities: frozenset[str]


def subjects(names: tuple[str, ...] = ()) -> Iterator[Subject]:
    """The architectures, built one at a time."""
    known = architectures.ARCHITECTURES
    for name in names or (*known, *handwritten.MODELS):
        if name in HELD_OUT:
            with mock.patch.dict(known, HELD_OUT):
                model, inputs = architectures.build(name)
            workload = _WORKLOAD[HELD_OUT[name].kind]
        elif name in known:
            model, inputs = architectures.build(name)
            workload = _WORKLOAD[known[name].kind]
        else:
            model, inputs = handwritten.build(name)
            workload = handwritten.MODELS[name][2]
        modalities = _MODALITIES[workload] | ({"text"} if "decoder_input_ids" in inputs else set())
        yield Subject(name=name, model=model, inputs=inputs, workload=workload, modalities=frozenset(modalities))


def evaluate(subject: Subject, outcomes: Mapping[tuple[str, bool], Outcome]) -> None:
    """Add one subject's three captures to the sums."""
    with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()), torch.no_grad():
        warnings.simplefilter("ignore")
        captures = [*compiled_captures(subject.model, subject.inputs),
                    recorded_capture(subject.model, subject.inputs, {"": subject.model})]
        outputs = subject.model(**subject.inputs)
    keeps = subject.name in _KEEPS_INSIDE or any(
        getattr(outputs, name, None) is not None for name in ("past_key_values", "cache_params"))
    for capture in captures:
        truth = truth_by_node(capture)
        for named in (True, False):
            view = read_graph(capture.gm, roles=capture.roles, names=named)
            graph, _ = Annotator(names=named).annotate_view(view)
            outcome = outcomes[capture.kind, named]
            _compare(subject, capture, view, graph, truth, outcome)
            _compare_whole(subject, graph, "prefill" if keeps else "forward", outcome)


def truth_by_node(capture: Capture) -> dict[str, tuple[str, str]]:
    """Node name -> (kind, instance), from module structure alone."""
    stacks = {node.name: modules_of(node) for node in capture.gm.graph.nodes if node.op.startswith("call")}
    children: dict[str, set[str]] = defaultdict(set)
    for stack in stacks.values():
        for path, _ in stack:
            parent, _, leaf = path.rpartition(".")
            children[parent].add(leaf)
    found = {}
    known = {path: sorted(names) for path, names in children.items()}
    for node in capture.gm.graph.nodes:
        if node.name not in stacks:
            continue
        frames = frames_of(node)
        key = truth_of(TruthNode(node.name, stacks[node.name], tuple(name for name, _ in frames),
                                 frames[-1][1] if frames else ""), known)
        if key is not None:
            found[node.name] = key
    return found


def _compare(subject: Subject, capture: Capture, view: GraphView, graph: SemanticGraph,
             truth: Mapping[str, tuple[str, str]], outcome: Outcome) -> None:
    counted = frozenset(
        node.name for node in view.nodes if node.kind == "call" and (
            node.op not in _PLUMBING or (truth.get(node.name, ("",))[0] in ("kv_cache", "positional")
                                         and node.op in ("cat", "copy", "index", "cumsum"))))
    regions = [(region.kind, region.nodes) for region in graph.regions if region.kind != "conv_stage"]
    stages = [(region.kind, region.nodes) for region in graph.regions if region.kind == "conv_stage"]
    leaves = score(regions, truth, counted, KINDS - {"conv_stage"})
    convolutions = frozenset(node.name for node in view.by_op.get("conv", ()) if node.name in counted)
    true_stages = _stage_truth(capture)
    # Where no class says what a stage is, stages are not judged.
    whole = score(stages if true_stages else (), true_stages, convolutions & true_stages.keys(),
                  frozenset({"conv_stage"}))
    for part in (leaves, whole):
        for kind, tally in part.kinds.items():
            outcome.kinds[kind].add(tally)
        outcome.regions += [f"{subject.name} ({capture.kind}): {wrong}" for wrong in part.wrong]


def _stage_truth(capture: Capture) -> dict[str, tuple[str, str]]:
    """Stages of networks whose classes say where one begins; a level of a neck or head is one by its size."""
    found = {}
    for node in capture.gm.graph.nodes:
        value = node.meta.get("val", node.meta.get("example_value"))
        for path, name in modules_of(node):
            if name in ("ConvStage", "ResNetStage", "ResNetEmbeddings", "ConvNextStage"):
                found[node.name] = ("conv_stage", path)
            elif name in ("Neck", "DetectionHead") and isinstance(value, torch.Tensor):
                found[node.name] = ("conv_stage", f"{path} {tuple(value.shape[2:])}")
    return found


def _compare_whole(subject: Subject, graph: SemanticGraph, phase: str, outcome: Outcome) -> None:
    outcome.graphs += 1
    if graph.workload != subject.workload:
        outcome.wrong_workload.append(f"{subject.name}: {graph.workload}, not {subject.workload}")
        if not graph.warnings:
            outcome.silent.append(subject.name)
    if set(graph.modalities) != subject.modalities:
        outcome.wrong_modality.append(f"{subject.name}: {graph.modalities}")
    if graph.phase != phase:
        outcome.wrong_phase.append(f"{subject.name}: {graph.phase}, not {phase}")


# ---------------------------------------------------------------- time
def synthetic(num_nodes: int) -> GraphView:
    """Decoder layers in ATen form, until the graph has so many nodes."""
    nodes: list[ViewNode] = []

    def add(op: str, *inputs: ViewNode, kind: str = "call", shape: tuple[int, ...] = (2, 12, 32),
            args: tuple[Any, ...] = ()) -> ViewNode:
        node = ViewNode(index=len(nodes), name=f"n{len(nodes)}", kind=kind, op=op, target=op, args=(*inputs, *args),
                        shape=shape, hint=shape, dtype="float32")
        nodes.append(node)
        return node

    x = add("input", kind="input")
    while len(nodes) < num_nodes:
        x = _layer(add, x)
    return GraphView(nodes)


def _layer(add: Callable[..., ViewNode], x: ViewNode) -> ViewNode:
    def linear(value: ViewNode) -> ViewNode:
        weight = add("parameter", kind="input", shape=(32, 32))
        return add("view", add("matmul", add("view", value), add("transpose", weight)))

    normed = add("layer_norm", x)
    q, k, v = (add("transpose", add("view", linear(normed), shape=(2, 12, 4, 8)), shape=(2, 4, 12, 8))
               for _ in range(3))
    scores = add("mul", add("matmul", q, add("transpose", k), shape=(2, 4, 12, 12)), shape=(2, 4, 12, 12))
    out = add("matmul", add("softmax", scores, shape=(2, 4, 12, 12)), v, shape=(2, 4, 12, 8))
    x = add("add", x, linear(add("view", add("transpose", out))))
    return add("add", x, linear(add("gelu", linear(add("layer_norm", x)))))


def _timed(call: Callable[[], object], samples: int) -> Series:
    call()
    times = []
    for _ in range(samples):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return Series(unit="s", rounds=(tuple(times),))


def _time_case(settings: Settings) -> Case:
    from bench.workloads import gpt2

    model = gpt2()
    ids = torch.zeros(1, 128, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captures = compiled_captures(model, {"input_ids": ids})
    samples = 3 if settings.quick else 10
    series = {}
    annotator = Annotator()
    for capture in captures:
        num_nodes = len(capture.gm.graph.nodes)
        series[f"GPT-2 small, {capture.kind}, {num_nodes} nodes"] = _timed(
            lambda capture=capture: annotator.annotate(capture.gm, roles=capture.roles), samples)
    slowest = max(s.median for s in series.values())
    graph = annotator.annotate(captures[0].gm, roles=captures[0].roles)
    series["to_json"] = _timed(graph.to_json, 50)
    sizes = (1_000, 10_000) if settings.quick else (1_000, 10_000, 30_000, 100_000)
    per_node = []
    for size in sizes:
        samples = 1 if size > 10_000 else 3
        views = [synthetic(size) for _ in range(samples + 1)]
        curve = _timed(lambda views=views: annotator.annotate_view(views.pop()), samples)
        series[f"synthetic decoder, {size} nodes"] = curve
        per_node.append(curve.median / size)
    growth = per_node[-1] / per_node[0]
    return Case(
        bench="semantics", title="time of all patterns (CPU time of the thread)", threads=1, pinned=False,
        series=series, targets=(
            Target(name="GPT-2 small, all patterns", value=slowest, limit=LIMIT_GPT2_S, unit="s", terms={}),
            Target(name="GPT-2 small, to_json", value=series["to_json"].median, limit=LIMIT_JSON_S, unit="s", terms={}),
            Target(name=f"time per node, {sizes[-1]} against {sizes[0]} nodes", value=growth, limit=2.0, unit="x",
                   terms={"first": per_node[0], "last": per_node[-1]})))


# ---------------------------------------------------------------- the table
def _accuracy_case(kind: str, named: bool, outcome: Outcome) -> Case:
    notes = [f"{'kind':<18}{'precision':>10}{'recall':>8}{'found':>7}{'true':>6}"]
    targets = []
    for name in sorted(outcome.kinds):
        tally = outcome.kinds[name]
        precision, recall = tally.precision, tally.recall
        notes.append(f"{name:<18}{_share(precision):>10}{_share(recall):>8}{tally.predicted:>7}{tally.true:>6}")
        if precision is None or recall is None:
            continue
        targets.append(Target(name=f"{kind}, {name}: error (worse of precision and recall)", unit="share",
                              value=1 - min(precision, recall), limit=LIMIT_ERROR, terms={
                                  "precision": precision, "recall": recall}))
    for what, wrong in (("workload", outcome.wrong_workload), ("modality", outcome.wrong_modality),
                        ("phase", outcome.wrong_phase)):
        targets.append(Target(name=f"{kind}, {what}: error", value=len(wrong) / outcome.graphs, limit=LIMIT_ERROR,
                              unit="share", terms={"wrong": len(wrong), "graphs": outcome.graphs}))
        notes += [f"wrong {what}: {line}" for line in wrong]
    targets.append(Target(name=f"{kind}, architectures wrong without a warning", value=len(outcome.silent), limit=0,
                          unit="x", terms={}))
    notes += [f"wrong: {line}" for line in outcome.regions]
    errors = [t.value for t in targets if t.unit == "share"]
    title = f"{kind} capture, {'with' if named else 'without'} names, {outcome.graphs} architectures"
    return Case(bench="semantics", title=title, threads=1, pinned=False, notes=tuple(notes), targets=tuple(targets),
                series={"errors (all kinds)": Series(unit="share", rounds=(tuple(errors),))})


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def accuracy(names: tuple[str, ...] = ()) -> dict[tuple[str, bool], Outcome]:
    """Outcomes by (capture, with names)."""
    outcomes: dict[tuple[str, bool], Outcome] = defaultdict(Outcome)
    for subject in subjects(names):
        evaluate(subject, outcomes)
    return outcomes


def run(settings: Settings) -> Iterator[Case]:
    torch.set_num_threads(1)
    names = ("gpt2", "bert", "resnet", "clip", "whisper", "mixtral", "dlrm", "detector") if settings.quick else ()
    for (kind, named), outcome in accuracy(names).items():
        yield _accuracy_case(kind, named, outcome)
    for (kind, named), outcome in accuracy(tuple(HELD_OUT)[::8 if settings.quick else 1]).items():
        yield _accuracy_case(f"held out, {kind}", named, outcome)
    yield _time_case(settings)

