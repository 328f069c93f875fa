"""Kinds of tensors that do not live on the device, and what is said where one comes up."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_SPARSE = (
    ("_sparse_coo_tensor_with_dims_and_tensors", "SparsePrivateUse1"), ("_to_sparse", "PrivateUse1"),
    ("_to_sparse.sparse_dim", "PrivateUse1"), ("_to_sparse_csr", "PrivateUse1"), ("addmm", "SparsePrivateUse1"),
)
"""Where sparse tensors come up."""

QUANTIZING = ("quantize_per_tensor", "quantize_per_tensor_dynamic", "quantize_per_tensor.tensor_qparams",
               "quantize_per_tensor.tensors", "quantize_per_channel", "_make_per_tensor_quantized_tensor",
               "_make_per_channel_quantized_tensor")
"""Ops that make a quantized tensor of a plain one."""


def _refusal(message: str) -> Callable[..., Any]:
    def refuse(*_: Any, **__: Any) -> Any:
        """Raises: NotImplementedError."""
        raise NotImplementedError(message)

    return refuse


_no_sparse = _refusal(
    "sparse tensors do not live on remote_accelerator: use x.to_dense() before x.to('remote_accelerator'), "
    "Embedding(sparse=False), or keep that layer on the cpu")
_no_quantized = _refusal(
    "quantized tensors (qint8, quint8, ...) do not live on remote_accelerator: keep that layer on the cpu, move "
    "x.int_repr() or x.dequantize(), or compute with int8 tensors and scales of your own")
_no_nested = _refusal(
    "nested tensors with layout=torch.strided do not live on remote_accelerator: make them with layout=torch.jagged, "
    "or move x.to_padded_tensor(0.0)")


def refuse_layouts() -> list[Any]:
    """For tensors of the device that torch tells apart by dispatch key. The libraries returned hold the refusals."""
    library: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    library.fallback(_no_quantized, "QuantizedPrivateUse1")
    library.fallback(_no_nested, "NestedTensorPrivateUse1")
    return [library]


def refuse_ops(library: Any) -> None:
    """For ops that would make such tensors of the device's plain ones."""
    for name, key in _SPARSE:
        library.impl(name, _no_sparse, key)
    for name in QUANTIZING:
        library.impl(name, _no_quantized, "PrivateUse1")
