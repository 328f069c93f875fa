"""How many lanes a worker keeps open (runtime/worker/lanes.py), without a worker around them."""
from __future__ import annotations

import os
import resource
import select
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from genie_dynamo.runtime.worker import lanes as worker_lanes
from genie_dynamo.runtime.worker.lanes import Lanes, Offer
from tests.runtime.lanes.ends import native


@pytest.fixture
def came() -> list[bytes]:
    return []


@pytest.fixture
def lanes(came: list[bytes], monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Lanes, str]]:
    monkeypatch.setattr(worker_lanes, "max_lanes", lambda: 2)
    listener = native().listen("shm", f"@genie-worker-lanes-{os.getpid()}-{time.monotonic_ns()}")

    def on_message(name: bytes, header: bytes, frames: Sequence[Any]) -> None:
        came.append(header)
        served.send(name, b"answer", frames)

    served = Lanes([Offer("shm", 1, listener.address, listener)], select.epoll(), on_message, lambda name: None)
    yield served, listener.address
    served.close()


def serve(lanes: Lanes, seconds: float = 0.3) -> None:
    until_s = time.monotonic() + seconds
    while time.monotonic() < until_s:
        for fd, _ in lanes._poller.poll(0.0 if lanes.has_more else 0.01):
            lanes.serve(fd)
        lanes.serve_more()


def connect(lanes: Lanes, address: str) -> Any:
    opened: list[Any] = []
    thread = threading.Thread(target=lambda: opened.append(native().connect("shm", address, 5.0)))
    thread.start()
    while thread.is_alive():
        serve(lanes, 0.02)
    return opened[0]


def test_a_worker_has_only_so_many_lanes_and_the_others_go_on(lanes: tuple[Lanes, str], came: list[bytes],
                                                              caplog: pytest.LogCaptureFixture) -> None:
    served, address = lanes
    kept = [connect(served, address) for _ in range(2)]
    refused = connect(served, address)
    serve(served, 0.05)
    with pytest.raises(OSError, match="PEER_LOST"):
        refused.receive(5.0)
    assert "2 are open" in caplog.text
    for channel in kept:
        channel.send([b"still here"])
    serve(served, 0.1)
    assert came == [b"still here"] * 2
    kept[0].close()
    serve(served, 0.1)
    assert connect(served, address).close() is None           # one has gone, one may come


def test_the_bound_follows_the_descriptors_that_a_process_may_have(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, expected in ((1024, 64), (10, 1), (10**6, worker_lanes.MAX_LANES),
                            (resource.RLIM_INFINITY, worker_lanes.MAX_LANES)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert worker_lanes.max_lanes() == expected
