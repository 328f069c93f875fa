"""Which workers are lost, and which only look so."""
from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from genie_dynamo.core.errors import ConfigError, SessionClosedError
from genie_dynamo.runtime.heartbeat import (
    Disconnected,
    Echoed,
    HeartbeatEcho,
    HeartbeatMonitor,
    HeartbeatState,
    Lost,
    Ping,
    Refused,
    Tick,
    reachable_address,
)
from genie_dynamo.runtime.security import Authenticator, Security, generate_keys

# A worker's process with nothing in it but the echo. On each line of its input it does what the line says.
ECHO_PROCESS = """
import ctypes, os, sys, zmq
from genie_dynamo.runtime.heartbeat import HeartbeatEcho
from genie_dynamo.runtime.security import Security
echo = HeartbeatEcho(zmq.Context(), "tcp://127.0.0.1:*", Security())
print(echo.address, flush=True)
for line in sys.stdin:
    ctypes.PyDLL(None).usleep(int(line))     # PyDLL: the call keeps the GIL
    print("done", flush=True)
"""


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.005)


# ---------------------------------------------------------------- the state machine, without time or network
def state(interval_s: float = 1.0, timeout_s: float = 10.0) -> HeartbeatState:
    numbers = iter(range(1 << 30))
    return HeartbeatState(incarnation="w", interval_s=interval_s, timeout_s=timeout_s, started_s=0.0,
                          nonce=lambda: next(numbers).to_bytes(8, "big"))


def tick(machine: HeartbeatState, now_s: float, **facts: Any) -> Any:
    return machine.handle(Tick(now_s=now_s, **facts))


def run_ticks(machine: HeartbeatState, start_s: float, end_s: float, step_s: float = 1.0) -> list[Any]:
    commands = []
    now_s = start_s
    while now_s <= end_s:
        commands += tick(machine, now_s)
        now_s += step_s
    return commands


def test_it_pings_once_per_interval_with_a_nonce_and_the_incarnation() -> None:
    machine = state(interval_s=1.0, timeout_s=100.0)
    pings = run_ticks(machine, 0.0, 4.9, step_s=0.1)
    assert len(pings) == 5 and len({ping.payload for ping in pings}) == 5
    assert all(ping.payload.endswith(b"w") for ping in pings)


def test_silence_is_a_loss_at_the_timeout_and_said_once() -> None:
    machine = state()
    assert all(isinstance(command, Ping) for command in run_ticks(machine, 0.0, 9.0))
    (lost,) = tick(machine, 10.0)
    assert lost == Lost(reason="no heartbeat for 10.0 s (limit 10 s)") and machine.lost == lost.reason
    assert run_ticks(machine, 11.0, 30.0) == []


def test_an_echo_starts_the_silence_anew() -> None:
    machine = state()
    (ping,) = tick(machine, 0.0)
    run_ticks(machine, 1.0, 8.0)
    machine.handle(Echoed(now_s=8.5, payload=ping.payload))
    assert machine.round_trip_s == 8.5
    assert all(isinstance(command, Ping) for command in run_ticks(machine, 9.0, 18.0))
    (lost,) = tick(machine, 18.6)
    assert isinstance(lost, Lost)


@pytest.mark.parametrize("payload", [b"", b"junk", (0).to_bytes(8, "big") + b"another incarnation"])
def test_what_it_did_not_send_says_nothing(payload: bytes) -> None:
    machine = state()
    run_ticks(machine, 0.0, 8.0)
    machine.handle(Echoed(now_s=8.5, payload=payload))
    assert machine.round_trip_s is None
    assert isinstance(run_ticks(machine, 9.0, 10.0)[-1], Lost)


def test_an_echo_counts_once() -> None:
    machine = state()
    (ping,) = tick(machine, 0.0)
    machine.handle(Echoed(now_s=0.1, payload=ping.payload))
    run_ticks(machine, 1.0, 9.0)
    machine.handle(Echoed(now_s=9.5, payload=ping.payload))      # replayed
    assert isinstance(run_ticks(machine, 10.0, 10.2, step_s=0.1)[-1], Lost)


def test_the_end_of_the_process_is_a_loss_at_once() -> None:
    machine = state()
    assert tick(machine, 0.01, process_alive=False) == (Lost(reason="its process has ended"),)


def test_a_refused_key_is_a_loss_at_once() -> None:
    (lost,) = state().handle(Refused(now_s=0.0))
    assert isinstance(lost, Lost) and "key" in lost.reason


