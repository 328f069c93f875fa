"""Embedded workers: separate processes on this machine that live exactly as long as their client.

    client                                   worker (python -P -m genie_dynamo.runtime.worker --embedded ...)
    lifeline, write end  ---- pipe ---->     lifeline_watch(fd): EOF means the client is gone, however it went
    ready, read end      <--- pipe -----     one line, "ready <incarnation>" or what went wrong
    log file             <--------------     stdout and stderr
    ipc:///<dir>/worker  <-------------->    its sockets, in a directory of mode 0700

A worker is started by exec, never by fork or multiprocessing: an unguarded main script is not run again, no
thread, lock or CUDA context is inherited, and a daemonic process may start one. The pipe ties it to the
client's process and not to a thread; the kernel closes the client's end on exit, crash or kill -9 alike.

Raises: WorkerUnreachableError (with the end of the worker's log) when one does not come up in time.
"""
from __future__ import annotations

import contextlib
import importlib.machinery
import logging
import os
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from genie_dynamo.core.errors import ConfigError, WorkerUnreachableError

_LOG = logging.getLogger(__name__)

WORKER_MODULE = "genie_dynamo.runtime.worker"
MAX_IPC_PATH_BYTES = 107          # sockaddr_un.sun_path without its final NUL
_SOCKET_NAME_BYTES = 24           # room that is left for the names of sockets in the directory
_SOCKET_DIR_PREFIX = "genie-w-"
_LOG_TAIL_BYTES = 4096
_POLL_S = 0.05                    # how soon the death of a starting worker is seen
_EXIT_TIMEOUT_S = 2.0             # at interpreter exit: from closing the lifeline to SIGKILL
_THREAD_VARIABLES = (
    "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS",
)

# ---------------------------------------------------------------- the parent's ends of the lifelines
_lifelines: set[int] = set()
_lifelines_lock = threading.Lock()


def _close_lifelines_in_forked_child() -> None:
    """A forked child holds copies of the write ends: with them open, workers would outlive their client."""
    global _lifelines_lock
    _lifelines_lock = threading.Lock()
    for fd in _lifelines:
        with contextlib.suppress(OSError):
            os.close(fd)
    _lifelines.clear()


# The lock is taken across a fork so that no pipe can be half registered in the child.
os.register_at_fork(
    before=lambda: _lifelines_lock.acquire(),
    after_in_parent=lambda: _lifelines_lock.release(),
    after_in_child=_close_lifelines_in_forked_child,
)


def _open_lifeline() -> tuple[int, int]:
    """(read end for the worker, write end that stays here). Both close on exec."""
    with _lifelines_lock:
        read_fd, write_fd = os.pipe()
        _lifelines.add(write_fd)
    return read_fd, write_fd


def _close_lifeline(fd: int) -> None:
    with _lifelines_lock:
        if fd in _lifelines:
            _lifelines.discard(fd)
            os.close(fd)


def lifeline_watch(fd: int, on_eof: Callable[[], None]) -> threading.Thread:
    """Worker side: call `on_eof` from a daemon thread as soon as the client is gone.

    The read end is made non-inheritable first: processes that the worker starts have no use for it.
    """
    os.set_inheritable(fd, False)

    def watch() -> None:
        with contextlib.suppress(OSError):
            while os.read(fd, 64):
                pass
        on_eof()

    thread = threading.Thread(target=watch, name="genie-lifeline", daemon=True)
    thread.start()
    return thread


# ---------------------------------------------------------------- the directory of a worker's sockets
def make_socket_dir() -> Path:
    """A fresh directory of mode 0700 whose sockets have paths short enough for the kernel.

    Raises: ConfigError if no temporary directory is both writable and short enough.
    """
    tried = []
    for base in dict.fromkeys((os.environ.get("XDG_RUNTIME_DIR", ""), tempfile.gettempdir(), "/tmp")):
        if not Path(base).is_absolute():
            continue
        if len(os.fsencode(base)) + len(_SOCKET_DIR_PREFIX) + 10 + _SOCKET_NAME_BYTES > MAX_IPC_PATH_BYTES:
            tried.append(f"{base}: too long for a socket's path ({MAX_IPC_PATH_BYTES} bytes)")
            continue
        try:
            return Path(tempfile.mkdtemp(prefix=_SOCKET_DIR_PREFIX, dir=base))   # mkdtemp makes it 0700
        except OSError as exc:
            tried.append(f"{base}: {exc.strerror}")
    raise ConfigError(f"no directory for the sockets of embedded workers ({'; '.join(tried)}); set TMPDIR")


def remove_socket_dir(address: str) -> None:
    """Remove the directory that `make_socket_dir` made for `address` (ipc://...), with what is in it.

    Anything that does not look like such a directory (name, owner, mode) is left alone.
    """
    if not address.startswith("ipc://"):
        return
    directory = Path(address.removeprefix("ipc://")).parent
    with contextlib.suppress(FileNotFoundError):
        facts = directory.lstat()
        ours = directory.name.startswith(_SOCKET_DIR_PREFIX) and facts.st_uid == os.getuid()
        if ours and stat.S_ISDIR(facts.st_mode) and stat.S_IMODE(facts.st_mode) == 0o700:
            shutil.rmtree(directory, ignore_errors=True)


