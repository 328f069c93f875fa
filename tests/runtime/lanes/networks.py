"""Two network namespaces joined by a veth pair, gone when the test is; and why dpdk cannot be tested here."""
from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass

from genie_dynamo.runtime.lanes import dpdk, native


@dataclass(frozen=True, slots=True)
class Pair:
    """Names of the namespaces and of the interface in each."""

    first: str
    second: str
    first_interface: str
    second_interface: str

    def inside(self, which: int) -> list[str]:
        """What to put before a command that is to run in one of them."""
        return ["ip", "netns", "exec", self.first if which == 0 else self.second]


def why_no_dpdk() -> str:
    """Why no dpdk lane can be tested here; empty where it can."""
    return native.why_not() or ("" if dpdk.module() is not None else dpdk.why_not())


def why_no_namespaces() -> str:
    """Why two ends cannot be put on an Ethernet of their own; empty where they can."""
    if why := why_no_dpdk():
        return why
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need iproute2"
    probe = f"genie-{os.getpid()}-p"
    if subprocess.run(["ip", "netns", "add", probe], capture_output=True, check=False).returncode:
        return "network namespaces cannot be made here"
    subprocess.run(["ip", "netns", "del", probe], capture_output=True, check=False)
    return ""


@contextlib.contextmanager
def veth(mtu: int) -> Iterator[Pair]:
    """The pair, of one queue each way: af_xdp takes what comes on one queue, and the kernel spreads over all."""
    pid = os.getpid()
    pair = Pair(f"genie-{pid}-a", f"genie-{pid}-b", "gv0", "gv1")
    names = ((pair.first, pair.first_interface), (pair.second, pair.second_interface))
    queues = ["numrxqueues", "1", "numtxqueues", "1"]
    try:
        for namespace, _ in names:
            _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", "gv0", *queues, "netns", pair.first, "type", "veth", "peer", "name", "gv1", *queues,
             "netns", pair.second)
        for namespace, interface in names:
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "link", "set", interface, "mtu", str(mtu), "up")
        yield pair
    finally:
        for namespace, _ in names:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
