"""The other end of a lane, in a process of its own: `python -m tests.runtime.lanes.peer KIND ADDRESS MODE`.

KIND is shm, tcp or a port of the dpdk lane, whose address is a directory of mode 0700.

echo    sends every message back
hold    takes messages and keeps them; says after each how many
deaf    accepts and never looks again
It prints its address, and ends when its stdin does.
"""
from __future__ import annotations

import atexit
import os
import sys
import threading
import time
from typing import Any

from genie_dynamo import _native


def serve(kind: str, address: str, mode: str) -> None:
    listener = _native.listen(kind, address) if kind in ("shm", "tcp") else listen_at_port(kind, address)
    print(listener.address, flush=True)
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    channel = None
    while channel is None:
        try:
            channel = listener.accept()
        except OSError as error:
            print(f"refused: {error}", flush=True)
        time.sleep(0.001)
    held = []
    while mode == "deaf":
        time.sleep(1)
    while True:
        try:
            came = channel.receive(1.0)
        except OSError as error:
            print(f"closed {channel.close_end}: {error}", flush=True)
            while True:                                   # the reader of stdin ends this process
                time.sleep(1)
        if came is None:
            continue
        header, frames = came
        if mode == "hold":
            held.append(frames)
            channel.send([str(len(held)).encode()])
        else:
            channel.send([header, *frames])


def listen_at_port(port: str, directory: str) -> Any:
    """A listener on a port of DPDK, without the imports of runtime/lanes/dpdk.py: a process starts in half the time."""
    from genie_dynamo import _dpdk

    _dpdk.start()
    atexit.register(_dpdk.stop)
    return _native.adopt_listener(_dpdk.listen(port, directory))


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    serve(*sys.argv[1:4])
