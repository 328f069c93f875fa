"""Which inputs a compiled graph is right for: symbols for sizes, and the conditions the compiler took for granted."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch._dynamo.source import LocalSource
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import DimDynamic, ShapeEnv, StatelessSymbolicContext
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.reference import PythonReferenceAnalysis

Form = tuple[Any, ...]
"""`(dtype, shape, stride)` of a tensor, `(type, value)` of anything else."""

Slot = tuple[int, int]
"""`(input, dimension)`; dimension -1 for an input that is an int."""

_SCALAR = -1


def form_of(value: Any) -> Form:
    """What compiled code depends on."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.stride())
    return (type(value), value)


def _sizes(forms: Sequence[Form]) -> dict[Slot, int]:
    """Every size and int among the inputs."""
    sizes: dict[Slot, int] = {}
    for index, form in enumerate(forms):
        if len(form) == 3:
            sizes.update({(index, dim): size for dim, size in enumerate(form[1])})
        elif form[0] is int:
            sizes[(index, _SCALAR)] = form[1]
    return sizes


def varying_slots(seen: Sequence[tuple[Form, ...]]) -> frozenset[Slot]:
    """The sizes to make symbols of: those that differed, or where one call was seen, those equal to an int input."""
    tables = [_sizes(forms) for forms in seen]
    last = tables[-1]
    if len(tables) == 1:
        ints = {value for (_, dim), value in last.items() if dim == _SCALAR and value >= 2}
        return frozenset(slot for slot, value in last.items() if value in ints)
    return frozenset(
        slot for slot in last if any(slot in table and table[slot] != last[slot] for table in tables)
    )


class SymbolicInputs:
    """Example inputs for a compiler: fake tensors and symbols in a shape environment of their own."""

    def __init__(self, examples: list[Any], fake_mode: FakeTensorMode, shape_env: ShapeEnv) -> None:
        self.examples, self.fake_mode, self._shape_env = examples, fake_mode, shape_env

    def expected(self) -> ExpectedShapes:
        """After compiling: what inputs must look like."""
        return ExpectedShapes(self.examples, self._shape_env)


def symbolic_inputs(inputs: Sequence[Any], dynamic: frozenset[Slot]) -> SymbolicInputs:
    """Symbols for the dynamic sizes (equal sizes share one), numbers for all others."""
    shape_env = ShapeEnv()
    fake_mode = FakeTensorMode(shape_env=shape_env)
    examples: list[Any] = []
    for index, value in enumerate(inputs):
        source = LocalSource(f"a{index}")
        if isinstance(value, torch.Tensor):
            dims = [DimDynamic.DUCK if (index, d) in dynamic else DimDynamic.STATIC for d in range(value.dim())]
            context: Any = StatelessSymbolicContext(dynamic_sizes=dims, constraint_sizes=[None] * len(dims))
            examples.append(fake_mode.from_tensor(value, symbolic_context=context, source=source))
        elif type(value) is int and (index, _SCALAR) in dynamic:
            symbol = shape_env.create_symbol(value, source=source, dynamic_dim=DimDynamic.DUCK)
            examples.append(shape_env.create_symintnode(symbol, hint=value, source=source))
        else:
            examples.append(value)
    return SymbolicInputs(examples, fake_mode, shape_env)


class ExpectedShapes:
    """Sizes and strides as expressions over symbols, with the guards a compilation left behind."""

    def __init__(self, examples: Sequence[Any], shape_env: ShapeEnv) -> None:
        self._forms = [_expected_form(example) for example in examples]
        self._guards = [g for g in (shape_env.simplify(guard.expr) for guard in shape_env.guards) if g != sympy.true]
        symbols = {s for form in self._forms for e in _expressions(form) for s in e.free_symbols}
        self._ranges = {s: shape_env.var_to_range[s] for s in symbols if s in shape_env.var_to_range}

    def fit(self, forms: Sequence[Form]) -> bool:
        """Whether code compiled with these expectations is right for inputs of these forms."""
        pairs: list[tuple[Any, Any]] = []
        for expected, form in zip(self._forms, forms, strict=True):
            if expected[0] is not form[0] or len(expected) != len(form):
                return False
            if len(form) == 3:
                if len(expected[1]) != len(form[1]):
                    return False
                pairs += [*zip(expected[1], form[1], strict=True), *zip(expected[2], form[2], strict=True)]
            elif isinstance(expected[1], sympy.Expr):
                pairs.append((expected[1], form[1]))
            elif expected[1] != form[1]:
                return False
        return self._solve(pairs)

    def _solve(self, pairs: list[tuple[Any, Any]]) -> bool:
        values: dict[Any, int] = {}
        for expression, actual in pairs:
            if isinstance(expression, sympy.Symbol) and values.setdefault(expression, actual) != actual:
                return False
        known: dict[Any, Any] = {}
        for expression, actual in pairs:
            if isinstance(expression, int):
                if expression != actual:
                    return False
                continue
            if expression not in known:
                known[expression] = _evaluate(expression, values)
            if known[expression] != actual:
                return False
        if any(symbol not in values for symbol in self._ranges):
            return False
        if not all(bounds.lower <= values[symbol] <= bounds.upper for symbol, bounds in self._ranges.items()):
            return False
        return all(bool(_evaluate(guard, values)) for guard in self._guards)


def _evaluate(expression: Any, values: dict[Any, int]) -> Any:
    try:
        return sympy_interp(PythonReferenceAnalysis, values, expression)
    except KeyError:
        return None  # a symbol that no input fixes: nothing is known, so nothing fits


def _expected_form(example: Any) -> Form:
    if isinstance(example, torch.Tensor):
        return (example.dtype, tuple(map(_expression, example.shape)), tuple(map(_expression, example.stride())))
    if isinstance(example, torch.SymInt):
        return (int, _expression(example, keep=True))
    return (type(example), example)


def _expression(size: Any, keep: bool = False) -> Any:
    """A number, or a sympy expression over symbols that are left after all replacements."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return expression if keep or not expression.is_number else int(expression)
    return int(size)


def _expressions(form: Form) -> list[Any]:
    parts = (*form[1], *form[2]) if len(form) == 3 else (form[1],)
    return [part for part in parts if isinstance(part, sympy.Expr)]
