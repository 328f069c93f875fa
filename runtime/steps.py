"""The steps of a flat plan: closures over register numbers, specialised by what a node's arguments look like."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from operator import getitem, itemgetter
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from genie_dynamo.core.allowlist import resolve
from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.fragment import Arg, Constant, Device, GraphSpec, NodeSpec, Op, Subgraph, Value

Step = Callable[[list[Any]], None]
Builder = Callable[[list[Any]], Any]
MakeSubgraph = Callable[[GraphSpec, torch.device, frozenset[str]], Callable[..., Any]]


def references(arg: Arg) -> tuple[int, ...]:
    """The values an argument refers to, in order, with repetitions."""
    return tuple(_references(arg))


def _references(arg: Arg) -> Iterator[int]:
    if isinstance(arg, Value):
        yield arg.index
    elif isinstance(arg, (list, tuple)):
        for item in arg:
            yield from _references(item)
    elif isinstance(arg, dict):
        for item in arg.values():
            yield from _references(item)
    elif isinstance(arg, slice):
        for item in (arg.start, arg.stop, arg.step):
            yield from _references(item)


_WORD_IS_GOOD = frozenset({"aten", "prims", "genie"})
"""Op libraries whose schemas are taken at their word where memory of another process is at stake."""


class Literals:
    """What of a graph is fixed: functions, constants, subgraphs and literal arguments, each with a register."""

    def __init__(self, spec: GraphSpec, device: torch.device, extra_namespaces: frozenset[str], *, first: int,
                 subgraph: MakeSubgraph) -> None:
        self.values: list[Any] = []
        self._first = first
        self._device = device
        self._namespaces = extra_namespaces
        self._constants = [constant.to_tensor(device) for constant in spec.constants]
        self._subgraphs = [subgraph(s, device, extra_namespaces) for s in spec.subgraphs]
        self._functions: dict[str, Callable[..., Any]] = {}

    def function(self, node: NodeSpec) -> Callable[..., Any]:
        """What the node calls.

        Raises: UnsupportedGraphError where this worker may not or cannot run it.
        """
        return self._resolve(node.target)

    def _resolve(self, target: str) -> Callable[..., Any]:
        function = self._functions.get(target)
        if function is None:
            function = self._functions[target] = resolve(target, self._namespaces)
            check_device(function, target, self._device)
        return function

    def writes(self, node: NodeSpec) -> bool:
        """Whether the node may write into one of its arguments."""
        function = self._functions[node.target]
        return isinstance(function, OpOverload) and function._schema.is_mutable

    def may_write(self, node: NodeSpec) -> bool:
        """The same where nobody's word is taken: ops of other libraries and higher-order ops may."""
        function = self._functions[node.target]
        if isinstance(function, OpOverload):
            return function._schema.is_mutable or function.namespace not in _WORD_IS_GOOD
        return isinstance(function, HigherOrderOperator)

    def literal(self, arg: Arg) -> Any:
        """An argument without values, as the op takes it."""
        if isinstance(arg, Constant):
            return self._constants[arg.index]
        if isinstance(arg, Subgraph):
            return self._subgraphs[arg.index]
        if isinstance(arg, Device):
            return self._device if arg is Device.WORKER else torch.device("meta")
        if isinstance(arg, Op):
            return self._resolve(arg.target)
        if isinstance(arg, list):
            return [self.literal(item) for item in arg]
        if isinstance(arg, tuple):
            return tuple(self.literal(item) for item in arg)
        if isinstance(arg, dict):
            return {key: self.literal(item) for key, item in arg.items()}
        if isinstance(arg, slice):
            return slice(self.literal(arg.start), self.literal(arg.stop), self.literal(arg.step))
        return arg

    def register(self, arg: Arg, registers: list[int]) -> int | None:
        """The register an argument can be read from as it is, or None where it must be built."""
        if isinstance(arg, Value):
            return registers[arg.index]
        if references(arg):
            return None
        self.values.append(self.literal(arg))
        return self._first + len(self.values) - 1

    def registers(self, args: Sequence[Arg], registers: list[int]) -> list[int] | None:
        """The registers of several arguments, or None where one of them must be built."""
        if any(not isinstance(arg, Value) and references(arg) for arg in args):
            return None
        return [register for arg in args if (register := self.register(arg, registers)) is not None]

    def builder(self, arg: Arg, registers: list[int]) -> Builder:
        """A function from registers to the argument."""
        register = self.register(arg, registers)
        if register is not None:
            return itemgetter(register)
        if isinstance(arg, (list, tuple)):
            return self._sequence(arg, registers)
        if isinstance(arg, dict):
            items = [(key, self.builder(item, registers)) for key, item in arg.items()]
            return lambda regs: {key: build(regs) for key, build in items}
        start, stop, step = (self.builder(part, registers) for part in (arg.start, arg.stop, arg.step))
        return lambda regs: slice(start(regs), stop(regs), step(regs))

    def output_builder(self, arg: Arg, registers: list[int]) -> Builder:
        """Like `builder`, for an output: a constant is copied, since whoever gets it may keep and update it."""
        if isinstance(arg, Constant):
            constant = self._constants[arg.index]
            return lambda _: constant.clone()
        return self.builder(arg, registers)

    def _sequence(self, arg: list[Arg] | tuple[Arg, ...], registers: list[int]) -> Builder:
        kind = type(arg)
        simple = self.registers(arg, registers)
        if simple is not None:
            if len(simple) == 1:
                (only,) = simple
                return (lambda regs: [regs[only]]) if kind is list else (lambda regs: (regs[only],))
            get = itemgetter(*simple)
            return (lambda regs: list(get(regs))) if kind is list else get
        builders = [self.builder(item, registers) for item in arg]
        return lambda regs: kind([build(regs) for build in builders])

    def describe(self, arg: Arg, values: list[Any], registers: list[int]) -> str:
        """An argument for an error message: shapes and dtypes of tensors, literals as they are."""
        if isinstance(arg, Value):
            return _describe(values[registers[arg.index]])
        if isinstance(arg, Constant):
            return _describe(self._constants[arg.index])
        if isinstance(arg, (list, tuple)):
            inside = ", ".join(self.describe(item, values, registers) for item in arg)
            return f"[{inside}]" if isinstance(arg, list) else f"({inside})"
        return f"{arg!r:.60}"


