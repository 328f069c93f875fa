"""A worker stays awake for the next message of a client whose messages come fast, and only then."""
from __future__ import annotations

import select
import time
from typing import Any

import pytest

from genie_dynamo.runtime.worker import lanes
from genie_dynamo.runtime.worker.lanes import Lanes, Offer
from tests.runtime.lanes.ends import native


class Listener:
    """Hands out channels, each once."""

    address = "inproc"

    def __init__(self, channels: list[Any]) -> None:
        self._channels = channels
        self._fd = select.epoll()

    def accept(self) -> Any:
        return self._channels.pop() if self._channels else None

    def fileno(self) -> int:
        return self._fd.fileno()

    def close(self) -> None:
        self._fd.close()


class Worker:
    """The lanes of a worker that echoes, with two clients."""

    def __init__(self) -> None:
        self.client, end = native().inproc()
        self.other, its_end = native().inproc()
        listener = Listener([its_end, end])
        self._poller = select.epoll()
        self.came: list[bytes] = []
        self.lanes = Lanes([Offer("inproc", 1, "", listener)], self._poller, self._echo, lambda name: None)
        self.lanes.serve(listener.fileno())
        self.lanes.serve(listener.fileno())

    def _echo(self, name: bytes, header: bytes, frames: Any) -> None:
        self.came.append(header)
        self.lanes.send(name, header, ())

    def serve(self) -> None:
        """What has come already."""
        while self.lanes.has_more or (events := self._poller.poll(0)):
            if self.lanes.has_more:
                self.lanes.serve_more()
            else:
                for fd, _ in events:
                    self.lanes.serve(fd)

    def ask(self, text: bytes, client: Any = None) -> None:
        client = client or self.client
        client.send([text])
        self.serve()
        assert client.receive(1.0)[0] == text


@pytest.fixture
def worker(monkeypatch: pytest.MonkeyPatch) -> Worker:
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda pid: {0, 1})
    return Worker()


def lingered_s(worker: Worker) -> float:
    before_s = time.perf_counter()
    worker.lanes.linger()
    return time.perf_counter() - before_s


def test_a_message_that_comes_soon_after_an_answer_makes_the_worker_wait_awake_for_the_next(worker: Worker,
        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LINGER_S", 0.2)
    worker.ask(b"1")
    worker.ask(b"2")
    worker.client.send([b"3"])
    worker.lanes.linger()
    assert worker.came == [b"1", b"2", b"3"]


def test_it_gives_up_after_a_moment_and_does_not_begin_again_by_itself(worker: Worker,
                                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LINGER_S", 0.05)
    worker.ask(b"1")
    worker.ask(b"2")
    assert lingered_s(worker) >= 0.05
    assert lingered_s(worker) < 0.05


def test_slow_messages_are_not_waited_for(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LINGER_S", 0.05)
    worker.ask(b"1")
    time.sleep(0.06)
    worker.ask(b"2")
    assert lingered_s(worker) < 0.05


def test_clients_that_call_in_turns_do_not_wait_for_each_other(worker: Worker,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LINGER_S", 0.05)
    for text in (b"1", b"2"):
        worker.ask(text)
        worker.ask(text, worker.other)
        assert lingered_s(worker) < 0.05


def test_a_client_that_has_left_is_not_waited_for(worker: Worker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "LINGER_S", 5.0)
    worker.ask(b"1")
    worker.ask(b"2")
    worker.client.close()
    assert lingered_s(worker) < 1.0


def test_with_one_core_nobody_waits_awake(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes.os, "sched_getaffinity", lambda pid: {0})
    monkeypatch.setattr(lanes, "LINGER_S", 0.05)
    worker = Worker()
    worker.ask(b"1")
    worker.ask(b"2")
    assert lingered_s(worker) < 0.05


def test_what_comes_while_house_is_kept_is_served(worker: Worker) -> None:
    worker.ask(b"1")
    worker.client.send([b"2"])
    worker.lanes.tidy()
    worker.serve()
    assert worker.came == [b"1", b"2"]
