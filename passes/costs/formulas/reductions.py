"""Ops that combine elements: reductions, scans, softmax, normalisations, sorting, pooling, resampling.

Weights are operations per element in adds, measured as those of elementwise.py; the backward ones count the passes
that torch's kernels make over the data.
"""
from __future__ import annotations

from math import prod
from typing import Any

import sympy
import torch

from genie_dynamo.passes.costs.registry import Call, Work, base_name, formula
from genie_dynamo.passes.costs.sizes import Size, numel, shape_of, touched_bytes

_REDUCTIONS = ("sum", "mean", "prod", "amax", "amin", "any", "all", "nansum", "linalg_vector_norm", "norm", "aminmax",
               "count_nonzero", "hash_tensor", "native_norm", "dist", "_cdist_forward", "_cdist_backward",
               "_pdist_forward", "trace", "bincount", "histc", "logsumexp", "equal", "renorm", "histogram",
               "_histogramdd_from_bin_cts", "searchsorted", "bucketize")
_INDEXED = ("max", "min", "argmax", "argmin", "mode", "median", "nanmedian", "kthvalue", "std", "var", "var_mean",
            "std_mean", "nanmedian")
_SCANS = ("cumsum", "cumprod", "cummax", "cummin", "_cummax_helper", "_cummin_helper", "logcumsumexp")
_WEIGHTS = {"reduction": 1.0, "indexed": 9.0, "scan": 8.5}


@formula("reduction", *(f"aten::{name}" for name in _REDUCTIONS))
def reduction(call: Call) -> Work:
    return call.work(_WEIGHTS["reduction"] * call.in_numel)


@formula("indexed_reduction", *dict.fromkeys(f"aten::{name}" for name in _INDEXED))
def indexed_reduction(call: Call) -> Work:
    """Reductions that carry a position or a second moment."""
    return call.work(_WEIGHTS["indexed"] * call.in_numel)


@formula("scan", *(f"aten::{name}" for name in _SCANS))
def scan(call: Call) -> Work:
    return call.work(_WEIGHTS["scan"] * call.in_numel)


@formula("softmax", "aten::_softmax", "aten::_log_softmax", "aten::_safe_softmax", "aten::softmax",
         "aten::log_softmax")
def softmax(call: Call) -> Work:
    """Largest element, exponentials and their sum, quotients."""
    return call.work(6 * call.out_numel)


@formula("softmax", "aten::_softmax_backward_data", "aten::_log_softmax_backward_data")
def softmax_backward(call: Call) -> Work:
    log = "log" in call.name
    return call.work((9 if log else 4) * call.out_numel)


@formula("norm", "aten::native_layer_norm", "aten::native_group_norm", "aten::_fused_rms_norm",
         "aten::_native_batch_norm_legit", "aten::_native_batch_norm_legit_functional", "aten::native_batch_norm",
         "aten::_batch_norm_with_update", "aten::_batch_norm_with_update_functional", "aten::cudnn_batch_norm",
         "aten::_weight_norm_interface")
def normalisation(call: Call) -> Work:
    """Mean and variance, then the normalised, scaled and shifted elements."""
    return call.work(7 * numel(call.tensor(0)))


@formula("norm", "aten::_native_batch_norm_legit_no_training", "aten::_batch_norm_no_update")
def normalisation_by_known_moments(call: Call) -> Work:
    return call.work(2 * numel(call.tensor(0)))


@formula("norm_backward", "aten::native_layer_norm_backward", "aten::native_group_norm_backward",
         "aten::native_batch_norm_backward", "aten::batch_norm_backward", "aten::_fused_rms_norm_backward",
         "aten::cudnn_batch_norm_backward", "aten::_weight_norm_interface_backward")
def normalisation_backward(call: Call) -> Work:
    return call.work(14 * numel(call.tensor(0)))


@formula("sort", "aten::sort", "aten::argsort", "aten::msort", "aten::unique_dim", "aten::_unique2",
         "aten::unique_consecutive")
