"""How contents travel to a worker: small ones together, large ones in pieces, and calls of others in between."""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from genie_dynamo.core import messages as m
from genie_dynamo.runtime.client.connection import Connection
from genie_dynamo.runtime.client.uploads import MAX_TOGETHER, Content, parcels, payload_bytes
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames
from tests.runtime.lanes.ends import native
from tests.runtime.lanes.test_negotiation import tcp_worker  # noqa: F401 - a fixture

MIB = 1 << 20
LANES = ["shm", "tcp", "zmq"]


def contents(*sizes: int) -> list[Content]:
    return [Content(i, 1, torch.zeros(size, dtype=torch.uint8), None) for i, size in enumerate(sizes)]


def test_small_contents_share_a_message_and_large_ones_come_in_pieces() -> None:
    sizes = [400] * 70 + [40_000] * 10 + [5 * MIB // 2] + [700_000, 700_000, 8] + [MIB, MIB + 1]
    made = list(parcels(ZmqFrames(), contents(*sizes)))
    puts = [p for p in made if isinstance(p.message, m.Put)]
    pieces = [p for p in made if isinstance(p.message, m.Piece)]
    assert [len(p.message.contents) for p in puts] == [81, 3]
    assert [(p.message.tensor_id, p.message.offset // MIB, p.payload_bytes) for p in pieces] == [
        (80, 0, MIB), (80, 1, MIB), (80, 2, MIB // 2), (85, 0, MIB), (85, 1, 1)]
    assert sum(p.payload_bytes for p in made) == sum(sizes)
    for parcel in puts:
        wires = [wire for _, _, wire, _ in parcel.message.contents]
        assert parcel.payload_bytes == sum(payload_bytes(wire, parcel.frames) for wire in wires)
        assert parcel.inline_bytes == parcel.payload_bytes - sum(map(len, parcel.frames))


def test_a_message_has_as_many_contents_as_have_frames() -> None:
    made = list(parcels(ZmqFrames(), contents(*[1] * (MAX_TOGETHER + 1))))
    assert [len(p.message.contents) for p in made] == [MAX_TOGETHER, 1]


class Sent:
    """The messages that this process sends, and what is to happen beside one of them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.messages: list[m.Message] = []
        self.before: Callable[[m.Message], None] = lambda message: None
        send = Connection.send

        def recorded(connection: Connection, message: m.Message, frames: Any = ()) -> int:
            self.before(message)
            self.messages.append(message)
            return send(connection, message, frames)

        monkeypatch.setattr(Connection, "send", recorded)

    def of(self, kind: type[Any]) -> list[Any]:
        return [message for message in self.messages if type(message) is kind]


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> Sent:
    return Sent(monkeypatch)


def test_150_small_parameters_travel_in_one_message(sent: Sent, own_session: Any, fresh_dynamo: None) -> None:
    own_session(workers=1)
    net = nn.Sequential(*[nn.Linear(12, 12) for _ in range(75)])
    x = torch.randn(2, 12)
    with torch.no_grad():
        assert torch.equal(torch.compile(net, backend="genie")(x), net(x))
        assert [len(put.contents) for put in sent.of(m.Put)] == [150]
        sent.messages.clear()
        for parameter in net.parameters():
            parameter.mul_(1.5)
        assert torch.equal(torch.compile(net, backend="genie")(x), net(x))
    assert [len(put.contents) for put in sent.of(m.Put)] == [150], "changed ones, beside the run"
    assert genie.get_stats()["by_reason"]["weights"]["sent"] == 2 * 75 * (144 + 12) * 4


@pytest.mark.parametrize("lane", LANES)
def test_a_call_is_answered_in_the_middle_of_an_upload(lane: str, sent: Sent, tcp_worker: str,  # noqa: F811
                                                       own_session: Any, fresh_dynamo: None) -> None:
    native()
    own_session(workers=[tcp_worker], require_lane=lane, strict=True)
    small, x = nn.Linear(8, 8), torch.randn(2, 8)
    large, y = nn.Linear(2048, 2048, bias=False), torch.randn(1, 2048)
    step = torch.compile(small, backend="genie")
    answered: list[int] = []
    asked, done = threading.Semaphore(0), threading.Semaphore(0)

    def steps() -> None:
        with torch.no_grad():
            while asked.acquire() and not over.is_set():
                answered.append(int(torch.equal(step(x), small(x))))
                done.release()

    def beside(message: m.Message) -> None:
        if isinstance(message, m.Piece) and message.offset // MIB in (1, 9, 15):
            asked.release()
            assert done.acquire(timeout=60.0), "a step has waited for the upload"

    over = threading.Event()
    with torch.no_grad():
        step(x)                                    # its program and parameters are there
        thread = threading.Thread(target=steps, daemon=True)
        thread.start()
        sent.before = beside
        assert torch.equal(torch.compile(large, backend="genie")(y), large(y))
    over.set()
    asked.release()
    thread.join(10.0)
    assert answered == [1, 1, 1]
    assert [piece.offset for piece in sent.of(m.Piece)] == [i * MIB for i in range(16)]
