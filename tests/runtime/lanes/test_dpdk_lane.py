"""The dpdk lane between two processes, over ports: what drivers are known to get wrong, loss, and bad peers."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from genie_dynamo.runtime.lanes import dpdk, native
from genie_dynamo.runtime.lanes.native import to_tensor
from tests.runtime.lanes.ends import PORTS, Peer, why_not

pytestmark = pytest.mark.heavy

RING_FRAMES = 512


@pytest.fixture(params=PORTS)
def peer(request: pytest.FixtureRequest) -> Iterator[Peer]:
    if why := why_not(request.param):
        pytest.skip(why)
    other = Peer(request.param, "echo")
    yield other
    dpdk.module().lose(0.0)
    other.close()


def payload(size: int, seed: int) -> torch.Tensor:
    return torch.randint(256, (size,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def there_and_back(peer: Peer, sent: list[torch.Tensor]) -> None:
    peer.channel.send([b"head", *[x.numpy() for x in sent]])
    came = peer.channel.receive(30.0)
    assert came is not None
    assert all(torch.equal(to_tensor(a), b) for a, b in zip(came[1], sent, strict=True))


def test_frames_of_mixed_sizes_are_whole_after_the_ring_has_wrapped(peer: Peer) -> None:
    """memif of DPDK 22.11 corrupts chained descriptors of mixed sizes there; buffers that hold a frame avoid them."""
    sizes = [1, 900, 5_000, 16_000, 40_000, 300_000]
    while peer.channel.statistics()["frames_out"] < 6 * RING_FRAMES:
        for seed, size in enumerate(sizes):
            there_and_back(peer, [payload(size, seed), payload(3, seed)])


def test_large_payload_is_sent_from_where_it_is_and_its_memory_is_let_go(peer: Peer) -> None:
    """Frames of a header and an external buffer; a transfer that has ended has nobody who reads its memory."""
    before = peer.channel.statistics()
    for seed in range(4):
        sent = bytearray(payload(2_000_000, seed).numpy().tobytes())
        expected = bytes(sent)
        transfer = peer.channel.send([b"", sent], watch=True)
        assert peer.channel.wait_ended(transfer, 30.0) == "OK"
        sent[:] = bytes(len(sent))
        came = peer.channel.receive(30.0)
        assert came is not None
        assert bytes(came[1][0]) == expected
    after = peer.channel.statistics()
    assert after["gathered"] - before["gathered"] > 400
    assert after["bad_digests"] == after["bad_frames"] == 0


def test_payload_lands_in_the_one_pool_of_this_process(peer: Peer) -> None:
    """Whose numbers, limit and page-locking hold for every lane."""
    pool = native.module().landing_statistics
    before = pool()["num_allocations"]
    sent = payload(3_000_000, 1)
    peer.channel.send([b"", sent.numpy()])
    came = peer.channel.receive(30.0)
    assert came is not None
    assert pool()["num_allocations"] == before + 1
    assert pool()["used_bytes"] >= 3_000_000
    del came


@pytest.mark.parametrize("loss", [0.001, 0.01, 0.3])
def test_what_is_lost_on_the_way_is_sent_again_and_arrives_once(peer: Peer, loss: float) -> None:
    dpdk.module().lose(loss, 7)
    for seed in range(3):
        there_and_back(peer, [payload(1_500_000, seed), payload(100, seed)])
    facts = peer.channel.statistics()
    assert facts["chunks_sent_again"] > 0 or loss < 0.01
    assert facts["arrived"] == 3


def test_a_peer_that_is_stopped_for_long_is_lost_and_nobody_waits(peer: Peer) -> None:
    peer.signal(signal.SIGSTOP)
    transfer = peer.channel.send([b"", payload(1_000_000, 1).numpy()], watch=True)
    began_s = time.monotonic()
    assert peer.channel.wait_ended(transfer, 10.0) == "PEER_LOST"
    assert time.monotonic() - began_s < 5
    with pytest.raises(OSError, match="PEER_LOST"):
        peer.channel.receive(1.0)


@pytest.mark.parametrize("peer", ["memif"], indirect=True)
def test_who_is_killed_in_the_middle_leaves_no_files_and_no_sockets_behind(peer: Peer) -> None:
    directory = Path("/var/run/dpdk", f"genie-{peer.pid}")
    if os.geteuid() != 0:
        pytest.skip("DPDK keeps its files elsewhere for other users")
    assert directory.exists()
    transfer = peer.channel.send([b"", payload(60_000_000, 1).numpy()], watch=True)
    peer.signal(signal.SIGKILL)
    assert peer.channel.wait_ended(transfer, 10.0) in ("PEER_LOST", "OK")
    free = _hugepages_free()
    subprocess.run([sys.executable, "-c", "from genie_dynamo import _dpdk; _dpdk.start(); _dpdk.stop()"], check=True,
                   timeout=60)
    assert not directory.exists()                 # the next start has tidied up
    assert _hugepages_free() == free


@pytest.mark.parametrize("peer", ["memif"], indirect=True)
@pytest.mark.parametrize("after_s", [0.01, 0.03, 0.08])
def test_a_peer_that_is_killed_while_frames_move_both_ways_is_lost_at_once(peer: Peer, after_s: float) -> None:
    """memif's driver would unmap its rings under our burst, if it heard of the death. We hear of it at once."""
    chunk = payload(4_000_000, 1).numpy()
    killed_s = 0.0

    def kill() -> None:
        nonlocal killed_s
        peer.signal(signal.SIGKILL)
        killed_s = time.monotonic()

    timer = threading.Timer(after_s, kill)
    timer.start()
    with pytest.raises(OSError, match="PEER_LOST"):
        while True:
            peer.channel.send([b"", chunk], timeout_s=0.2)
            peer.channel.try_receive()
    timer.join()
    assert time.monotonic() - killed_s < 1.0