def sort(call: Call) -> Work:
    """n log2 n comparisons of the sorted dimension, 38 adds each: 342 were measured for an element of 512."""
    x = call.tensor(0)
    dim = call.arg(1, "dim", -1)
    if call.name == "aten::sort" and isinstance(dim, bool):       # sort.stable(self, *, stable, dim)
        dim = call.kwargs.get("dim", -1)
    length: Size = shape_of(x)[dim] if x.dim() and isinstance(dim, int) and call.name == "aten::sort" else numel(x)
    log2 = sympy.log(sympy.Max(length, 2)) / float(sympy.log(2))
    return call.work(38 * numel(x) * log2, workspace=touched_bytes(x))


@formula("sort", "aten::topk")
def topk(call: Call) -> Work:
    """A partial sort."""
    return call.work(38 * call.in_numel)


def _window(call: Call) -> int:
    kernel: Any = call.arg(1, "kernel_size", 1)
    return prod(kernel) if isinstance(kernel, list | tuple) else int(kernel)


@formula("pool", "aten::max_pool1d_with_indices", "aten::max_pool2d_with_indices", "aten::max_pool3d_with_indices",
         "aten::max_pool2d", "aten::avg_pool1d", "aten::avg_pool2d", "aten::avg_pool3d", "aten::max_pool3d")
def pool(call: Call) -> Work:
    return call.work(_window(call) * numel(call.outputs[0]))


@formula("pool", "aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d", "aten::adaptive_avg_pool1d",
         "aten::adaptive_max_pool2d", "aten::adaptive_max_pool3d", "aten::fractional_max_pool2d",
         "aten::fractional_max_pool3d")
def adaptive_pool(call: Call) -> Work:
    return call.work(call.in_numel)


@formula("pool", "aten::max_pool2d_with_indices_backward", "aten::max_pool3d_with_indices_backward",
         "aten::avg_pool2d_backward", "aten::avg_pool3d_backward", "aten::_adaptive_avg_pool2d_backward",
         "aten::_adaptive_avg_pool3d_backward", "aten::adaptive_max_pool2d_backward",
         "aten::adaptive_max_pool3d_backward")
def pool_backward(call: Call) -> Work:
    """The gradient and what it is spread over; the pooled values themselves are not looked at."""
    indices = [t for t in call.inputs if t.dtype == torch.int64]
    read = sum(touched_bytes(t) for t in (call.tensor(0), *indices))
    return call.work(call.out_numel, read=read)


_TAPS = {"nearest1d": 1, "nearest2d": 1, "nearest3d": 1, "_exact1d": 1, "_exact2d": 1, "_exact3d": 1, "linear1d": 4,
         "bilinear2d": 8, "_bilinear2d_aa": 16, "_bicubic2d_aa": 40, "bicubic2d": 40, "trilinear3d": 16}


def _resampling_names(suffix: str) -> list[str]:
    names = [f"upsample_{kind}" for kind in _TAPS if not kind.startswith("_")]
    names += [f"_upsample_nearest{kind}" for kind in ("_exact1d", "_exact2d", "_exact3d")]
    names += ["_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa"]
    return [f"aten::{name}{suffix}" for name in names]


@formula("upsample", *_resampling_names(""), *_resampling_names("_backward"))
def resample(call: Call) -> Work:
    """Operations per element of the larger side, by the number of neighbours that are weighed."""
    short = base_name(call.name).removesuffix("_backward")
    per_element = max((taps for kind, taps in _TAPS.items() if short.endswith(kind)), default=1)
    larger = call.tensor(0) if call.name.endswith("_backward") else call.outputs[0]
    return call.work(per_element * numel(larger))


@formula("upsample", "aten::grid_sampler_2d", "aten::grid_sampler_3d", "aten::grid_sampler_2d_backward",
         "aten::grid_sampler_3d_backward")
def grid_sample(call: Call) -> Work:
    return call.work(12 * call.out_numel)
