"""torch's op_db on `remote_accelerator`: every float32 entry, forward, backward and in place, and some complex ones."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.opinfo.core import OpInfo

from tests.yardsticks.device_cases import compare, marked, updates_copy
from tests.yardsticks.op_cases import (
    INPLACE_DTYPE,
    _first_inplace_sample,
    _first_samples,
    supports_inplace_training,
    supports_training,
)

COMPLEX = ("mul", "conj", "real", "imag", "matmul", "fft.fft", "abs", "angle", "view_as_real", "resolve_conj", "dot",
           "vdot", "linalg.inv", "sgn", "exp")


def _cases() -> Iterator[Any]:
    for op in op_db:
        if torch.float32 not in op.dtypes or op.name.startswith("jiterator"):
            continue
        yield marked(f"inference/{op.full_name}", op, "inference", torch.float32)
        if supports_training(op, torch.float32):
            yield marked(f"training/{op.full_name}", op, "training", torch.float32)
        dtype = INPLACE_DTYPE.get(op.name, torch.float32)
        if op.inplace_variant is not None:
            yield marked(f"inplace/{op.full_name}", op, "inplace", dtype)
        if supports_inplace_training(op, dtype):
            yield marked(f"inplace_training/{op.full_name}", op, "inplace_training", dtype)
    for op in op_db:
        if op.name in COMPLEX and torch.complex64 in op.dtypes:
            yield marked(f"complex/{op.full_name}", op, "training", torch.complex64)


@pytest.mark.filterwarnings("ignore:dropout2d. Received a 3D input")
@pytest.mark.parametrize(("op", "mode", "dtype"), list(_cases()))
def test_op(op: OpInfo, mode: str, dtype: torch.dtype) -> None:
    training = mode.endswith("training")
    if mode.startswith("inplace"):
        fn = updates_copy(op.inplace_variant) if training else op.inplace_variant
        compare(fn, _first_inplace_sample(op, dtype, requires_grad=training), op, training=training, where=mode)
        return
    for sample in _first_samples(op, dtype, training):
        compare(op.op, sample, op, training=training, where=mode)
