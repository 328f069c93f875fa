"""`torch.autocast("remote_accelerator", dtype=...)`: which ops run in the lower precision, and which in float32.

The lists are those of torch.amp's documentation for CUDA ("CUDA Ops that can autocast ..."); other ops take what comes.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch._ops import OpOverload

from genie_dynamo.device import NAME

Tensor = torch.Tensor

LOWER = (
    "_convolution", "convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d", "conv_transpose2d",
    "conv_transpose3d", "matmul", "mm", "mv", "addmm", "addmv", "addr", "addbmm", "baddbmm", "bmm", "linear",
    "chain_matmul", "linalg_multi_dot", "prelu", "gru_cell", "lstm_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "scaled_dot_product_attention",
)
FLOAT32 = (
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow", "softplus", "layer_norm", "group_norm", "norm", "frobenius_norm", "nuclear_norm", "cosine_similarity",
    "poisson_nll_loss", "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss",
    "smooth_l1_loss", "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist", "renorm",
    "logsumexp", "prod", "softmax", "log_softmax", "cumprod", "cumsum", "sum",
)
WIDEST = ("addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "vdot", "grid_sampler", "index_put", "tensordot",
          "scatter_add", "cat", "stack")


def register_autocast() -> list[Any]:
    """Register; the libraries returned hold the registrations."""
    rest: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    rest.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for names, dtype_of in ((LOWER, _lower), (FLOAT32, _float32), (WIDEST, _widest)):
        for target in _overloads(names):
            library.impl(target._schema.name.removeprefix("aten::") + (
                f".{target._schema.overload_name}" if target._schema.overload_name else ""),
                _kernel(target, dtype_of), "AutocastPrivateUse1")
    return [rest, library]


def _overloads(names: tuple[str, ...]) -> Iterator[OpOverload]:
    for name in names:
        packet = getattr(torch.ops.aten, name)
        for overload in packet.overloads():
            target = getattr(packet, overload)
            if not target._schema.is_mutable:
                yield target


def _kernel(target: OpOverload, dtype_of: Callable[[list[Tensor]], torch.dtype]) -> Callable[..., Any]:
    off = torch._C.DispatchKeySet(torch._C.DispatchKey.AutocastPrivateUse1)  # type: ignore[attr-defined]

    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ExcludeDispatchKeyGuard(off):
            found: list[Tensor] = []
            _collect(args, found)
            _collect(tuple(kwargs.values()), found)
            if not found:
                return target(*args, **kwargs)
            dtype = dtype_of(found)
            return target(*[_cast(a, dtype) for a in args], **{k: _cast(v, dtype) for k, v in kwargs.items()})

    return kernel


def _eligible(value: Any) -> bool:
    return (isinstance(value, Tensor) and value.device.type == NAME and value.is_floating_point()
            and value.dtype is not torch.float64)


def _collect(values: Any, found: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, list | tuple):
            _collect(value, found)
        elif _eligible(value):
            found.append(value)


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):
        return [_cast(item, dtype) for item in value]
    return value.to(dtype) if _eligible(value) and value.dtype is not dtype else value


def _lower(_: list[Tensor]) -> torch.dtype:
    return torch.get_autocast_dtype(NAME)


def _float32(_: list[Tensor]) -> torch.dtype:
    return torch.float32


def _widest(found: list[Tensor]) -> torch.dtype:
    return torch.float32 if any(t.dtype is torch.float32 for t in found) else _lower(found)
