"""What the client copies, it copies by itself: a pool of threads that it wakes keeps the worker's cores busy."""
from __future__ import annotations

import subprocess
import sys

SCRIPT = """
import os, torch
from genie_dynamo.runtime.lanes.native import copied
torch.set_num_threads(2)
tensor = torch.frombuffer(bytearray(os.urandom(1 << 18)), dtype=torch.uint8)
def num_threads():
    return len(os.listdir("/proc/self/task"))
before = num_threads()
copy = copied(tensor)
alone = num_threads()
assert torch.equal(copy, tensor) and copy.data_ptr() != tensor.data_ptr()
torch.empty(1 << 18).copy_(torch.empty(1 << 18))
print(alone - before, num_threads() - alone)
"""


def test_a_copy_wakes_no_pool_of_threads() -> None:
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=True)
    by_us, by_torch = map(int, ran.stdout.split())
    assert by_us == 0 and by_torch > 0
