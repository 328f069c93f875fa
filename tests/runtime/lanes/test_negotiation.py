"""How a session chooses its lane, says it, requires it, and leaves a broken one without losing a call."""
from __future__ import annotations

import json
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo import sessions
from genie_dynamo.core.errors import LaneUnavailableError
from genie_dynamo.runtime.client import negotiation
from genie_dynamo.runtime.lanes import survey
from tests.runtime.lanes.ends import native


@pytest.fixture(autouse=True)
def closed_afterwards(fresh_dynamo: None) -> Iterator[None]:
    native()
    yield
    genie.shutdown()
    sessions._config = None


@pytest.fixture
def tcp_worker() -> Iterator[str]:
    """A worker of its own at a port of this machine."""
    process = subprocess.Popen([sys.executable, "-m", "genie_dynamo.cli", "worker", "--bind", "tcp://127.0.0.1:*",
                                "--threads", "1"], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    found = re.search(r" at (\S+) on cpu", process.stdout.readline())
    assert found is not None
    yield found[1]
    process.kill()
    process.communicate()


def double(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def compiled() -> Any:
    return torch.compile(double, backend="genie", options={"strict": True})


def lane(worker: str = "w0") -> dict[str, Any]:
    row: dict[str, Any] = genie.get_stats()["workers"][worker]["lane"]
    return row


X = torch.arange(100_000, dtype=torch.float32)


def test_pages_are_shared_with_a_worker_of_this_machine_and_that_is_said() -> None:
    genie.init(workers=1, num_threads=1)
    assert torch.equal(compiled()(X), double(X))
    found = lane()
    assert found["name"] == "shm"
    assert found["gb_per_s"] > 0.1
    assert found["reason"]


UNCOUNTED_BYTES = 4000
"""Of messages that belong to no call: questions for statistics, and their answers."""


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_counters_agree_with_the_lanes_own(tcp_worker: str, name: str) -> None:
    genie.init(workers=[tcp_worker], require_lane=name)
    net, table = torch.nn.Linear(700, 700), torch.nn.Embedding(1000, 700)       # pieces, and small ones together

    def forward(ids: torch.Tensor) -> torch.Tensor:
        return net(table(ids)).square().mean()

    run, backward = compiled(), torch.compile(forward, backend="genie", options={"strict": True})
    run(X)
    genie.reset_stats()
    before = lane()
    for shift in range(3):
        run(X + shift)                # new content: what a worker has already stays there
    for step in range(2):
        backward(torch.arange(50) + step).backward()
        with torch.no_grad():
            net.weight.add_(0.01)
    stats = genie.get_stats()
    after = stats["workers"]["w0"]["lane"]
    moved = stats["by_reason"]
    assert moved["inputs"]["sent"] >= 3 * X.nbytes
    assert moved["weights"]["sent"] == 4 * (2 * 700 * 700 + 700 + 1000 * 700)
    assert moved["gradients"]["received"] == 2 * 4 * (700 * 700 + 700 + 1000 * 700)
    for counted, logical in (("bytes_sent", "sent"), ("bytes_arrived", "received")):
        total = sum(row[logical] for row in moved.values())
        assert total == stats[f"bytes_{logical}"]
        assert total <= after[counted] - before[counted] < total + UNCOUNTED_BYTES, logical
    # Pages that both sides see: all but what is smaller than the message that would name them.
    shared = after["bytes_shared"] - before["bytes_shared"]
    assert 0.98 * stats["bytes_sent"] <= shared <= stats["bytes_sent"] if name == "shm" else shared == 0


@pytest.mark.parametrize("name", ["zmq", "stream", "shm"])
def test_a_required_lane_is_the_one_that_is_taken(name: str) -> None:
    genie.init(workers=1, num_threads=1, require_lane=name)
    assert torch.equal(compiled()(X), double(X))
    assert lane()["name"] == name


def test_a_required_lane_that_is_not_offered_is_an_error_and_starts_nothing() -> None:
    with pytest.raises(LaneUnavailableError, match=r"tcp.*does not offer it"):
        genie.init(workers=1, num_threads=1, require_lane="tcp")


def test_a_compiled_model_may_require_what_its_session_has_not() -> None:
    genie.init(workers=1, num_threads=1, require_lane="stream")
    run = torch.compile(double, backend="genie", options={"strict": True, "require_lane": "shm"})
    with pytest.raises(LaneUnavailableError, match="require_lane='shm', and payload to worker w0 takes stream"):
        run(X)


@pytest.mark.parametrize("name", ["shm", "tcp"])
def test_a_worker_at_a_port_offers_both(tcp_worker: str, name: str) -> None:
    genie.init(workers=[tcp_worker], require_lane=name)
    assert torch.equal(compiled()(X), double(X))
    assert lane()["name"] == name


def break_lane(session: Any) -> None:
    for connection in session.links[0]._idle:
        connection.end.channel.close()


@pytest.mark.parametrize("during", [False, True])
def test_a_broken_lane_is_left_for_the_next_best_and_the_call_succeeds(tcp_worker: str, during: bool) -> None:
    session = genie.init(workers=[tcp_worker])
    slow = torch.compile(lambda x: [x := torch.sin(x) @ x for _ in range(30)][-1], backend="genie",
                         options={"strict": True})
    m = torch.eye(600) * 0.5
    expected = slow(m)
    assert lane()["name"] == "shm"
    channels = [connection.end.channel for connection in session.links[0]._idle]     # one or two, and any may be next
    if during:
        threading.Timer(0.05, lambda: [channel.close() for channel in channels]).start()
        for _ in range(20):
            assert torch.allclose(slow(m), expected)
            if session.links[0].lane.name != "shm":
                break
    else:
        for channel in channels:
            channel.close()
        assert torch.allclose(slow(m), expected)
    found = genie.get_stats()
    assert found["events"]["call repeated after a lane broke"] == 1
    assert found["workers"]["w0"]["lane"]["name"] == "tcp"
    assert "it broke" in found["workers"]["w0"]["lane"]["refused"]["shm"]


def test_a_required_lane_that_breaks_is_an_error_not_a_slower_call() -> None:
    session = genie.init(workers=1, num_threads=1, require_lane="shm")
    run = compiled()
    run(X)
    break_lane(session)
    with pytest.raises(LaneUnavailableError, match="shm"):
        run(X)


def test_a_lane_that_gives_back_other_bytes_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    real = negotiation._echo
    monkeypatch.setattr(negotiation, "_echo", lambda *args: real(*args).bitwise_not())
    genie.init(workers=1, num_threads=1)
    assert torch.equal(compiled()(X), double(X))
    assert lane()["name"] == "stream"
    assert "not proven" in lane()["refused"]["shm"]


def test_another_version_of_a_lane_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negotiation.native, "lane_version", lambda: 99)
    genie.init(workers=1, num_threads=1)
    assert torch.equal(compiled()(X), double(X))
    assert "version" in lane()["refused"]["shm"]


def test_without_the_extension_everything_works_and_the_reason_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(negotiation.native, "_module", None)
    monkeypatch.setattr(negotiation.native, "_why_not", "not built")
    genie.init(workers=1, num_threads=1)
    assert torch.equal(compiled()(X), double(X))
    assert lane()["name"] == "stream"
    assert lane()["refused"]["native lanes"] == "not built"


def test_returned_tensors_are_the_callers_and_outlive_the_session() -> None:
    genie.init(workers=1, num_threads=1)
    run = compiled()
    big = torch.arange(1_000_000, dtype=torch.float32)
    first = run(big)
    first.zero_()
    second = run(big)
    assert torch.equal(second, double(big))
    assert not first.any()
    genie.shutdown()
    assert torch.equal(second.add_(1), double(big) + 1)


def test_a_graph_that_writes_to_its_input_does_not_write_to_the_callers_pages() -> None:
    genie.init(workers=1, num_threads=1)

    def step(x: torch.Tensor) -> torch.Tensor:
        x.mul_(3)
        return x.sum()

    x = torch.ones(200_000)
    total = torch.compile(step, backend="genie", options={"strict": True})(x)
    assert total == 600_000
    assert torch.equal(x, torch.full((200_000,), 3.0))


def peer_lane() -> dict[str, Any]:
    """The one lane between two workers that pushes have taken."""
    lanes = [row for worker in genie.get_stats()["workers"].values() for row in worker["peer_lanes"].values()]
    (row,) = lanes
    return dict(row)


def test_pushes_between_workers_take_a_lane_and_have_a_column() -> None:
    from tests.runtime.test_two_workers import cut, halves

    genie.init(workers=2, num_threads=1, strict=True)
    net = torch.nn.Sequential(*[torch.nn.Linear(300, 300) for _ in range(4)]).eval()
    run = torch.compile(net, backend=cut(halves))
    x = torch.randn(500, 300)
    with torch.no_grad():
        expected = net(x)
        for _ in range(3):
            run(x)
        genie.reset_stats()
        before = peer_lane()
        for _ in range(5):
            torch.testing.assert_close(run(x), expected, rtol=1e-5, atol=1e-5)
    moved, after = genie.get_stats()["by_reason"], peer_lane()
    assert after["name"] == "shm"
    assert 0 <= after["bytes_sent"] - before["bytes_sent"] - moved["activations"]["worker_to_worker"] < 5 * 200
    assert after["bytes_shared"] - before["bytes_shared"] == moved["activations"]["worker_to_worker"]
    assert moved["activations"]["worker_to_worker"] == moved["activations"]["total"] == 5 * 500 * 300 * 4
    assert moved["inputs"]["worker_to_worker"] == 0


def test_the_survey_says_why_not_and_json_has_the_documented_fields(capsys: pytest.CaptureFixture[str]) -> None:
    from genie_dynamo.cli.main import main

    assert main(["lanes", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["lanes"]
    assert [row["name"] for row in rows] == ["shm", "tcp", "dpdk", "cuda_staging", "gpudirect"]
    for row in rows:
        assert set(row) == {"name", "usable", "reason", "gb_per_s", "hardware_verified"}
        assert row["reason"]
    by_name = {row["name"]: row for row in rows}
    for name in ("shm", "tcp"):
        assert by_name[name]["usable"]
        assert by_name[name]["gb_per_s"] > 0.05
    for name in ("cuda_staging", "gpudirect"):
        assert not by_name[name]["hardware_verified"]
        assert "not verified on hardware" in by_name[name]["reason"]


def test_the_survey_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(survey.native, "_module", None)
    monkeypatch.setattr(survey.native, "_why_not", "not built")
    assert [(row.usable, "not built" in row.reason) for row in survey.survey()] == [(False, True)] * 5


def test_who_waits_polls_only_where_that_was_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    # Not by the processor time that is spent: who polls gives way, and on a busy machine has next to none.
    for busy_poll_s in (0.0, 0.05):
        genie.init(workers=1, busy_poll_s=busy_poll_s)
        run = compiled()
        assert torch.equal(run(X), double(X))
        (link,) = sessions.session().links
        with link.connection() as connection:
            asked: list[tuple[float, float]] = []
            with monkeypatch.context() as patch:
                patch.setattr(connection.end, "channel", Silent(asked))
                with pytest.raises(BlockingIOError):
                    connection.end.read()
        assert [spin_s for _, spin_s in asked] == [busy_poll_s]


class Silent:
    """A channel to which nothing comes."""

    def __init__(self, asked: list[tuple[float, float]]) -> None:
        self._asked = asked

    def receive(self, timeout_s: float, spin_s: float) -> None:
        self._asked.append((timeout_s, spin_s))
