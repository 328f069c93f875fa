"""The other end of the lanes bench: `python -m bench.lane_peer KIND ADDRESS FOLDER`; it ends when its stdin does.

KIND is a native lane ("dpdk:PORT" for one over a port), or "raw" for bench/raw_socket.c. A message of one buffer comes
back as it is; of one with payload the first byte says whether the receiver copies it ("c") or only looks at its ends;
the answer is one byte.
"""
from __future__ import annotations

import ctypes
import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.child import Child
from bench.sidecar import Sidecar

SOURCE = Path(__file__).parent / "raw_socket.c"


def raw_library(folder: str) -> Any:
    """bench/raw_socket.c, compiled. Raises: OSError, subprocess.CalledProcessError."""
    target = Path(folder) / "raw_socket.so"
    if not target.exists():
        subprocess.run(["cc", "-O2", "-shared", "-fPIC", "-o", target, SOURCE], check=True)
    library = ctypes.CDLL(str(target))
    for name in ("send_all", "receive_all"):
        getattr(library, name).argtypes = (ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t)
    return library


def serve(kind: str, address: str, folder: str) -> None:
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    if kind == "raw":
        _serve_raw(raw_library(folder))
        return
    listener = listen(kind, address)
    print(listener.address, flush=True)
    channel = None
    while channel is None:
        channel = listener.accept()
        time.sleep(0.001)
    spin_s = float(os.environ.get("LANE_SPIN_S", "0"))
    lose(kind)
    copy, beside = bytearray(), 0             # beside: bytes that are copied here, after the lane
    while True:
        came = channel.receive(3600.0, spin_s)
        header, frames = came
        if header == b"s" and not frames:
            counted = channel.statistics()
            header = json.dumps({"bytes_copied": counted["bytes_copied_in"] + beside}).encode()
        elif frames and header == b"c":
            beside += len(frames[0])
            if len(copy) != len(frames[0]):
                copy = bytearray(len(frames[0]))
            memoryview(copy)[:] = memoryview(frames[0])
        elif frames:
            header = _ends(memoryview(frames[0]))
        del frames, came             # and with them the sender's memory, which its next payload fills while it is warm
        channel.send([header])


def _ends(payload: memoryview) -> bytes:
    return bytes((payload[0] ^ payload[-1],))


def listen(kind: str, address: str) -> Any:
    """A native Listener; of a dpdk lane with digests only where LANE_DIGEST asks for them."""
    from genie_dynamo import _native
    from genie_dynamo.runtime.lanes import dpdk

    if not kind.startswith("dpdk:"):
        return _native.listen(kind, address)
    dpdk.use_port(kind.removeprefix("dpdk:"))
    return dpdk.listen(digest=os.environ.get("LANE_DIGEST") == "1")


def lose(kind: str) -> None:
    """Lose the share LANE_LOSS of the frames that this process's port sends."""
    from genie_dynamo.runtime.lanes import dpdk

    if kind.startswith("dpdk:"):
        dpdk.module().lose(float(os.environ.get("LANE_LOSS", "0")), 1 + os.getpid())


def _serve_raw(library: Any) -> None:
    """Each transfer: u64 size, the bytes, one byte back."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        sock, _ = listener.accept()
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    fd, memory = sock.fileno(), ctypes.create_string_buffer(1)
    while True:
        size, = struct.unpack("<Q", sock.recv(8, socket.MSG_WAITALL))
        if size != len(memory):
            memory = ctypes.create_string_buffer(size)
        library.receive_all(fd, memory, size)
        sock.sendall(b"k")


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


class Peer(Child):
    """Such a process, and this process's end of the way to it.

    Args: there: its KIND, where that is another one.  prefix: before its command, as `ip netns exec NAME`.
        kind: "sidecar:PORT" for a port that a process between owns (sidecar.py).
    """

    _sidecar: Sidecar | None = None

    def __init__(self, kind: str, spin_s: float = 0.0, there: str = "", prefix: Sequence[str] = ()) -> None:
        folder = tempfile.TemporaryDirectory(prefix="bench-")
        if kind == "raw":
            self.library = raw_library(folder.name)
        address = "127.0.0.1:0" if kind in ("tcp", "raw") else f"{folder.name}/lane"
        super().__init__("bench.lane_peer", (there or kind, address), folder, prefix, {"LANE_SPIN_S": str(spin_s)})
        self.spin_s = spin_s
        if kind == "raw":
            host, _, port = self.where.rpartition(":")
            self.socket = socket.create_connection((host, int(port)))
            self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        elif kind.startswith("dpdk:"):
            from genie_dynamo.runtime.lanes import dpdk

            dpdk.use_port(kind.removeprefix("dpdk:"))
            self.channel = dpdk.connect(self.where, 10.0, os.environ.get("LANE_DIGEST") == "1")
            lose(kind)
        elif kind.startswith("sidecar:"):
            self._sidecar = Sidecar(kind.removeprefix("sidecar:"), self.where)
            self.channel = self._sidecar.channel
        else:
            from genie_dynamo import _native

            self.channel = _native.connect(kind, self.where, 10.0)

    def cpu_s(self) -> float:
        """CPU seconds of both ends, and of what is between them."""
        between_s = self._sidecar.cpu_s() if self._sidecar is not None else 0.0
        return time.process_time() + super().cpu_s() + between_s

    def copies(self) -> dict[str, float]:
        """Bytes that went to the other end so far, and copies of them that either end has made."""
        self.channel.send([b"s"])
        there = json.loads(self.channel.receive(60.0)[0])
        here = self.channel.statistics()
        return {"bytes_moved": here["bytes_sent"], "bytes_copied": here["bytes_copied_out"] + there["bytes_copied"]}

    def close(self) -> None:
        if self._sidecar is not None:
            self._sidecar.close()
        super().close()


if __name__ == "__main__":
    serve(*sys.argv[1:4])
