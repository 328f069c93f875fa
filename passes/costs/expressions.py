"""Expressions over a graph's symbols: compiled to a short list of steps, and stored as plain data.

    compiled = compile_expressions([4 * s0 * s1, s0 ** 2, 7])
    compiled({"s0": 2, "s1": 3}) -> [24, 4, 7]

A step is `(operation, operands)` with operands among the values before it; equal parts of expressions are one step.
`to_data` gives the steps as lists of names and numbers, `from_data` checks and takes them back: nothing is parsed by
sympy and nothing evaluated as code.
"""
from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
from torch.utils._sympy import functions as torch_sympy

from genie_dynamo.core.errors import CostError
from genie_dynamo.passes.costs.sizes import Size

Number = int | float

_MAX_STEPS = 1 << 20


def _power(base: Number, exponent: Number) -> Number:
    result: Number = base ** exponent
    return result


def _sum(*terms: Number) -> Number:
    return sum(terms)


def _ceil_div(a: Number, b: Number) -> Number:
    return -(-a // b)


OPERATIONS: dict[str, Callable[..., Any]] = {
    "add": _sum, "mul": lambda *factors: math.prod(factors), "pow": _power, "floordiv": lambda a, b: a // b,
    "ceildiv": _ceil_div, "mod": lambda a, b: a % b, "truediv": lambda a, b: a / b, "max": max, "min": min,
    "log": math.log, "abs": abs, "floor": math.floor, "ceil": math.ceil, "trunc": math.trunc, "round": round,
    "float": float, "same": lambda a: a, "select": lambda c, a, b: a if c else b,
    "eq": lambda a, b: a == b, "ne": lambda a, b: a != b, "lt": lambda a, b: a < b, "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b, "ge": lambda a, b: a >= b, "and": lambda *v: all(v), "or": lambda *v: any(v),
    "not": lambda a: not a,
}
_TWO = frozenset({"pow", "floordiv", "ceildiv", "mod", "truediv", "eq", "ne", "lt", "le", "gt", "ge"})
_ONE = frozenset({"log", "abs", "floor", "ceil", "trunc", "round", "float", "same", "not"})
_NAMES: dict[type[Any], str] = {
    sympy.Add: "add", sympy.Mul: "mul", sympy.Pow: "pow", torch_sympy.PowByNatural: "pow",
    torch_sympy.FloatPow: "pow", torch_sympy.FloorDiv: "floordiv", torch_sympy.CleanDiv: "floordiv",
    torch_sympy.CeilDiv: "ceildiv", torch_sympy.Mod: "mod", torch_sympy.PythonMod: "mod", sympy.Mod: "mod",
    torch_sympy.IntTrueDiv: "truediv", torch_sympy.FloatTrueDiv: "truediv", torch_sympy.Max: "max",
    torch_sympy.Min: "min", sympy.Max: "max", sympy.Min: "min", sympy.log: "log", sympy.Abs: "abs",
    sympy.floor: "floor", sympy.ceiling: "ceil", torch_sympy.TruncToInt: "trunc", torch_sympy.FloorToInt: "floor",
    torch_sympy.CeilToInt: "ceil", torch_sympy.RoundToInt: "round", torch_sympy.ToFloat: "float",
    torch_sympy.Identity: "same", torch_sympy.Where: "select", sympy.Eq: "eq", sympy.Ne: "ne", sympy.Lt: "lt",
    sympy.Le: "le", sympy.Gt: "gt", sympy.Ge: "ge", sympy.And: "and", sympy.Or: "or", sympy.Not: "not",
}

Step = tuple[str, tuple[int, ...]]


class CompiledExpressions:
    """Steps over constants and symbols; call it with the symbols' values.

    Values are laid out as: constants, then symbols, then the result of each step.
    """

    def __init__(self, constants: Sequence[Number], symbols: Sequence[str], steps: Sequence[Step],
                 results: Sequence[int]) -> None:
        self.symbols = tuple(symbols)
        self._constants, self._steps, self._results = tuple(constants), tuple(steps), tuple(results)
        self._run = tuple((OPERATIONS[name], operands) for name, operands in steps)

    def __call__(self, values: Mapping[str, int]) -> list[Number]:
        """The expressions' values, in order.

        Raises: KeyError for a symbol without a value.
        """
        known: list[Any] = [*self._constants, *[values[symbol] for symbol in self.symbols]]
        append = known.append
        for operation, operands in self._run:
            if len(operands) == 2:
                append(operation(known[operands[0]], known[operands[1]]))
            else:
                append(operation(*[known[index] for index in operands]))
        return [known[index] for index in self._results]

    def to_data(self) -> dict[str, Any]:
        """Lists of names and numbers, ready for JSON."""
        return {"constants": list(self._constants), "symbols": list(self.symbols),
                "steps": [[name, *operands] for name, operands in self._steps], "results": list(self._results)}

    @classmethod
    def from_data(cls, data: Any) -> CompiledExpressions:
        """The inverse of to_data, for data of any origin.

        Raises: CostError where it is not exactly what to_data writes.
        """
        if not isinstance(data, dict) or set(data) != {"constants", "symbols", "steps", "results"}:
            raise CostError("stored expressions need exactly: constants, symbols, steps, results")
        for field in data.values():
            if not isinstance(field, list) or len(field) > _MAX_STEPS:
                raise CostError(f"stored expressions hold lists of at most {_MAX_STEPS} items")
        if not all(type(c) in (int, float) for c in data["constants"]):
            raise CostError("constants of stored expressions have to be numbers")
        if not all(type(s) is str and s.isidentifier() for s in data["symbols"]):
            raise CostError("symbols of stored expressions have to be names")
        first = len(data["constants"]) + len(data["symbols"])
        steps = [_checked_step(item, first + index) for index, item in enumerate(data["steps"])]
        _check_operands(data["results"], first + len(steps))
        return cls(data["constants"], data["symbols"], steps, data["results"])


def _checked_step(item: Any, known: int) -> Step:
    if not isinstance(item, list) or len(item) < 2 or type(item[0]) is not str or item[0] not in OPERATIONS:
        raise CostError(f"not a step of stored expressions: {item!r:.80}")
    name, operands = item[0], item[1:]
    _check_operands(operands, known)
    wanted = 2 if name in _TWO else 1 if name in _ONE else 3 if name == "select" else len(operands)
    if len(operands) != wanted:
        raise CostError(f"step {name} takes {wanted} operands, got {len(operands)}")
    return name, tuple(operands)


def _check_operands(operands: Any, known: int) -> None:
    if not all(type(index) is int and 0 <= index < known for index in operands):
        raise CostError(f"operands of stored expressions have to be among the {known} values before them")


def compile_expressions(expressions: Sequence[Size]) -> CompiledExpressions:
    """Steps that compute all the expressions.

    Raises: CostError for a sympy function that has no operation here.
    """
    symbols = sorted({str(s) for e in expressions if isinstance(e, sympy.Basic) for s in e.free_symbols})
    return _Compiler(symbols).compile(expressions)


class _Compiler:
    def __init__(self, symbols: list[str]) -> None:
        self._symbols = {symbol: index for index, symbol in enumerate(symbols)}
        self._constants: dict[tuple[type, Number], int] = {}
        self._steps: dict[tuple[str, tuple[Any, ...]], int] = {}
        self._seen: dict[Any, Any] = {}

    def compile(self, expressions: Sequence[Size]) -> CompiledExpressions:
        results = [self._reference(expression) for expression in expressions]
        at = {"constant": 0, "symbol": len(self._constants), "step": len(self._constants) + len(self._symbols)}

        def place(reference: tuple[str, int]) -> int:
            return at[reference[0]] + reference[1]

        steps = [(name, tuple(map(place, operands))) for name, operands in self._steps]
        return CompiledExpressions([value for _, value in self._constants], list(self._symbols), steps,
                                   list(map(place, results)))

    def _reference(self, expression: Any) -> tuple[str, int]:
        if isinstance(expression, int | float):
            return self._constant(expression)
        if expression in self._seen:
            found: tuple[str, int] = self._seen[expression]
            return found
        reference = self._build(expression)
        self._seen[expression] = reference
        return reference

    def _constant(self, value: Number) -> tuple[str, int]:
        return "constant", self._constants.setdefault((type(value), value), len(self._constants))

    def _build(self, expression: Any) -> tuple[str, int]:
        if expression.is_Symbol:
            return "symbol", self._symbols[str(expression)]
        if expression.is_Integer:
            return self._constant(int(expression))
        if expression.is_number and expression.is_real:
            return self._constant(float(expression))
        if expression in (sympy.true, sympy.false):
            return self._constant(int(expression is sympy.true))
        if isinstance(expression, sympy.Piecewise):
            return self._piecewise(expression)
        if isinstance(expression, torch_sympy.ModularIndexing):
            base, divisor, modulus = map(self._reference, expression.args)
            return self._step("mod", (self._step("floordiv", (base, divisor)), modulus))
        name = _NAMES.get(expression.func)
        if name is None:
            raise CostError(f"a size is {expression}, and {expression.func.__name__} is not among the functions that "
                            f"costs are computed with", function=expression.func.__name__)
        return self._step(name, tuple(map(self._reference, expression.args)))

    def _piecewise(self, expression: Any) -> tuple[str, int]:
        value, _ = expression.args[-1]
        result = self._reference(value)
        for value, condition in reversed(expression.args[:-1]):
            result = self._step("select", (self._reference(condition), self._reference(value), result))
        return result

    def _step(self, name: str, operands: tuple[tuple[str, int], ...]) -> tuple[str, int]:
        return "step", self._steps.setdefault((name, operands), len(self._steps))
