"""What goes wrong, and what the user gets: the right answer or a clear error, nothing hung, nothing left running."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import zmq

import genie_dynamo as genie
from genie_dynamo.core import messages as m
from genie_dynamo.core.limits import DEFAULT_LIMITS
from genie_dynamo.core.wire import pack, unpack
from genie_dynamo.runtime.lanes import zmq_frames


def spin(x: torch.Tensor) -> torch.Tensor:
    """Some seconds of work in one graph, with time to be killed in."""
    for _ in range(400):
        x = torch.mm(x, x) / 512
    return x


def worker_pid() -> int:
    return int(genie.session().links[0].embedded.pid)  # type: ignore[union-attr]


def in_a_thread(run: Any) -> tuple[threading.Thread, dict[str, Any]]:
    box: dict[str, Any] = {}

    def target() -> None:
        try:
            box["value"] = run()
        except BaseException as error:
            box["error"] = error

    thread = threading.Thread(target=target)
    thread.start()
    return thread, box


def wait_until(condition: Any, timeout_s: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.01)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def kill_while_it_computes(compiled: Any, x: torch.Tensor) -> tuple[dict[str, Any], int]:
    pid = worker_pid()
    before = cpu_seconds(pid)
    with torch.no_grad():
        thread, box = in_a_thread(lambda: torch.no_grad()(compiled)(x))
        wait_until(lambda: cpu_seconds(pid) > before + 0.3)
        os.kill(pid, signal.SIGKILL)
        thread.join(60)
    assert not thread.is_alive(), "the call hangs"
    return box, pid


@pytest.fixture
def matrix() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(512, 512)


def test_a_worker_killed_in_a_call_is_replaced_and_the_call_repeated(own_session: Any, fresh_dynamo: None,
                                                                     matrix: torch.Tensor) -> None:
    own_session(workers=1, num_threads=1, strict=True)
    compiled = torch.compile(spin, backend="genie")
    with torch.no_grad():
        expected = compiled(matrix)
        box, pid = kill_while_it_computes(compiled, matrix)
    assert torch.equal(box["value"], expected)
    assert worker_pid() != pid
    assert genie.get_stats()["events"]["call repeated after a worker was lost"] == 1


def test_a_worker_killed_in_a_call_with_policy_error(own_session: Any, fresh_dynamo: None,
                                                     matrix: torch.Tensor) -> None:
    own_session(workers=1, num_threads=1, strict=True, on_worker_loss="error")
    compiled = torch.compile(spin, backend="genie")
    compiled(matrix)
    started = time.monotonic()
    box, _ = kill_while_it_computes(compiled, matrix)
    error = box["error"]
    assert isinstance(error, genie.WorkerLostError) and "SIGKILL" in str(error)
    assert error.facts["worker"] == "w0"
    assert time.monotonic() - started < 30
    assert torch.isfinite(compiled(matrix)).all(), "the next call has a new worker"


@pytest.mark.fallback
def test_a_worker_killed_in_a_call_with_policy_local(own_session: Any, fresh_dynamo: None,
                                                     matrix: torch.Tensor) -> None:
    own_session(workers=1, num_threads=1, on_worker_loss="local")
    compiled = torch.compile(spin, backend="genie")
    expected = compiled(matrix)
    box, _ = kill_while_it_computes(compiled, matrix)
    torch.testing.assert_close(box["value"], expected)
    assert genie.get_stats()["fallbacks"] == {"worker lost, on_worker_loss=local": 1}


def test_activations_lost_with_their_worker_are_an_error_that_says_so(own_session: Any, fresh_dynamo: None) -> None:
    own_session(workers=1, num_threads=1, strict=True)
    net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    compiled, x = torch.compile(net, backend="genie"), torch.randn(3, 4)
    loss = compiled(x).sum()
    os.kill(worker_pid(), signal.SIGKILL)
    with pytest.raises(genie.WorkerLostError, match="run the training step again"):
        loss.backward()
    compiled(x).sum().backward()
    expected = torch.autograd.grad(net(x).sum(), list(net.parameters()))
    for p, e in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(p.grad, e)


def test_a_stopped_worker_is_lost_after_the_heartbeat_timeout(own_session: Any, fresh_dynamo: None) -> None:
    own_session(workers=1, num_threads=1, strict=True, heartbeat_interval_s=0.1, heartbeat_timeout_s=1.0,
                on_worker_loss="error")
    compiled, x = torch.compile(lambda x: x + 1, backend="genie"), torch.ones(3)
    compiled(x)
    pid = worker_pid()
    os.kill(pid, signal.SIGSTOP)
    try:
        with pytest.raises(genie.WorkerLostError):
            compiled(x)
    finally:
        os.kill(pid, signal.SIGCONT)


def test_an_index_error_on_the_worker_is_an_index_error_here(session: Any, fresh_dynamo: None) -> None:
    table = torch.randn(4, 2)
    compiled = torch.compile(lambda i: torch.nn.functional.embedding(i, table), backend="genie")
    good = torch.tensor([1, 2])
    assert torch.equal(compiled(good), table[good])
    with pytest.raises(IndexError) as caught:
        compiled(torch.tensor([1, 9]))
    assert isinstance(caught.value, genie.RemoteExecutionError) and "embedding" in str(caught.value)
    assert torch.equal(compiled(good), table[good]), "the worker lives on"


def test_a_singular_matrix_is_a_lin_alg_error_here(session: Any, fresh_dynamo: None) -> None:
    compiled = torch.compile(torch.linalg.inv, backend="genie")
    with pytest.raises(torch.linalg.LinAlgError, match="singular") as caught:
        compiled(torch.zeros(3, 3))
    assert isinstance(caught.value, genie.RemoteExecutionError)


def test_out_of_memory_fails_the_call_and_not_the_worker(session: Any, fresh_dynamo: None) -> None:
    def greedy(x: torch.Tensor, n: int) -> torch.Tensor:
        return (x.new_ones(n) * x.sum()).sum()

    compiled = torch.compile(greedy, backend="genie", dynamic=True)
    x, pid = torch.ones(3), worker_pid()
    assert compiled(x, 100) == 300
    with pytest.raises(genie.WorkerMemoryError, match="out of memory"):
        compiled(x, 1 << 44)
    assert compiled(x, 100) == 300 and worker_pid() == pid


def test_a_deadline_that_passes_is_a_timeout_and_the_next_call_works(own_session: Any, fresh_dynamo: None,
                                                                     matrix: torch.Tensor) -> None:
    own_session(workers=1, num_threads=1, strict=True)
    quick = torch.compile(lambda x: x + 1, backend="genie")
    quick(matrix)
    slow = torch.compile(spin, backend="genie", options={"timeout_s": 0.3})
    with pytest.raises(TimeoutError) as caught:
        slow(matrix)
    assert isinstance(caught.value, genie.WorkerTimeoutError)
    assert torch.equal(quick(matrix), matrix + 1)


def test_nobody_at_the_address() -> None:
    with pytest.raises(genie.WorkerUnreachableError, match=r"genie worker --bind tcp://127.0.0.1:1"):
        genie.Session(
            genie.Config.build(workers=["tcp://127.0.0.1:1"], connect_timeout_s=0.3),
            cluster_of("tcp://127.0.0.1:1"))


def cluster_of(address: str) -> Any:
    from genie_dynamo.runtime.cluster import parse_workers

    return parse_workers([address]).workers


def test_another_protocol_version_is_an_error_that_names_both(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    address, spoken = genie.session().links[0].address, m.PROTOCOL_VERSION
    monkeypatch.setattr(m, "PROTOCOL_VERSION", 99)
    with pytest.raises(genie.VersionMismatchError, match=rf"99.*\b{spoken}\b.*release"):
        genie.Session(genie.Config.build(workers=[address]), cluster_of(address))


def test_hostile_bytes_are_answered_and_the_worker_lives_on(session: Any, fresh_dynamo: None) -> None:
    address = genie.session().links[0].address
    compiled, x = torch.compile(lambda x: x * 2, backend="genie"), torch.ones(3)
    compiled(x)
    with zmq.Context() as context, context.socket(zmq.DEALER) as socket:
        socket.linger = 0
        socket.rcvtimeo = 10_000
        socket.connect(address)
        for data in (b"", b"\xc1", b"\x00" * 99, pack((99,)), pack((0, 1)),
                     pack(m.to_wire(m.Run(7, 1, 1, (), (), (), ()))),
                     pack(m.to_wire(m.Hello(99, b"x" * 16, 0.0, {})))):
            socket.send(data)
            answer = m.from_wire(unpack(socket.recv()))
            assert isinstance(answer, m.Failure), answer
        assert answer.kind == "VersionMismatchError" and "99" in answer.message
        socket.send(pack(bytes(DEFAULT_LIMITS.header_bytes)))
        answer = m.from_wire(unpack(socket.recv()))
        assert isinstance(answer, m.Failure) and answer.kind == "MessageLimitError", answer
    assert torch.equal(compiled(x), x * 2)


def test_a_tensor_beyond_the_limit_is_refused_before_it_is_sent(session: Any, fresh_dynamo: None,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = torch.compile(lambda x: x.sum(), backend="genie", dynamic=True)
    monkeypatch.setattr(zmq_frames, "MAX_FRAME_BYTES", 1 << 20)
    assert compiled(torch.ones(1 << 18)) == 1 << 18
    genie.reset_stats()
    with pytest.raises(genie.MessageLimitError, match=r"shape \(262145,\), torch.float32.*split it") as caught:
        compiled(torch.ones((1 << 18) + 1))
    assert caught.value.facts == {"size_bytes": (1 << 20) + 4, "limit_bytes": 1 << 20}
    assert genie.get_stats()["by_reason"]["inputs"]["sent"] == 0
    assert compiled(torch.ones(9)) == 9, "the session goes on"


def test_a_user_exception_in_a_graph_break_is_unchanged(session: Any, fresh_dynamo: None) -> None:
    class Mine(Exception):
        pass

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x + 1
        torch._dynamo.graph_break()
        if float(y.sum()) > 3:
            raise Mine("three")
        return y * 2

    compiled = torch.compile(f, backend="genie")
    assert torch.equal(compiled(torch.zeros(2)), torch.full((2,), 2.0))
    with pytest.raises(Mine, match="three"):
        compiled(torch.ones(2))


def test_a_wrong_option_names_the_right_ones(fresh_dynamo: None) -> None:
    with pytest.raises(Exception, match="awareness"):
        torch.compile(lambda x: x + 1, backend="genie", options={"awarness": "full"})(torch.ones(1))
    with pytest.raises(genie.ConfigError, match="worker_compiler"):
        genie.compile(lambda x: x, worker_compilers="flat")


SCRIPT = """
    import os, sys, torch
    import genie_dynamo as genie
    genie.init(workers=2, num_threads=1)
    f = torch.compile(lambda x: x + 1, backend="genie")
    f(torch.ones(2))
    print(*[link.embedded.pid for link in genie.session().links],
          *[os.path.dirname(link.address.removeprefix("ipc://")) for link in genie.session().links], flush=True)
    {end}
