"""Embedded workers: they come up, and whatever happens to their client, none is left behind."""
from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from genie_dynamo.core.errors import ConfigError, WorkerUnreachableError
from genie_dynamo.runtime import launcher
from genie_dynamo.runtime.launcher import EmbeddedWorker, make_socket_dir, remove_socket_dir, start_embedded

STAND_IN = "tests.runtime.stand_in_worker"
ROOT = Path(__file__).parents[2]


def start(count: int = 1, *behaviours: str, **options: Any) -> list[EmbeddedWorker]:
    return start_embedded(count, module=STAND_IN, op_libraries=behaviours, **options)


def wait_until(condition: Callable[[], bool], timeout_s: float = 20.0) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline_s, "it did not happen in time"
        time.sleep(0.01)


def runs(pid: int) -> bool:
    """A zombie does not run: who reaps orphans here is not our matter."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def open_fds() -> set[str]:
    return {f"{fd.name}:{fd.readlink()}" for fd in Path("/proc/self/fd").iterdir() if fd.exists()}


@pytest.fixture
def workers() -> Iterator[list[EmbeddedWorker]]:
    """What a test appends here is closed after it."""
    opened: list[EmbeddedWorker] = []
    yield opened
    for worker in opened:
        worker.close(timeout_s=0.0)


# ---------------------------------------------------------------- coming up and going
def test_workers_come_up_with_what_they_need_and_close_without_a_trace(workers: list[EmbeddedWorker]) -> None:
    before = open_fds()
    workers += start(2, num_threads=3)
    directories = [worker.log_path.parent for worker in workers]
    assert len({worker.pid for worker in workers}) == len(set(directories)) == 2
    for worker, directory in zip(workers, directories, strict=True):
        assert worker.alive and worker.exit_reason() is None
        assert worker.incarnation == "stand-in-1"
        assert worker.address == f"ipc://{directory}/worker"
        assert stat.S_IMODE(directory.stat().st_mode) == 0o700
        environment = (directory / "environment").read_text().splitlines()
        assert {"OMP_NUM_THREADS=3", "MKL_NUM_THREADS=3"} <= set(environment)
        assert os.getsid(worker.pid) != os.getsid(0)     # a Ctrl-C in the terminal does not reach it
        assert Path(f"/proc/{worker.pid}/fd/0").readlink() == Path("/dev/null")
    for worker in workers:
        worker.close(timeout_s=5.0)
        worker.close()
        assert not worker.alive and str(worker.exit_reason()).startswith("exited with code 0")
    assert not any(directory.exists() for directory in directories)
    assert open_fds() == before


def test_cores_are_shared_out_when_no_number_is_given(workers: list[EmbeddedWorker]) -> None:
    workers += start(2)
    expected = max(1, len(os.sched_getaffinity(0)) // 2)
    assert f"OMP_NUM_THREADS={expected}" in (workers[0].log_path.parent / "environment").read_text().splitlines()


@pytest.mark.parametrize(("behaviour", "says"), [
    ("dies", "exited with code 7; end of its log:\nthe stand-in says goodbye"),
    ("segfaults", "killed by SIGSEGV"),
    ("refuses", "refused to start: no CUDA device here"),
    ("closes_ready", "exited with code 3, and logged nothing"),
])
def test_one_that_does_not_start_says_why(behaviour: str, says: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/tmp")
    made = _remember_directories(monkeypatch)
    before = open_fds()
    with pytest.raises(WorkerUnreachableError) as caught:
        start(2, behaviour)
    assert says in str(caught.value)
    assert not runs(caught.value.pid)  # type: ignore[attr-defined]
    assert len(made) == 2 and not any(directory.exists() for directory in made)
    assert open_fds() == before


def _remember_directories(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    made: list[Path] = []

    def make() -> Path:
        made.append(make_socket_dir())
        return made[-1]

    monkeypatch.setattr(launcher, "make_socket_dir", make)
    return made


def test_one_that_hangs_is_given_up_at_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _remember_directories(monkeypatch)
    started_s = time.monotonic()
    with pytest.raises(WorkerUnreachableError, match=r"not ready within 0\.5 s.*raise connect_timeout_s") as caught:
        start(1, "hangs", connect_timeout_s=0.5)
    assert time.monotonic() - started_s < 5
    assert not runs(caught.value.pid)  # type: ignore[attr-defined]
    assert not made[0].exists()


def test_an_interrupted_start_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    made = _remember_directories(monkeypatch)
    pids: list[int] = []

    def interrupted(worker: EmbeddedWorker, *_: Any) -> str:
        pids.append(worker.pid)
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "_wait_ready", interrupted)
    with pytest.raises(KeyboardInterrupt):
        start(2)
    assert not runs(pids[0]) and not any(directory.exists() for directory in made)


def test_no_workers_is_an_error() -> None:
    with pytest.raises(ConfigError, match="at least 1"):
        start(0)


def test_a_killed_worker_tells_how_it_ended(workers: list[EmbeddedWorker]) -> None:
    (worker,) = start()
    workers.append(worker)
    os.kill(worker.pid, signal.SIGKILL)
    wait_until(lambda: not worker.alive)
    expected = "killed by SIGKILL; end of its log:\nup and running"
    assert worker.exit_reason() == expected
    worker.close()
    assert worker.exit_reason() == expected       # the log is gone with its directory, its end is not


def test_a_stubborn_worker_is_killed_with_its_children(workers: list[EmbeddedWorker]) -> None:
    (worker,) = start(1, "has_child")
    workers.append(worker)
    child = int((worker.log_path.parent / "child").read_text())
    assert runs(child)
    worker.close(timeout_s=0.2)
    assert "killed by SIGKILL" in str(worker.exit_reason())
    wait_until(lambda: not runs(child))
    assert not worker.log_path.parent.exists()


def test_a_dropped_worker_ends() -> None:
    (worker,) = start()
    pid = worker.pid
    del worker
    wait_until(lambda: not runs(pid))


def test_many_threads_may_start_workers_at_once(workers: list[EmbeddedWorker]) -> None:
    with ThreadPoolExecutor(4) as pool:
        for started in pool.map(lambda _: start(1), range(4)):
            workers += started
    assert all(worker.alive for worker in workers)
    # None holds another's lifeline: each ends when its own is closed, and only then.
    for index, worker in enumerate(workers):
        worker.close(timeout_s=5.0)
        assert str(worker.exit_reason()).startswith("exited with code 0")
        assert all(other.alive for other in workers[index + 1:])


# ---------------------------------------------------------------- what becomes of the client
PRELUDE = f"""
import os, signal, subprocess, sys, threading
from genie_dynamo.runtime.launcher import start_embedded
def announce(workers):
    print(*[w.pid for w in workers], workers[0].log_path.parent, flush=True)
