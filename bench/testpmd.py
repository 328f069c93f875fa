"""dpdk-testpmd between two processes over the same kind of port: what the port alone moves, with nobody reading it."""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from bench.harness import BenchError, NotInstalledError

_RATE = re.compile(rb"Rx-bps:\s+(\d+)")
_COMMON = ("--no-huge", "-m", "256", "--no-pci", "--no-telemetry", "--iova-mode=va")
START_S = 6.0
ATTEMPTS = 4
"""Over af_packet, a sender of testpmd stands still after its first frames now and then; a new one does not."""
FRAME_BYTES = {"memif": 16320, "af_packet": 9014}
"""With the Ethernet header, as the lane sends them: native/dpdk/port.cc, and an MTU of 9000."""


def bytes_per_s(port: str, steps: int, interfaces: Sequence[str] = ("", ""),
                prefixes: Sequence[Sequence[str]] = ((), ())) -> float:
    """Median of what a testpmd that only receives has got from one that only sends, over so many steps of a second.

    Args: port: "memif" or "af_packet".  interfaces, prefixes: of the receiver and the sender.
    Raises: NotInstalledError, BenchError where next to nothing has come.
    """
    program = shutil.which("dpdk-testpmd")
    if program is None:
        raise NotInstalledError("dpdk-testpmd is not installed (Debian: apt-get install dpdk)")
    said = ""
    for _ in range(ATTEMPTS):
        rates, said = _received(program, port, steps, interfaces, prefixes)
        if rates:
            return rates[len(rates) // 2]
    raise BenchError(f"dpdk-testpmd received nothing over {port}, {ATTEMPTS} times: {said}")


def _received(program: str, port: str, steps: int, interfaces: Sequence[str],
              prefixes: Sequence[Sequence[str]]) -> tuple[list[float], str]:
    """Rates in rising order, the first step left out; and the end of what the receiver has printed."""
    with tempfile.TemporaryDirectory(prefix="bench-") as folder:
        log = Path(folder, "receiver")
        with log.open("wb") as out, contextlib.ExitStack() as stack:
            for which in (0, 1):
                process = _start(program, port, which, folder, interfaces[which], prefixes[which], out if which == 0
                                 else subprocess.DEVNULL)
                stack.callback(_stop, process)
                time.sleep(0.8)
            until_s = time.monotonic() + START_S + steps
            while len(rates := _rates(log)) <= steps and time.monotonic() < until_s:
                time.sleep(0.1)
        return sorted(rates[1:]), log.read_text(errors="replace")[-2000:]    # the first has begun before the sender


def _rates(log: Path) -> list[float]:
    return [int(found) / 8 for found in _RATE.findall(log.read_bytes()) if int(found) > 0]


def _stop(process: subprocess.Popen[bytes]) -> None:
    for number in (signal.SIGINT, signal.SIGKILL):
        process.send_signal(number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)
            return


def _start(program: str, port: str, which: int, folder: str, interface: str, prefix: Sequence[str],
           out: object) -> subprocess.Popen[bytes]:
    """Receiver (0) or sender (1), each with a core of its own where there are two."""
    if port == "memif":
        device = (f"net_memif0,role={('server', 'client')[which]},id=0,socket={folder}/memif,socket-abstract=no,"
                  "rsize=9,bsize=17408")
    else:
        device = f"net_af_packet0,iface={interface},qpairs=1,blocksz=65536,framesz=16384,framecnt=512"
    frame = str(FRAME_BYTES[port])
    mode = ["--forward-mode=rxonly"] if which == 0 else ["--forward-mode=txonly", f"--txpkts={frame}"]
    return subprocess.Popen(
        [*prefix, program, "--lcores", f"0@(0-1),1@{1 - which}", *_COMMON, f"--file-prefix=bench-{os.getpid()}-{which}",
         f"--vdev={device}", "--", "--mbuf-size=18000", "--total-num-mbufs=2048", *mode, "--auto-start",
         "--stats-period=1"], stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT)    # type: ignore[call-overload]
