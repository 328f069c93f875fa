"""The classifier: examples from graphs and truth, training, and its accuracy on families that it never saw.

    python tools/train_classifier.py          trains the one that ships

An example is one node that computes: what the classifier sees of it, what truth says, and what the rules said. Nodes
of one graph that look and are the same count once.
"""
from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from bench.harness import Case, Series, Target
from bench.semantics_held_out import HELD_OUT
from bench.semantics_samples import Sample
from bench.semantics_score import PLUMBING
from bench.semantics_truth import LAYERS, optimizer_truth, truths_of
from genie_dynamo.passes.semantics.annotate import Annotator
from genie_dynamo.passes.semantics.learned.features import Array, describe
from genie_dynamo.passes.semantics.learned.network import Network, train
from genie_dynamo.passes.semantics.learned.opinion import ASKED, SURE

KINDS = ("", *sorted(LAYERS["leaf"]), "conv_stage")


@dataclass(frozen=True, slots=True, kw_only=True)
class Examples:
    """N nodes. Shapes: features (N, NUM_FEATURES), the others (N); truth and rules are indices into KINDS."""

    features: Array
    truth: NDArray[np.int64]
    rules: NDArray[np.int64]
    asked: NDArray[np.bool_]           # the op is one that the classifier is asked about
    family: NDArray[np.str_]
    held_out: NDArray[np.bool_]

    def only(self, rows: NDArray[np.bool_]) -> Examples:
        return Examples(**{name: getattr(self, name)[rows] for name in self.__slots__})


def examples_of(samples: Iterable[Sample]) -> Iterator[Examples]:
    """The examples of each sample; of one with labels, only the loss, since the rest stands without labels too."""
    for sample in samples:
        truths = optimizer_truth(sample.origins) if sample.form == "optimizer" else \
            truths_of(sample.origins, sample.modalities)
        truth = {**truths["stage"], **truths["leaf"]}
        view = sample.view(False)
        graph, _ = Annotator(names=False, classifier=None).annotate_view(view)
        rules: dict[str, str] = {}
        for region in sorted(graph.regions, key=lambda r: r.kind != "conv_stage"):
            if region.trusted and region.kind in KINDS:
                rules.update(dict.fromkeys(region.nodes, region.kind))
        nodes = [n for n in view.nodes if n.kind == "call" and n.op not in PLUMBING and (
            sample.form != "labelled" or truth.get(n.name, ("",))[0] == "loss")]
        features = describe(view, nodes)
        once = {(features[i].tobytes(), truth.get(n.name, ("",))[0], rules.get(n.name, "")): i
                for i, n in enumerate(nodes)}
        rows = sorted(once.values())
        kinds = [truth.get(nodes[i].name, ("",))[0] for i in rows]
        yield Examples(
            features=features[rows], truth=np.array([_number(kind) for kind in kinds], np.int64),
            rules=np.array([_number(rules.get(nodes[i].name, "")) for i in rows], np.int64),
            asked=np.array([nodes[i].op in ASKED for i in rows], np.bool_),
            family=np.array([sample.family] * len(rows)),
            held_out=np.array([sample.subject in HELD_OUT] * len(rows), np.bool_))


def _number(kind: str) -> int:
    return KINDS.index(kind) if kind in KINDS else 0


def joined(parts: Iterable[Examples]) -> Examples:
    found = list(parts)
    return Examples(**{name: np.concatenate([getattr(part, name) for part in found])
                       for name in Examples.__slots__})


def trained(examples: Examples) -> Network:
    return train(examples.features, examples.truth, KINDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """Shares of nodes that are right: of all, and of those whose op makes a region and that no rule claims."""

    family: str
    num: int
    network: float
    rules: float
    unclaimed: int
    truly_none: float
    said: int                          # of the unclaimed: the network is sure of a kind
    said_right: int
    missed: int                        # of the unclaimed: truth has a kind

    def __str__(self) -> str:
        return (f"{self.family:<14}{self.num:>7}{self.network:>9.3f}{self.rules:>8.3f}{self.unclaimed:>11}"
                f"{self.truly_none:>12.3f}{self.said:>7}{self.said_right:>7}{self.missed:>8}")


HEADER = (f"{'left out':<14}{'nodes':>7}{'network':>9}{'rules':>8}{'unclaimed':>11}{'truly none':>12}{'said':>7}"
          f"{'right':>7}{'missed':>8}")


def leave_one_out(examples: Examples) -> list[Row]:
    """Each family by a network that was trained on the others; the held-out architectures by one on all tuned ones."""
    rows = []
    for family in sorted(set(examples.family.tolist())):
        out = (examples.family == family) & ~examples.held_out
        rows.append(_row(family, trained(examples.only(~examples.held_out & ~out)), examples.only(out)))
    if examples.held_out.any():
        tuned = trained(examples.only(~examples.held_out))
        rows.append(_row("(held out)", tuned, examples.only(examples.held_out)))
    return rows


def _row(family: str, network: Network, out: Examples) -> Row:
    table = network.probabilities(out.features)
    kind = table.argmax(axis=1)
    unclaimed = out.asked & (out.rules == 0)
    said = unclaimed & (kind != 0) & (table.max(axis=1) >= SURE)
    return Row(family=family, num=len(out.truth), network=float(np.mean(kind == out.truth)),
               rules=float(np.mean(out.rules == out.truth)), unclaimed=int(unclaimed.sum()),
               truly_none=float(np.mean(out.truth[unclaimed] == 0)) if unclaimed.any() else 1.0, said=int(said.sum()),
               said_right=int(np.sum(kind[said] == out.truth[said])), missed=int(np.sum(unclaimed & (out.truth != 0))))


def classifier_case(examples: Examples) -> Case:
    """The table. No target: what it shows decides how the answers are used, which the README says."""
    rows: Sequence[Row] = leave_one_out(examples)
    said, right = sum(row.said for row in rows), sum(row.said_right for row in rows)
    target = Target(name="classifier: wrong where it is sure and no rule claims", limit=0.35, unit="share",
                    value=1 - right / said if said else 0.0, terms={"said": said, "right": right})
    return Case(bench="semantics", title="classifier, leaving out one family at a time", threads=1, pinned=False,
                notes=(HEADER, *map(str, rows)), targets=(target,),
                series={"wrong nodes": Series(unit="share", rounds=(tuple(1 - row.network for row in rows),))})
