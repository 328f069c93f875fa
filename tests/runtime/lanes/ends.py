"""Starts the other end of a lane and connects to it."""
from __future__ import annotations

import atexit
import contextlib
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from genie_dynamo.runtime.lanes import dpdk
from genie_dynamo.runtime.lanes import native as native_lanes
from tests.runtime.lanes import networks

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("shm", "tcp")
"""Lanes whose receiver moves them itself: what it does not look at has not arrived."""
PORTS = ("memif", "af_packet")
"""Ports of the dpdk lane, which a thread of its own moves. The promises of lane.h hold over these too."""

_numbers = itertools.count()


def native() -> Any:
    """The extension; tests of lanes are skipped where it was not built."""
    return pytest.importorskip("genie_dynamo._native", reason="the native extension is not built")


def why_not(kind: str) -> str:
    """Why this kind of lane or port cannot be tested here; empty where it can."""
    if kind in KINDS:
        return native_lanes.why_not()
    return networks.why_no_dpdk() if kind == "memif" else networks.why_no_namespaces()


class Peer:
    """A process with the other end. `channel` is this process's.

    Over af_packet, and wherever `apart` asks for it, each end has a network namespace; this thread is in its own for as
    long as the peer lives, and other threads are not.
    """

    def __init__(self, kind: str, mode: str, apart: bool = False) -> None:
        self._stack = contextlib.ExitStack()
        apart = apart or kind == "af_packet"
        self.pair = self._stack.enter_context(networks.veth(mtu=9000)) if apart else None
        here, there, prefix = kind, kind, []
        if self.pair is not None:
            if kind in PORTS:
                here, there = f"{kind}:{self.pair.first_interface}", f"{kind}:{self.pair.second_interface}"
            prefix = self.pair.inside(1)
            self._stack.enter_context(networks.thread_inside(self.pair.first))
        host = networks.give_addresses(self.pair)[1] if self.pair is not None else "127.0.0.1"
        address = f"@genie-tests-{os.getpid()}-{next(_numbers)}" if kind == "shm" else f"{host}:0"
        if kind in PORTS:
            address = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="genie-t-"))
        self._process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "tests.runtime.lanes.peer", there, address, mode], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        self.channel = native().connect(kind, self.address, 10.0) if kind in KINDS else over_port(here, self.address)

    @property
    def pid(self) -> int:
        return self._process.pid

    def signal(self, number: signal.Signals) -> None:
        self._process.send_signal(number)
        if number == signal.SIGKILL:
            self._process.wait(10)

    def said(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def close(self) -> None:
        self.channel.close()
        self._process.send_signal(signal.SIGCONT)
        self._process.kill()
        self._process.communicate()
        self._stack.close()


def over_port(port: str, address: str) -> Any:
    """A channel over a port of this process, which has as many as it likes here; DPDK stays on until it ends."""
    module = dpdk.module()
    if not module.is_running():
        module.start()
        atexit.register(module.stop)
    return native().adopt_lane(module.connect(port, address, 10.0))


def open_files() -> list[str]:
    """What this process has open that a lane could leave behind."""
    found = []
    for entry in Path("/proc/self/fd").iterdir():
        try:
            target = str(entry.readlink())
        except OSError:
            continue
        if "genie-lane" in target or target.startswith(("socket:", "anon_inode:[event")):
            found.append(target.split(":")[0] + ":" + target.split("[")[0])
    return sorted(found)


def mapped_segments() -> int:
    """How many mappings of lanes' memory this process has."""
    return Path("/proc/self/maps").read_text().count("memfd:genie-lane")
