"""Everything a worker process is: options, limits, sockets, heartbeat, lifeline, and the loop."""
from __future__ import annotations

import ctypes
import importlib
import logging
import os
import resource
import secrets
import signal
import sys
import threading
from dataclasses import dataclass
from typing import Any

import torch
import zmq

from genie_dynamo.core import portable_ops as _portable_ops  # noqa: F401 - registers genie::sdpa
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.core.limits import QUOTA_SHARE
from genie_dynamo.runtime.heartbeat import HeartbeatEcho
from genie_dynamo.runtime.lanes import dpdk, stream
from genie_dynamo.runtime.launcher import lifeline_watch, remove_socket_dir
from genie_dynamo.runtime.security import Authenticator, Security, apply_client, apply_server, check_bind, harden
from genie_dynamo.runtime.worker import lanes
from genie_dynamo.runtime.worker.engine import Engine
from genie_dynamo.runtime.worker.shell import WAKE_IDENTITY, Shell
from genie_dynamo.runtime.worker.staging import open_staging
from genie_dynamo.runtime.worker.state import WorkerState

log = logging.getLogger(__name__)

_WAKE_ADDRESS = "inproc://genie-wake"
# From malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3




@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """What `genie worker` was asked for."""

    bind: str
    device: str = "cpu"
    num_threads: int | None = None
    op_libraries: tuple[str, ...] = ()
    keys: str | None = None                   # a directory of `genie keygen`: own key, and who is let in
    allow_unauthenticated: bool = False
    memory_limit_bytes: int | None = None     # default: the machine's physical memory
    resident_quota_bytes: int | None = None   # what one session may keep here; default: QUOTA_SHARE of the limit
    dpdk_port: str | None = None              # of the dpdk lane (runtime/lanes/dpdk.py); None: no such lane
    embedded: bool = False
    lifeline_fd: int | None = None
    ready_fd: int | None = None
    log_level: str = "WARNING"


def run_worker(options: WorkerOptions) -> None:
    """Serve until the process is told to stop (SIGTERM, SIGINT, or the end of its lifeline).

    Raises: ConfigError for an address, device, key or op library that cannot be used.
    """
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    security = Security.for_server(options.keys) if options.keys else Security()
    check_bind(options.bind, security, options.allow_unauthenticated)
    device = _device(options.device)
    num_threads = options.num_threads or os.cpu_count() or 1
    torch.set_num_threads(num_threads)
    torch.set_grad_enabled(False)       # graphs hold their backward; no plan then has to switch it off for a run
    limit_bytes = _limit_memory(options.memory_limit_bytes)
    _keep_freed_memory()
    namespaces = _import_op_libraries(options.op_libraries)
    incarnation = secrets.token_hex(8)
    context = zmq.Context()
    authenticator = Authenticator(context, security) if security.is_server else None
    socket = context.socket(zmq.ROUTER)
    harden(socket, "server")
    apply_server(socket, security)
    _bind(socket, options.bind)
    address = socket.getsockopt_string(zmq.LAST_ENDPOINT)   # before the shell binds its own in-process endpoint
    heartbeat = HeartbeatEcho(context, _beside(options.bind), security)
    socket.bind(_WAKE_ADDRESS)
    wake = _Wake(context)
    engine = Engine(device=device, num_threads=num_threads, namespaces=namespaces, wake=wake,
                    staging=open_staging(device))
    listener = _listen(options.bind, address, security)
    dpdk.use_port(options.dpdk_port)
    offers = lanes.offer(options.bind, address, keys=security.is_server)
    state = WorkerState(incarnation=incarnation, heartbeat_address=heartbeat.address, toolbox=engine,
                        stream_address="" if listener is None else stream.address_of(listener),
                        lanes=tuple((offer.name, offer.version, offer.address) for offer in offers),
                        quota_bytes=options.resident_quota_bytes or _default_quota(device, limit_bytes))

    def connect_peer(address: str, key: str) -> zmq.Socket[bytes]:
        peer = context.socket(zmq.DEALER)
        harden(peer, "client")
        apply_client(peer, security, key.encode() or None)
        peer.connect(address)
        return peer

    shell = Shell(socket, state, engine, connect_peer, listener, offers, wake)
    if options.lifeline_fd is not None:
        lifeline_watch(options.lifeline_fd, lambda: _die(options.bind))
    if options.ready_fd is not None:
        os.write(options.ready_fd, f"ready {incarnation}\n".encode())
        os.close(options.ready_fd)
    elif not options.embedded:
        print(f"genie worker {incarnation} at {_as_given(options.bind, address)} on {device}, {num_threads} thread(s), "
              f"{'keys required' if security.is_server else 'no keys'}; Ctrl-C stops it", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: setattr(shell, "stopping", True))
    try:
        shell.run_forever()
    except KeyboardInterrupt:
        log.info("interrupted")
    finally:
        shell.close()
        socket.close(linger=0)
        heartbeat.close()
        if authenticator is not None:
            authenticator.close()
        wake.close()
        context.destroy(linger=0)


