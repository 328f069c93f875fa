"""Compiled expressions: equal to sympy's own values, stored as data, and hostile data refused."""
from __future__ import annotations

import json
from typing import Any

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._sympy.functions import CeilDiv, FloorDiv, Max, Min, Mod, ModularIndexing

from genie_dynamo.core.errors import CostError
from genie_dynamo.passes.costs.expressions import CompiledExpressions, compile_expressions

A, B = sympy.symbols("s0 s1", integer=True, positive=True)
CASES = [
    4 * A * B + A ** 2, FloorDiv(A, 3) * B, CeilDiv(A, 4), Mod(A, 5) + 2, Max(A, B) - Min(A, 3 * B),
    ModularIndexing(A, 2, 3), A * sympy.Rational(5, 2), sympy.log(sympy.Max(A, 2)) * A, A / B,
    sympy.Piecewise((A, A > B), (2 * B, sympy.Eq(A, B)), (7, True)),
]


@settings(max_examples=30, deadline=None)
@given(a=st.integers(1, 10 ** 6), b=st.integers(1, 10 ** 4))
def test_values_are_those_of_sympy(a: int, b: int) -> None:
    got = compile_expressions([*CASES, 7, 2.5])({"s0": a, "s1": b})
    expected = [float(case.subs({A: a, B: b})) for case in CASES]
    assert got == pytest.approx([*expected, 7, 2.5])


def test_equal_parts_are_computed_once() -> None:
    steps = compile_expressions([A * B, A * B + 1, Max(A * B, 9)]).to_data()["steps"]
    assert sum(step[0] == "mul" for step in steps) == 1


def test_round_trip_through_json() -> None:
    compiled = compile_expressions(CASES)
    again = CompiledExpressions.from_data(json.loads(json.dumps(compiled.to_data())))
    values = {"s0": 12, "s1": 5}
    assert again(values) == compiled(values) and again.symbols == compiled.symbols


@pytest.mark.parametrize("change", [
    {"steps": [["__import__", 0]]}, {"steps": [["pow", 0, 99]]}, {"steps": [["add", -1]]}, {"steps": [["log", 0, 0]]},
    {"steps": ["add"]}, {"steps": [[["add"], 0]]}, {"symbols": ["os.system('x')"]}, {"symbols": [1]},
    {"constants": ["4"]}, {"constants": [True]}, {"results": [10 ** 9]}, {"results": "0"}, {"more": []},
])
def test_hostile_data_is_refused(change: dict[str, Any]) -> None:
    data = compile_expressions([A + 1]).to_data() | change
    with pytest.raises(CostError):
        CompiledExpressions.from_data(data)


def test_an_unknown_function_is_named() -> None:
    with pytest.raises(CostError, match="besselj"):
        compile_expressions([sympy.besselj(0, A)])
