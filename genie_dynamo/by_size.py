"""Micro-batches of a graph whose batch is a symbol: a graph for each size of the batch that comes.

Whether a batch can be cut, and where each part lies, depends on its size; so does what the stages take. A few sizes
have a plan of their own; calls of others run the symbolic graph, whole.
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.passes.costs.symbols import SymbolBinding
from genie_dynamo.passes.following import Homes
from genie_dynamo.passes.specialize import specialize

log = logging.getLogger(__name__)

MAX_SIZES = 8
"""Sizes that get a plan: each is a program more on the workers."""

Sizes = frozenset[tuple[str, int]]
Make = Callable[[fx.GraphModule, str, Homes], Callable[[list[Any]], Any]]
"""`make(graph for one size, its label, what its backward goes by)` -> the callable that runs it."""


class SizedHomes:
    """What the forward of each size tells the backward of that size."""

    def __init__(self) -> None:
        self._of: dict[Sizes, Homes] = {}

    def at(self, sizes: Mapping[str, int]) -> Homes:
        """Those of the forward whose symbols have these values, as far as both know them."""
        for known, homes in self._of.items():
            values = dict(known)
            if any(name in values for name in sizes) and all(values.get(n, size) == size for n, size in sizes.items()):
                return homes
        return self._of.setdefault(frozenset(sizes.items()), Homes())


class BySize:
    """Boxed callable: the graph for the sizes of each call.

    Args:  whole: the symbolic graph, for sizes beyond the first few.  refused: told why a call was not cut.
           strict: whether a size that cannot be had is an error.
    """

    def __init__(self, gm: fx.GraphModule, label: str, homes: SizedHomes, whole: Callable[[list[Any]], Any],
                 make: Make, refused: Callable[[str], None], strict: bool) -> None:
        self._boxed_call = True
        self._gm, self._label, self._homes = gm, label, homes
        self._whole, self._make, self._refused, self._strict = whole, make, refused, strict
        self._symbols = SymbolBinding(gm)
        self._of: dict[Sizes, Callable[[list[Any]], Any]] = {}

    def __call__(self, args: list[Any]) -> Any:
        values = self._symbols(args)
        sizes = frozenset(values.items())
        found = self._of.get(sizes)
        if found is None and len(self._of) < MAX_SIZES:
            found = self._of[sizes] = self._graph(values)
        if found is None:
            self._refused(f"{MAX_SIZES} sizes of the batch have a plan already")
            found = self._whole
        return found(args)

    def _graph(self, values: Mapping[str, int]) -> Callable[[list[Any]], Any]:
        shown = ", ".join(f"{name}={size}" for name, size in sorted(values.items()))
        try:
            return self._make(specialize(self._gm, values), f"{self._label} at {shown}", self._homes.at(values))
        except UnsupportedGraphError as error:
            if self._strict:
                raise
            log.warning("%s runs whole at %s: %s", self._label, shown, error)
            return self._whole
