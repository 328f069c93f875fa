"""The far ends of the peers that need a process of their own: `python -m bench.peer_servers KIND WORK ADDRESS`.

WORK is "tiny" (x + 1 over 1 KB) or "mlp" (resident weights). Every far end runs that function on what arrives;
none is an echo. They end when their stdin does.
"""
from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from bench import workloads

_WORKS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {}


def work(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    """The function of a work; its weights are made once per process."""
    torch.set_grad_enabled(False)
    if name not in _WORKS:
        _WORKS[name] = workloads.tiny if name == "tiny" else workloads.mlp()
    return _WORKS[name]


def example(name: str) -> torch.Tensor:
    return workloads.tiny_input() if name == "tiny" else workloads.mlp_input()


def call_work(name: str, x: torch.Tensor) -> torch.Tensor:
    """What torch.distributed.rpc calls by name."""
    return work(name)(x)


def receive_into(connection: socket.socket, view: memoryview) -> bool:
    """Fill `view`. False where the other end has closed."""
    done = 0
    while done < len(view):
        count = connection.recv_into(view[done:])
        if not count:
            return False
        done += count
    return True


def bytes_of(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.numpy().data).cast("B")


class ServerProcess:
    """A far end in a process; `address` is what it printed when it was ready."""

    def __init__(self, kind: str, name: str, address: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "bench.peer_servers", kind, name, address],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.address = self._process.stdout.readline().decode().strip()

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(20)
        self._process.stdout.close()


# ---------------------------------------------------------------- the servers
def _serve_tcp(name: str, address: str) -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    function, x = work(name), example(name)
    view = bytes_of(x)
    while receive_into(connection, view):
        connection.sendall(bytes_of(function(x)))


def _serve_pyzmq(name: str, address: str) -> None:
    import zmq

    router: zmq.Socket[bytes] = zmq.Context().socket(zmq.ROUTER)
    router.bind(address)
    print(address, flush=True)
    function, like = work(name), example(name)
    while True:
        identity, frame = router.recv_multipart(copy=False)
        x = torch.frombuffer(frame.buffer, dtype=torch.float32).view_as(like)
        router.send_multipart([identity, bytes_of(function(x))], copy=False)


def _serve_rpc(name: str, address: str) -> None:
    start_rpc("callee", 1, address)
    work(name)
    print("ready", flush=True)
    threading.Event().wait()


def start_rpc(role: str, rank: int, address: str) -> None:
    from torch.distributed import rpc

    options = rpc.TensorPipeRpcBackendOptions(init_method=address)
    rpc.init_rpc(  # type: ignore[no-untyped-call]
        role, rank=rank, world_size=2, rpc_backend_options=options)


def flight_batch(tensor: torch.Tensor, arrow: Any) -> Any:
    """A record batch of one float32 column over the tensor's memory."""
    column = arrow.Array.from_buffers(
        arrow.float32(), tensor.numel(), [None, arrow.py_buffer(tensor.contiguous().numpy())])
    return arrow.RecordBatch.from_arrays([column], ["x"])


def flight_tensor(chunk: Any, like: torch.Tensor) -> torch.Tensor:
    """The tensor in a batch that has arrived."""
    return torch.from_numpy(chunk.data.column(0).to_numpy()).view_as(like)


def _serve_flight(name: str, address: str) -> None:
    arrow, arrow_flight = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.flight")
    function, like = work(name), example(name)

    class Server(arrow_flight.FlightServerBase):  # type: ignore[misc, name-defined]
        def do_exchange(self, context: Any, descriptor: Any, reader: Any, writer: Any) -> None:
            torch.set_grad_enabled(False)          # per thread
            writer.begin(flight_batch(like, arrow).schema)
            for chunk in reader:
                writer.write_batch(flight_batch(function(flight_tensor(chunk, like)), arrow))

    server = Server("grpc://127.0.0.1:0")
    print(server.port, flush=True)
    server.serve()


_SERVERS = {"tcp": _serve_tcp, "pyzmq": _serve_pyzmq, "rpc": _serve_rpc, "flight": _serve_flight}


def _exit_with_parent() -> None:
    sys.stdin.buffer.read()
    os._exit(0)


if __name__ == "__main__":
    import warnings

    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    _SERVERS[sys.argv[1]](*sys.argv[2:])