def test_a_closed_connection_has_a_moment_to_come_back() -> None:
    machine = state(interval_s=0.5)
    tick(machine, 0.0)
    machine.handle(Disconnected(now_s=0.1))
    pings = run_ticks(machine, 0.5, 1.0, step_s=0.5)
    machine.handle(Disconnected(now_s=0.9))                      # the reconnect failed once more: the first one counts
    assert all(isinstance(command, Ping) for command in pings)
    (lost,) = tick(machine, 1.2)
    assert isinstance(lost, Lost) and "did not come back within 1 s" in lost.reason

    machine = state(interval_s=0.5)
    (ping,) = tick(machine, 0.0)
    machine.handle(Disconnected(now_s=0.1))
    machine.handle(Echoed(now_s=0.6, payload=ping.payload))
    assert not any(isinstance(command, Lost) for command in run_ticks(machine, 0.7, 9.0, step_s=0.5))


def test_a_client_that_slept_does_not_call_it_the_workers_silence() -> None:
    machine = state()
    run_ticks(machine, 0.0, 3.0)
    (ping,) = tick(machine, 1000.0)                              # suspended, or its GIL was held
    assert isinstance(ping, Ping) and machine.lost is None
    assert not any(isinstance(command, Lost) for command in run_ticks(machine, 1001.0, 1005.0))
    assert isinstance(run_ticks(machine, 1006.0, 1007.0)[-1], Lost)   # but 3 + 7 s of watched silence are enough


events = st.one_of(
    st.builds(lambda p: ("tick", p), st.booleans() | st.just(True)), st.just(("echo", 0)), st.just(("junk", 0)),
    st.just(("gone", 0)))


@given(st.lists(st.tuples(st.floats(0, 3), events), max_size=60))
def test_in_any_order_a_loss_is_said_once_and_last(steps: list[tuple[float, tuple[str, Any]]]) -> None:
    machine, now_s, said, sent = state(), 0.0, [], [b""]
    for delay_s, (kind, fact) in steps:
        now_s += delay_s
        event = {
            "tick": Tick(now_s=now_s, process_alive=fact is not False), "echo": Echoed(now_s=now_s, payload=sent[-1]),
            "junk": Echoed(now_s=now_s, payload=b"junk"), "gone": Disconnected(now_s=now_s),
        }[kind]
        commands = machine.handle(event)
        sent += [command.payload for command in commands if isinstance(command, Ping)]
        said += commands
    losses = [command for command in said if isinstance(command, Lost)]
    assert len(losses) <= 1 and (not losses or said[-1] is losses[0])
    assert (machine.lost is not None) == bool(losses)
    assert len(machine._sent) <= 12                              # timeout / interval, and no more


# ---------------------------------------------------------------- with sockets and processes
class EchoProcess:
    """A process that echoes heartbeats, and can be told to hold its GIL."""

    def __init__(self) -> None:
        self.process = subprocess.Popen([sys.executable, "-c", ECHO_PROCESS], text=True, stdin=subprocess.PIPE,
                                        stdout=subprocess.PIPE)
        assert self.process.stdin is not None and self.process.stdout is not None
        self.stdin, self.stdout = self.process.stdin, self.process.stdout
        self.address = self.stdout.readline().strip()

    def hold_gil(self, seconds: float) -> None:
        self.stdin.write(f"{int(seconds * 1e6)}\n")
        self.stdin.flush()
        assert self.stdout.readline() == "done\n"

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.stdin.close()
        self.stdout.close()


@pytest.fixture
def echo_process() -> Iterator[EchoProcess]:
    process = EchoProcess()
    yield process
    process.close()


@pytest.fixture
def monitor() -> Iterator[HeartbeatMonitor]:
    watching = HeartbeatMonitor(0.1, 1.0)
    yield watching
    watching.close()


def beats(monitor: HeartbeatMonitor, key: object) -> bool:
    return monitor.round_trip_s(key) is not None  # type: ignore[arg-type]


def test_a_worker_that_holds_its_gil_is_not_lost(monitor: HeartbeatMonitor, echo_process: EchoProcess) -> None:
    monitor.add("w", echo_process.address, Security(), "i")
    wait_until(lambda: beats(monitor, "w"))
    echo_process.hold_gil(2.5)                # more than twice the timeout
    assert monitor.is_lost("w") is None


