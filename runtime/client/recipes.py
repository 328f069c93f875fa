"""Recipes (core/rebuild.py) as functions: the caller makes a value from its own tensors and the rows that came."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from genie_dynamo.core.plan import Plan
from genie_dynamo.core.rebuild import INDEXED, VIEWS, WRITES, Rebuild, Step
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.copies import copied_in

Read = Callable[[Sequence[Any], Mapping[str, Any], list[Any]], Any]
"""`read(arguments of the call, pieces by name, what the steps so far have made)`: the value of one argument."""


class Append(NamedTuple):
    """`cat([input, piece], dim)`: the form of most caches."""

    source: int                        # position of the input
    piece: str
    dim: int


class Recipe:
    """One recipe, ready to be carried out.

    Args: target: position of the mutated input whose new content the value is; None for an output.
    """

    def __init__(self, recipe: Rebuild, plan: Plan, target: int | None) -> None:
        index_of = {name: index for index, name in enumerate(plan.inputs)}
        self.value = recipe.value
        self.text = str(recipe)
        self._steps = [(_resolve(step.op), [_reader(arg, index_of) for arg in step.args]) for step in recipe.steps]
        self._ends_in_view = recipe.steps[-1].op in VIEWS
        self._indices = [_reader(step.args[INDEXED[step.op]], index_of, recipe.steps) for step in recipe.steps
                         if step.op in INDEXED]
        self._write = _in_place(recipe, plan, target)
        self._append = _append(recipe, index_of)
        self._pieces = tuple(dict.fromkeys(name for step in recipe.steps for arg in step.args for name in _pieces(arg)))
        self._num_rows = 0                 # that the last call appended

    def applies(self, args: Sequence[Any], pieces: Mapping[str, Any]) -> bool:
        """Whether the result is defined to the bit: no index is written to twice."""
        for read in self._indices:
            index = read(args, pieces, [])
            for item in index if isinstance(index, list) else [index]:
                if item is not None and item.dtype != torch.bool and item.numel() > 1 \
                        and (item.unique().numel() != item.numel() or bool((item < 0).any() != (item < 0).all())):
                    return False        # -1 and the last row are one: signs that mix are not looked into
        return True

    def begin(self, args: Sequence[Any]) -> torch.Tensor | None:
        """What of the value can be made before anything has come: rows that the caller has, with room for the new ones.

        None where the value is not an append, or nothing tells yet how many rows one call brings.
        """
        if self._append is None or not self._num_rows:
            return None
        old = args[self._append.source]
        if not old.is_contiguous() or old.is_inference() or not -old.dim() <= self._append.dim < old.dim() \
                or not old.is_cpu or old.is_conj() or old.is_neg() or old._is_zerotensor():
            return None
        dim = self._append.dim
        shape = list(old.shape)
        shape[dim] += self._num_rows
        begun = torch.empty(shape, dtype=old.dtype, device="cpu")
        native.copy_rows(begun, 0, old, dim % old.dim())
        return begun

    def _complete(self, begun: torch.Tensor, args: Sequence[Any], pieces: Mapping[str, Any]) -> torch.Tensor | None:
        """Append what has come; None where it is not what was expected."""
        assert self._append is not None
        new, dim = pieces[self._append.piece], self._append.dim
        start = args[self._append.source].shape[dim]
        room = begun.narrow(dim, start, begun.shape[dim] - start)
        if new.dtype != begun.dtype or new.shape != room.shape:
            return None
        if new.is_contiguous() and not (new.is_conj() or new.is_neg()):
            native.copy_rows(begun, start, new, dim % new.dim())
        else:
            room.copy_(new)
        copied_in(new.nbytes)
        return begun

    def make(self, args: Sequence[Any], pieces: Mapping[str, Any],
             begun: torch.Tensor | None = None) -> torch.Tensor:
        """The value, in memory of its own. Args: begun: what `begin` has made of the same arguments."""
        if begun is not None and (made := self._complete(begun, args, pieces)) is not None:
            return made
        if self._append is not None:
            new = pieces[self._append.piece]
            self._num_rows = new.shape[self._append.dim] if new.dim() == args[self._append.source].dim() else 0
        made = self._run(self._steps, args, pieces)
        self._put_in_place(pieces)
        if self._ends_in_view:
            # As an output of its own: autograd, and who asks for its base, would take a view for something else.
            made = torch.empty(0, dtype=made.dtype, device="cpu").set_(
                made.untyped_storage(), made.storage_offset(), made.shape, made.stride())
        return made

    def write(self, target: torch.Tensor, args: Sequence[Any], pieces: Mapping[str, Any]) -> None:
        """Bring a mutated input to the value."""
        self._put_in_place(pieces)
        if self._write is None:
            target.copy_(self._run(self._steps, args, pieces))
            return
        made: list[Any] = []
        for function, readers in self._steps[:-1]:
            made.append(function(*[read(args, pieces, made) for read in readers]))
        self._write(target, *[read(args, pieces, made) for read in self._steps[-1][1][1:]])

    def _put_in_place(self, pieces: Mapping[str, Any]) -> None:
        """Count what came, and is copied to where it belongs by the steps."""
        copied_in(sum([pieces[name].nbytes for name in self._pieces if isinstance(pieces[name], torch.Tensor)]))

    @staticmethod
    def _run(steps: Sequence[tuple[Any, list[Read]]], args: Sequence[Any], pieces: Mapping[str, Any]) -> Any:
        made: list[Any] = []
        for function, readers in steps:
            made.append(function(*[read(args, pieces, made) for read in readers]))
        return made[-1]


def _append(recipe: Rebuild, index_of: Mapping[str, int]) -> Append | None:
    """The recipe as one append, where it is that."""
    (step, *more) = recipe.steps
    if more or step.op != "aten.cat.default":
        return None
    parts, dim = step.args[0], step.args[1] if len(step.args) > 1 else 0
    match parts:
        case ("list", ("input", str(name)), ("piece", str(piece))) if type(dim) is int:
            return Append(index_of[name], piece, dim)
    return None


def _pieces(arg: Any) -> Iterator[str]:
    """The names of the pieces that an argument reads."""
    if type(arg) is tuple and arg[0] == "piece":
        yield arg[1]
    elif type(arg) is tuple and arg[0] == "list":
        for item in arg[1:]:
            yield from _pieces(item)


def _resolve(op: str) -> Any:
    namespace, name, overload = op.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _reader(arg: Any, index_of: Mapping[str, int], steps: Sequence[Step] = ()) -> Read:
    """Args: steps: the recipe's, where a step has to be carried out again because none has been yet."""
    if type(arg) is not tuple:
        return lambda args, pieces, made: arg
    kind: str = arg[0]
    target: Any = arg[1] if len(arg) > 1 else None
    if kind == "input":
        index = index_of[target]
        return lambda args, pieces, made: args[index]
    if kind == "piece":
        return lambda args, pieces, made: pieces[target]
    if kind == "step" and steps:
        function = _resolve(steps[target].op)
        inner = [_reader(item, index_of, steps) for item in steps[target].args]
        return lambda args, pieces, made: function(*[read(args, pieces, made) for read in inner])
    if kind == "step":
        return lambda args, pieces, made: made[target]
    readers = [_reader(item, index_of, steps) for item in arg[1:]]
    return lambda args, pieces, made: [read(args, pieces, made) for read in readers]


