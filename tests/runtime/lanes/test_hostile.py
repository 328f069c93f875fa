"""Peers that lie, over a raw socket: what a lane must refuse. Its process lives on, and so do other lanes."""
from __future__ import annotations

import array
import contextlib
import fcntl
import mmap
import os
import resource
import select
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.runtime.lanes.ends import native

MAGIC_SHM, MAGIC_TCP, VERSION = 0x4D4C4E47, 0x544C4E47, 2
RING_BYTES = 4096 + (512 << 10)
SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW
HELLO, SEGMENT = 1, 2
MESSAGE, RELEASE, DROP = 1, 2, 3


@pytest.fixture
def lanes() -> Any:
    return native()


def accept(listener: Any, timeout_s: float = 5.0) -> Any:
    until_s = time.monotonic() + timeout_s
    while time.monotonic() < until_s:
        channel = listener.accept()
        if channel is not None:
            return channel
        time.sleep(0.001)
    raise TimeoutError


# ---------------------------------------------------------------- shm
def memory(size: int, seals: int = SEALS) -> int:
    fd = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def packet(kind: int, size: int, number: int = 0, magic: int = MAGIC_SHM, version: int = VERSION) -> bytes:
    return struct.pack("<IHHIIQ", magic, version, kind, number, 0, size)


def pass_fds(sock: socket.socket, body: bytes, fds: list[int]) -> None:
    sock.sendmsg([body], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else [])


class HostileShm:
    """A peer that says hello as it should, and then writes what it likes into its ring."""

    def __init__(self, lanes: Any, name: str) -> None:
        self.listener = lanes.listen("shm", name)
        self.socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.socket.connect("\0" + name[1:])
        self.ring_fd = memory(RING_BYTES)
        self.ring = mmap.mmap(self.ring_fd, RING_BYTES)
        self.bell, self.rope = socket.socketpair()
        pass_fds(self.socket, packet(HELLO, RING_BYTES), [self.ring_fd, self.rope.fileno()])
        self.channel = accept(self.listener)

    def write(self, records: bytes, tail: int | None = None) -> None:
        self.ring[4096:4096 + len(records)] = records
        self.ring[0:8] = struct.pack("<Q", len(records) if tail is None else tail)

    def hello(self) -> tuple[mmap.mmap, int]:
        """What the other end said: the ring that it writes to, and the rope to its bell."""
        self.socket.settimeout(5)
        _, ancillary, _, _ = self.socket.recvmsg(64, socket.CMSG_SPACE(8))
        ring_fd, rope = struct.unpack("ii", ancillary[0][2])
        ring = mmap.mmap(ring_fd, RING_BYTES)
        os.close(ring_fd)
        return ring, rope

    def close(self) -> None:
        self.channel.close()
        self.listener.close()
        self.socket.close()
        self.ring.close()
        os.close(self.ring_fd)
        self.bell.close()
        self.rope.close()


@pytest.fixture
def hostile(lanes: Any) -> Iterator[HostileShm]:
    peer = HostileShm(lanes, f"@genie-hostile-{os.getpid()}-{time.monotonic_ns()}")
    yield peer
    peer.close()


def record(kind: int, body: bytes) -> bytes:
    return struct.pack("<II", len(body), kind) + body + b"\0" * (-len(body) % 8)


def message(slices: list[tuple[int, int, int]], inlined: bytes = b"", sequence: int = 1, count: int | None = None,
            flags: int = 0, digest: int = 0) -> bytes:
    """slices: (size, offset, segment)."""
    head = struct.pack("<QQQIIII", 1, sequence, 0, len(slices) if count is None else count, flags, digest, 0)
    return record(MESSAGE, head + b"".join(struct.pack("<QQQII", s, o, 0, g, 0) for s, o, g in slices) + inlined)


def test_a_peer_that_keeps_to_the_protocol_is_heard(hostile: HostileShm) -> None:
    """Or the refusals below would prove nothing."""
    hostile.write(message([(5, 0, 0)], b"hello"))
    assert hostile.channel.receive(1.0) == (b"hello", [])