def start(count=1):
    workers = start_embedded(count, module={STAND_IN!r})
    announce(workers)
    return workers
"""


class Client:
    """A script in a process of its own that prints the pids of its workers and a directory."""

    def __init__(self, body: str, folder: Path, name: str = "script.py") -> None:
        script = folder / name
        script.write_text(PRELUDE + textwrap.dedent(body))
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        text=True, cwd=folder, env=environment)
        assert self.process.stdout is not None
        *pids, directory = self.process.stdout.readline().split()
        self.workers = [int(pid) for pid in pids]
        self.directory = Path(directory)

    def finish(self) -> str:
        """Let it run to its end; what else it printed."""
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        with self.process.stdout as out:      # not communicate(): it would not see what readline() has buffered
            text = out.read()
        self.process.wait(timeout=60)
        return text

    def nothing_is_left(self) -> None:
        wait_until(lambda: not any(runs(pid) for pid in self.workers))
        wait_until(lambda: not self.directory.exists())


@pytest.mark.parametrize(("ending", "code"), [
    ("pass", 0), ("raise ValueError('no')", 1), ("sys.exit(3)", 3), ("os._exit(4)", 4),
    ("os.kill(os.getpid(), signal.SIGTERM)", -15), ("os.kill(os.getpid(), signal.SIGKILL)", -9),
    ("os.abort()", -6),
])
def test_no_worker_outlives_its_client(tmp_path: Path, ending: str, code: int) -> None:
    client = Client(f"workers = start(2)\nsys.stdin.readline()\n{ending}\n", tmp_path)
    assert all(runs(pid) for pid in client.workers)
    client.finish()
    assert client.process.returncode == code
    client.nothing_is_left()


@pytest.mark.parametrize("child", [
    "pid = os.fork()\nif not pid:\n    signal.pause()\n",
    "pid = subprocess.Popen(['sleep', '1000'], close_fds=False).pid\n",
    "import multiprocessing\nprocess = multiprocessing.get_context('fork').Process(target=signal.pause)\n"
    "process.start()\npid = process.pid\n",
])
def test_children_of_the_client_do_not_keep_workers_alive(tmp_path: Path, child: str) -> None:
    client = Client(f"workers = start()\n{child}print(pid, flush=True)\nsys.stdin.readline()\n", tmp_path)
    assert client.process.stdout is not None
    survivor = int(client.process.stdout.readline())
    try:
        client.process.kill()
        client.nothing_is_left()
        assert runs(survivor)
    finally:
        os.kill(survivor, signal.SIGKILL)
        client.finish()


def test_a_forked_child_neither_uses_nor_ends_its_parents_workers(tmp_path: Path) -> None:
    client = Client("""
        (worker,) = start()
        pid = os.fork()
        if not pid:
            worker.close()
            print(worker.alive, worker.exit_reason(), flush=True)
            sys.exit()
        os.waitpid(pid, 0)
        print(worker.alive, flush=True)
    """, tmp_path)
    assert client.finish().splitlines() == ["False belongs to the parent of this process", "True"]
    client.nothing_is_left()


def test_a_daemonic_process_may_have_workers(tmp_path: Path) -> None:
    client = Client("""
        import multiprocessing
        def body():
            start()
            sys.stdin = open(0)
            sys.stdin.readline()
        process = multiprocessing.get_context("fork").Process(target=body, daemon=True)
        process.start()
        process.join()
    """, tmp_path)
    client.finish()
    client.nothing_is_left()


def test_a_worker_may_be_started_by_a_thread_that_ends(tmp_path: Path) -> None:
    client = Client("""
        thread = threading.Thread(target=lambda: globals().update(workers=start()))
        thread.start()
        thread.join()
        sys.stdin.readline()
        print(workers[0].alive, flush=True)
    """, tmp_path)
    assert client.finish() == "True\n"
    client.nothing_is_left()


def test_an_unguarded_script_is_not_run_again(tmp_path: Path) -> None:
    client = Client("""
        open("runs", "a").write("once")
        start(2)
    """, tmp_path)
    client.finish()
    assert (tmp_path / "runs").read_text() == "once"


def test_a_client_without_a_script_as_in_a_notebook(tmp_path: Path) -> None:
    code = PRELUDE + "start()\n"
    done = subprocess.run([sys.executable, "-"], input=code, text=True, capture_output=True, cwd=tmp_path, timeout=60,
                          env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True)
    pid = int(done.stdout.split()[0])
    wait_until(lambda: not runs(pid))


def test_ctrl_c_is_the_clients_to_handle(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(PRELUDE + textwrap.dedent("""
        workers = start()
        try:
            print("waiting", flush=True)
            signal.pause()
        except KeyboardInterrupt:
            print(workers[0].alive, flush=True)
    """))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True, cwd=tmp_path,
                               env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline().split()[0])
    assert process.stdout.readline() == "waiting\n"
    os.killpg(process.pid, signal.SIGINT)      # what a terminal does: to the whole group
    with process.stdout as out:
        assert out.read() == "True\n"
    process.wait(timeout=30)
    wait_until(lambda: not runs(pid))


# ---------------------------------------------------------------- what the worker can import
def test_a_file_beside_the_script_does_not_stand_in_for_the_standard_library(tmp_path: Path) -> None:
    (tmp_path / "argparse.py").write_text("raise SystemExit('this is not the standard library')")
    client = Client("start()\n", tmp_path)
    assert client.workers
    client.finish()


def test_an_op_library_beside_the_script_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_ops.py").write_text("")
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.chdir(tmp_path)
    assert str(tmp_path) not in launcher._module_path(())
    assert str(tmp_path) in launcher._module_path(["my_ops.sub"])
    assert str(tmp_path) not in launcher._module_path(["folder"])      # a mere folder of that name


def test_paths_added_by_the_client_reach_the_worker_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                             workers: list[EmbeddedWorker]) -> None:
    monkeypatch.setattr(sys, "path", [str(tmp_path / "first"), *sys.path, str(tmp_path / "last")])
    workers += start()
    text = (workers[0].log_path.parent / "environment").read_text()
    (line,) = [line for line in text.splitlines() if line.startswith("PYTHONPATH=")]
    entries = line.removeprefix("PYTHONPATH=").split(os.pathsep)
    assert entries[0] == str(tmp_path / "first") and entries[-1] == str(tmp_path / "last")


# ---------------------------------------------------------------- socket directories
def test_a_directory_too_long_for_sockets_is_not_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    long = tmp_path / ("x" * 80)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    monkeypatch.setattr("tempfile.tempdir", str(long))
    directory = make_socket_dir()
    try:
        assert directory.parent == Path("/tmp")
    finally:
        directory.rmdir()


def test_no_usable_directory_says_what_was_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", "/nonexistent")

    def refuse(**_: Any) -> str:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("tempfile.mkdtemp", refuse)
    with pytest.raises(ConfigError, match=r"/nonexistent: Permission denied.*set TMPDIR"):
        make_socket_dir()


def test_only_directories_of_ours_are_removed(tmp_path: Path) -> None:
    foreign = tmp_path / "somebody"
    foreign.mkdir(mode=0o700)
    public = tmp_path / "genie-w-public"
    public.mkdir(mode=0o755)
    target = tmp_path / "target"
    target.mkdir(mode=0o700)
    link = tmp_path / "genie-w-link"
    link.symlink_to(target)
    for directory in (foreign, public, link):
        remove_socket_dir(f"ipc://{directory}/worker")
        assert directory.exists()
    remove_socket_dir("tcp://127.0.0.1:5555")
    remove_socket_dir(f"ipc://{tmp_path}/genie-w-gone/worker")
    ours = make_socket_dir()
    (ours / "log").write_text("x")
    remove_socket_dir(f"ipc://{ours}/worker")
    assert not ours.exists()


def test_lifeline_watch_calls_once_at_the_end_of_the_pipe() -> None:
    read_fd, write_fd = os.pipe()
    os.set_inheritable(read_fd, True)
    ended = threading.Event()
    thread = launcher.lifeline_watch(read_fd, ended.set)
    assert not os.get_inheritable(read_fd)
    os.write(write_fd, b"still here")
    assert not ended.wait(0.05)
    os.close(write_fd)
    assert ended.wait(5)
    thread.join(5)
    os.close(read_fd)
