"""Every dtype that travels, and the modes that change dtypes or gradients, against eager."""
from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from tests.face.comparing import check, same

pytestmark = pytest.mark.usefixtures("session", "fresh_dynamo")


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64,
                                   torch.int32,
                                   torch.int16, torch.int8, torch.uint8, torch.bool, torch.complex64, torch.complex128])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.tensor([[0, 1, 2], [3, 0, 1]]).to(dtype)
    check(lambda x: (x.t(), x + x, x == x.flip(0), x.to(torch.float64) if not x.is_complex() else x.conj()), x)


def test_float8() -> None:
    x = torch.randn(4, 4)
    compiled = torch.compile(lambda x: x.to(torch.float8_e4m3fn), backend="genie")
    assert torch.equal(compiled(x).float(), x.to(torch.float8_e4m3fn).float())
    half = x.to(torch.float8_e5m2)
    same(torch.compile(lambda x: x.to(torch.float32) * 2, backend="genie")(half), half.to(torch.float32) * 2)


def test_a_float8_matrix_product() -> None:
    a, b = torch.randn(16, 32).to(torch.float8_e4m3fn), torch.randn(8, 32).to(torch.float8_e4m3fn).t()
    scale = torch.tensor(0.5)

    def product(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch._scaled_mm(a, b, scale, scale, out_dtype=torch.float32)

    same(torch.compile(product, backend="genie")(a, b), product(a, b))


def test_gradients_of_complex_parameters() -> None:
    weight = nn.Parameter(torch.randn(4, 3, dtype=torch.complex64))
    x = torch.randn(5, 4, dtype=torch.complex64)

    def loss(x: torch.Tensor) -> torch.Tensor:
        return (x @ weight).abs().square().sum()

    expected = torch.autograd.grad(loss(x), weight)
    same(torch.autograd.grad(torch.compile(loss, backend="genie")(x), weight), expected)


def test_autocast_no_grad_and_inference_mode() -> None:
    net = nn.Linear(8, 8)
    compiled, x = torch.compile(net, backend="genie"), torch.randn(4, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual, expected = compiled(x), net(x)
    assert actual.dtype is torch.bfloat16
    torch.testing.assert_close(actual, expected)
    with torch.no_grad():
        same(compiled(x), net(x))
    with torch.inference_mode():
        actual = compiled(x)
        assert actual.is_inference()
        torch.testing.assert_close(actual, net(x))
    with torch.inference_mode():
        frozen = nn.Linear(8, 8)
        torch.testing.assert_close(torch.compile(frozen, backend="genie")(x), frozen(x))


def test_training_under_autocast() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))
    reference = copy.deepcopy(net)
    compiled, x = torch.compile(net, backend="genie"), torch.randn(5, 8)
    for run in (compiled, reference):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = run(x)
        assert out.dtype is torch.bfloat16
        out.float().square().mean().backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=0)


@pytest.fixture
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def test_another_default_dtype(float64_by_default: None) -> None:
    """What is made out of integers has the client's default dtype, which workers do not have."""
    def function(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (torch.sigmoid(x), x / 3, x * 1.5, torch.ones(3) * x[:3], torch.arange(3) * 0.1, torch.linspace(0, 1, 4),
                x.view(torch.float64), x.to(torch.float16), x.sum())

    compiled = torch.compile(function, backend="genie", fullgraph=True)
    x = torch.arange(1, 6)
    for mine, eager in zip(compiled(x), function(x), strict=True):
        same(mine, eager)
    assert not genie.get_stats()["fallbacks"]


@pytest.mark.fallback
def test_what_cannot_be_told_the_default_dtype_runs_here(float64_by_default: None) -> None:
    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.logsumexp(x, 0)

    compiled = torch.compile(function, backend="genie", options={"strict": False})
    x = torch.arange(1, 6)
    same(compiled(x), function(x))
    assert any("set_default_dtype" in reason for reason in genie.get_stats()["fallbacks"])


def test_another_default_dtype_on_the_device(session: object) -> None:
    x = torch.arange(1, 6)
    there = x.to("remote_accelerator")
    before = there * 1.5
    torch.set_default_dtype(torch.float64)
    try:
        with pytest.raises(RuntimeError, match="convert the integers first"):
            there * 1.5
        made = there.to(torch.float64) * 1.5 + torch.ones(5, device="remote_accelerator")
        same(made.cpu(), x * 1.5 + torch.ones(5))
    finally:
        torch.set_default_dtype(torch.float32)
    same(before.cpu(), x * 1.5)
    same((there * 1.5).cpu(), x * 1.5)