@pytest.mark.parametrize("records", [
    record(99, b""),
    record(MESSAGE, b"short"),
    message([(5, 0, 0)], b"hell"),                                 # longer than what came
    message([(5, 2**63, 0)], b"hello"),                            # an offset that overflows
    message([(5, 0, 0)], b"hello", sequence=2),                    # out of turn
    message([(5, 0, 0)], b"hello", sequence=1) * 2,                # a replay
    message([], count=2**31),                                      # more slices than may be
    message([(5, 0, 0)], b"hello", flags=1, digest=1),             # not the digest of these bytes
    message([(5, 0, 7)]),                                          # a segment that nobody passed
    record(RELEASE, struct.pack("<Q", 5)),                         # a slab that was never lent
    record(RELEASE, b"123"),
    record(DROP, struct.pack("<I", 3)),
    struct.pack("<II", 2**31, MESSAGE),                            # a record beyond the ring
    struct.pack("<II", 0xFFFFFFFF, 0),                             # nothing before the end of the ring, at its start
], ids=lambda value: f"{len(value)}-{value[:12].hex()}")
def test_records_that_cannot_be_close_the_lane(hostile: HostileShm, records: bytes) -> None:
    hostile.write(records)
    with pytest.raises(OSError, match="CORRUPT"):
        for _ in range(3):
            hostile.channel.receive(0.5)
    assert hostile.channel.close_end == "CORRUPT"


@pytest.mark.parametrize("tail", [2**64 - 8, RING_BYTES * 4, 12])
def test_positions_that_cannot_be_close_the_lane(hostile: HostileShm, tail: int) -> None:
    hostile.write(b"", tail=tail)
    with pytest.raises(OSError, match="CORRUPT"):
        hostile.channel.receive(1.0)


def test_a_reader_that_claims_more_than_was_written_closes_the_lane(hostile: HostileShm) -> None:
    ring, rope = hostile.hello()
    os.close(rope)
    ring[64:72] = struct.pack("<Q", 1 << 40)
    hostile.channel.send([b"x"])
    with pytest.raises(OSError, match="CORRUPT"):
        hostile.channel.receive(1.0)


@pytest.mark.parametrize(("real", "said", "seals", "says"), [
    (4096, 1 << 20, SEALS, "bytes"),                               # cut short: reading it would be a SIGBUS
    (1 << 20, 1 << 20, 0, "sealed"),                               # could be cut short later
    (1 << 20, 1 << 20, fcntl.F_SEAL_GROW, "sealed"),
])
def test_segments_that_are_not_what_they_say_are_not_mapped(hostile: HostileShm, real: int, said: int, seals: int,
                                                           says: str) -> None:
    segment = memory(real, seals)
    pass_fds(hostile.socket, packet(SEGMENT, said, number=1), [segment])
    os.close(segment)
    hostile.write(message([(1 << 20, 0, 1)]))
    with pytest.raises(OSError, match=f"CORRUPT.*{says}"):
        hostile.channel.receive(1.0)


def test_a_slice_beyond_its_segment_is_refused(hostile: HostileShm) -> None:
    segment = memory(1 << 20)
    pass_fds(hostile.socket, packet(SEGMENT, 1 << 20, number=1), [segment])
    os.close(segment)
    hostile.write(message([(4096, (1 << 20) - 4000, 1)]))
    with pytest.raises(OSError, match="CORRUPT"):
        hostile.channel.receive(1.0)


def test_a_bell_that_would_block_is_rung_without_waiting(hostile: HostileShm) -> None:
    """The peer shares the bell's flags, and may fill it between any look at it and the ringing."""
    hostile.rope.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        while True:
            hostile.rope.send(bytes(1 << 16))
    hostile.rope.setblocking(True)                                 # as our end of it is then
    ring, rope = hostile.hello()
    os.close(rope)
    ring[128:132] = struct.pack("<I", 1)                           # it says that it sleeps
    rung = threading.Thread(target=lambda: hostile.channel.send([b"x"]), daemon=True)
    rung.start()
    rung.join(5)
    assert not rung.is_alive()
    assert hostile.channel.statistics()["wakeups"] == 1


