"""What every lane between two processes promises, also when the other side is stopped or killed."""
from __future__ import annotations

import gc
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from genie_dynamo.runtime.lanes.ends import BULK, URGENT, NativeEnd
from genie_dynamo.runtime.lanes.native import to_own_tensor, to_tensor
from genie_dynamo.runtime.lanes.transfer import Transfer, TransferError
from tests.runtime.lanes.ends import KINDS, PORTS, Peer, mapped_segments, native, open_files, why_not


@pytest.fixture(params=[*KINDS, *PORTS])
def kind(request: pytest.FixtureRequest) -> str:
    native()
    if why := why_not(request.param):
        pytest.skip(why)
    return str(request.param)


# What a deaf receiver has not looked at has not arrived; a dpdk lane's own thread lands it all the same. And a port has
# no memory of its own.
not_over_ports = pytest.mark.parametrize("kind", KINDS, indirect=True)


@pytest.fixture
def peer(kind: str, request: pytest.FixtureRequest) -> Iterator[Peer]:
    mode = getattr(request, "param", "echo")
    other = Peer(kind, mode)
    yield other
    other.close()


def payload(size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("digest", [False, True])
def test_bytes_come_back_as_they_went(peer: Peer, digest: bool) -> None:
    for size in (1, 1000, 16_384, 16_385, 70_000, 5_000_001):
        sent = [payload(size, 1), payload(3, 2), payload(size, 3)]
        peer.channel.send([b"head", *[x.numpy() for x in sent]], digest=digest)
        header, frames = peer.channel.receive(10.0)
        assert header == b"head"
        assert all(torch.equal(to_tensor(a), b) for a, b in zip(frames, sent, strict=True))


def test_what_arrived_outlives_the_lane_and_the_peer(peer: Peer) -> None:
    sent = payload(2_000_000)
    peer.channel.send([b"", sent.numpy()])
    _, frames = peer.channel.receive(10.0)
    tensor = to_own_tensor(frames[0])
    del frames
    peer.signal(signal.SIGKILL)
    peer.channel.close()
    assert torch.equal(tensor, sent)
    tensor.add_(1)           # and it is the receiver's to change
    assert torch.equal(tensor, sent + 1)


def test_the_senders_later_edits_do_not_reach_the_receiver(peer: Peer) -> None:
    sent = payload(300_000)
    before = sent.clone()
    transfer = peer.channel.send([b"", sent.numpy()], watch=True)
    assert _ended(peer, transfer) == "OK"
    sent.zero_()
    _, frames = peer.channel.receive(10.0)
    assert torch.equal(to_tensor(frames[0]), before)


def _ended(peer: Peer, transfer: int, timeout_s: float = 10.0) -> str:
    return str(peer.channel.wait_ended(transfer, timeout_s))


@pytest.mark.parametrize("peer", ["hold"], indirect=True)
def test_a_killed_peer_ends_everything_and_leaves_nothing_behind(kind: str, peer: Peer) -> None:
    peer.channel.close()
    gc.collect()
    files, segments = open_files(), mapped_segments()
    for _ in range(3):
        other = Peer(kind, "hold")
        for _ in range(4):                                   # slabs that the peer holds
            other.channel.send([b"", payload(200_000).numpy()])
            assert other.channel.receive(10.0) is not None
        other.signal(signal.SIGKILL)
        with pytest.raises(OSError, match="PEER_LOST"):
            other.channel.receive(10.0)
        assert other.channel.close_end == "PEER_LOST"
        with pytest.raises(OSError, match="PEER_LOST"):
            other.channel.send([b"too late"])
        other.close()
        del other
    gc.collect()
    assert open_files() == files
    assert mapped_segments() <= segments


@not_over_ports
@pytest.mark.parametrize("peer", ["deaf"], indirect=True)
@pytest.mark.parametrize("size", [100, 3_000_000])
def test_open_transfers_end_when_the_peer_is_killed(peer: Peer, size: int) -> None:
    transfers = [peer.channel.send([payload(size).numpy()], watch=True) for _ in range(3)]
    threading.Timer(0.2, peer.signal, (signal.SIGKILL,)).start()
    assert [_ended(peer, transfer) for transfer in transfers] == ["PEER_LOST"] * 3


def test_a_stopped_peer_is_a_timeout_and_the_lane_goes_on_afterwards(kind: str, peer: Peer) -> None:
    peer.signal(signal.SIGSTOP)
    time.sleep(0.05)
    late = peer.channel.send([b"late"], deadline_s=0.2, watch=True)
    assert _ended(peer, late) == "TIMEOUT"
    assert peer.channel.receive(0.05) is None
    peer.signal(signal.SIGCONT)
    # What the peer could see before the deadline it may still answer; the lane itself is as it was.
    answers = []
    peer.channel.send([b"next"])
    while b"next" not in answers:
        came = peer.channel.receive(10.0)
        assert came is not None
        answers.append(came[0])
    assert set(answers) <= {b"late", b"next"}


@not_over_ports
@pytest.mark.parametrize("peer", ["deaf"], indirect=True)
def test_cancel_and_close_are_told_apart(peer: Peer) -> None:
    first = peer.channel.send([b"a"], watch=True)
    second = peer.channel.send([b"b"], watch=True)
    assert peer.channel.cancel(second)
    assert _ended(peer, second) == "CANCELLED"
    peer.channel.close()
    assert _ended(peer, first) == "CANCELLED"
    assert peer.channel.close_end == "CANCELLED"


def test_a_transfer_is_a_future(peer: Peer) -> None:
    end = NativeEnd(peer.channel, 1.0, 0.0, digest=False)
    learnt: queue.Queue[str] = queue.Queue()
    transfer = end.post([b"head", payload(100_000).numpy()])
    assert transfer is not None
    transfer.add_done_callback(lambda t: learnt.put(t.end))
    assert transfer.result(10.0) == 100_004
    assert transfer.done() and transfer.progress() == 1.0
    assert learnt.get(timeout=10.0) == "OK"
    transfer.add_done_callback(lambda t: learnt.put("again"))
    assert learnt.get_nowait() == "again"
    assert not transfer.cancel()


def test_a_callback_comes_though_nobody_asks(peer: Peer, caplog: pytest.LogCaptureFixture) -> None:
    end = NativeEnd(peer.channel, 1.0, 0.0, digest=False)
    learnt: queue.Queue[tuple[str, int]] = queue.Queue()

    def chained(first: Transfer) -> None:
        learnt.put((first.end, first.size_bytes))
        second = end.post([b"second"])
        assert second is not None
        second.add_done_callback(lambda t: learnt.put((t.end, t.size_bytes)))
        raise RuntimeError("the callback's own bug")

    transfer = end.post([b"head", payload(100_000).numpy()])
    assert transfer is not None
    transfer.add_done_callback(chained)
    assert learnt.get(timeout=10.0) == ("OK", 100_004)
    assert learnt.get(timeout=10.0) == ("OK", 6), "of one that a callback has posted"
    assert "the callback's own bug" in caplog.text


@not_over_ports
@pytest.mark.parametrize("peer", ["deaf"], indirect=True)
def test_callbacks_of_what_ends_badly_come_out_of_order(peer: Peer) -> None:
    end = NativeEnd(peer.channel, 1.0, 0.0, digest=False)
    learnt: queue.Queue[tuple[str, str]] = queue.Queue()
    for name, deadline_s in (("open", 60.0), ("late", 0.1)):
        transfer = end.post([b"x"], BULK, deadline_s)
        assert transfer is not None
        transfer.add_done_callback(lambda t, name=name: learnt.put((name, t.end)))
    del transfer
    assert learnt.get(timeout=10.0) == ("late", "TIMEOUT")
    peer.signal(signal.SIGKILL)
    assert learnt.get(timeout=10.0) == ("open", "PEER_LOST")


@not_over_ports
@pytest.mark.parametrize("peer", ["deaf"], indirect=True)
def test_progress_is_what_has_left(kind: str, peer: Peer) -> None:
    end = NativeEnd(peer.channel, 1.0, 0.0, digest=False)
    transfer = end.post([payload(64 << 20).numpy()])
    assert transfer is not None
    seen = transfer.progress()
    if kind == "tcp":
        assert 0.0 < seen < 1.0, "the peer's kernel takes some of it"
    else:
        assert seen in (0.0, 1.0), "pages are named at once, or nothing is"
    waiting = end.post([b"behind it"])
    assert waiting is not None
    assert kind != "tcp" or waiting.progress() == 0.0
    assert transfer.cancel()
    assert transfer.done() and transfer.progress() == 0.0


def test_threads_that_wait_for_one_future_all_learn_its_end(peer: Peer) -> None:
    end = NativeEnd(peer.channel, 1.0, 0.0, digest=False)
    for _ in range(20):
        transfer = end.post([b"head", payload(1000).numpy()])
        assert transfer is not None
        learnt: list[int] = []
        called: queue.Queue[str] = queue.Queue()
        transfer.add_done_callback(lambda t, called=called: called.put(t.end))
        threads = [threading.Thread(target=lambda t=transfer, learnt=learnt: learnt.append(t.result(10.0)))
                   for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert learnt == [1004] * 3
        assert called.get(timeout=10.0) == "OK"
        assert called.empty()


def test_a_message_of_more_buffers_than_a_lane_names_arrives(peer: Peer) -> None:
    sent = [payload(i % 50, i) for i in range(6000)]
    peer.channel.send([b"head", *[x.numpy() for x in sent]])
    header, frames = peer.channel.receive(10.0)
    assert header == b"head"
    assert all(torch.equal(to_tensor(a), b) for a, b in zip(frames, sent, strict=True))


def test_a_forked_child_leaves_the_lane_to_its_parent(peer: Peer) -> None:
    child = os.fork()
    if child == 0:
        try:
            peer.channel.send([b"from the child"])
            os._exit(1)
        except OSError as error:
            peer.channel.close()
            os._exit(0 if "forked" in str(error) else 2)
    assert os.waitpid(child, 0)[1] == 0
    peer.channel.send([b"from the parent"])
    assert peer.channel.receive(10.0) == (b"from the parent", [])


@not_over_ports
@pytest.mark.parametrize("peer", ["deaf"], indirect=True)
def test_a_future_says_how_it_failed(peer: Peer) -> None:
    end = NativeEnd(peer.channel, 1.0, 0.0, digest=False)
    cancelled, late, lost = end.post([b"a"]), end.post([b"b"], URGENT, 0.1), end.post([b"c"], BULK)
    assert cancelled is not None and late is not None and lost is not None
    assert not cancelled.done()
    assert cancelled.cancel()
    with pytest.raises(TimeoutError):
        lost.result(0.01)
    for transfer, expected in ((cancelled, "CANCELLED"), (late, "TIMEOUT")):
        with pytest.raises(TransferError) as caught:
            transfer.result(5.0)
        assert caught.value.end == transfer.end == expected
    peer.signal(signal.SIGKILL)
    with pytest.raises(TransferError, match="PEER_LOST"):
        lost.result(5.0)


@not_over_ports
def test_what_a_call_waits_for_overtakes_bulk(peer: Peer) -> None:
    end = NativeEnd(peer.channel, 1.0, 0.0, digest=False)
    piece = payload(1 << 20).numpy()
    peer.signal(signal.SIGSTOP)
    try:
        bulk = [end.post([b"bulk %d" % i, piece], BULK) for i in range(40)]
        assert end.post([b"step"]) is not None
    finally:
        peer.signal(signal.SIGCONT)
    assert None not in bulk
    came = [peer.channel.receive(30.0)[0] for _ in range(41)]
    assert came.index(b"step") <= 4, "a window of 4 MiB, or less where the next piece would not fit"
    came.remove(b"step")
    assert came == [b"bulk %d" % i for i in range(40)]


def test_the_gil_is_free_while_a_thread_waits(peer: Peer) -> None:
    waited = threading.Thread(target=peer.channel.receive, args=(0.5,))
    waited.start()
    count, until_s = 0, time.monotonic() + 0.1
    while time.monotonic() < until_s:
        count += 1
    waited.join()
    assert count > 1000


@not_over_ports
def test_memory_of_the_lane_is_sent_without_a_copy(kind: str, peer: Peer) -> None:
    memory = peer.channel.allocate(1 << 20)
    tensor = to_tensor(memory)
    tensor.copy_(payload(1 << 20))
    before = peer.channel.statistics()["bytes_copied_out"]
    peer.channel.send([b"", tensor.numpy()])
    _, frames = peer.channel.receive(10.0)
    assert torch.equal(to_tensor(frames[0]), payload(1 << 20))
    assert peer.channel.statistics()["bytes_copied_out"] - before < 1000
    assert (peer.channel.statistics()["bytes_shared"] >= 1 << 20) == (kind == "shm")


@not_over_ports
def test_slabs_come_back(kind: str, peer: Peer) -> None:
    """A steady state asks the system for no more memory, though every message takes slabs at both ends."""
    x = payload(1 << 20).numpy()
    for _ in range(20):
        peer.channel.send([b"", x])
        peer.channel.receive(10.0)
    segments = mapped_segments()
    for _ in range(200):
        peer.channel.send([b"", x])
        peer.channel.receive(10.0)
    assert mapped_segments() <= segments


def test_a_small_allocation_of_a_pool_is_quick_and_a_full_pool_says_so() -> None:
    pool = native().Pool(limit_bytes=64 << 20)
    held = [pool.allocate(1 << 20) for _ in range(32)]
    facts = pool.statistics()
    assert facts["asked_bytes"] == 32 << 20
    assert facts["used_bytes"] >= facts["asked_bytes"]
    with pytest.raises(MemoryError, match="limit of 67108864"):
        while True:
            held.append(pool.allocate(8 << 20))
    held.clear()
    assert pool.statistics()["used_bytes"] == 0