class _Wake:
    """Called from helper threads: the loop, which waits for messages, gets one."""

    def __init__(self, context: zmq.Context[Any]) -> None:
        self._lock = threading.Lock()
        self._socket = context.socket(zmq.DEALER)
        # A client that asks for this name later is refused: the worker's router takes no name twice.
        self._socket.setsockopt(zmq.IDENTITY, WAKE_IDENTITY)
        self._socket.connect(_WAKE_ADDRESS)

    def __call__(self) -> None:
        with self._lock:
            self._socket.send(b"")

    def close(self) -> None:
        self._socket.close(linger=0)


def _die(bind: str) -> None:
    """The client is gone: nothing of this process may outlive it."""
    remove_socket_dir(bind)
    os._exit(0)


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ConfigError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def _keep_freed_memory() -> None:
    """Let large buffers be reused instead of mapped, faulted in and unmapped for every frame: twice the lane's rate.

    The price is that this process keeps its high-water mark. Where the C library is not glibc nothing changes.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    for option, value in ((_M_MMAP_THRESHOLD, 1 << 30), (_M_TRIM_THRESHOLD, (1 << 31) - 1), (_M_TOP_PAD, 64 << 20)):
        mallopt(option, value)


def _limit_memory(limit_bytes: int | None) -> int:
    """Let an allocation beyond physical memory fail in the call that asks for it, not by the kernel's killer.

    Returns: the limit in bytes.
    """
    limit = limit_bytes or os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    if hard != resource.RLIM_INFINITY:
        limit = min(limit, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))
    return limit


def _default_quota(device: torch.device, limit_bytes: int) -> int:
    if device.type == "cuda":
        limit_bytes = torch.cuda.get_device_properties(device).total_memory
    return int(limit_bytes * QUOTA_SHARE)


def _import_op_libraries(modules: tuple[str, ...]) -> frozenset[str]:
    """Import the modules that register ops; returns the op namespaces that they added."""
    before = _op_namespaces()
    for name in modules:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise ConfigError(f"op library {name!r} cannot be imported: {error}; sys.path is {sys.path}") from error
    return frozenset(_op_namespaces() - before)


def _op_namespaces() -> set[str]:
    return {name.split("::")[0] for name in torch._C._dispatch_get_all_op_names()}


def _bind(socket: zmq.Socket[bytes], address: str) -> None:
    try:
        socket.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError(f"cannot bind {address!r}: {error}; is another worker running there?") from error


def _listen(bind: str, bound: str, security: Security) -> stream.Socket | None:
    """Where clients open streams: beside the worker's socket. Streams know no keys: where keys are asked for, none."""
    if security.is_server:
        return None
    host = bound.removeprefix("tcp://").rpartition(":")[0]
    wanted = f"{bind}.run" if bind.startswith("ipc://") else f"tcp://{host}:0"
    try:
        return stream.listen(wanted)
    except OSError as error:
        log.warning("no streams, small calls take the ZeroMQ socket: cannot listen at %s: %s", wanted, error)
        return None


def _as_given(bind: str, bound: str) -> str:
    """The address in the words of --bind, with the port that the system has chosen for `*`."""
    return bind.removesuffix("*") + bound.rpartition(":")[2] if bind.endswith(":*") else bind


def _beside(address: str) -> str:
    """Where the heartbeat answers: another socket of the same kind, on a port or path of its own."""
    if address.startswith("ipc://"):
        return address + ".hb"
    host = address.removeprefix("tcp://").rpartition(":")[0]
    return f"tcp://{host}:*"
