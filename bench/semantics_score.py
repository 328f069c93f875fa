"""Predicted regions against true ones: precision and recall per kind.

A predicted region is right if most of its computing nodes, of those that truth puts into a region at all, lie in one
true region of its kind. A true region is found if a right prediction lies in it.
"""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from bench.semantics_truth import Key


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


def score(regions: Iterable[tuple[str, tuple[str, ...]]], truth: Mapping[str, Key], counted: frozenset[str],
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