def _hugepages_free() -> int:
    text = Path("/proc/meminfo").read_text()
    return int(text.split("HugePages_Free:")[1].split()[0])


@pytest.mark.parametrize("peer", ["af_packet"], indirect=True)
def test_frames_of_strangers_change_nothing(peer: Peer) -> None:
    """Noise and replays of our own frames, from a socket on the same Ethernet."""
    assert peer.pair is not None
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x88B5)) as wire:
        wire.bind((peer.pair.first_interface, 0))
        wire.settimeout(5)
        there_and_back(peer, [payload(100_000, 1)])
        heard = [wire.recv(9100) for _ in range(8)]
        for i in range(200):
            frame = bytearray(heard[i % len(heard)])
            if i % 2:
                frame[14 + i % 48] ^= 1 << i % 8
            wire.send(bytes(frame))
            wire.send(bytes(frame[:14]) + os.urandom(60 + i))
        there_and_back(peer, [payload(200_000, 2)])
    assert peer.channel.statistics()["arrived"] == 2


@pytest.mark.parametrize("peer", ["memif"], indirect=True)
def test_a_receiver_that_does_not_poll_is_not_filled(peer: Peer) -> None:
    """The echo of 20 x 30 MB to a side that does not look: what has landed there is bounded."""
    most, size = 256 << 20, 30_000_000
    chunk = payload(size, 1).numpy()
    for _ in range(20):
        assert peer.channel.send([b"", chunk], timeout_s=30.0)
    until_s = time.monotonic() + 30.0
    while (untaken := peer.channel.statistics()["untaken_bytes"]) <= most - size - 4096:   # the next one still has room
        assert time.monotonic() < until_s, f"{untaken} bytes have landed"
        time.sleep(0.01)
    for _ in range(20):                            # the peer has more to send, and waits
        assert peer.channel.statistics()["untaken_bytes"] <= most
        time.sleep(0.005)
    came = 0
    while came < 20:
        message = peer.channel.receive(10.0)
        assert message is not None
        came += 1
    assert peer.channel.statistics()["arrived"] == 20
