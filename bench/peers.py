"""The tiny call and the resident MLP through other ways to run a function in another process.

A peer whose package is missing is named in the table with the command that installs it. Their packages may live
in another virtual environment: `--peers-python` names its interpreter (it needs torch too, of the same version).
"""
from __future__ import annotations

import importlib
import socket
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from bench.harness import Case, Measurement, NotInstalledError, Settings, Side, Step, measure, ratio_target

FRAMEWORKS = ("Arrow Flight", "torch RPC", "Ray call", "Ray graph", "Monarch")
_RAY_START_S = 3.0            # Ray goes on starting processes after init returns
_TITLES = {"tiny": "tiny call: 1 KB in, one op, 1 KB out", "mlp": "resident MLP: 3 x 1024, batch 32"}


def _step(run: Callable[[Any], Any], work: str, close: Callable[[], Any] | None = None) -> Step:
    """`run`: tensor -> tensor, through the peer."""
    import warnings

    import torch

    from bench import workloads
    from bench.peer_servers import example

    warnings.filterwarnings("ignore", "The given NumPy array is not writable")
    torch.set_grad_enabled(False)
    x = example(work)
    for _ in range(3):
        run(x)
    change = (lambda: x.add_(1)) if work == "tiny" else (lambda: x.mul_(-1))
    return Step(call=lambda: run(x), prepare=change, close=close,
                checksum=lambda: workloads.fingerprint(run(example(work))))


def _optional(module: str, package: str) -> Any:
    """A module of a peer. Raises: NotInstalledError with the command that installs it."""
    try:
        return importlib.import_module(module)
    except ImportError as exc:
        raise NotInstalledError(f"not installed: pip install '{package}' ({exc})") from exc


# ---------------------------------------------------------------- ours
def genie(params: Mapping[str, Any]) -> Step:
    from bench import workloads
    from bench.peer_servers import work

    remote = workloads.remote(params)
    return _step(remote.compile(work(params["work"])), params["work"], remote.close)


def local(params: Mapping[str, Any]) -> Step:
    from bench.peer_servers import work

    return _step(work(params["work"]), params["work"])


# ---------------------------------------------------------------- bare sockets
def raw_tcp(params: Mapping[str, Any]) -> Step:
    import torch

    from bench.peer_servers import ServerProcess, bytes_of, receive_into

    server = ServerProcess("tcp", params["work"], "-")
    connection = socket.create_connection(("127.0.0.1", int(server.address)))
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def run(x: torch.Tensor) -> torch.Tensor:
        connection.sendall(bytes_of(x))
        out = torch.empty_like(x)
        receive_into(connection, bytes_of(out))
        return out

    def close() -> None:
        connection.close()
        server.close()

    return _step(run, params["work"], close)


def pyzmq(params: Mapping[str, Any]) -> Step:
    import torch
    import zmq

    from bench.peer_servers import ServerProcess, bytes_of

    folder = tempfile.TemporaryDirectory(prefix="bench-")
    server = ServerProcess("pyzmq", params["work"], f"ipc://{Path(folder.name) / 'peer'}")
    context = zmq.Context()
    dealer: zmq.Socket[bytes] = context.socket(zmq.DEALER)
    dealer.connect(server.address)

    def run(x: torch.Tensor) -> torch.Tensor:
        dealer.send(bytes_of(x), copy=False)
        frame: Any = dealer.recv(copy=False)
        return torch.frombuffer(frame.buffer, dtype=torch.float32).view_as(x)

    def close() -> None:
        context.destroy(linger=0)
        server.close()
        folder.cleanup()

    return _step(run, params["work"], close)


# ---------------------------------------------------------------- frameworks
def torch_rpc(params: Mapping[str, Any]) -> Step:
    from torch.distributed import rpc

    from bench.peer_servers import ServerProcess, call_work, start_rpc

    if not rpc.is_available():
        raise NotInstalledError("not in this build of torch")
    import threading

    folder, work = tempfile.TemporaryDirectory(prefix="bench-"), params["work"]
    address = f"file://{Path(folder.name) / 'store'}"
    joining = threading.Thread(target=start_rpc, args=("caller", 0, address))
    joining.start()                              # both ends must join before either goes on
    server = ServerProcess("rpc", work, address)
    joining.join()

    def close() -> None:
        rpc.shutdown(graceful=False)
        server.close()
        folder.cleanup()

    return _step(lambda x: rpc.rpc_sync("callee", call_work, args=(work, x)), work, close)


def flight(params: Mapping[str, Any]) -> Step:
    arrow_flight, arrow = _optional("pyarrow.flight", "pyarrow"), _optional("pyarrow", "pyarrow")
    from bench.peer_servers import ServerProcess, example, flight_batch, flight_tensor

    server = ServerProcess("flight", params["work"], "-")
    client = arrow_flight.connect(f"grpc://127.0.0.1:{server.address}")
    # One exchange for all calls: a call of its own per request costs more.
    writer, reader = client.do_exchange(arrow_flight.FlightDescriptor.for_command(b"run"))
    writer.begin(flight_batch(example(params["work"]), arrow).schema)

    def run(x: Any) -> Any:
        writer.write_batch(flight_batch(x, arrow))
        return flight_tensor(reader.read_chunk(), x)

    def close() -> None:
        writer.close()
        client.close()
        server.close()

    return _step(run, params["work"], close)


