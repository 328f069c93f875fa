"""Corrections of the roofline from observed times, per op.

    seconds ~ a * overhead + b * flops / rate + c * bytes / rate        a, b, c >= 0

Least squares of relative errors, so that a view counts as much as a product. Each op is drawn towards its family, and
each family towards its kind (matrix products, views, others), the more the fewer of it were observed. Rows
that fit badly count less in further rounds, because a time is disturbed more often upwards than downwards.
"""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from genie_dynamo.core.errors import CostError
from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.core.observations import Observation
from genie_dynamo.passes.costs.graph_costs import Array
from genie_dynamo.passes.costs.registry import MATRIX_FAMILIES

Coefficients = tuple[float, float, float]

_KINDS = ("matrix", "dispatch", "other")
_DISPATCH = frozenset({"view", "scalar", "empty"})
_PRIOR_ROWS = 2.0
_LEAST_SHARE = 1.0
_DOUBT_ROWS = 0.5           # of rows that say that a fit is off by a factor
_ROUNDS = 6
_MAX_COUNT = 8.0            # nodes that do the same were seen in one run: they say less than as many different ones
_OUTLIER = 0.5              # a row further off than this share of its time counts less
_MAX_ROWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CostFit:
    """Coefficients (of overhead, arithmetic, memory): by op; by family for other ops; by kind for other families."""

    ops: Mapping[str, Coefficients]
    families: Mapping[str, Coefficients]
    kinds: Mapping[str, Coefficients]
    num_rows: int

    def coefficients(self, op: str, family: str) -> Coefficients:
        return self.ops.get(op) or self.families.get(family) or self.kinds[_kind(family)]

    def seconds(self, ops: Sequence[tuple[str, str]], overhead_s: Array, arithmetic_s: Array, memory_s: Array) -> Array:
        """Seconds of nodes, given by (op, family), from the terms of estimate.py."""
        factors = np.array([self.coefficients(*each) for each in ops]).reshape(-1, 3)
        return factors[:, 0] * overhead_s + factors[:, 1] * arithmetic_s + factors[:, 2] * memory_s

    def to_json(self) -> dict[str, Any]:
        return {"ops": {name: list(row) for name, row in self.ops.items()},
                "families": {name: list(row) for name, row in self.families.items()},
                "kinds": {name: list(row) for name, row in self.kinds.items()}, "num_rows": self.num_rows}

    @classmethod
    def from_json(cls, data: Any) -> CostFit:
        """The inverse of to_json, for data of any origin. Raises: CostError where it is something else."""
        if not isinstance(data, Mapping) or set(data) != {"ops", "families", "kinds", "num_rows"}:
            raise CostError("a fit needs exactly: ops, families, kinds, num_rows")
        if not isinstance(data["kinds"], Mapping) or set(data["kinds"]) != set(_KINDS):
            raise CostError(f"a fit has coefficients for the kinds {', '.join(_KINDS)}")
        if type(data["num_rows"]) is not int or data["num_rows"] < 0:
            raise CostError("num_rows of a fit has to be a number of at least zero")
        return cls(ops=_table(data["ops"]), families=_table(data["families"]), kinds=_table(data["kinds"]),
                   num_rows=data["num_rows"])


def fit_costs(observations: Iterable[Observation], hardware: HardwareFacts) -> CostFit:
    """Coefficients from observations made on this hardware; others are left out.

    Raises: CostError where none is left.
    """
    rows = [row for row in observations
            if row.machine == hardware.name and row.num_threads == hardware.num_threads and row.seconds > 0]
    if not rows:
        raise CostError(f"there are no observations of {hardware.name} with {hardware.num_threads} thread(s) to fit")
    design = np.array([_terms(row, hardware) for row in rows])
    seconds, counts = np.array([row.seconds for row in rows]), np.array([float(row.count) for row in rows])
    families = np.array([row.family for row in rows])
    kinds: dict[str, Coefficients] = {}
    for kind in _KINDS:
        chosen = np.array([_kind(family) == kind for family in families])
        kinds[kind] = _solve(design[chosen], seconds[chosen], counts[chosen], (1.0, 1.0, 1.0))
    names, fitted = np.array([row.op for row in rows]), dict[str, Coefficients]()
    for family in map(str, np.unique(families)):
        chosen = families == family
        fitted[family] = _solve(design[chosen], seconds[chosen], counts[chosen], kinds[_kind(family)])
    ops: dict[str, Coefficients] = {}
    for op in map(str, np.unique(names)):
        chosen = names == op
        ops[op] = _solve(design[chosen], seconds[chosen], counts[chosen], fitted[str(families[chosen][0])])
    return CostFit(ops=ops, families=fitted, kinds=kinds, num_rows=len(rows))