# ---------------------------------------------------------------- one worker
class EmbeddedWorker:
    """A worker process of this client. `close()` ends it; so does the end of this process, in any way."""

    def __init__(
        self, process: subprocess.Popen[bytes], *, address: str, log_path: Path, lifeline_fd: int
    ) -> None:
        self.process = process
        self.address = address
        self.log_path = log_path
        self.incarnation = ""       # known once it is ready
        self._owner_pid = os.getpid()
        self._log_tail: str | None = None
        self._close_lock = threading.Lock()
        self._finalizer = weakref.finalize(
            self, _end_process, process, lifeline_fd, address, self._owner_pid, _EXIT_TIMEOUT_S)

    def __repr__(self) -> str:
        return f"EmbeddedWorker({self.address}, pid={self.pid}, {self.exit_reason() or 'alive'})"

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def alive(self) -> bool:
        """False once the process has ended; always False in a forked child, whose worker it is not."""
        return os.getpid() == self._owner_pid and self.process.poll() is None

    def exit_reason(self) -> str | None:
        """None while it lives; otherwise signal or exit code, and the end of what it logged."""
        if self.alive:
            return None
        if os.getpid() != self._owner_pid:
            return "belongs to the parent of this process"
        code = self.process.returncode
        reason = f"killed by {_signal_name(-code)}" if code < 0 else f"exited with code {code}"
        tail = self._log_tail if self._log_tail is not None else _read_tail(self.log_path)
        return f"{reason}; end of its log:\n{tail}" if tail else f"{reason}, and logged nothing"

    def close(self, timeout_s: float = 5.0) -> None:
        """End the process: politely for `timeout_s`, then by SIGKILL. Idempotent; no-op in a forked child."""
        with self._close_lock:
            details = self._finalizer.detach()
            if details is None:
                return
            _, _, arguments, _ = details
            process, lifeline_fd, address, owner_pid, _ = arguments
            if self._log_tail is None and self.process.poll() is not None:
                self._log_tail = _read_tail(self.log_path)
            _end_process(process, lifeline_fd, address, owner_pid, timeout_s, self._keep_log)

    def _keep_log(self) -> None:
        """The log goes with the directory; keep its end, so that exit_reason() stays true."""
        self._log_tail = _read_tail(self.log_path)


def _end_process(
    process: subprocess.Popen[bytes], lifeline_fd: int, address: str, owner_pid: int, timeout_s: float,
    before_remove: Callable[[], None] | None = None,
) -> None:
    if os.getpid() != owner_pid:
        return
    _close_lifeline(lifeline_fd)
    try:
        process.wait(timeout_s)
    except subprocess.TimeoutExpired:
        if timeout_s > 0:
            _LOG.warning("embedded worker %d did not leave within %.1f s; killing it", process.pid, timeout_s)
        # It leads its own process group (start_new_session): what it started goes with it.
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if before_remove is not None:
        before_remove()
    remove_socket_dir(address)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _read_tail(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - _LOG_TAIL_BYTES))
            return file.read().decode(errors="replace").strip()
    except OSError:
        return ""