"""


@pytest.mark.parametrize("end", ["", "raise RuntimeError('x')", "os._exit(3)", "os.kill(os.getpid(), 9)",
                                 "sys.exit(1)"])
def test_no_worker_outlives_its_client(end: str, tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(textwrap.dedent(SCRIPT.format(end=end)))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, timeout=120)
    words = done.stdout.split()
    assert len(words) == 4, done.stderr
    wait_until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in words[:2]))
    wait_until(lambda: not any(Path(folder).exists() for folder in words[2:]))


def test_a_forked_child_does_not_use_its_parents_session(session: Any, fresh_dynamo: None) -> None:
    compiled, x = torch.compile(lambda x: x + 1, backend="genie"), torch.ones(3)
    compiled(x)
    inherited = genie.session()
    pid = os.fork()
    if pid == 0:
        try:
            inherited.check_open()
        except genie.SessionClosedError:
            genie.shutdown()
            os._exit(0)
        os._exit(1)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    assert torch.equal(compiled(x), x + 1), "the child's exit has closed nothing of ours"


def test_a_forked_child_that_calls_opens_a_session_of_its_own(session: Any, fresh_dynamo: None) -> None:
    net = torch.nn.Linear(3, 2)
    compiled, x = torch.compile(net, backend="genie"), torch.randn(4, 3)
    with torch.no_grad():
        expected = compiled(x)
        mine = worker_pid()
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                same = torch.equal(compiled(x), expected)
                os.write(writer, b"right" if same and worker_pid() != mine else b"wrong")
                genie.shutdown()
            finally:
                os._exit(0)
        os.close(writer)
        with os.fdopen(reader, "rb") as pipe:
            assert pipe.read() == b"right"
        os.waitpid(pid, 0)
        assert torch.equal(compiled(x), expected) and worker_pid() == mine


def test_data_loader_workers_beside_a_session(session: Any, fresh_dynamo: None) -> None:
    data = torch.utils.data.TensorDataset(torch.arange(12.0).reshape(6, 2))
    compiled = torch.compile(lambda x: x * 2, backend="genie")
    seen = [compiled(x) for (x,) in torch.utils.data.DataLoader(data, batch_size=2, num_workers=2)]
    assert torch.equal(torch.cat(seen), data.tensors[0] * 2)


def test_threads_call_at_once(session: Any, fresh_dynamo: None) -> None:
    net = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    compiled = torch.compile(net, backend="genie")
    inputs = [torch.randn(5, 16) for _ in range(8)]
    with torch.no_grad():
        compiled(inputs[0])
        expected = [net(x) for x in inputs]
    results: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        with torch.no_grad():
            for _ in range(20):
                results[index] = compiled(inputs[index])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for index, value in enumerate(expected):
        torch.testing.assert_close(results[index], value)


def test_shutdown_in_the_middle_of_a_call_ends_the_call(own_session: Any, fresh_dynamo: None,
                                                         matrix: torch.Tensor) -> None:
    own_session(workers=1, num_threads=1, strict=True)
    compiled = torch.compile(spin, backend="genie")
    compiled(matrix)
    pid = worker_pid()
    before = cpu_seconds(pid)
    thread, box = in_a_thread(lambda: compiled(matrix))
    wait_until(lambda: cpu_seconds(pid) > before + 0.1)
    genie.shutdown()
    thread.join(30)
    assert isinstance(box["error"], genie.SessionClosedError)
    wait_until(lambda: not Path(f"/proc/{pid}").exists())


def test_two_clients_share_a_worker_and_its_weights(tmp_path: Path) -> None:
    """Two processes, one worker: both right; the second one's weights do not travel again."""
    address = f"ipc://{tmp_path}/w"
    worker = subprocess.Popen([sys.executable, "-m", "genie_dynamo.runtime.worker", "--bind", address,
                               "--threads", "1"])
    script = textwrap.dedent("""
        import sys, torch
        import genie_dynamo as genie
        genie.init(workers=[sys.argv[1]], strict=True)
        torch.manual_seed(0)
        net = torch.nn.Linear(256, 256)
        compiled, x = torch.compile(net, backend="genie"), torch.randn(4, 256)
        with torch.no_grad():
            assert torch.allclose(compiled(x), net(x), atol=1e-6)
        print(genie.get_stats()["by_reason"]["weights"]["sent"], flush=True)
        sys.stdin.read()
    """)
    clients = []
    try:
        for _ in range(2):
            client = subprocess.Popen([sys.executable, "-c", script, address], stdin=subprocess.PIPE,
                                      stdout=subprocess.PIPE, text=True)
            clients.append(client)
            assert client.stdout is not None
            client.sent = int(client.stdout.readline())  # type: ignore[attr-defined]
        assert [c.sent for c in clients] == [256 * 256 * 4 + 1024, 1024]  # type: ignore[attr-defined]
    finally:
        for client in clients:
            client.kill()
            client.wait()
        worker.terminate()
        assert worker.wait(20) == 0
