"""A process that owns a dpdk port for another: `python -m bench.sidecar PORT ADDRESS FOLDER`; it ends with its stdin.

It prints where it listens for its owner, over shm, and hands every message on, both ways, as it came. What a sidecar
costs is measured with it (docs/adr/008-dpdk-lives-in-the-worker.md): two wake-ups and one copy more each way, and this
relay's few microseconds of Python.
"""
from __future__ import annotations

import os
import sys
import tempfile
import threading
import time
from typing import Any

from bench.child import Child


def serve(port: str, address: str, folder: str) -> None:
    from genie_dynamo import _native
    from genie_dynamo.runtime.lanes import dpdk

    dpdk.use_port(port)
    far = dpdk.connect(address, 10.0, os.environ.get("LANE_DIGEST") == "1")
    listener = _native.listen("shm", f"{folder}/sidecar")
    print(listener.address, flush=True)
    near = None
    while near is None:
        near = listener.accept()
        time.sleep(0.001)
    threading.Thread(target=_hand_on, args=(far, near), daemon=True).start()
    threading.Thread(target=_hand_on, args=(near, far), daemon=True).start()
    sys.stdin.buffer.read()
    os._exit(0)


def _hand_on(source: Any, target: Any) -> None:
    try:
        while True:
            header, frames = source.receive(3600.0)
            target.send([header, *frames])
    except OSError:
        os._exit(0)                       # one of them is gone


class Sidecar(Child):
    """Such a process, and the channel to it."""

    def __init__(self, port: str, address: str) -> None:
        from genie_dynamo import _native

        super().__init__("bench.sidecar", (port, address), tempfile.TemporaryDirectory(prefix="bench-"))
        self.channel = _native.connect("shm", self.where, 10.0)

    def close(self) -> None:
        self.channel.close()
        super().close()


if __name__ == "__main__":
    serve(*sys.argv[1:4])
