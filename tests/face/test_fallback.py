"""What cannot be shipped runs locally: said once with its reason, counted, an error in strict mode."""
from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch

import genie_dynamo as genie

pytestmark = pytest.mark.usefixtures("session", "fresh_dynamo")
REASON = "fallbacktest::plus"


@pytest.fixture(autouse=True)
def _op_that_no_worker_has() -> Iterator[None]:
    with torch.library._scoped_library("fallbacktest", "DEF") as library:
        library.define("plus(Tensor x) -> Tensor")
        library.impl("plus", lambda x: x + 1, "CompositeExplicitAutograd")
        yield


def plus_twice(x: torch.Tensor) -> torch.Tensor:
    result: torch.Tensor = torch.ops.fallbacktest.plus(x) * 2
    return result


@pytest.mark.fallback
def test_it_is_said_once_with_the_reason_and_counted_each_time(caplog: pytest.LogCaptureFixture) -> None:
    compiled = torch.compile(plus_twice, backend="genie")
    with caplog.at_level(logging.WARNING, logger="genie_dynamo"):
        for _ in range(3):
            assert torch.equal(compiled(torch.ones(2)), torch.full((2,), 4.0))
        said = [record.getMessage() for record in caplog.records if REASON in record.getMessage()]
    assert len(said) == 1 and "runs locally" in said[0]
    stats = genie.get_stats()
    ((reason, count),) = stats["fallbacks"].items()
    assert REASON in reason and count == 3
    assert stats["calls"] == 0


@pytest.mark.fallback
def test_gradients_of_a_graph_that_runs_locally() -> None:
    x = torch.randn(3, requires_grad=True)
    y = torch.randn(3, requires_grad=True)

    def f(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (torch.ops.fallbacktest.plus(x.detach()) * x.sin() * y).sum()

    torch.compile(f, backend="genie")(x, y).backward()
    expected = torch.autograd.grad(((x.detach() + 1) * x.sin() * y).sum(), (x, y))
    torch.testing.assert_close((x.grad, y.grad), expected)
    assert sum(genie.get_stats()["fallbacks"].values()) == 1, "the backward has nothing that cannot be shipped"


def test_in_strict_mode_it_is_an_error_that_names_the_op() -> None:
    with pytest.raises(Exception, match=REASON) as caught:
        torch.compile(plus_twice, backend="genie")(torch.ones(2))
    cause = getattr(caught.value, "inner_exception", caught.value)
    assert isinstance(cause, genie.UnsupportedGraphError)
    assert genie.get_stats()["fallbacks"] == {}


@pytest.mark.fallback
def test_only_the_graph_that_cannot_be_shipped_stays() -> None:
    """A graph break before it: what can be shipped is."""
    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        torch._dynamo.graph_break()
        return plus_twice(y)

    x = torch.randn(3)
    assert torch.allclose(torch.compile(f, backend="genie")(x), (x.sin() + 1) * 2)
    stats = genie.get_stats()
    assert stats["calls"] == 1 and sum(stats["fallbacks"].values()) == 1
