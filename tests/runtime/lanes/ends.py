"""Starts the other end of a lane and connects to it."""
from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
KINDS = ("shm", "tcp")
"""Lanes between processes; every promise of lane.h is tested over each of them."""

_numbers = itertools.count()


def native() -> Any:
    """The extension; tests of lanes are skipped where it was not built."""
    return pytest.importorskip("genie_dynamo._native", reason="the native extension is not built")


class Peer:
    """A process with the other end. `channel` is this process's."""

    def __init__(self, kind: str, mode: str) -> None:
        address = f"@genie-tests-{os.getpid()}-{next(_numbers)}" if kind == "shm" else "127.0.0.1:0"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.runtime.lanes.peer", kind, address, mode], cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().strip()
        self.channel = native().connect(kind, self.address, 10.0)

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
