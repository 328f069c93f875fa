"""The fit that comes with the package."""
from __future__ import annotations

from genie_dynamo.passes.costs.shipped import shipped_fit


def test_processors_have_a_fit_and_others_do_not() -> None:
    fit = shipped_fit("cpu")
    assert fit is not None and fit.num_rows > 500
    assert all(factor >= 0 for row in (*fit.ops.values(), *fit.families.values()) for factor in row)
    assert fit.coefficients("aten::addmm", "matmul")[1] > 0
    assert shipped_fit("cuda") is None