def test_a_stopped_process_is_lost_after_the_timeout(echo_process: EchoProcess) -> None:
    losses: list[tuple[Any, str, float]] = []
    monitor = HeartbeatMonitor(0.1, 1.0, on_loss=lambda key, why: losses.append((key, why, time.monotonic())))
    try:
        monitor.add("w", echo_process.address, Security(), "i")
        wait_until(lambda: beats(monitor, "w"))
        stopped_s = time.monotonic()
        echo_process.process.send_signal(signal.SIGSTOP)
        wait_until(lambda: bool(losses))
        ((key, reason, lost_s),) = losses
        assert key == "w" and "no heartbeat for" in reason and echo_process.address in reason
        assert reason == monitor.is_lost("w")
        assert 0.8 <= lost_s - stopped_s < 3.0
    finally:
        monitor.close()


def test_a_killed_embedded_worker_is_noticed_at_once(echo_process: EchoProcess) -> None:
    monitor = HeartbeatMonitor(5.0, 60.0)
    try:
        monitor.add("w", echo_process.address, Security(), "i", is_alive=lambda: echo_process.process.poll() is None)
        wait_until(lambda: beats(monitor, "w"))
        killed_s = time.monotonic()
        echo_process.process.kill()
        wait_until(lambda: monitor.is_lost("w") is not None)
        assert time.monotonic() - killed_s < 1.0      # 0.1 s, on a machine that has time
        assert "its process has ended" in str(monitor.is_lost("w"))
    finally:
        monitor.close()


def test_a_killed_remote_worker_is_noticed_by_its_connection(echo_process: EchoProcess) -> None:
    monitor = HeartbeatMonitor(0.2, 60.0)
    try:
        monitor.add("w", echo_process.address, Security(), "i")
        wait_until(lambda: beats(monitor, "w"))
        echo_process.process.kill()
        wait_until(lambda: monitor.is_lost("w") is not None, timeout_s=10.0)
        assert "did not come back" in str(monitor.is_lost("w"))
    finally:
        monitor.close()


def test_nobody_at_the_address_is_a_loss(monitor: HeartbeatMonitor, tmp_path: Path) -> None:
    monitor.add("w", f"ipc://{tmp_path}/nobody", Security(), "i")
    wait_until(lambda: monitor.is_lost("w") is not None)


def test_one_monitor_watches_many_and_forgets_on_request(monitor: HeartbeatMonitor, tmp_path: Path) -> None:
    context = zmq.Context()
    echoes = [HeartbeatEcho(context, f"ipc://{tmp_path}/{index}", Security()) for index in range(5)]
    for index, echo in enumerate(echoes):
        monitor.add(index, echo.address, Security(), f"i{index}")
    wait_until(lambda: all(beats(monitor, index) for index in range(5)))
    echoes[2].close()
    wait_until(lambda: monitor.is_lost(2) is not None)
    assert [index for index in range(5) if monitor.is_lost(index)] == [2]
    monitor.remove(2)
    monitor.remove("never added")
    assert monitor.is_lost(2) is None
    echoes[2] = HeartbeatEcho(context, f"ipc://{tmp_path}/2b", Security())
    monitor.add(2, echoes[2].address, Security(), "i2b")           # a new incarnation under the same key
    wait_until(lambda: beats(monitor, 2))
    for echo in echoes:
        echo.close()
        echo.close()
    context.term()


