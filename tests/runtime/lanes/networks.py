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
    """Why two ends of a dpdk lane cannot be put on an Ethernet of their own; empty where they can."""
    return why_no_dpdk() or why_no_network()


def why_no_network() -> str:
    """Why this process cannot have network namespaces; empty where it can."""
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


def give_addresses(pair: Pair) -> tuple[str, str]:
    """Of IPv4, to both ends."""
    addresses = ("10.231.0.1", "10.231.0.2")
    for namespace, interface, address in ((pair.first, pair.first_interface, addresses[0]),
                                          (pair.second, pair.second_interface, addresses[1])):
        _run("ip", "-n", namespace, "addr", "add", f"{address}/24", "dev", interface)
    return addresses


def why_no_loss() -> str:
    """Why the kernel cannot be made to lose frames here; empty where it can."""
    if why := why_no_network():
        return why
    if shutil.which("tc") is None:
        return "tc is not installed (apt-get install iproute2)"
    with veth(mtu=1500) as pair:
        try:
            lose(pair, one_in=2)
        except subprocess.CalledProcessError as error:
            return f"this kernel has no clsact with BPF: {error.stderr.strip()}"
    return ""


def lose(pair: Pair, one_in: int) -> None:
    """From here on the kernel drops one of so many frames that leave either end, by its own random numbers.

    Not every kernel has netem; this is a classic BPF program where frames leave, and drops where random % one_in is 0.
    DPDK's af_packet driver sends past it.
    """
    random, shot, ok = 0xFFFFF038, 2, 0                # SKF_AD_OFF + SKF_AD_RANDOM; TC_ACT_SHOT, TC_ACT_OK
    program = f"5,32 0 0 {random},148 0 0 {one_in},21 0 1 0,6 0 0 {shot},6 0 0 {ok}"
    for which, interface in enumerate((pair.first_interface, pair.second_interface)):
        _run(*pair.inside(which), "tc", "qdisc", "add", "dev", interface, "clsact")
        _run(*pair.inside(which), "tc", "filter", "add", "dev", interface, "egress", "bpf", "da", "bytecode", program)


def num_lost(pair: Pair) -> int:
    """Frames that `lose` has dropped at both ends."""
    said = [subprocess.run([*pair.inside(which), "tc", "-s", "qdisc", "show", "dev", interface], check=True, text=True,
                           capture_output=True, timeout=20).stdout.partition("clsact")[2]
            for which, interface in enumerate((pair.first_interface, pair.second_interface))]
    return sum(int(text.partition("dropped ")[2].partition(",")[0]) for text in said)


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=20)
