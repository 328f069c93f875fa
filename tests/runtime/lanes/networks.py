"""Two network namespaces joined by a veth pair, gone when the test is; and why dpdk cannot be tested here."""
from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from genie_dynamo.runtime.lanes import dpdk, native

_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


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
    number = next(_numbers)
    name = f"genie-{os.getpid()}-{number}"
    pair = Pair(f"{name}a", f"{name}b", f"gv{number}a", f"gv{number}b")   # no two of one process have the same name
    names = ((pair.first, pair.first_interface), (pair.second, pair.second_interface))
    queues = ["numrxqueues", "1", "numtxqueues", "1"]
    try:
        for namespace, _ in names:
            _run("ip", "netns", "add", namespace)
        _run("ip", "link", "add", pair.first_interface, *queues, "netns", pair.first, "type", "veth", "peer", "name",
             pair.second_interface, *queues, "netns", pair.second)
        for namespace, interface in names:
            _run("ip", "-n", namespace, "link", "set", "lo", "up")
            _run("ip", "-n", namespace, "link", "set", interface, "mtu", str(mtu), "up")
        yield pair
    finally:
        for namespace, _ in names:
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, check=False)


@contextlib.contextmanager
def thread_inside(namespace: str) -> Iterator[None]:
    """This thread, and what it starts meanwhile, in a namespace of `ip netns`."""
    libc = ctypes.CDLL(None, use_errno=True)
    with Path("/proc/thread-self/ns/net").open() as before, Path("/run/netns", namespace).open() as inside:
        if libc.setns(inside.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"entering the namespace {namespace}")
        try:
            yield
        finally:
            libc.setns(before.fileno(), _CLONE_NEWNET)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
