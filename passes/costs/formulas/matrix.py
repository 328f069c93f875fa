"""Ops on matrix units: products, convolutions, attention, recurrences, dense linear algebra.

Flops count a multiply and an add as two and leave out bias and softmax, as torch.utils.flop_counter does.
"""
from __future__ import annotations

from typing import Any

import sympy
import torch

from genie_dynamo.passes.costs.registry import Call, Work, bytes_of, formula
from genie_dynamo.passes.costs.sizes import Size, numel, product, shape_of, tensors_in, touched_bytes


def _product_flops(a: torch.Tensor, b: torch.Tensor) -> Size:
    """a (..., M, K) times b (..., K, N); vectors are matrices with one row or column."""
    return 2 * numel(a) * (shape_of(b)[-1] if b.dim() > 1 else 1)


@formula("matmul", "aten::mm", "aten::bmm", "aten::mv", "aten::dot", "aten::vdot", "aten::_scaled_mm", "aten::_int_mm",
         "aten::matmul")
def matmul(call: Call) -> Work:
    return call.work(_product_flops(call.tensor(0), call.tensor(1)))


@formula("matmul", "aten::addmm", "aten::baddbmm", "aten::addmv", "aten::addbmm", "aten::_addmm_activation")
def matmul_with_addend(call: Call) -> Work:
    return call.work(_product_flops(call.tensor(1), call.tensor(2)))


@formula("matmul", "aten::linear")
def linear(call: Call) -> Work:
    return call.work(2 * numel(call.tensor(0)) * shape_of(call.tensor(1))[0])


@formula("matmul", "aten::addr", "aten::ger", "aten::outer")
def outer_product(call: Call) -> Work:
    return call.work(2 * call.out_numel)


@formula("matmul", "transformers::grouped_mm_fallback", "aten::_grouped_mm")
def grouped_matmul(call: Call) -> Work:
    """rows (T, K) of several groups, each with a matrix of its own out of (G, K, N)."""
    return call.work(_product_flops(call.tensor(0), call.tensor(1)))


@formula("matmul", "transformers::grouped_mm_fallback_backward")
def grouped_matmul_backward(call: Call) -> Work:
    """grad (T, N), rows (T, K), matrices (G, K, N): one product for the rows' gradient, one for the matrices'."""
    grad, rows = call.tensor(0), call.tensor(1)
    return call.work(4 * numel(grad) * shape_of(rows)[-1])


@formula("conv", "aten::convolution", "aten::_convolution", "aten::cudnn_convolution",
         "aten::convolution_overrideable")
def convolution(call: Call) -> Work:
    return call.work(_conv_flops(call.tensor(0), call.tensor(1), call.outputs[0], call.arg(6, "transposed", False)))


@formula("conv", "aten::_slow_conv2d_forward", "aten::mkldnn_convolution", "aten::thnn_conv2d")
def convolution_not_transposed(call: Call) -> Work:
    return call.work(_conv_flops(call.tensor(0), call.tensor(1), call.outputs[0], False))


def _conv_flops(x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, transposed: bool) -> Size:
    """Each position (of the output; of the input where transposed) meets the whole kernel once: groups are in it."""
    positions = x if transposed else out
    return 2 * shape_of(positions)[0] * product(shape_of(positions)[2:]) * numel(weight)


@formula("conv_backward", "aten::convolution_backward")
def convolution_backward(call: Call) -> Work:
    grad, x, weight = call.tensor(0), call.tensor(1), call.tensor(2)
    transposed, wanted = call.arg(7, "transposed", False), call.arg(10, "output_mask", (True, True, True))
    one = _conv_flops(x, weight, grad, transposed)
    return call.work(one * sum(map(bool, wanted[:2])))


_SDPA = ("genie::sdpa", "aten::_scaled_dot_product_flash_attention_for_cpu",
         "aten::_scaled_dot_product_flash_attention",
         "aten::_scaled_dot_product_efficient_attention", "aten::_scaled_dot_product_cudnn_attention",
         "aten::_scaled_dot_product_fused_attention_overrideable", "aten::scaled_dot_product_attention",
         "aten::_scaled_dot_product_attention_math_for_mps", "aten::_scaled_dot_product_attention_math")
_SDPA_BACKWARD = (
    "genie::sdpa_bw", "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
    "aten::_scaled_dot_product_flash_attention_backward", "aten::_scaled_dot_product_efficient_attention_backward",
    "aten::_scaled_dot_product_cudnn_attention_backward",
    "aten::_scaled_dot_product_fused_attention_overrideable_backward")


@formula("attention", *_SDPA, "higher_order::flex_attention")
def attention(call: Call) -> Work:
    """q (..., H, L, E), k (..., Hkv, S, E), v (..., Hkv, S, Ev): scores and their product with the values.

    A causal mask is not taken off: kernels differ in how much of it they skip.
    """
    q, k, v = call.tensor(0), call.tensor(1), call.tensor(2)
    assumption = "score_mod is free and no block is skipped" if "flex" in call.name else ""
    return call.work(_scores(q, k) * (shape_of(q)[-1] + shape_of(v)[-1]), assumption=assumption)


