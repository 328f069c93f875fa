"""Regions, phase, modality and workload against ground truth, over architectures; the classifier.

Accuracy: every architecture in three captures, with module paths and names and without. Error rates are what the
targets bound: 1 - precision and 1 - recall per kind. What patterns were tuned with and what they never saw are
separate cases. A region below confidence 0.7 is not counted as found: it is treated as ordinary nodes.
"""
from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch

from bench.harness import Case, Series, Settings, Target
from bench.semantics_classifier import Examples, classifier_case, examples_of, joined
from bench.semantics_held_out import HELD_OUT
from bench.semantics_optimizers import HELD_OUT_OPTIMIZERS, OPTIMIZERS
from bench.semantics_samples import (
    DECODED,
    Sample,
    all_names,
    decode_samples,
    forward_samples,
    labelled_samples,
    optimizer_samples,
)
from bench.semantics_score import Outcome, evaluate

LIMIT_ERROR = 0.05
_QUICK = ("gpt2", "bert", "resnet", "clip", "whisper", "mixtral", "dlrm", "detector")


def samples(names: tuple[str, ...], *, decoded: tuple[str, ...] = (),
            optimizers: tuple[str, ...] = ()) -> Iterator[Sample]:
    """Every form of graph of these architectures."""
    yield from forward_samples(names)
    yield from labelled_samples(names)
    yield from decode_samples(decoded)
    yield from optimizer_samples(optimizers)


def accuracy(found: Iterable[Sample], examples: list[Examples] | None = None) -> dict[tuple[str, bool], Outcome]:
    """Outcomes by (capture, with names). `examples`: gets those for the classifier too."""
    outcomes: dict[tuple[str, bool], Outcome] = defaultdict(Outcome)
    for sample in found:
        evaluate(sample, outcomes)
        if examples is not None:
            examples += examples_of([sample])
    return outcomes


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
    for what, graphs in outcome.graphs.items():
        wrong = outcome.wrong[what]
        targets.append(Target(name=f"{kind}, {what}: error", value=len(wrong) / graphs, limit=LIMIT_ERROR,
                              unit="share", terms={"wrong": len(wrong), "graphs": graphs}))
        notes += [f"wrong {what}: {line}" for line in wrong]
    targets.append(Target(name=f"{kind}, graphs wrong without a warning", value=len(outcome.silent), limit=0,
                          unit="x", terms={}))
    notes += [f"without a warning: {line}" for line in outcome.silent]
    notes += [f"wrong: {line}" for line in outcome.regions]
    errors = [t.value for t in targets if t.unit == "share"]
    title = f"{kind} capture, {'with' if named else 'without'} names, {max(outcome.graphs.values(), default=0)} graphs"
    return Case(bench="semantics", title=title, threads=1, pinned=False, notes=tuple(notes), targets=tuple(targets),
                series={"errors (all kinds)": Series(unit="share", rounds=(tuple(errors),))})


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def run(settings: Settings) -> Iterator[Case]:
    torch.set_num_threads(1)
    quick = settings.quick
    examples: list[Examples] = []
    tuned = samples(_QUICK if quick else all_names(), decoded=DECODED[:2] if quick else DECODED,
                    optimizers=tuple(OPTIMIZERS)[:2] if quick else tuple(OPTIMIZERS))
    for (kind, named), outcome in accuracy(tuned, examples).items():
        yield _accuracy_case(kind, named, outcome)
    unseen = samples(tuple(HELD_OUT)[::16 if quick else 1],
                     optimizers=tuple(HELD_OUT_OPTIMIZERS)[:2 if quick else None])
    for (kind, named), outcome in accuracy(unseen, examples).items():
        yield _accuracy_case(f"held out, {kind}", named, outcome)
    yield classifier_case(joined(examples))
