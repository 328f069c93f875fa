"""Messages over stream sockets: any cut of the bytes gives the same messages, and nobody can ask for too much."""
from __future__ import annotations

import select
import socket
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genie_dynamo.core.errors import GenieError, MessageLimitError
from genie_dynamo.runtime.lanes import stream
from genie_dynamo.runtime.worker.streams import Streams

MESSAGES = st.lists(
    st.tuples(st.binary(min_size=1, max_size=300), st.lists(st.binary(min_size=1, max_size=5000), max_size=3)),
    min_size=1, max_size=4)


def as_bytes(header: bytes, frames: list[bytes]) -> bytes:
    return b"".join(bytes(part) for part in stream.to_parts(header, frames))


def plain(message: stream.Message | None) -> tuple[bytes, list[bytes]] | None:
    return None if message is None else (message[0], [bytes(frame.numpy()) for frame in message[1]])


@given(MESSAGES, st.lists(st.integers(1, 400), min_size=1, max_size=30))
@settings(max_examples=60, deadline=None)
def test_messages_are_the_same_however_the_bytes_come(messages: list[Any], cuts: list[int]) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        theirs.setblocking(False)
        reader = stream.Reader(theirs)
        data = b"".join(as_bytes(*message) + stream.ELSEWHERE for message in messages)
        read: list[Any] = []
        at = 0
        for index in range(len(data)):
            step = cuts[index % len(cuts)]
            ours.sendall(data[at:at + step])
            at += step
            try:
                while True:
                    read.append(plain(reader.read()))
            except BlockingIOError:
                pass
            if at >= len(data):
                break
        assert read == [item for message in messages for item in (message, None)]
        assert not reader.has_more
        ours.close()
        with pytest.raises(EOFError):
            reader.read()


def test_a_frame_arrives_in_memory_of_its_own_that_kernels_like() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        reader = stream.Reader(theirs)
        payload = torch.arange(40_000, dtype=torch.float32)
        stream.send_all(ours, stream.to_parts(b"h", [memoryview(payload.numpy()).cast("B")]), pytest.fail)
        message = reader.read()
        assert message is not None
        frame = message[1][0]
        assert torch.equal(frame.view(torch.float32), payload)
        assert frame.data_ptr() % 64 == 0


@pytest.mark.parametrize("claim", [
    struct.pack("<II", 1 << 31, 0), struct.pack("<II", 1, 1 << 20),
    struct.pack("<IIQ", 1, 1, 1 << 40) + b"h",
])
def test_what_a_peer_may_claim_is_bounded(claim: bytes) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(claim)
        with pytest.raises(MessageLimitError, match="at most"):
            stream.Reader(theirs).read()


def test_what_does_not_fit_is_not_sent_over_a_stream() -> None:
    assert stream.fits(b"x" * 100, [])
    assert stream.fits(b"x", [bytes(stream.STREAM_BYTES - 1)])
    assert not stream.fits(b"x", [bytes(stream.STREAM_BYTES)])
    assert not stream.fits(b"x", [b"y"] * 65)


class Server:
    """Streams with an epoll of their own; what arrives is kept, and answered with itself."""

    def __init__(self, path: Path) -> None:
        self.poller = select.epoll()
        self.listener = stream.listen(f"ipc://{path}")
        self.address = stream.address_of(self.listener)
        self.seen: list[tuple[bytes, bytes]] = []
        self.left: list[bytes] = []
        self.streams = Streams(self.listener, self.poller, self._message, self.left.append)

    def _message(self, connection: bytes, header: bytes, frames: Any) -> None:
        self.seen.append((connection, header))
        self.streams.send(connection, stream.to_parts(header, [memoryview(f.numpy()) for f in frames]))

    def turn(self) -> None:
        for fd, mask in self.poller.poll(1.0):
            self.streams.serve(fd, mask)


@pytest.fixture
def server(tmp_path: Path) -> Any:
    made = Server(tmp_path / "worker.run")
    yield made
    made.streams.close()
    made.poller.close()
    assert not (tmp_path / "worker.run").exists()


def test_the_socket_file_is_for_its_owner_alone(server: Server, tmp_path: Path) -> None:
    assert (tmp_path / "worker.run").stat().st_mode & 0o777 == 0o600