def ray(params: Mapping[str, Any]) -> Step:
    """`graph`: the actor's method through a compiled graph; otherwise as a remote call."""
    ray_, dag = _optional("ray", "ray[cgraph]"), _optional("ray.dag", "ray[cgraph]")
    import torch

    folder = None
    if not ray_.is_initialized():                # both of Ray's sides share a cluster
        folder = tempfile.TemporaryDirectory(prefix="bench-", dir="/tmp", ignore_cleanup_errors=True)
        ray_.init(num_cpus=4, include_dashboard=False, logging_level="error", log_to_driver=False,
                  object_store_memory=200 << 20, _temp_dir=folder.name)
        time.sleep(_RAY_START_S)

    class Callee:
        def run(self, x: Any) -> Any:
            import torch

            from bench.peer_servers import work

            return work(params["work"])(torch.from_numpy(x)).numpy()

    callee = ray_.remote(Callee).options(num_cpus=params["threads"]).remote()

    def close() -> None:
        ray_.shutdown()
        if folder is not None:
            folder.cleanup()

    if not params["graph"]:
        return _step(lambda x: torch.from_numpy(ray_.get(callee.run.remote(x.numpy()))), params["work"], close)
    with dag.InputNode() as given:
        graph = callee.run.bind(given).experimental_compile()

    def finish() -> None:
        graph.teardown()
        close()

    return _step(lambda x: torch.from_numpy(ray_.get(graph.execute(x.numpy()))), params["work"], finish)


def monarch(params: Mapping[str, Any]) -> Step:
    actor = _optional("monarch.actor", "torchmonarch")

    class Callee(actor.Actor):  # type: ignore[misc, name-defined]
        def __init__(self, name: str) -> None:
            from bench.peer_servers import work

            self._name, self._work = name, work

        @actor.endpoint  # type: ignore[untyped-decorator]
        async def run(self, x: Any) -> Any:
            return self._work(self._name)(x)

    callee = actor.this_host().spawn_procs(per_host={"procs": 1}).spawn("callee", Callee, params["work"])
    return _step(lambda x: callee.run.call_one(x).get(), params["work"], lambda: actor.shutdown_context().get())


SIDES = {"genie": genie, "local": local, "raw_tcp": raw_tcp, "pyzmq": pyzmq, "torch_rpc": torch_rpc,
         "flight": flight, "ray": ray, "monarch": monarch}


def _groups(settings: Settings, work: str, threads: int) -> dict[str, list[Side]]:
    """Peers that can be alive together. Ray's and Monarch's own processes work in the background, which would disturb
    the others' calls: each of the two meets genie and local alone, and is stopped while those have their turn."""
    common = {"backend": settings.backend, "threads": threads, "work": work}

    def peer(factory: str, name: str, **more: Any) -> Side:
        return Side(module=__name__, factory=factory, name=name, params={**common, **more}, optional=True,
                    python=settings.peers_python, process="ray" if factory == "ray" else "",
                    freeze=factory in ("ray", "monarch"))

    ours = [Side(module=__name__, factory="local", name="local eager", params=common),
            Side(module=__name__, factory="genie", params=common)]
    return {
        "sockets, Flight, RPC": [*ours, peer("raw_tcp", "raw TCP"), peer("pyzmq", "bare pyzmq"),
                                 peer("flight", "Arrow Flight"), peer("torch_rpc", "torch RPC")],
        "Ray": [*ours, peer("ray", "Ray call", graph=False), peer("ray", "Ray graph", graph=True)],
        "Monarch": [*ours, peer("monarch", "Monarch")],
    }


def run(settings: Settings) -> Iterator[Case]:
    for work in ("tiny", "mlp"):
        samples = (100 if work == "tiny" else 40) // (5 if settings.quick else 1)
        for threads, pinned in settings.placements():
            for group, sides in _groups(settings, work, threads).items():
                seen = measure(settings, sides, blocks=1 if settings.quick else 4, samples=samples, settle=10,
                               threads=threads, pinned=pinned)
                yield _case(seen, work, group, threads, pinned)


def _case(seen: Measurement, work: str, group: str, threads: int, pinned: bool) -> Case:
    peers = [label for label in seen.series if label not in ("genie", "local eager")]
    return Case(
        bench="peers", title=f"{_TITLES[work]} ({group})", threads=threads, pinned=pinned, series=seen.series,
        skipped=seen.skipped,
        ratios=tuple([seen.ratio(label, "local eager") for label in ("genie", *peers)]
                     + [seen.ratio("genie", label) for label in peers if label not in FRAMEWORKS]),
        targets=tuple(ratio_target(f"{work}: genie over {label}", seen.ratio("genie", label), 1.0)
                      for label in peers if label in FRAMEWORKS))
