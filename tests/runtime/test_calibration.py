"""What a worker measures of itself and of its ways to others; that it is short, kept, and in nobody's way."""
from __future__ import annotations

import json
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.runtime import calibration
from genie_dynamo.runtime.lanes import native

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "genie-dynamo"


@pytest.fixture(scope="module")
def facts() -> HardwareFacts:
    steps, spent_s = calibration.measure(CPU, 1), []
    try:
        while True:
            started_s = time.thread_time()
            next(steps)
            spent_s.append(time.thread_time() - started_s)
    except StopIteration as stop:
        measured: HardwareFacts = stop.value
    # CPU time of this thread, so that a busy machine does not fail the test.
    assert sum(spent_s) < 1.0 and max(spent_s) < 0.25 and len(spent_s) > 10
    return measured


def test_numbers_are_plausible(facts: HardwareFacts) -> None:
    """Orders of magnitude of any computer of this century."""
    assert facts.kind == "cpu" and facts.num_threads == 1 and "measured in" in facts.source
    assert 1e9 < facts.matmul_rate("float32") < 1e13
    assert facts.matmul_rate("float32") > facts.elementwise_rate("float32") > 1e8
    assert all(1e8 < rate < 1e12 for _, rate in facts.memory_bytes_per_s)
    assert 1e-8 < facts.op_overhead_s < 1e-3


def test_facts_are_kept_for_this_machine_and_number_of_threads(facts: HardwareFacts, directory: Path) -> None:
    assert calibration.cached(CPU, 1) is None
    calibration.remember(CPU, 1, facts)
    assert calibration.cached(CPU, 1) == facts
    assert calibration.cached(CPU, 2) is None


@pytest.mark.parametrize("content", [
    b"", b"\xff\xfe", b"[" * 50_000, b'{"name": "__import__(\'os\')"}', b"9" * 6000, b"x" * 100_000,
])
def test_a_hostile_cache_file_is_measured_again(content: bytes, facts: HardwareFacts, directory: Path) -> None:
    calibration.remember(CPU, 1, facts)
    (path,) = directory.iterdir()
    path.write_bytes(content)
    assert calibration.cached(CPU, 1) is None
    path.write_text(json.dumps(facts.to_json() | {"op_overhead_s": 1e400}))
    assert calibration.cached(CPU, 1) is None


def test_a_session_measures_its_workers_and_lanes(directory: Path, own_session: Any) -> None:
    session = own_session(workers=2, num_threads=1)
    first = session.hardware()
    assert set(first) == {"w0", "w1"} and len(list(directory.iterdir())) == 1
    assert first["w0"] == first["w1"] and session.hardware() == first      # the second reads what the first has kept
    lanes = session.lanes()
    assert [(lane.start, lane.end) for lane in lanes] == [("client", "w0"), ("client", "w1"), ("w0", "w1")]
    assert all(1e-6 < lane.latency_s < 1 and 1e6 < lane.bytes_per_s < 1e12 for lane in lanes)
    # What is timed between two workers is the lane that they push over, not the one that opens first.
    best = "shm" if native.module() is not None else "zmq"
    assert lanes[-1].source.endswith(f"bytes over {best}"), lanes[-1].source


def test_a_call_does_not_wait_for_a_calibration(directory: Path, own_session: Any) -> None:
    """The request is under way when the call comes; the call's answer comes first."""
    import genie_dynamo as genie
    from genie_dynamo.core import messages as m

    session = own_session(workers=1, num_threads=1)
    double = genie.compile(lambda x: x * 2)
    with torch.no_grad():
        double(torch.ones(3))
        (link,) = session.links
        with link.connection() as connection:
            request = connection.next_request()
            connection.request(m.Calibrate(request, True))
            assert double(torch.ones(3)).tolist() == [2, 2, 2]
            assert not connection.socket.poll(0)
            answer, _, _ = connection.receive(time.monotonic() + 60)
    assert isinstance(answer, m.Done) and HardwareFacts.from_json(answer.info).num_threads == 1


def test_memory_is_what_this_process_may_take_also_where_facts_were_kept(
        facts: HardwareFacts, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration.remember(CPU, 1, facts)
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (1 << 28, 1 << 28))
    known = calibration.cached(CPU, 1)
    assert known is not None and known.memory_bytes == 1 << 28