def test_a_reader_that_is_slow_gets_all_of_it_and_stops_nobody(server: Server) -> None:
    slow, quick = (stream.connect(server.address, 5.0, 5.0) for _ in range(2))
    with slow, quick:
        server.turn()
        server.turn()
        payload = torch.randint(0, 256, (stream.STREAM_BYTES - 100,), dtype=torch.uint8)
        # More than the kernel's buffers hold, and nothing is read meanwhile: the rest waits in the outbox.
        for _ in range(3):
            for part in stream.to_parts(b"big", [memoryview(payload.numpy())]):
                left = memoryview(part)
                while left.nbytes:
                    ready = select.select([], [slow], [], 0)[1]
                    if ready:
                        left = left[slow.send(left[:65536]):]
                    server.turn()
        quick.sendall(as_bytes(b"small", []))
        server.turn()
        assert plain(stream.Reader(quick).read()) == (b"small", [])
        reader = stream.Reader(slow)
        slow.setblocking(False)
        got = []
        while len(got) < 3:
            try:
                got.append(reader.read())
            except BlockingIOError:
                server.turn()
        assert all(m is not None and torch.equal(m[1][0], payload) for m in got)


def test_a_client_that_sends_nonsense_loses_its_stream_and_nobody_else(server: Server) -> None:
    bad, good = (stream.connect(server.address, 5.0, 5.0) for _ in range(2))
    with bad, good:
        server.turn()
        server.turn()
        bad.sendall(b"\xff" * 64)
        server.turn()
        assert len(server.left) == 1
        with pytest.raises(EOFError):
            stream.Reader(bad).read()
        good.sendall(as_bytes(b"hello", []))
        server.turn()
        assert plain(stream.Reader(good).read()) == (b"hello", [])


def test_a_client_that_leaves_is_forgotten(server: Server) -> None:
    sock = stream.connect(server.address, 5.0, 5.0)
    server.turn()
    sock.close()
    server.turn()
    assert len(server.left) == 1 and server.left[0] not in server.streams
    server.streams.send(server.left[0], [b"too late"])


def test_another_users_process_is_refused(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stream, "_PEER_CREDENTIALS", _OtherUser())
    with pytest.raises(GenieError, match="user 7"):
        stream.connect(server.address, 1.0, 1.0)


class _OtherUser:
    size = 12

    def unpack(self, data: bytes) -> tuple[int, int, int]:
        return 1, 7, 7


def test_sending_to_a_peer_that_does_not_read_gives_the_caller_the_word(server: Server) -> None:
    sock = stream.connect(server.address, 0.05, 5.0)
    asked: list[int] = []

    def waiting() -> None:
        asked.append(1)
        if len(asked) == 3:
            raise TimeoutError

    with sock, pytest.raises(TimeoutError):
        stream.send_all(sock, [bytes(64 << 20)], waiting)


def test_a_client_that_never_reads_is_dropped(server: Server) -> None:
    with stream.connect(server.address, 5.0, 5.0) as sock:
        server.turn()
        sock.sendall(as_bytes(b"hello", []))
        server.turn()
        (connection, _), = server.seen
        for _ in range(200):
            server.streams.send(connection, [bytes(1 << 20)])
        assert server.left == [connection]


def test_several_messages_at_once_are_all_served_in_turn(server: Server) -> None:
    with stream.connect(server.address, 5.0, 5.0) as sock:
        server.turn()
        sock.sendall(b"".join(as_bytes(name, []) for name in (b"a", b"b", b"c")))
        server.turn()
        assert [header for _, header in server.seen] == [b"a"] and server.streams.has_more
        while server.streams.has_more:
            server.streams.serve_more()
        assert [header for _, header in server.seen] == [b"a", b"b", b"c"]


def test_the_file_that_a_killed_worker_left_is_replaced(tmp_path: Path) -> None:
    address = f"ipc://{tmp_path}/left.run"
    stream.listen(address).close()
    again = stream.listen(address)
    with pytest.raises(OSError, match="in use"):
        stream.listen(address)
    stream.close_listener(again)


def test_tcp_streams_know_their_port() -> None:
    listener = stream.listen("tcp://127.0.0.1:0")
    with listener:
        address = stream.address_of(listener)
        assert address.startswith("tcp://127.0.0.1:") and not address.endswith(":0")
        with stream.connect(address, 1.0, 1.0) as ours, stream.accept(listener) as theirs:
            ours.sendall(as_bytes(b"x", []))
            select.select([theirs], [], [], 5.0)
            assert plain(stream.Reader(theirs).read()) == (b"x", [])
