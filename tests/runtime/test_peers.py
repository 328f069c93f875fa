"""Between two workers, on their one lane: a push that a call waits for overtakes state that moves."""
from __future__ import annotations

import select
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.wire import pack, unpack
from genie_dynamo.runtime.lanes.ends import NativeEnd
from genie_dynamo.runtime.lanes.zmq_frames import cut
from genie_dynamo.runtime.worker.events import Deliver
from genie_dynamo.runtime.worker.peers import Peer, Peers, _Way
from genie_dynamo.runtime.worker.shell import Shell
from tests.runtime.lanes.ends import native

THERE = Peer("tcp://127.0.0.1:9", "", ())


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_a_push_overtakes_state_that_moves(kind: str) -> None:
    module = native()
    listener = module.listen(kind, "@genie-test-peers" if kind == "shm" else "127.0.0.1:0")
    with ThreadPoolExecutor(1) as beside:                # who connects waits until it is accepted
        connecting = beside.submit(module.connect, kind, listener.address, 5.0)
        theirs: Any = None
        while theirs is None and not connecting.done():
            theirs = listener.accept()
        mine = connecting.result()
    poller = select.epoll()
    peers = Peers(lambda address, key: pytest.fail("nothing takes ZeroMQ"), poller, lambda: None)
    peers._ways[THERE.address] = _Way()
    peers._proven.append((THERE, NativeEnd(mine, 1.0, 0.0, digest=False)))
    answers: list[m.Message] = []
    shell = Shell.__new__(Shell)
    shell._peers = peers
    shell._reply = lambda connection, message, frames: answers.append(message)     # type: ignore[method-assign]
    state, value = torch.randn(20 << 18), (m.INLINE, (0, (1,), (1,), b"1234"))
    letters = [(m.Piece(b"s" * 16, 7, 1, wire, None, offset), (frame,)) for wire, frame, offset in cut(state)]
    try:
        shell._deliver(Deliver(THERE.address, "", letters, b"c", 5))
        run = SimpleNamespace(program=SimpleNamespace(sends=((3, THERE.address, "", ()),)),
                              session=SimpleNamespace(token=b"s" * 16, pushed_bytes=0),
                              message=SimpleNamespace(call_id=9), loaded=SimpleNamespace(return_index={}))
        shell._engine = SimpleNamespace(stage=lambda value, frames: value)         # type: ignore[assignment]
        shell._emit(run, 3, value)                                                 # type: ignore[arg-type]
        came = [m.from_wire(unpack(theirs.receive(10.0)[0])) for _ in range(21)]
    finally:
        peers.close()
        poller.close()
        listener.close()
    assert isinstance(answers[0], m.Done)
    at = next(i for i, message in enumerate(came) if isinstance(message, m.Push))
    assert at <= 4, "of 20 pieces, those that had left before"
    assert [message.offset for message in came if isinstance(message, m.Piece)] == [i << 20 for i in range(20)]
    assert len(pack(m.to_wire(came[at]))) < 100
