"""What the commands do, and their status when they cannot."""
from __future__ import annotations

import json
import re
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from genie_dynamo.cli.main import main
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.runtime.worker.main import WorkerOptions


# ---------------------------------------------------------------- worker
def options_of(monkeypatch: pytest.MonkeyPatch, *argv: str) -> WorkerOptions:
    """What run_worker is given for `genie worker argv`."""
    given: list[WorkerOptions] = []
    monkeypatch.setattr("genie_dynamo.runtime.worker.main.run_worker", given.append)
    assert main(["worker", *argv]) == 0
    return given[0]


def test_worker_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(monkeypatch, "--bind", "tcp://127.0.0.1:5555")
    assert options == WorkerOptions(bind="tcp://127.0.0.1:5555")


def test_worker_with_every_option(monkeypatch: pytest.MonkeyPatch) -> None:
    options = options_of(
        monkeypatch, "--bind", "tcp://0.0.0.0:5555", "--device", "cuda:0", "--threads", "3", "--op-library", "a.b",
        "--op-library", "c", "--keys", "k", "--allow-anyone-on-the-network", "--memory-limit-gib", "1.5",
        "--resident-quota-gib", "0.5",
        "--log-level", "info")
    assert options == WorkerOptions(
        bind="tcp://0.0.0.0:5555", device="cuda:0", num_threads=3, op_libraries=("a.b", "c"), keys="k",
        allow_unauthenticated=True, memory_limit_bytes=1610612736, resident_quota_bytes=536870912,
        log_level="INFO")


def test_an_error_of_ours_is_one_line_and_status_1(
        monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(_: WorkerOptions) -> None:
        raise ConfigError("the reason")

    monkeypatch.setattr("genie_dynamo.runtime.worker.main.run_worker", refuse)
    assert main(["worker", "--bind", "tcp://127.0.0.1:5555"]) == 1
    assert capsys.readouterr().err == "genie worker: the reason\n"


def test_ctrl_c_is_status_130(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: WorkerOptions) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("genie_dynamo.runtime.worker.main.run_worker", interrupted)
    assert main(["worker", "--bind", "tcp://127.0.0.1:5555"]) == 130


def test_a_bug_is_not_dressed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: WorkerOptions) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("genie_dynamo.runtime.worker.main.run_worker", broken)
    with pytest.raises(ZeroDivisionError):
        main(["worker", "--bind", "tcp://127.0.0.1:5555"])


def genie(*argv: str, **kwargs: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "genie_dynamo.cli", *argv], capture_output=True, text=True,
                          timeout=120, check=False, **kwargs)


@contextmanager
def running_worker(*argv: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`genie worker argv` and the address it says it is at."""
    process = subprocess.Popen([sys.executable, "-m", "genie_dynamo.cli", "worker", "--threads", "1", *argv],
                               stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()   # the test's timeout bounds it; EOF if the worker ends
        found = re.search(r" at (\S+) ", line)
        assert found, f"no address in {line!r}"
        yield process, found[1]
    finally:
        process.kill()
        process.communicate()


@pytest.mark.heavy
def test_a_worker_answers_and_stops_on_sigterm() -> None:
    with running_worker("--bind", "tcp://127.0.0.1:*") as (process, address):
        asked = genie("workers", address, "--json")
        assert asked.returncode == 0, asked.stderr
        row, = json.loads(asked.stdout)["workers"]
        assert row["address"] == address
        assert row["error"] is None
        assert re.fullmatch(r"[0-9a-f]{16}", row["facts"]["incarnation"])
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 0


@pytest.mark.heavy
def test_a_worker_beyond_loopback_wants_keys() -> None:
    refused = genie("worker", "--bind", "tcp://0.0.0.0:*")
    assert refused.returncode == 1
    assert "--keys" in refused.stderr
    assert "--allow-anyone-on-the-network" in refused.stderr
    assert "Traceback" not in refused.stderr


@pytest.mark.heavy
def test_workers_with_keys(tmp_path: Path) -> None:
    assert genie("keygen", str(tmp_path / "keys")).returncode == 0
    with running_worker("--bind", "tcp://127.0.0.1:*", "--keys", str(tmp_path / "keys")) as (_, address):
        cluster = tmp_path / "cluster.yaml"
        cluster.write_text(f"workers:\n  - address: {address}\n    server_key: keys/server.key\n"
                           "client_key: keys/client.key_secret\n")
        asked = genie("workers", "--cluster", str(cluster))
        assert asked.returncode == 0, asked.stdout + asked.stderr
        assert f"{address}  answers" in asked.stdout


# ---------------------------------------------------------------- workers
@pytest.mark.heavy
def test_workers_says_who_does_not_answer() -> None:
    asked = genie("workers", "tcp://127.0.0.1:9", "--timeout-s", "0.5", "--json")
    assert asked.returncode == 1
    row, = json.loads(asked.stdout)["workers"]
    assert "tcp://127.0.0.1:9" in row["error"]
    assert "genie worker --bind" in row["error"]


@pytest.mark.parametrize("argv", [[], ["tcp://127.0.0.1:9", "--cluster", "x.yaml"], ["nonsense"]])
def test_workers_wants_to_know_whom_to_ask(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["workers", *argv]) == 1
    assert "tcp://HOST:PORT" in capsys.readouterr().err


# ---------------------------------------------------------------- keygen
def test_keygen_writes_four_files_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "keys"
    assert main(["keygen", str(folder), "--json"]) == 0
    files = [Path(name) for name in json.loads(capsys.readouterr().out)["files"]]
    assert sorted(path.name for path in files) == ["client.key", "client.key_secret", "server.key",
                                                   "server.key_secret"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    before = [path.read_bytes() for path in files]
    assert main(["keygen", str(folder)]) == 1
    assert "exists" in capsys.readouterr().err
    assert [path.read_bytes() for path in files] == before
    (tmp_path / "file").write_text("")
    assert main(["keygen", str(tmp_path / "file" / "keys")]) == 1
    assert "no keys were written" in capsys.readouterr().err


def test_patterns_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["patterns"]) == 0
    assert "attention" in capsys.readouterr().out
    assert main(["patterns", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["patterns"]
    assert {"name", "version", "priority", "kinds", "anchors", "origin", "disabled"} == set(rows[0])
    assert all(row["origin"] == "built-in" for row in rows)
