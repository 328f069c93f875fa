"""Lanes on hugepages, which are reserved for these tests and given back: said in the log, off with GENIE_SYSTEM=0."""
from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.runtime.lanes import networks
from tests.runtime.lanes.ends import ROOT, native

pytestmark = pytest.mark.heavy

log = logging.getLogger(__name__)

RESERVED = Path("/proc/sys/vm/nr_hugepages")
NUM_PAGES = 512          # of 2 MB: two processes of DPDK have 128 MB each; pools of other tests take some as they come
CLIENT = """
    import json, sys
    from genie_dynamo import _dpdk, _native
    facts = _dpdk.start(memory="hugepages")
    channel = _native.adopt_lane(_dpdk.connect("memif", sys.argv[1], 10.0))
    sent = bytes(range(256)) * 12000
    channel.send([b"head", sent])
    _, frames = channel.receive(20.0)
    print(json.dumps({"same": bytes(frames[0]) == sent, **facts}), flush=True)
    channel.close()
    _dpdk.stop()
"""


def meminfo(name: str) -> int:
    return int(Path("/proc/meminfo").read_text().split(name + ":")[1].split()[0])


def pages_of(pid: int) -> int:
    """How many hugepages of 2 MB a process has."""
    text = Path(f"/proc/{pid}/smaps_rollup").read_text()
    return sum(int(text.split(f"{kind}_Hugetlb:")[1].split()[0]) for kind in ("Shared", "Private")) // 2048


@pytest.fixture(scope="module")
def hugepages(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where hugetlbfs is mounted."""
    if os.environ.get("GENIE_SYSTEM", "1") == "0":
        pytest.skip("no hugepages: GENIE_SYSTEM=0 leaves the system alone")
    if os.geteuid() != 0 or not os.access(RESERVED, os.W_OK):
        pytest.skip("no hugepages: reserving them needs root")
    if meminfo("Hugepagesize") != 2048 or meminfo("MemAvailable") < 4 << 20:
        pytest.skip("no hugepages: this machine has no 2 MB ones, or less than 4 GB available")
    before = int(RESERVED.read_text())
    log.warning("system-wide change: vm.nr_hugepages %d -> %d until these tests have ended", before, before + NUM_PAGES)
    folder = tmp_path_factory.mktemp("hugetlbfs")
    try:
        RESERVED.write_text(str(before + NUM_PAGES))
        if int(RESERVED.read_text()) < before + NUM_PAGES:
            pytest.skip("no hugepages: memory is too fragmented to reserve them")
        if subprocess.run(["mount", "-t", "hugetlbfs", "none", folder], capture_output=True, check=False).returncode:
            pytest.skip("no hugepages: hugetlbfs cannot be mounted here")
        yield folder
    finally:
        subprocess.run(["umount", folder], capture_output=True, check=False)
        RESERVED.write_text(str(before))


def test_memif_runs_on_hugepages_and_a_killed_process_leaves_none_taken(hugepages: Path, tmp_path: Path) -> None:
    if why := networks.why_no_dpdk():
        pytest.skip(why)
    peer = subprocess.Popen([sys.executable, "-m", "tests.runtime.lanes.peer", "memif", tmp_path, "echo"], cwd=ROOT,
                            text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    try:
        assert peer.stdout is not None
        address = peer.stdout.readline().strip()
        taken = pages_of(peer.pid)
        assert taken >= 64
        done = subprocess.run([sys.executable, "-c", textwrap.dedent(CLIENT), address], cwd=ROOT, capture_output=True,
                              text=True, timeout=100, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        facts = json.loads(done.stdout)
        assert facts["same"]
        assert facts["hugepages"] and facts["memory"] == "hugepages"
        assert not list(hugepages.iterdir())              # unlinked at once: nothing to leave behind
        free = meminfo("HugePages_Free")
    finally:
        peer.kill()
        peer.communicate()
    # Pools of other processes take some as they come.
    until_s = time.monotonic() + 5
    while meminfo("HugePages_Free") < free + taken // 2 and time.monotonic() < until_s:
        time.sleep(0.05)
    assert meminfo("HugePages_Free") >= free + taken // 2


def test_a_pool_takes_hugepages_where_there_are_some_and_gives_them_back(hugepages: Path) -> None:
    pool = native().Pool()
    held = [pool.allocate(3 << 20) for _ in range(4)]
    assert pool.statistics()["pages"] == "hugepages"
    for memory in held:
        memoryview(memory)[0] = 1
    assert pages_of(os.getpid()) >= len(held)
    del memory
    held.clear()
    pool.trim()
    assert pool.statistics()["reserved_bytes"] == 0
    assert pages_of(os.getpid()) == 0