def refine(fit: CostFit | None, observations: Iterable[Observation], hardware: HardwareFacts) -> CostFit | None:
    """A fit corrected for the ops that were observed on this hardware; what was not keeps its coefficients.

    Rows of other hardware, and of dtypes that it has no rate for, are left out. None: no fit, and no rows for one.
    """
    rows = [row for row in observations if row.machine == hardware.name and row.num_threads == hardware.num_threads
            and row.seconds > 0 and row.count > 0 and _has_rate(row, hardware)]
    if not rows:
        return fit
    if fit is None:
        return fit_costs(rows, hardware)
    ops = dict(fit.ops)
    by_op: dict[tuple[str, str], list[Observation]] = {}
    for row in rows:
        by_op.setdefault((row.op, row.family), []).append(row)
    for (op, family), own in by_op.items():
        design, seconds = np.array([_terms(row, hardware) for row in own]), np.array([row.seconds for row in own])
        counts = np.array([float(row.count) for row in own])
        believed = _scaled(fit.coefficients(op, family), design, seconds, counts)
        ops[op] = _solve(design, seconds, counts, believed)
    return CostFit(ops=ops, families=fit.families, kinds=fit.kinds, num_rows=fit.num_rows + len(rows))


def _scaled(prior: Coefficients, design: Array, seconds: Array, counts: Array) -> Coefficients:
    """The prior times what the rows say it is off by, less so where they are few.

    Without it rows that a prior misses by far would be taken for disturbed ones.
    """
    estimate = design @ np.array(prior)
    seen = estimate > 0
    if not seen.any():
        return prior
    weights = np.minimum(counts[seen], _MAX_COUNT)
    ratios = np.log(seconds[seen] / estimate[seen])
    order = np.argsort(ratios)
    middle = int(np.searchsorted(np.cumsum(weights[order]), weights.sum() / 2))
    factor = math.exp(float(ratios[order][middle]) * float(weights.sum() / (weights.sum() + _DOUBT_ROWS)))
    return prior[0] * factor, prior[1] * factor, prior[2] * factor


def _has_rate(row: Observation, hardware: HardwareFacts) -> bool:
    try:
        _terms(row, hardware)
    except CostError:
        return False
    return True


def _terms(row: Observation, hardware: HardwareFacts) -> tuple[float, float, float]:
    rate = hardware.matmul_rate if row.family in MATRIX_FAMILIES else hardware.elementwise_rate
    return (0.0 if row.op.startswith("python::") else hardware.op_overhead_s,
            row.flops / rate(row.dtype) if row.flops else 0.0,
            row.bytes_moved / hardware.memory_rate(row.bytes_moved) if row.bytes_moved else 0.0)


def _solve(design: Array, seconds: Array, counts: Array, prior: Coefficients) -> Coefficients:
    """Coefficients of relative least squares under a pull to the prior; none below zero."""
    if not len(seconds):
        return prior
    relative = design / seconds[:, None]
    # The pull has the size of a few typical rows, so that it only decides what the rows leave open. A part of a row's
    # time is at most all of it: what is more belongs to a coefficient that is small.
    share = np.sqrt(np.mean(np.minimum(relative, 1) ** 2, axis=0) + 1e-12)
    # Small ops say little of arithmetic and memory: what they leave open must not be stretched to large ones.
    share[1:] = np.maximum(share[1:], _LEAST_SHARE)
    pull = np.diag(np.sqrt(_PRIOR_ROWS) * share)
    goal = pull @ np.array(prior)
    weights = np.minimum(counts, _MAX_COUNT)
    best = np.array(prior)
    for _ in range(_ROUNDS):
        scaled = np.sqrt(weights)[:, None]
        best = _non_negative(np.vstack([relative * scaled, pull]), np.concatenate([scaled[:, 0], goal]))
        estimate = np.maximum(relative @ best, 0.05)
        misses = np.abs(np.log(estimate))
        # Divided by the estimate as well as by the time: else too low would count less than too high.
        weights = np.minimum(counts, _MAX_COUNT) * np.minimum(1, _OUTLIER / np.maximum(misses, 1e-9)) / estimate
    return float(best[0]), float(best[1]), float(best[2])


def _non_negative(matrix: Array, goal: Array) -> Array:
    """Least squares with no coefficient below zero: with three, all sets of those that are above are tried."""
    best, least = np.zeros(3), math.inf
    for size in (3, 2, 1):
        for columns in combinations(range(3), size):
            part, *_ = np.linalg.lstsq(matrix[:, columns], goal, rcond=None)
            if (part < 0).any():
                continue
            candidate = np.zeros(3)
            candidate[list(columns)] = part
            miss = float(np.sum((matrix @ candidate - goal) ** 2))
            if miss < least:
                best, least = candidate, miss
    return best


def _kind(family: str) -> str:
    return "matrix" if family in MATRIX_FAMILIES else "dispatch" if family in _DISPATCH else "other"


def _table(data: Any) -> dict[str, Coefficients]:
    if not isinstance(data, Mapping) or len(data) > _MAX_ROWS:
        raise CostError(f"coefficients of a fit are a table of at most {_MAX_ROWS} rows")
    for name, row in data.items():
        if type(name) is not str or not isinstance(row, list) or len(row) != 3 or not all(
                type(x) in (int, float) and math.isfinite(x) and x >= 0 for x in row):
            raise CostError(f"coefficients of {name!r:.40} have to be three numbers of at least zero")
    return {name: (float(row[0]), float(row[1]), float(row[2])) for name, row in data.items()}
