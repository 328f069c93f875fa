"""What the client copies, it copies by itself: a pool of threads that it wakes keeps the worker's cores busy."""
from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch

from genie_dynamo.runtime.lanes import native

SCRIPT = """
import os, torch
from genie_dynamo.runtime.lanes.native import copied, copy_rows
torch.set_num_threads(2)
tensor = torch.frombuffer(bytearray(os.urandom(1 << 18)), dtype=torch.uint8)
def num_threads():
    return len(os.listdir("/proc/self/task"))
before = num_threads()
copy = copied(tensor)
wide = torch.empty(4, 1 << 17, dtype=torch.uint8)
copy_rows(wide, 1 << 16, tensor.view(4, 1 << 16), 1)
alone = num_threads()
assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
assert torch.equal(wide[:, 1 << 16:], tensor.view(4, 1 << 16))
torch.empty(1 << 18).copy_(torch.empty(1 << 18))
print(alone - before, num_threads() - alone)
"""


def test_a_copy_wakes_no_pool_of_threads() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    by_us, by_torch = map(int, ran.stdout.split())
    assert by_us == 0 and by_torch > 0


@pytest.mark.parametrize("built", [True, False])
@pytest.mark.parametrize("dim", [0, 1, 2, 3])
@pytest.mark.parametrize(("rows", "start"), [(1, 3), (2, 0), (0, 1), (4, 0)])
def test_rows_go_where_narrow_has_them(built: bool, dim: int, rows: int, start: int,
                                       monkeypatch: pytest.MonkeyPatch) -> None:
    if built and native.module() is None:
        pytest.skip("the native extension is not built")
    if not built:
        monkeypatch.setattr(native, "_module", None)
    shape: list[Any] = [4, 4, 4, 4]
    target = torch.randn(shape)
    shape[dim] = rows
    source = torch.randn(shape)
    expected = target.clone()
    expected.narrow(dim, start, rows).copy_(source)
    native.copy_rows(target, start, source, dim)
    assert torch.equal(target, expected)