def test_a_failing_callback_does_not_stop_the_watch(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def fail(key: object, reason: str) -> None:
        raise RuntimeError("the callback's own bug")

    monitor = HeartbeatMonitor(0.05, 0.2, on_loss=fail)
    try:
        for key in ("a", "b"):
            monitor.add(key, f"ipc://{tmp_path}/{key}", Security(), "i")
            wait_until(lambda key=key: monitor.is_lost(key) is not None)  # type: ignore[misc]
        assert "the callback's own bug" in caplog.text
    finally:
        monitor.close()


def test_a_monitor_that_fails_does_not_leave_workers_looking_healthy(
    tmp_path: Path, caplog: pytest.LogCaptureFixture,
) -> None:
    monitor = HeartbeatMonitor(0.05, 60.0)
    monitor.add("w", f"ipc://{tmp_path}/w", Security(), "i", is_alive=lambda: 1 // 0 == 0)
    wait_until(lambda: monitor.is_lost("w") is not None)
    assert "monitor failed" in str(monitor.is_lost("w")) and "ZeroDivisionError" in caplog.text
    monitor.close()


def test_signals_do_not_end_the_echo(monitor: HeartbeatMonitor) -> None:
    hits: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: hits.append(number))
    context = zmq.Context()
    echo = HeartbeatEcho(context, "tcp://127.0.0.1:*", Security())
    try:
        monitor.add("w", echo.address, Security(), "i")
        for count in (1, 2):
            signal.pthread_kill(echo._thread.ident or 0, signal.SIGUSR1)
            wait_until(lambda count=count: len(hits) == count)  # type: ignore[misc]
        wait_until(lambda: beats(monitor, "w"))
        assert echo._thread.is_alive()
    finally:
        signal.signal(signal.SIGUSR1, before)
        echo.close()
        context.term()


def test_heartbeats_ask_for_keys_too(tmp_path: Path) -> None:
    generate_keys(tmp_path / "ours")
    generate_keys(tmp_path / "theirs")
    server = Security.for_server(tmp_path / "ours")
    context = zmq.Context()
    with Authenticator(context, server):
        echo = HeartbeatEcho(context, "tcp://127.0.0.1:*", server)
        monitor = HeartbeatMonitor(0.1, 30.0)
        try:
            ours, theirs = (Security.for_client(tmp_path / side) for side in ("ours", "theirs"))
            monitor.add("ours", echo.address, ours, "i", server_public=server.server_public)
            monitor.add("theirs", echo.address, theirs, "i", server_public=server.server_public)
            wait_until(lambda: beats(monitor, "ours"))
            wait_until(lambda: monitor.is_lost("theirs") is not None)
            assert "refuses this client's key" in str(monitor.is_lost("theirs"))
            assert monitor.is_lost("ours") is None
        finally:
            monitor.close()
            echo.close()
    context.term()


def test_closing_is_quick_and_leaves_nothing(tmp_path: Path) -> None:
    def resources() -> tuple[int, int]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count()

    context = zmq.Context()
    echo = HeartbeatEcho(context, f"ipc://{tmp_path}/echo", Security())
    before = resources()
    for _ in range(20):
        monitor = HeartbeatMonitor(10.0, 60.0)
        for key in range(3):
            monitor.add(key, echo.address, Security(), "i")
        started_s = time.monotonic()
        monitor.close()
        monitor.close()
        assert time.monotonic() - started_s < 2.0
        with pytest.raises(SessionClosedError):
            monitor.add("late", echo.address, Security(), "i")
    descriptors, threads = resources()
    # Others in this process may open one meanwhile; a leak would be one a round.
    assert descriptors - before[0] < 20 and threads == before[1]
    echo.close()
    context.term()


def test_it_may_be_closed_by_its_own_callback(tmp_path: Path) -> None:
    closed = threading.Event()

    def close(key: object, reason: str) -> None:
        monitor.close()
        closed.set()

    monitor = HeartbeatMonitor(0.05, 0.2, on_loss=close)
    monitor.add("w", f"ipc://{tmp_path}/nobody", Security(), "i")
    assert closed.wait(10)
    wait_until(lambda: not monitor._thread.is_alive())


def test_a_forked_child_leaves_its_parents_monitor_alone(tmp_path: Path, monitor: HeartbeatMonitor) -> None:
    context = zmq.Context()
    echo = HeartbeatEcho(context, f"ipc://{tmp_path}/echo", Security())
    monitor.add("w", echo.address, Security(), "i")
    pid = os.fork()
    if pid == 0:
        monitor.close()
        os._exit(0)
    assert os.waitpid(pid, 0)[1] == 0
    wait_until(lambda: beats(monitor, "w"))
    echo.close()
    context.term()


def test_an_incarnation_that_does_not_fit_is_refused(monitor: HeartbeatMonitor) -> None:
    with pytest.raises(ConfigError, match="at most 128"):
        monitor.add("w", "tcp://127.0.0.1:1", Security(), "x" * 129)


@pytest.mark.parametrize(("echo", "worker", "expected"), [
    ("tcp://0.0.0.0:7001", "tcp://10.0.0.5:5555", "tcp://10.0.0.5:7001"),
    ("tcp://[::]:7001", "tcp://[fe80::5]:5555", "tcp://[fe80::5]:7001"),
    ("tcp://[::ffff:127.0.0.1]:7001", "tcp://localhost:5555", "tcp://localhost:7001"),
    ("ipc:///a/b.hb", "ipc:///a/b", "ipc:///a/b.hb"),
])
def test_the_echo_is_reached_where_the_worker_is(echo: str, worker: str, expected: str) -> None:
    assert reachable_address(echo, worker) == expected
