"""How a caller makes a value of a graph from what it holds already: a short recipe of ops that only move data.

    cat([cache, new], -2)                         -> the rows `new` travel, the caller appends them
    index_copy(cache, 2, position, new)           -> `position` and `new` travel, the caller writes them
    slice(cat([window, new], -2), 2, -7, end)     -> `new` travels, the caller appends and crops

The ops are those of `MOVES`: they copy elements and compute nothing, so what the caller makes has the bits that the
worker's value has. Arguments are plain data:

    None, bool, int, float     themselves
    ("input", name)            an input of the graph, as it was before the call
    ("piece", name)            a value that a fragment makes and that travels, a tensor or a number
    ("step", k)                what step k of the recipe made
    ("list", ...)              a list of these
"""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

VIEWS: frozenset[str] = frozenset({
    "aten.alias.default", "aten.slice.Tensor", "aten.select.int", "aten.transpose.int", "aten.permute.default",
    "aten.view.default", "aten.unsqueeze.default", "aten.squeeze.dim", "aten.squeeze.dims", "aten.expand.default",
})
"""Ops whose result is a view of their first argument."""

WRITES: dict[str, str] = {
    "aten.copy.default": "copy", "aten.index_copy.default": "index_copy", "aten.index_put.default": "index_put",
    "aten.slice_scatter.default": "slice_scatter", "aten.select_scatter.default": "select_scatter",
}
"""Ops whose result is their first argument with some of it overwritten."""

MOVES: frozenset[str] = VIEWS | frozenset(WRITES) | frozenset({
    "aten.cat.default", "aten.clone.default", "aten.roll.default", "aten.index_select.default",
})
"""Every op that a recipe may use."""

INDEXED: dict[str, int] = {"aten.index_copy.default": 2, "aten.index_put.default": 1}
"""Writes at indices, with the argument that holds them: where one occurs twice, which row wins is not defined."""

_REFERENCES = ("input", "piece", "step")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One op of a recipe."""

    op: str
    args: tuple[Any, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebuild:
    """The recipe of one value; its last step is the value."""

    value: str
    steps: tuple[Step, ...]

    def names(self, kind: str) -> tuple[str, ...]:
        """What the recipe takes: of kind "input" or "piece", each once, in order."""
        found = (ref[1] for step in self.steps for ref in references(step.args) if ref[0] == kind)
        return tuple(dict.fromkeys(found))

    def __str__(self) -> str:
        return "; ".join(f"%{k} = {step.op.split('.')[1]}({', '.join(map(_show, step.args))})"
                         for k, step in enumerate(self.steps))


def references(args: Any) -> Iterator[tuple[str, Any]]:
    """The references among arguments, also in lists."""
    for arg in args:
        if type(arg) is tuple and arg and arg[0] in _REFERENCES:
            yield arg
        elif type(arg) is tuple and arg and arg[0] == "list":
            yield from references(arg[1:])


def recipe_problems(recipe: Rebuild) -> Iterator[str]:
    """Every rule that a recipe breaks by itself."""
    if not recipe.steps:
        yield f"the recipe of {recipe.value} has no steps"
    for number, step in enumerate(recipe.steps):
        if step.op not in MOVES:
            yield f"the recipe of {recipe.value} uses {step.op}, which does more than move data"
        for arg in step.args:
            if not _is_plain(arg):
                yield f"the recipe of {recipe.value} has an argument that is not plain data: {arg!r:.60}"
        for kind, target in references(step.args):
            if kind == "step" and not (type(target) is int and 0 <= target < number):
                yield f"step {number} of the recipe of {recipe.value} reads step {target!r:.20}"


def _is_plain(arg: Any) -> bool:
    if type(arg) is not tuple:
        return arg is None or isinstance(arg, bool | int | float)
    if len(arg) == 2 and arg[0] in ("input", "piece"):
        return type(arg[1]) is str
    if len(arg) == 2 and arg[0] == "step":
        return type(arg[1]) is int
    return bool(arg) and arg[0] == "list" and all(map(_is_plain, arg[1:]))


def _show(arg: Any) -> str:
    if type(arg) is not tuple:
        return repr(arg)
    if arg[0] == "list":
        return f"[{', '.join(map(_show, arg[1:]))}]"
    return f"%{arg[1]}" if arg[0] == "step" else str(arg[1])