def _in_place(recipe: Rebuild, plan: Plan, target: int | None) -> Callable[..., Any] | None:
    """The write that the last step stands for, where it writes into the target itself; None where it must be copied.

    What is written must not be a view of the target: memory would be read while it is overwritten.
    """
    last = recipe.steps[-1]
    if target is None or last.op not in WRITES or last.args[0] != ("input", plan.inputs[target]):
        return None
    if any(_views(argument, recipe.steps, plan.inputs[target]) for argument in last.args[1:]):
        return None
    return _WRITES[last.op]


def _views(argument: Any, steps: Sequence[Step], target: str) -> bool:
    """Whether an argument may share memory with the target."""
    if type(argument) is not tuple:
        return False
    if argument[0] == "list":
        return any(_views(item, steps, target) for item in argument[1:])
    if argument[0] == "step":
        step = steps[argument[1]]
        return step.op in VIEWS and _views(step.args[0], steps, target)
    return bool(argument[0] == "input")    # another input may be a view of the target's memory


def _write_slice(target: torch.Tensor, source: torch.Tensor, dim: int = 0, start: int | None = None,
                 end: int | None = None, step: int = 1) -> None:
    torch.ops.aten.slice.Tensor(target, dim, start, end, step).copy_(source)


_WRITES: dict[str, Callable[..., Any]] = {
    "aten.copy.default": lambda target, source, *_: target.copy_(source),
    "aten.index_copy.default": lambda target, dim, index, source: target.index_copy_(dim, index, source),
    "aten.index_put.default": lambda target, indices, values, *_: target.index_put_(indices, values),
    "aten.slice_scatter.default": _write_slice,
    "aten.select_scatter.default": lambda target, source, dim, index: target.select(dim, index).copy_(source),
}
