"""Which ops are also run in other dtypes than float32: the ones that models of those dtypes are made of."""

from __future__ import annotations

import torch

BFLOAT16 = (
    "add", "addmm", "argmax", "baddbmm", "bmm", "cat", "clamp", "cumsum", "einsum", "exp", "gather", "index_add",
    "index_select", "masked_fill", "matmul", "mean", "mul", "nn.functional.avg_pool2d", "nn.functional.batch_norm",
    "nn.functional.conv2d", "nn.functional.cross_entropy", "nn.functional.dropout", "nn.functional.embedding",
    "nn.functional.gelu", "nn.functional.group_norm", "nn.functional.interpolate", "nn.functional.layer_norm",
    "nn.functional.linear", "nn.functional.max_pool2d", "nn.functional.rms_norm",
    "nn.functional.scaled_dot_product_attention", "nn.functional.silu", "nn.functional.softplus", "pow", "rsqrt",
    "scatter_add", "sigmoid", "softmax", "sort", "sum", "tanh", "topk", "tril", "var", "where",
)  # fmt: skip

COMPLEX64 = (
    "abs", "add", "addmm", "angle", "bmm", "cat", "conj", "conj_physical", "cos", "cumsum", "diagonal", "div",
    "einsum", "exp", "fft.fft", "fft.fft2", "fft.fftshift", "fft.ifft", "fft.irfft", "imag", "index_select",
    "linalg.cholesky", "linalg.eigh", "linalg.inv", "linalg.norm", "linalg.qr", "linalg.solve", "linalg.svd", "log",
    "masked_fill", "matmul", "mean", "mul", "nn.functional.conv1d", "nn.functional.linear", "prod", "real",
    "reciprocal", "resolve_conj", "sqrt", "sum", "tanh", "transpose", "view_as_real", "where",
)  # fmt: skip

INT64 = (
    "add", "argmax", "argsort", "arange", "bincount", "bitwise_and", "bitwise_left_shift", "cat", "clamp", "cumsum",
    "eq", "floor_divide", "gather", "gt", "index_put", "index_select", "isin", "logical_and", "masked_fill",
    "masked_select", "max", "mul", "nn.functional.one_hot", "nonzero", "randint", "remainder", "repeat_interleave",
    "scatter", "searchsorted", "sort", "sum", "topk", "unique", "where",
)  # fmt: skip

SPOT_SETS: dict[torch.dtype, tuple[str, ...]] = {
    torch.bfloat16: BFLOAT16,
    torch.complex64: COMPLEX64,
    torch.int64: INT64,
}
