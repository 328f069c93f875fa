"""torch's hop_db through the backend: cond, scan, while_loop, flex_attention and the other higher-order ops."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch.testing._internal.hop_db import hop_db

from tests.yardsticks.harness import BACKEND, Case, parametrize, unique
from tests.yardsticks.op_cases import inference_case, training_case

OP_LIBRARY = "torch.testing._internal.hop_db"


def cases() -> list[Case]:
    """Every case of this file."""
    return unique(_cases())


def _cases() -> Iterator[Case]:
    # Some entries list no CPU dtype; what of them works on the CPU is measured, not taken from the entry.
    for op in hop_db:
        yield inference_case("hop_db", op, torch.float32)
        if op.supports_autograd:
            yield training_case("hop_db", op, torch.float32)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's partitioner writes a graph that it fails on to the current folder."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture(autouse=True)
def _workers_know_the_library(case: Case, request: pytest.FixtureRequest) -> None:
    """One entry is about an op that torch's test library defines: its worker must be told to import that library."""
    if "auto_functionalize" in case.key and BACKEND == "genie":
        request.getfixturevalue("own_session")(workers=1, op_libraries=(OP_LIBRARY,))


@parametrize(cases())
def test_higher_order_op(case: Case) -> None:
    case.run()
