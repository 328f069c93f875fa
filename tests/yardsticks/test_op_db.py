"""torch's op_db through the backend: every float32 entry, and spot sets of bfloat16, complex64 and int64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.testing._internal.common_methods_invocations import op_db

from tests.yardsticks.harness import Case, parametrize, unique
from tests.yardsticks.op_cases import (
    INPLACE_DTYPE,
    inference_case,
    inplace_case,
    inplace_training_case,
    supports_inplace_training,
    supports_training,
    training_case,
)
from tests.yardsticks.spot_sets import SPOT_SETS


def cases() -> list[Case]:
    """Every case of this file."""
    return unique((*_float32_cases(), *_spot_cases()))


def _float32_cases() -> Iterator[Case]:
    for op in op_db:
        if torch.float32 not in op.dtypes:
            continue
        yield inference_case("op_db", op, torch.float32)
        if supports_training(op, torch.float32):
            yield training_case("op_db", op, torch.float32)
        inplace_dtype = INPLACE_DTYPE.get(op.name, torch.float32)
        if op.inplace_variant is not None:
            yield inplace_case("op_db", op, inplace_dtype)
        if supports_inplace_training(op, inplace_dtype):
            yield inplace_training_case("op_db", op, inplace_dtype)


def _spot_cases() -> Iterator[Case]:
    for dtype, names in SPOT_SETS.items():
        for op in op_db:
            if op.name not in names or dtype not in op.dtypes:
                continue
            yield inference_case("op_db", op, dtype)
            if supports_training(op, dtype):
                yield training_case("op_db", op, dtype)


@parametrize(cases())
def test_op(case: Case) -> None:
    case.run()


@pytest.mark.parametrize("dtype", SPOT_SETS, ids=str)
def test_every_spot_op_has_an_entry(dtype: torch.dtype) -> None:
    """A renamed op must not drop out of a spot set unseen."""
    known = {op.name for op in op_db if dtype in op.dtypes}
    assert set(SPOT_SETS[dtype]) <= known