def _describe(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_describe, value))}]"
    return f"{value!r:.60}"


def check_device(function: Callable[..., Any], target: str, device: torch.device) -> None:
    """Refuse an op that has no kernel for the device, such as the CPU's own attention on a GPU.

    Raises: UnsupportedGraphError.
    """
    if device.type == "cpu" or not isinstance(function, OpOverload):
        return
    key = torch._C._dispatch_key_for_device(device.type)
    if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(function._name, key):
        raise UnsupportedGraphError(
            f"op {target} has no kernel for {device.type}, the device of this worker", op=target
        )


def _cond(pred: Any, true_fn: Callable[..., Any], false_fn: Callable[..., Any], operands: Any = ()) -> Any:
    return true_fn(*operands) if pred else false_fn(*operands)


def _invoke_subgraph(subgraph: Callable[..., Any], _identifier: str | None, *operands: Any) -> Any:
    return subgraph(*operands)


def _invoke_quant(subgraph: Callable[..., Any], *operands: Any, **_options: Any) -> Any:
    return subgraph(*operands)


_SHORTCUTS: dict[str, Callable[..., Any]] = {
    "higher_order::cond": _cond,
    "higher_order::invoke_subgraph": _invoke_subgraph,
    "higher_order::invoke_quant": _invoke_quant,
    "higher_order::invoke_quant_packed": _invoke_quant,
}
"""Higher-order ops that mean a plain call; their own dispatch costs tens of microseconds and may want GraphModules."""


