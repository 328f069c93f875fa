"""Ops that work on each element by itself: by torch's `pointwise` tag, with a weight for what an element costs.

WEIGHTS are times relative to one add of float32, measured over 16 Ki elements in cache on one thread (torch 2.13.0,
x86-64 with AVX2). They say which ops are dear; how dear on another machine, calibration and the fit say.
"""
from __future__ import annotations

import torch

from genie_dynamo.passes.costs.registry import Call, Work, base_name, bytes_of, formula
from genie_dynamo.passes.costs.sizes import numel, size_bytes

WEIGHTS: dict[str, float] = {
    "sqrt": 4, "rsqrt": 2.5, "exp": 7, "exp2": 7, "expm1": 11, "log": 9, "log2": 9, "log10": 9, "log1p": 7,
    "sin": 11, "cos": 12, "tan": 15, "asin": 50, "acos": 50, "atan": 22, "atan2": 12, "sinh": 20, "cosh": 20,
    "tanh": 22, "asinh": 40, "acosh": 40, "atanh": 40, "sigmoid": 3.5, "log_sigmoid_forward": 13, "erf": 11,
    "erfc": 15, "erfinv": 20, "gelu": 7, "silu": 3.5, "mish": 34, "softplus": 13, "pow": 23, "hypot": 9.5,
    "lgamma": 40, "digamma": 136, "polygamma": 136, "i0": 40, "sinc": 12, "logit": 10, "fmod": 11, "remainder": 12,
    "floor_divide": 11, "where": 10, "masked_fill": 3, "logaddexp": 20, "logaddexp2": 20, "xlogy": 10,
    "binary_cross_entropy": 18, "huber_loss": 3, "smooth_l1_loss": 3,
    # backward ops whose forward has another weight
    "gelu_backward": 12, "silu_backward": 7, "mish_backward": 40, "softplus_backward": 10, "tanh_backward": 2,
    "sigmoid_backward": 2, "logit_backward": 4, "log_sigmoid_backward": 10,
}
TRANSCENDENTAL_FROM = 3
"""Ops from this weight on are a family of their own: arithmetic, not memory, bounds them in cache."""

_RANDOM = ("rand", "rand_like", "randn", "randn_like", "randint", "randint_like", "bernoulli", "normal", "normal_",
           "uniform", "random", "exponential", "multinomial", "randperm", "rrelu_with_noise",
           "rrelu_with_noise_functional", "geometric", "cauchy", "log_normal", "poisson", "binomial",
           "_standard_gamma", "_sample_dirichlet", "normal_functional")
RANDOM_WEIGHT = 25


def weight(call: Call) -> float:
    """Elementwise operations per element, in adds."""
    short = base_name(call.name)
    if short == "pow" and isinstance(exponent := call.arg(1, "exponent"), int | float):
        return {0.5: 4, 2: 1, 3: 1.5, -1: 1}.get(float(exponent), WEIGHTS["pow"])
    if short == "gelu" and call.kwargs.get("approximate") == "tanh":
        return 15
    return WEIGHTS.get(short, 1)


def pointwise(call: Call) -> tuple[str, Work]:
    """Family and work of an op with torch's `pointwise` tag."""
    per_element = weight(call)
    family = "transcendental" if per_element >= TRANSCENDENTAL_FROM else "elementwise"
    return family, call.work(per_element * call.out_numel)


def foreach(call: Call) -> tuple[str, Work]:
    """`_foreach_*`: the same op for each tensor of a list. In-place forms write to the first list."""
    short = base_name(call.name).removeprefix("_foreach_")
    elements = sum(numel(t) for t in call.tensors(0))
    written = bytes_of(call.outputs or call.tensors(0))
    family = "transcendental" if WEIGHTS.get(short, 1) >= TRANSCENDENTAL_FROM else "elementwise"
    return family, call.work(WEIGHTS.get(short, 1) * elements, written=written)