# ---------------------------------------------------------------- starting
def start_embedded(
    count: int,
    *,
    num_threads: int | None = None,
    device: str = "cpu",
    op_libraries: Sequence[str] = (),
    connect_timeout_s: float = 20.0,
    log_level: str = "WARNING",
    resident_quota_bytes: int | None = None,
    memif: bool = False,
    module: str = WORKER_MODULE,
) -> list[EmbeddedWorker]:
    """Start `count` workers at once and wait until each is ready.

    Args:    num_threads: compute threads of each; None shares this process's cores out.
             op_libraries: modules each imports at start.  module: what to run instead, in tests.
             resident_quota_bytes: what the session may keep on each; None leaves it to the worker.
             memif: each offers the dpdk lane.
    Returns: the workers, in order; all ready.
    Raises:  WorkerUnreachableError if one is not ready within `connect_timeout_s`; none is left running then.
    """
    if count < 1:
        raise ConfigError(f"workers={count}: must be at least 1")
    deadline_s = time.monotonic() + connect_timeout_s
    threads = num_threads or max(1, len(os.sched_getaffinity(0)) // count)
    arguments = ["--device", device, "--threads", str(threads), "--log-level", log_level]
    for library in op_libraries:
        arguments += ["--op-library", library]
    if memif:
        arguments += ["--dpdk-port", "memif"]
    if resident_quota_bytes is not None:
        arguments += ["--resident-quota-bytes", str(resident_quota_bytes)]
    environment = _environment(threads, op_libraries)
    workers: list[EmbeddedWorker] = []
    with contextlib.ExitStack() as stack:
        ready_fds: list[int] = []
        try:
            for _ in range(count):
                worker, ready_fd = _spawn(module, arguments, environment)
                workers.append(worker)
                ready_fds.append(ready_fd)
                stack.callback(os.close, ready_fd)
            for index, (worker, ready_fd) in enumerate(zip(workers, ready_fds, strict=True)):
                worker.incarnation = _wait_ready(worker, ready_fd, deadline_s, index, connect_timeout_s)
        except BaseException:      # KeyboardInterrupt too: nothing may be left behind
            for worker in workers:
                worker.close(timeout_s=0.0)
            raise
    return workers


def _spawn(module: str, arguments: Sequence[str], environment: dict[str, str]) -> tuple[EmbeddedWorker, int]:
    if not sys.executable:
        raise ConfigError("sys.executable is empty, so no embedded worker can be started; run `genie worker`")
    directory = make_socket_dir()
    address = f"ipc://{directory}/worker"
    log_path = directory / "log"
    lifeline_read, lifeline_write = _open_lifeline()
    ready_read, ready_write = os.pipe()
    try:
        with log_path.open("wb") as log:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", module, "--embedded", "--bind", address, *arguments,
                 "--lifeline-fd", str(lifeline_read), "--ready-fd", str(ready_write)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment,
                pass_fds=(lifeline_read, ready_write),
                start_new_session=True,       # a Ctrl-C in the terminal is the client's to handle
            )
    except BaseException:
        _close_lifeline(lifeline_write)
        os.close(ready_read)
        remove_socket_dir(address)
        raise
    finally:
        os.close(lifeline_read)
        os.close(ready_write)
    return EmbeddedWorker(process, address=address, log_path=log_path, lifeline_fd=lifeline_write), ready_read


def _wait_ready(
    worker: EmbeddedWorker, ready_fd: int, deadline_s: float, index: int, connect_timeout_s: float
) -> str:
    """The incarnation, from the line "ready <incarnation>"."""
    line = b""
    while not line.endswith(b"\n"):
        remaining_s = deadline_s - time.monotonic()
        if remaining_s <= 0:
            worker.close(timeout_s=0.0)
            raise WorkerUnreachableError(
                f"embedded worker {index} (pid {worker.pid}) was not ready within {connect_timeout_s:g} s, "
                f"and was ended ({worker.exit_reason()}); raise connect_timeout_s if this machine is slow",
                address=worker.address, pid=worker.pid)
        readable, _, _ = select.select([ready_fd], [], [], min(_POLL_S, remaining_s))
        chunk = os.read(ready_fd, 4096) if readable else b""
        line += chunk
        if not chunk and worker.process.poll() is not None:
            raise WorkerUnreachableError(
                f"embedded worker {index} (pid {worker.pid}) did not start: {worker.exit_reason()}",
                address=worker.address, pid=worker.pid)
        if readable and not chunk:           # it closed the pipe and still runs: wait for what it will do
            with contextlib.suppress(subprocess.TimeoutExpired):
                worker.process.wait(_POLL_S)
    text = line.decode(errors="replace").strip()
    word, _, incarnation = text.partition(" ")
    if word != "ready" or not incarnation:
        raise WorkerUnreachableError(
            f"embedded worker {index} (pid {worker.pid}) refused to start: {text}", address=worker.address,
            pid=worker.pid)
    return incarnation


# ---------------------------------------------------------------- the child's environment
def _environment(num_threads: int, op_libraries: Sequence[str]) -> dict[str, str]:
    environment = dict(os.environ)
    environment.update(dict.fromkeys(_THREAD_VARIABLES, str(num_threads)))
    environment["PYTHONPATH"] = os.pathsep.join(_module_path(op_libraries))
    environment["PYTHONUNBUFFERED"] = "1"          # its last words reach the log
    environment["PYTHONFAULTHANDLER"] = "1"        # also those of a segmentation fault
    return environment


def _module_path(op_libraries: Sequence[str]) -> Iterator[str]:
    """This process's sys.path, in order: the child finds what the client finds, wherever that came from.

    Left out are the folder of the main script and the working directory: a file there that happens to be
    called like a module of the standard library is not the worker's. They stay if it needs what is in them.
    """
    main_file = getattr(sys.modules.get("__main__"), "__file__", None)
    own = {Path.cwd().resolve()}
    if main_file is not None:
        own.add(Path(main_file).resolve().parent)
    for entry in sys.path:
        directory = Path(entry).absolute()       # "" is the working directory
        if directory.resolve() not in own or _holds_any(directory, ("genie_dynamo", "torch", *op_libraries)):
            yield str(directory)


def _holds_any(directory: Path, modules: Sequence[str]) -> bool:
    for name in modules:
        spec = importlib.machinery.PathFinder.find_spec(name.partition(".")[0], [str(directory)])
        if spec is not None and spec.origin is not None:      # no origin: a mere folder of that name
            return True
    return False
