"""Costs of a graph's nodes, and their values for one call's sizes."""
from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from genie_dynamo.core.errors import CostError
from genie_dynamo.passes.costs.expressions import CompiledExpressions, Number, compile_expressions
from genie_dynamo.passes.costs.lifetimes import Span
from genie_dynamo.passes.costs.registry import MATRIX_FAMILIES
from genie_dynamo.passes.costs.sizes import Size

Array = npt.NDArray[np.float64]

QUANTITIES = ("flops", "bytes_read", "bytes_written", "output_bytes", "allocated_bytes", "workspace_bytes",
              "memory_bytes")


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeCost:
    """What one node does. Quantities are numbers or sympy expressions over the graph's symbols.

    flops are multiply-adds, counted as two, where `is_matrix`; else elementwise operations, in adds.
    """

    name: str
    op: str
    family: str
    dtype: str                   # what it computes in ("float32"); "" without tensors
    flops: Size
    bytes_read: Size             # of memory; a row that is not looked up is not read
    bytes_written: Size
    output_bytes: Size           # what moves when its results are sent
    allocated_bytes: Size        # new memory of its results: 0 for views
    workspace_bytes: Size        # memory that it needs only while it runs
    memory_bytes: Size           # arguments, new results and workspace: what there must be at once to run it
    has_formula: bool            # False: costed by the default, one operation per element of the result
    assumption: str = ""

    @property
    def is_matrix(self) -> bool:
        return self.family in MATRIX_FAMILIES


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """Sums over a graph for one call, but for peak_bytes."""

    flops: float
    matrix_flops: float          # what torch.utils.flop_counter counts
    bytes_read: float
    bytes_written: float
    input_bytes: float
    peak_bytes: float            # the most memory that values of the graph take at once, without its inputs

    @property
    def intensity(self) -> float:
        """Operations per byte moved."""
        moved = self.bytes_read + self.bytes_written
        return self.flops / moved if moved else 0.0


class GraphCosts:
    """Costs of all computing nodes of a graph, in topological order."""

    def __init__(self, nodes: Sequence[NodeCost], input_bytes: Size, origins: Mapping[str, tuple[str, int]],
                 spans: Sequence[Span]) -> None:
        self.nodes: Mapping[str, NodeCost] = {cost.name: cost for cost in nodes}
        self.input_bytes = input_bytes
        self._origins = dict(origins)
        self._spans = tuple(spans)

    def __iter__(self) -> Iterator[NodeCost]:
        return iter(self.nodes.values())

    def __len__(self) -> int:
        return len(self.nodes)

    def without(self, names: Set[str]) -> GraphCosts:
        """The same but for some nodes; memory over time is then not known."""
        left = [cost for cost in self if cost.name not in names]
        return GraphCosts(left, self.input_bytes, self._origins, ()) if names else self

    @property
    def symbols(self) -> tuple[str, ...]:
        """Symbols whose values an evaluation needs."""
        return self._sums.symbols

    @property
    def without_formula(self) -> Mapping[str, int]:
        """Ops that were costed by the default, with how many nodes."""
        return Counter(cost.op for cost in self if not cost.has_formula)

    @property
    def assumptions(self) -> Mapping[str, str]:
        """What formulas had to suppose, by node."""
        return {cost.name: cost.assumption for cost in self if cost.assumption}

    def totals(self, symbol_values: Mapping[str, int] | None = None) -> Totals:
        """Sums for one call.

        Args:   symbol_values: by symbol name; see `bind_symbols`.
        Raises: CostError that names node and dimension where a size is unknown.
        """
        return Totals(**dict(zip(_SUMS, self._evaluate(self._sums, symbol_values), strict=True)),
                      peak_bytes=self._peak_bytes(symbol_values))

    def values(self, symbol_values: Mapping[str, int] | None = None) -> dict[str, Array]:
        """Every quantity (see QUANTITIES) as an array over the nodes. Raises: as totals."""
        compiled, index = self._per_node
        unique = np.array(self._evaluate(compiled, symbol_values), dtype=np.float64)
        return {name: unique[positions] for name, positions in index.items()}

    def _evaluate(self, compiled: CompiledExpressions, values: Mapping[str, int] | None) -> list[Number]:
        try:
            return compiled(values or {})
        except KeyError:
            symbol = next(s for s in compiled.symbols if s not in (values or {}))
            node, dim = self._origins.get(symbol, ("", -1))
            where = f"size of dimension {dim} of node {node}" if dim >= 0 else f"value of node {node}"
            raise CostError(f"the {where} is {symbol}, which has no value; give it in symbol_values",
                            node=node, dim=dim, symbol=symbol) from None

    @functools.cached_property
    def _sums(self) -> CompiledExpressions:
        matrix = sum(c.flops for c in self if c.is_matrix)
        return compile_expressions([
            sum(c.flops for c in self), matrix, sum(c.bytes_read for c in self), sum(c.bytes_written for c in self),
            self.input_bytes])

    @functools.cached_property
    def _per_node(self) -> tuple[CompiledExpressions, dict[str, npt.NDArray[np.intp]]]:
        unique: dict[Any, int] = {}
        index = {name: np.array([unique.setdefault(getattr(c, name), len(unique)) for c in self], dtype=np.intp)
                 for name in QUANTITIES}
        return compile_expressions(list(unique)), index

    @functools.cached_property
    def _memory(self) -> tuple[CompiledExpressions, npt.NDArray[np.intp], Array]:
        """Unique sizes; and which of them comes (1) or goes (-1), in the order in which that happens."""
        unique: dict[Any, int] = {}
        changes: list[tuple[int, int, int]] = []
        steps = [Span(at, at, cost.workspace_bytes) for at, cost in enumerate(self)
                 if not is_zero(cost.workspace_bytes)]
        for span in (*self._spans, *steps):
            number = unique.setdefault(span.size_bytes, len(unique))
            # What dies with one node goes before what the next node makes comes.
            changes += [(span.birth, 1, number), (span.death + 1, -1, number)]
        changes.sort()
        return (compile_expressions(list(unique)), np.array([number for _, _, number in changes], dtype=np.intp),
                np.array([change for _, change, _ in changes], dtype=np.float64))

    def _peak_bytes(self, symbol_values: Mapping[str, int] | None) -> float:
        compiled, numbers, changes = self._memory
        sizes = np.array(self._evaluate(compiled, symbol_values), dtype=np.float64)
        return float(np.cumsum(sizes[numbers] * changes).max()) if len(changes) else 0.0

    def __str__(self) -> str:
        rows = Counter(cost.family for cost in self)
        lines = [f"{'family':<22}{'nodes':>7}  flops"]
        lines += [f"{family:<22}{count:>7}  {sum(c.flops for c in self if c.family == family)}"
                  for family, count in rows.most_common()]
        lines += [f"no formula, costed by size: {op} ({count})" for op, count in self.without_formula.items()]
        lines += [f"{name}: {text}" for name, text in self.assumptions.items()]
        return "\n".join(lines)


_SUMS = ("flops", "matrix_flops", "bytes_read", "bytes_written", "input_bytes")


def is_zero(size: Size) -> bool:
    return isinstance(size, int) and size == 0