@pytest.mark.parametrize("kind", [os.eventfd, lambda flags: os.open(os.devnull, os.O_WRONLY)], ids=["eventfd", "file"])
def test_a_bell_that_can_only_be_written_to_is_refused(lanes: Any, kind: Callable[[int], int]) -> None:
    """Such a write waits or not as the peer likes."""
    name = f"@genie-bell-{os.getpid()}-{time.monotonic_ns()}"
    listener = lanes.listen("shm", name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect("\0" + name[1:])
        handles = [memory(RING_BYTES), kind(0)]
        pass_fds(sock, packet(HELLO, RING_BYTES), handles)
        with pytest.raises(OSError, match="bell"):
            accept(listener)
        for handle in handles:
            os.close(handle)
    listener.close()


def test_a_peer_that_rings_without_end_or_hangs_up_its_bell_costs_no_more_than_looking(hostile: HostileShm) -> None:
    _, ours = hostile.hello()
    with socket.socket(fileno=ours) as rope:
        rope.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                rope.send(bytes(1 << 16))
    assert hostile.channel.receive(0.05) is None
    began_s = time.process_time()
    assert hostile.channel.receive(0.3) is None
    assert time.process_time() - began_s < 0.1                     # it sleeps
    hostile.write(message([(5, 0, 0)], b"hello"))
    assert hostile.channel.receive(1.0) == (b"hello", [])


def test_a_flood_of_records_does_not_keep_the_receiver(hostile: HostileShm) -> None:
    """One look takes a bounded number: a worker has other clients."""
    one = record(RELEASE, b"")
    hostile.write(one * (RING_BYTES // len(one) // 2))
    hostile.channel.try_receive()
    taken, = struct.unpack_from("<Q", hostile.ring, 64)
    assert 0 < taken <= 256 * len(one)
    assert not hostile.channel.arm()                               # and there is more to look at


def test_slices_that_name_more_than_may_be_sent_are_refused(hostile: HostileShm) -> None:
    """The same pages again and again: nothing was sent, but a receiver that copies would fill its memory."""
    segment = os.memfd_create("hostile", os.MFD_ALLOW_SEALING)
    os.ftruncate(segment, 1 << 31)
    fcntl.fcntl(segment, fcntl.F_ADD_SEALS, SEALS)
    pass_fds(hostile.socket, packet(SEGMENT, 1 << 31, number=1), [segment])
    os.close(segment)
    hostile.write(message([(1 << 31, 0, 1)] * 64))
    with pytest.raises(OSError, match="CORRUPT"):
        hostile.channel.receive(1.0)


@pytest.mark.parametrize("kind", ["shm", "tcp"])
def test_a_process_without_descriptors_turns_connections_away_and_does_not_spin(lanes: Any, kind: str) -> None:
    name = f"@genie-full-{os.getpid()}-{time.monotonic_ns()}"
    listener = lanes.listen(kind, name if kind == "shm" else "127.0.0.1:0")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) if kind == "shm" else socket.socket() as sock:
        highest = max(int(entry.name) for entry in Path("/proc/self/fd").iterdir())
        resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 2, limits[1]))
        filler: list[int] = []
        try:
            with contextlib.suppress(OSError):
                while True:
                    filler.append(os.open(os.devnull, os.O_RDONLY))
            if kind == "shm":
                sock.connect("\0" + name[1:])
            else:
                host, _, port = listener.address.rpartition(":")
                sock.connect((host, int(port)))
            with pytest.raises(OSError, match="turned away"):
                accept(listener)
            poller = select.poll()                                 # as a worker's, which has its descriptor already
            poller.register(listener.fileno(), select.POLLIN)
            assert poller.poll(50) == []
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
            for fd in filler:
                os.close(fd)
        assert sock.recv(1) == b""
    listener.close()


