"""The other end of bare ZeroMQ sockets: `python -m bench.echo echo|bulk ADDRESS`.

echo: a ROUTER that sends every message back as it came.
bulk: a ROUTER that measures a direction; the first frame says which.
    b"up", payload...     b"" back
    b"down", n            n frames of BULK_FRAME_BYTES back
It ends when its stdin does.
"""
from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import zmq

BULK_FRAME_BYTES = 8 << 20


def serve(mode: str, address: str) -> None:
    router: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    router.bind(address)
    print(router.getsockopt_string(zmq.LAST_ENDPOINT), flush=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    while mode == "echo":
        router.send_multipart(router.recv_multipart())
    frame = bytearray(BULK_FRAME_BYTES)
    while True:
        parts: list[Any] = router.recv_multipart(copy=False)
        if parts[1].bytes == b"up":
            router.send_multipart([parts[0], b""])
        else:
            router.send_multipart([parts[0], *[frame] * int(parts[2].bytes)], copy=False)
        del parts                       # a held frame would keep its memory until the next message


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


class Peer:
    """Such a process and a DEALER connected to it. `transport`: "ipc" or "tcp"."""

    def __init__(self, mode: str, transport: str) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="bench-")
        address = f"ipc://{Path(self._folder.name) / 'echo'}" if transport == "ipc" else "tcp://127.0.0.1:*"
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.echo", mode, address], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        endpoint = self._process.stdout.readline().decode().strip()
        self._context = zmq.Context()
        self.socket: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.socket.connect(endpoint)

    def part(self) -> None:
        """Give this process's threads one core and the other's another. Raises: ValueError where there is only one."""
        first, second, *_ = sorted(os.sched_getaffinity(0))
        for pid, cpu in ((os.getpid(), first), (self._process.pid, second)):
            for task in Path(f"/proc/{pid}/task").iterdir():
                os.sched_setaffinity(int(task.name), {cpu})

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._context.destroy(linger=0)
        self._process.stdin.close()
        self._process.wait(10)
        self._process.stdout.close()
        self._folder.cleanup()


if __name__ == "__main__":
    serve(*sys.argv[1:])