def clear_step(dead: tuple[int, ...]) -> Step:
    """Let go of the values in registers."""
    if len(dead) == 1:
        (only,) = dead

        def clear_one(regs: list[Any]) -> None:
            regs[only] = None

        return clear_one

    def clear(regs: list[Any]) -> None:
        for register in dead:
            regs[register] = None

    return clear


def make_step(function: Callable[..., Any], node: NodeSpec, registers: list[int], out: int,
              literals: Literals) -> Step:
    """The step of one node: read arguments from registers, call, put the result into register `out`."""
    call = function._op if isinstance(function, OpOverload) else _SHORTCUTS.get(node.target, function)
    if function is getitem and isinstance(node.args[0], Value) and type(node.args[1]) is int:
        return _getitem_step(registers[node.args[0].index], node.args[1], out)
    if any(references(value) for value in node.kwargs.values()):
        return _general_step(call, node, registers, out, literals)
    kwargs = {key: literals.literal(value) for key, value in node.kwargs.items()}
    sources = literals.registers(node.args, registers)
    if sources is None:
        return _built_step(call, [literals.builder(a, registers) for a in node.args], kwargs, out)
    return _keyword_step(call, sources, kwargs, out) if kwargs else _plain_step(call, sources, out)


def _getitem_step(source: int, index: int, out: int) -> Step:
    def step(regs: list[Any]) -> None:
        regs[out] = regs[source][index]

    return step


def _plain_step(call: Callable[..., Any], sources: list[int], out: int) -> Step:
    """Positional arguments that all stand in registers."""
    if len(sources) == 1:
        (a,) = sources

        def step1(regs: list[Any]) -> None:
            regs[out] = call(regs[a])

        return step1
    if len(sources) == 2:
        a, b = sources

        def step2(regs: list[Any]) -> None:
            regs[out] = call(regs[a], regs[b])

        return step2
    if len(sources) == 3:
        a, b, c = sources

        def step3(regs: list[Any]) -> None:
            regs[out] = call(regs[a], regs[b], regs[c])

        return step3
    if not sources:

        def step0(regs: list[Any]) -> None:
            regs[out] = call()

        return step0
    get = itemgetter(*sources)

    def step(regs: list[Any]) -> None:
        regs[out] = call(*get(regs))

    return step


def _keyword_step(call: Callable[..., Any], sources: list[int], kwargs: dict[str, Any], out: int) -> Step:
    """Positional arguments in registers, fixed keyword arguments."""
    if len(sources) == 1:
        (a,) = sources

        def step1(regs: list[Any]) -> None:
            regs[out] = call(regs[a], **kwargs)

        return step1
    if not sources:

        def step0(regs: list[Any]) -> None:
            regs[out] = call(**kwargs)

        return step0
    get = itemgetter(*sources)

    def step(regs: list[Any]) -> None:
        regs[out] = call(*get(regs), **kwargs)

    return step


def _built_step(call: Callable[..., Any], builders: list[Builder], kwargs: dict[str, Any], out: int) -> Step:
    """Some positional arguments are lists or slices that hold values."""
    if len(builders) == 1 and not kwargs:
        (only,) = builders

        def step1(regs: list[Any]) -> None:
            regs[out] = call(only(regs))

        return step1
    if len(builders) == 2 and not kwargs:
        first, second = builders

        def step2(regs: list[Any]) -> None:
            regs[out] = call(first(regs), second(regs))

        return step2

    def step(regs: list[Any]) -> None:
        regs[out] = call(*[build(regs) for build in builders], **kwargs)

    return step


def _general_step(call: Callable[..., Any], node: NodeSpec, registers: list[int], out: int,
                  literals: Literals) -> Step:
    """Keyword arguments that hold values."""
    args = [literals.builder(a, registers) for a in node.args]
    kwargs = [(key, literals.builder(value, registers)) for key, value in node.kwargs.items()]

    def step(regs: list[Any]) -> None:
        regs[out] = call(*[build(regs) for build in args], **{key: build(regs) for key, build in kwargs})

    return step


__all__ = ["Builder", "Literals", "Step", "check_device", "clear_step", "make_step", "references"]