@pytest.mark.parametrize(("body", "fds", "says"), [
    (packet(HELLO, RING_BYTES, magic=1), 2, "not a genie"),
    (packet(HELLO, RING_BYTES, version=99), 2, "version 99"),
    (packet(HELLO, 4096), 2, "no ring"),
    (packet(HELLO, RING_BYTES), 0, "no ring"),
    (b"GET / HTTP/1.0", 0, "not a genie"),
])
def test_hellos_that_are_none_are_refused_and_others_get_in(lanes: Any, body: bytes, fds: int, says: str) -> None:
    name = f"@genie-hello-{os.getpid()}-{time.monotonic_ns()}"
    listener = lanes.listen("shm", name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
        sock.connect("\0" + name[1:])
        handles = [memory(RING_BYTES), os.dup(sock.fileno())][:fds]
        pass_fds(sock, body, handles)
        with pytest.raises(OSError, match=says):
            accept(listener)
        for handle in handles:
            os.close(handle)
    connected: list[Any] = []
    thread = threading.Thread(target=lambda: connected.append(lanes.connect("shm", name, 5.0)))
    thread.start()
    accept(listener).close()
    thread.join()
    assert connected
    listener.close()


# ---------------------------------------------------------------- tcp
class HostileTcp:
    """A peer that says hello as it should, and then sends what it likes."""

    def __init__(self, lanes: Any) -> None:
        self.lanes = lanes
        self.listener = lanes.listen("tcp", "127.0.0.1:0")
        host, _, port = self.listener.address.rpartition(":")
        self.socket = socket.create_connection((host, int(port)))
        self.socket.sendall(struct.pack("<IHHQ", MAGIC_TCP, VERSION, 0, 1 << 30))
        self.channel = accept(self.listener)

    def header(self, kind: int = 1, flags: int = 0, slices: int = 1, sequence: int = 1, acked: int = 0) -> bytes:
        body = struct.pack("<IBBHQQQQ", MAGIC_TCP, kind, flags, slices, 1, sequence, 0, acked)
        return body + struct.pack("<I", self.lanes.crc32c(body))

    def sizes(self, *sizes: int) -> bytes:
        body = struct.pack(f"<{len(sizes)}Q", *sizes)
        return body + struct.pack("<I", self.lanes.crc32c(body))

    def close(self) -> None:
        self.channel.close()
        self.listener.close()
        self.socket.close()


@pytest.fixture
def tcp(lanes: Any) -> Iterator[HostileTcp]:
    peer = HostileTcp(lanes)
    yield peer
    peer.close()


def test_a_tcp_peer_that_keeps_to_the_protocol_is_heard(tcp: HostileTcp) -> None:
    tcp.socket.sendall(tcp.header() + tcp.sizes(5) + b"hello")
    assert tcp.channel.receive(1.0) == (b"hello", [])


@pytest.mark.parametrize("make", [
    lambda p: b"\0" * 44,
    lambda p: p.header()[:-1] + b"\0",                              # a flipped bit in the header
    lambda p: p.header(kind=9),
    lambda p: p.header(flags=8),
    lambda p: p.header(slices=5000),
    lambda p: p.header(sequence=2),                                 # out of turn
    lambda p: (p.header() + p.sizes(1) + b"x") * 2,                 # a replay
    lambda p: p.header(acked=3),                                    # of what was never sent
    lambda p: p.header() + p.sizes(1 << 50),                        # more than there is memory
    lambda p: p.header() + p.sizes(1)[:-1] + b"\xff",               # sizes that were not said
    lambda p: p.header(slices=2) + p.sizes(2**63, 2**63),           # a sum that overflows
    lambda p: p.header(flags=1) + p.sizes(5) + b"hello" + b"\0\0\0\0",     # not its digest
], ids=["zeros", "crc", "kind", "flags", "slices", "turn", "replay", "ack", "huge", "sizes", "overflow", "digest"])
def test_bytes_that_cannot_be_close_the_lane(tcp: HostileTcp, make: Callable[[HostileTcp], bytes]) -> None:
    tcp.socket.sendall(make(tcp))
    with pytest.raises(OSError, match="CORRUPT"):
        for _ in range(3):
            tcp.channel.receive(0.5)


@pytest.mark.parametrize("parts", [[b"y" * 50_000], [b"put tensor 7, epoch yyyy", b"x" * 50_000]],
                         ids=["payload", "handle"])
def test_a_byte_that_changes_on_the_way_is_found(lanes: Any, parts: list[bytes]) -> None:
    """A relay between two honest ends that flips one bit: of the payload, or of the handle and epoch it is for."""
    listener = lanes.listen("tcp", "127.0.0.1:0")
    relay = socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=_flip, args=(relay, listener.address), daemon=True)
    thread.start()
    connected: list[Any] = []
    opening = threading.Thread(
        target=lambda: connected.append(lanes.connect("tcp", f"127.0.0.1:{relay.getsockname()[1]}", 5.0)))
    opening.start()
    channel = accept(listener)
    opening.join()
    transfer = connected[0].send(parts, digest=True, watch=True)
    with pytest.raises(OSError, match="CORRUPT"):
        channel.receive(5.0)
    assert connected[0].wait_ended(transfer, 5.0) == "PEER_LOST"
    connected[0].close()
    relay.close()
    listener.close()


def _flip(relay: socket.socket, address: str) -> None:
    near, _ = relay.accept()
    host, _, port = address.rpartition(":")
    far = socket.create_connection((host, int(port)))
    with near, far:
        back = threading.Thread(target=_copy, args=(far, near, False), daemon=True)
        back.start()
        _copy(near, far, True)
        back.join(5)


def _copy(source: socket.socket, sink: socket.socket, flip: bool) -> None:
    try:
        while data := source.recv(1 << 16):
            sink.sendall(data.replace(b"yyyy", b"yyyz", 1) if flip else data)
        sink.shutdown(socket.SHUT_WR)
    except OSError:
        return
