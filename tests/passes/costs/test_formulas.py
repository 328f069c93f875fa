"""Flops against torch's counter, bytes against counts by hand."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from genie_dynamo.core.errors import CostError
from genie_dynamo.core.portable_ops import sdpa, sdpa_bw
from genie_dynamo.passes.costs import analyze_costs, bind_symbols, node_costs
from genie_dynamo.passes.costs.registry import Call, Work, formula
from tests.passes.costs.tracing import call_node, counted_flops, trace

SIZE = st.integers(1, 9)
BOTH = pytest.mark.parametrize("symbolic", [False, True], ids=["static", "symbolic"])


def assert_agrees(fn: Callable[..., Any], args: tuple[Any, ...], symbolic: bool) -> None:
    gm = trace(fn, *args, symbolic=symbolic)
    totals = analyze_costs(gm).totals(bind_symbols(gm, args))
    assert totals.matrix_flops == counted_flops(fn, *args)


def strided(*shape: int, order: tuple[int, ...] | None = None) -> Tensor:
    """Random numbers, laid out with dimensions in another order where one is given."""
    if order is None:
        return torch.randn(shape)
    return torch.empty_permuted(shape, order).normal_()


# ---------------------------------------------------------------- flops
@BOTH
@settings(max_examples=8, deadline=None)
@given(b=SIZE, m=SIZE, k=SIZE, n=SIZE, transposed=st.booleans())
def test_products(symbolic: bool, b: int, m: int, k: int, n: int, transposed: bool) -> None:
    order = (0, 2, 1) if transposed else None
    x, y = strided(b, m, k, order=order), strided(b, k, n, order=order)
    assert_agrees(lambda x, y, z: (torch.bmm(x, y), torch.baddbmm(z, x, y), x[0] @ y[0], torch.addmm(z[0], x[0], y[0])),
                  (x, y, torch.randn(b, m, n)), symbolic)


def test_products_that_torch_does_not_count() -> None:
    x, v = torch.randn(5, 7), torch.randn(7)
    (mv,) = node_costs(trace(torch.mv, x, v)).values()
    (dot,) = node_costs(trace(torch.dot, v, v)).values()
    assert (mv.flops, dot.flops) == (2 * 5 * 7, 2 * 7)
    assert (mv.bytes_read, mv.bytes_written) == (4 * (35 + 7), 4 * 5)


@BOTH
@settings(max_examples=6, deadline=None)
@given(batch=SIZE, groups=st.integers(1, 3), c_in=SIZE, c_out=SIZE, size=st.integers(4, 9), stride=st.integers(1, 2),
       transposed=st.booleans(), channels_last=st.booleans())
def test_convolutions(symbolic: bool, batch: int, groups: int, c_in: int, c_out: int, size: int, stride: int,
                      transposed: bool, channels_last: bool) -> None:
    x = strided(batch, groups * c_in, size, size, order=(0, 2, 3, 1) if channels_last else None)
    weight = torch.randn((groups * c_in, c_out, 3, 3) if transposed else (groups * c_out, c_in, 3, 3))
    conv = F.conv_transpose2d if transposed else F.conv2d
    assert_agrees(lambda x, w: conv(x, w, stride=stride, groups=groups), (x, weight), symbolic)


@settings(max_examples=6, deadline=None)
@given(batch=SIZE, c_in=SIZE, c_out=SIZE, size=st.integers(4, 9), transposed=st.booleans(),
       wanted=st.sampled_from([(True, True), (True, False), (False, True)]))
def test_backward_of_convolutions(batch: int, c_in: int, c_out: int, size: int, transposed: bool,
                                  wanted: tuple[bool, bool]) -> None:
    x, weight = torch.randn(batch, c_in, size), torch.randn((c_in, c_out, 3) if transposed else (c_out, c_in, 3))
    grad = torch.randn(batch, c_out, size + 2 if transposed else size - 2)

    def backward(grad: Tensor, x: Tensor, weight: Tensor) -> Any:
        return torch.ops.aten.convolution_backward(
            grad, x, weight, None, [1], [0], [1], transposed, [0], 1, [*wanted, False])

    assert_agrees(backward, (grad, x, weight), symbolic=False)


def test_backward_of_a_grouped_convolution_has_two_times_the_forward_s_flops() -> None:
    """torch's counter multiplies the weights' part by the number of groups; each group has its own channels alone."""
    x, weight = torch.randn(2, 8, 6, requires_grad=True), torch.randn(8, 1, 3, requires_grad=True)

    def step(x: Tensor, weight: Tensor) -> Any:
        return torch.autograd.grad(F.conv1d(x, weight, groups=8).sum(), (x, weight))

    costs = {cost.family: cost.flops for cost in analyze_costs(trace(step, x, weight))}
    assert costs["conv"] == 2 * 2 * 4 * 8 * 3
    assert costs["conv_backward"] == 2 * costs["conv"]


@BOTH
@settings(max_examples=6, deadline=None)
@given(batch=SIZE, heads=SIZE, length=st.integers(2, 9), keys=st.integers(2, 9), width=st.integers(2, 9))
def test_attention_and_its_backward(symbolic: bool, batch: int, heads: int, length: int, keys: int, width: int) -> None:
    q, k = torch.randn(batch, heads, length, width), torch.randn(batch, heads, keys, width)

    def step(q: Tensor, k: Tensor, v: Tensor) -> Any:
        out, lse = sdpa(q, k, v)
        return sdpa_bw(out, q, k, v, out, lse)

    assert_agrees(step, (q, k, k.clone()), symbolic)


# ---------------------------------------------------------------- bytes
def cost_of(op: str, fn: Callable[..., Any], *args: Any) -> tuple[int, int]:
    gm = trace(fn, *args)
    cost = node_costs(gm)[call_node(gm, op).name]
    assert cost.has_formula
    return cost.bytes_read, cost.bytes_written


def test_an_embedding_reads_the_rows_that_are_looked_up() -> None:
    table, ids = torch.randn(1000, 16), torch.randint(0, 1000, (2, 3))
    assert cost_of("aten.embedding.", lambda t, i: F.embedding(i, t), table, ids) == (6 * 16 * 4 + 6 * 8, 6 * 16 * 4)
    backward = lambda g, i: torch.ops.aten.embedding_dense_backward(g, i, 1000, -1, False)  # noqa: E731
    rows = 6 * 16 * 4
    assert cost_of("embedding_dense_backward", backward, torch.randn(2, 3, 16), ids) == (
        rows + 48 + rows, 1000 * 16 * 4 + rows)


@pytest.mark.parametrize("view", [
    lambda x: x.view(6, 4), lambda x: x.t(), lambda x: x[1:], lambda x: x.expand(5, 4, 6), lambda x: x.select(0, 1),
    lambda x: x.unsqueeze(0), lambda x: x.split(2), lambda x: x.detach(), lambda x: x.unbind(1),
    lambda x: x.as_strided((2, 2), (1, 1)), lambda x: x.permute(1, 0),
])
def test_views_move_nothing(view: Callable[[Tensor], Any]) -> None:
    costs = analyze_costs(trace(view, torch.randn(4, 6)))
    assert len(costs) and all(c.bytes_read == c.bytes_written == c.allocated_bytes == c.flops == 0 for c in costs)


def test_bytes_by_hand() -> None:
    x, y = torch.randn(4, 6), torch.randn(4, 6)
    assert cost_of("aten.add", lambda x, y: x + y, x, y) == (192, 96)
    assert cost_of("aten.add", lambda x: x + x, x) == (96, 96)                     # one argument, twice
    assert cost_of("aten.add", lambda x, y: x[:1].expand(4, 6) + y, x, y) == (24 + 96, 96)
    assert cost_of("aten.add", lambda x: x.to(torch.float16) + 1, x) == (48, 48)
    assert cost_of("aten.mul_", lambda x: x.clone().mul_(2), x) == (96, 96)
    assert cost_of("aten.cat", lambda x, y: torch.cat([x, y]), x, y) == (192, 192)
    assert cost_of("aten.sum", lambda x: x.sum(1), x) == (96, 16)
    assert cost_of("aten.full", lambda: torch.full((4, 6), 1.0)) == (0, 96)
    assert cost_of("aten.clone", lambda x: x.expand(3, 4, 6).clone(), x) == (96, 288)
    assert cost_of("slice_backward", lambda g: torch.ops.aten.slice_backward(g, [4, 6], 0, 0, 2, 1), x[:2]) == (
        48, 96 + 48)
    ids = torch.tensor([0, 3])
    assert cost_of("aten.index.", lambda x, i: x[i], x, ids) == (48 + 16, 48)
    assert cost_of("index_put_", lambda x, i, v: x.clone().index_put_((i,), v), x, ids, y[:2]) == (16 + 48, 48)
    assert cost_of("index_put.", lambda x, i, v: x.index_put((i,), v), x, ids, y[:2]) == (96 + 16 + 48, 96 + 48)
    assert cost_of("aten.gather", lambda x, i: x.gather(0, i), x, torch.zeros(2, 6, dtype=torch.int64)) == (
        48 + 96, 48)


def test_an_exponential_costs_more_than_a_sum() -> None:
    x = torch.randn(100)
    add, exp = (node_costs(trace(fn, x)) for fn in (lambda x: x + 1, lambda x: x.exp()))
    (a,), (e,) = add.values(), exp.values()
    assert (a.family, e.family) == ("elementwise", "transcendental") and e.flops > a.flops == 100
    assert (a.bytes_read, a.bytes_written) == (e.bytes_read, e.bytes_written)


@pytest.mark.parametrize(("fn", "family"), [
    (lambda x: x.sort(-1), "sort"), (lambda x: torch.fft.rfft(x), "fft"), (lambda x: x.cumsum(0), "scan"),
    (lambda x: F.max_pool2d(x[None, None], 2), "pool"), (lambda x: torch.rand_like(x), "random"),
    (lambda x: F.interpolate(x[None, None], scale_factor=2.0, mode="bilinear"), "upsample"),
    (lambda x: F.layer_norm(x, (16,)), "norm"), (lambda x: x.softmax(-1), "softmax"),
    (lambda x: F.mse_loss(x, x * 2), "loss"), (lambda x: x.argmax(-1), "indexed_reduction"),
    (lambda x: torch.linalg.cholesky_ex(x @ x.t()), "linalg"), (lambda x: x.new_empty(3), "empty"),
])
def test_families(fn: Callable[[Tensor], Any], family: str) -> None:
    costs = analyze_costs(trace(fn, torch.randn(16, 16)))
    assert family in {cost.family for cost in costs} and not costs.without_formula


def test_a_recurrence_counts_each_step() -> None:
    steps, batch, width, hidden = 7, 2, 3, 5
    x, bias, state = torch.randn(steps, batch, width), torch.zeros(4 * hidden), torch.zeros(batch, hidden)
    gm = trace(lambda *tensors: torch.ops.aten.mkldnn_rnn_layer(
        *tensors, False, [], 2, hidden, 1, True, False, False, False),
        x, torch.randn(4 * hidden, width), torch.randn(4 * hidden, hidden), bias, bias.clone(), state, state.clone())
    cost = node_costs(gm)[call_node(gm, "mkldnn_rnn_layer").name]
    assert cost.flops == 2 * steps * batch * 4 * hidden * (width + hidden)


# ---------------------------------------------------------------- the registry
def test_an_op_without_formula_is_said() -> None:
    gm = trace(lambda x: torch.ops.aten._pack_padded_sequence(x, torch.tensor([3, 2]), False), torch.randn(3, 2, 4))
    costs = analyze_costs(gm)
    name = call_node(gm, "_pack_padded_sequence").name
    assert costs.without_formula == {"aten::_pack_padded_sequence": 1}
    assert costs.nodes[name].family == "default" and costs.nodes[name].bytes_read > 0
    assert "no formula, costed by size: aten::_pack_padded_sequence (1)" in str(costs)


def test_two_formulas_for_one_op_are_refused() -> None:
    with pytest.raises(CostError, match="aten::mm has a cost formula already"):
        @formula("other", "aten::mm")
        def _again(call: Call) -> Work:
            return call.work(0)
