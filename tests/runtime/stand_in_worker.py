"""A worker's process without a worker in it: what the launcher's tests start.

`--op-library` names a behaviour here: a function of this file that is called before "ready" is written.
"""
from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

from genie_dynamo.runtime.launcher import lifeline_watch, remove_socket_dir


def dies() -> None:
    print("the stand-in says goodbye", file=sys.stderr)
    os._exit(7)


def segfaults() -> None:
    os.kill(os.getpid(), signal.SIGSEGV)


def hangs() -> None:
    threading.Event().wait()


def refuses() -> None:
    os.write(ARGUMENTS.ready_fd, b"no CUDA device here\n")
    os._exit(1)


def closes_ready() -> None:
    os.close(ARGUMENTS.ready_fd)
    os._exit(3)


def ignores_eof() -> None:
    STUBBORN.set()


def has_child() -> None:
    """A child that inherits nothing but outlives its parent unless the whole group is killed."""
    child = subprocess.Popen([sys.executable, "-c", "import threading; threading.Event().wait()"])
    (Path(ARGUMENTS.bind.removeprefix("ipc://")).parent / "child").write_text(str(child.pid))
    ignores_eof()


def on_eof() -> None:
    if STUBBORN.is_set():
        threading.Event().wait()
    remove_socket_dir(ARGUMENTS.bind)
    os._exit(0)


STUBBORN = threading.Event()
parser = argparse.ArgumentParser()
parser.add_argument("--embedded", action="store_true")
parser.add_argument("--bind")
parser.add_argument("--device")
parser.add_argument("--threads", type=int)
parser.add_argument("--op-library", action="append", default=[])
parser.add_argument("--lifeline-fd", type=int)
parser.add_argument("--ready-fd", type=int)
parser.add_argument("--log-level")
ARGUMENTS = parser.parse_args()

if __name__ == "__main__":
    for name in ARGUMENTS.op_library:
        globals()[name]()
    directory = Path(ARGUMENTS.bind.removeprefix("ipc://")).parent
    (directory / "environment").write_text("\n".join(f"{k}={v}" for k, v in os.environ.items()))
    lifeline_watch(ARGUMENTS.lifeline_fd, on_eof)
    print("up and running")
    os.write(ARGUMENTS.ready_fd, b"ready stand-in-1\n")
    os.close(ARGUMENTS.ready_fd)
    threading.Event().wait()
