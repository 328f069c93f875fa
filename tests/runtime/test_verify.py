"""verify=: a call whose remote result is not what the same graph gives here is an error that says by how much."""
from __future__ import annotations

from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo.core.plan import Output, Plan
from genie_dynamo.runtime.client import remote_graph
from genie_dynamo.runtime.client.verify import compare, run_reference


class OnlyOutputs:
    """What of a plan the comparison reads."""

    outputs = (Output(kind="literal", name=""), Output(kind="value", name="logits"))


def difference(actual: torch.Tensor, expected: torch.Tensor) -> str:
    plan: Plan = OnlyOutputs()  # type: ignore[assignment]
    try:
        compare(plan, "inference graph 0", (None, actual), (None, expected))
    except genie.RemoteExecutionError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("dtype", "near", "far"), [
    (torch.float64, 1e-8, 1e-6), (torch.float32, 5e-5, 1e-3), (torch.bfloat16, 1e-2, 0.1), (torch.float16, 1e-2, 0.1),
    (torch.complex64, 5e-5, 1e-3), (torch.int64, 0, 1), (torch.bool, 0, 1),
], ids=str)
def test_each_dtype_has_its_tolerance(dtype: torch.dtype, near: float, far: float) -> None:
    one = torch.ones(4).to(dtype)
    off = torch.zeros(4).to(dtype) if dtype is torch.bool else (torch.ones(4).to(torch.float64) + far).to(dtype)
    assert difference((torch.ones(4).to(torch.float64) + near).to(dtype), one) == ""
    assert "output 1 (logits) of inference graph 0" in difference(off, one)


def test_nan_is_equal_to_nan_and_to_nothing_else() -> None:
    nan = torch.full((2,), float("nan"))
    assert difference(nan, nan) == "" and difference(nan, torch.ones(2)) != ""


def test_the_reference_leaves_arguments_and_generator_alone() -> None:
    def local(args: list[Any]) -> tuple[torch.Tensor]:
        return (args[0].add_(torch.rand(3)),)

    x, state = torch.zeros(3), torch.get_rng_state()
    (first,), (second,) = run_reference(local, [x]), run_reference(local, [x])
    assert torch.equal(first, second) and not x.any() and torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_wrong_result_is_found_where_it_is_looked_for(session: Any, fresh_dynamo: None, share: float,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    real = remote_graph.run_reference
    monkeypatch.setattr(remote_graph, "run_reference", lambda *given: tuple(out + 1 for out in real(*given)))
    compiled, x = torch.compile(torch.sin, backend="genie", options={"verify": share}), torch.randn(3)
    if share == 0:
        assert torch.equal(compiled(x), x.sin())
        return
    with pytest.raises(genie.RemoteExecutionError, match=r"differs from the local run by up to 1, shape \(3,\)"):
        compiled(x)