def _scores(q: torch.Tensor, k: torch.Tensor) -> Size:
    """Multiply-adds per channel, times two: all pairs of a query and a key."""
    return 2 * product(shape_of(q)[:-1]) * shape_of(k)[-2]


@formula("attention_backward", *_SDPA_BACKWARD)
def attention_backward(call: Call) -> Work:
    """Scores again, the gradients of weights and values, then those of queries and keys."""
    return _attention_backward(call, call.tensor(1), call.tensor(2), call.tensor(3))


@formula("attention_backward", "higher_order::flex_attention_backward")
def flex_attention_backward(call: Call) -> Work:
    return _attention_backward(call, call.tensor(0), call.tensor(1), call.tensor(2),
                               "score_mod is free and no block is skipped")


def _attention_backward(call: Call, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, assumption: str = "") -> Work:
    return call.work(_scores(q, k) * (3 * shape_of(q)[-1] + 2 * shape_of(v)[-1]), assumption=assumption)


_WEIGHT_POSITIONS = {"aten::mkldnn_rnn_layer": (1, 2), "aten::mkldnn_rnn_layer_backward": (1, 3),
                     "aten::_cudnn_rnn": (1,), "aten::_cudnn_rnn_backward": (1,)}
"""Where an op has its weight matrices; elsewhere they are the list at position 2."""


@formula("rnn", "aten::mkldnn_rnn_layer", "aten::_cudnn_rnn", "aten::lstm", "aten::gru", "aten::rnn_tanh",
         "aten::rnn_relu")
def recurrence(call: Call) -> Work:
    """x (T, B, I) or (B, T, I): every step multiplies with every weight matrix once."""
    return call.work(_recurrence_flops(call))


@formula("rnn", "aten::mkldnn_rnn_layer_backward", "aten::_cudnn_rnn_backward")
def recurrence_backward(call: Call) -> Work:
    return call.work(2 * _recurrence_flops(call))


def _recurrence_flops(call: Call) -> Size:
    positions = _WEIGHT_POSITIONS.get(call.name, (2,))
    weights = tensors_in([call.arg(position, "weight") for position in positions])
    return 2 * product(shape_of(call.tensor(0))[:-1]) * sum(numel(w) for w in weights if w.dim() == 2)


_FACTORISATIONS = {
    # flops / n^3 of an n x n matrix (Golub and Van Loan, Matrix Computations, 4th edition)
    "aten::linalg_cholesky_ex": 1 / 3, "aten::linalg_lu_factor_ex": 2 / 3, "aten::linalg_inv_ex": 2.0,
    "aten::_linalg_det": 2 / 3, "aten::_linalg_slogdet": 2 / 3, "aten::linalg_qr": 4 / 3, "aten::_linalg_eigh": 9.0,
    "aten::_linalg_svd": 21.0, "aten::linalg_eig": 25.0, "aten::_linalg_solve_ex": 2 / 3, "aten::linalg_lu": 2 / 3,
    "aten::linalg_matrix_exp": 20.0, "aten::linalg_ldl_factor_ex": 1 / 3,
}


@formula("linalg", *_FACTORISATIONS)
def factorisation(call: Call) -> Work:
    a = call.tensor(0)
    short = shape_of(a)[-1]
    assumption = "" if "matrix_exp" not in call.name else "ten squarings"
    return call.work(numel(a) * short * _FACTORISATIONS[call.name], workspace=touched_bytes(a), assumption=assumption)


@formula("linalg", "aten::linalg_solve_triangular", "aten::triangular_solve", "aten::cholesky_solve",
         "aten::linalg_lu_solve")
def solve(call: Call) -> Work:
    a = max(call.inputs[:2], key=lambda t: t.dim())
    return call.work(call.out_numel * shape_of(a)[-1])


def _transform_length(call: Call) -> tuple[Any, Size]:
    """`(elements, elements of one transform)` of the larger side: a real transform drops half on the other."""
    x, out = call.tensor(0), call.outputs[0]
    dims = call.arg(1, "dim", (-1,))
    larger = out if call.name.endswith("c2r") else x
    shape = shape_of(larger)
    return numel(larger), product(shape[d] for d in dims)


@formula("fft", "aten::_fft_c2c", "aten::_fft_r2c", "aten::_fft_c2r")
def fourier(call: Call) -> Work:
    """5 N log2 N of the radix-2 transform; half of it where one side is real."""
    elements, length = _transform_length(call)
    factor = 5 if call.name.endswith("c2c") else 2.5
    log2 = sympy.log(sympy.Max(length, 2)) / float(sympy.log(2))
    return call.work(factor * elements * log2, workspace=bytes_of(call.outputs))