_NOT_TAGGED = ("floor_divide", "log_sigmoid_forward", "log_sigmoid_backward", "softplus_backward", "hardtanh_backward",
               "hardswish_backward", "hardsigmoid_backward", "elu_backward", "leaky_relu_backward", "mish_backward",
               "celu_backward", "softshrink_backward", "hardshrink_backward", "threshold_backward", "logit_backward",
               "rrelu_with_noise_backward", "_prelu_kernel", "_prelu_kernel_backward", "glu", "glu_backward",
               "silu_backward", "gelu_backward", "sigmoid_backward", "tanh_backward")


def _register_those_without_tag() -> None:
    for name in _NOT_TAGGED:
        family = "transcendental" if WEIGHTS.get(name, 1) >= TRANSCENDENTAL_FROM else "elementwise"
        formula(family, f"aten::{name}")(lambda call: pointwise(call)[1])


_register_those_without_tag()


@formula("random", *(f"aten::{name}" for name in _RANDOM if name != "normal_"))
def random(call: Call) -> Work:
    return call.work(RANDOM_WEIGHT * call.out_numel)


@formula("random", "aten::native_dropout")
def dropout(call: Call) -> Work:
    """A draw, a mask and a product, for each element."""
    return call.work((RANDOM_WEIGHT + 3) * numel(call.tensor(0)))


@formula("elementwise", "aten::native_dropout_backward")
def dropout_backward(call: Call) -> Work:
    return call.work(2 * numel(call.tensor(0)))


@formula("elementwise", "aten::masked_fill", "aten::masked_fill_")
def masked_fill(call: Call) -> Work:
    return call.work(WEIGHTS["masked_fill"] * call.out_numel)


def _fused_optimizer(call: Call) -> Work:
    """Lists of parameters, gradients and state; each element is read and written once."""
    lists = [call.tensors(position) for position in range(len(call.args))]
    elements = sum(numel(t) for t in lists[0])
    state = [t for tensors in lists for t in tensors]
    return Work(15 * elements, bytes_of(tuple(state)), sum(size_bytes(t) for t in state))


for _name in ("_fused_adam", "_fused_adamw", "_fused_sgd", "_fused_adagrad"):
    formula("elementwise", f"aten::{_name}", f"aten::{_name}_")(_fused_optimizer)


@formula("transcendental", "aten::_thnn_fused_lstm_cell", "aten::_thnn_fused_gru_cell")
def fused_cell(call: Call) -> Work:
    """The gates' sigmoids and tanhs, after the products."""
    return call.work(20 * numel(call.tensor(0)))


@formula("loss", "aten::mse_loss", "aten::huber_loss", "aten::smooth_l1_loss", "aten::binary_cross_entropy",
         "aten::binary_cross_entropy_with_logits", "aten::soft_margin_loss", "aten::mse_loss_backward",
         "aten::huber_loss_backward", "aten::smooth_l1_loss_backward", "aten::binary_cross_entropy_backward",
         "aten::soft_margin_loss_backward", "aten::multi_margin_loss", "aten::multilabel_margin_loss_forward",
         "aten::_ctc_loss", "aten::_ctc_loss_backward")
def loss(call: Call) -> Work:
    return call.work((WEIGHTS.get(base_name(call.name), 3)) * numel(max(call.inputs, key=torch.Tensor.dim)))


@formula("loss", "aten::nll_loss_forward", "aten::nll_loss2d_forward")
def nll_loss(call: Call) -> Work:
    """Reads one log-probability per target."""
    log_probabilities, target = call.tensor(0), call.tensor(1)
    read = numel(target) * (log_probabilities.dtype.itemsize + target.dtype.itemsize)
    return call.work(2 * numel(target), read=read)


@formula("loss", "aten::nll_loss_backward", "aten::nll_loss2d_backward")
def nll_loss_backward(call: Call) -> Work:
    """Writes zeros everywhere and one number per target."""
    return call.work(numel(call.tensor(2)), read=size_bytes(call.tensor(2)))
