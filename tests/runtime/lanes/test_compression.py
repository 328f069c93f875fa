"""Frames that travel compressed: where it pays, what comes back, and what hostile envelopes get."""
from __future__ import annotations

import itertools
import struct
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import genie_dynamo as genie
from genie_dynamo import sessions
from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ConfigError, MessageLimitError, ProtocolError
from genie_dynamo.core.limits import Limits
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.client import negotiation
from genie_dynamo.runtime.lanes import compression
from genie_dynamo.runtime.lanes.compression import MIN_FRAME_BYTES, Compression, installed, is_packed, wanted
from tests.runtime.lanes.ends import native
from tests.runtime.lanes.test_negotiation import tcp_worker  # noqa: F401 - a fixture

NAMES = ("zstd", "lz4")
KIB = 1 << 10


@pytest.fixture(autouse=True)
def _libraries() -> None:
    missing = [name for name in NAMES if name not in installed()]
    if missing:
        pytest.skip(f"no library for {missing[0]}: pip install 'genie-dynamo[compression]'")


def no_time() -> float:
    return 0.0


def made(*names: str, bytes_per_s: float = 1e8, clock: Callable[[], float] = no_time, **limits: int) -> Compression:
    return Compression(names or NAMES, bytes_per_s, clock=clock, limits=Limits(**limits))


def ids(size_bytes: int) -> bytes:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(50_000, (size_bytes // 8,), generator=generator).numpy().tobytes()


def noise(size_bytes: int) -> bytes:
    return torch.randint(256, (size_bytes,), dtype=torch.uint8,
                         generator=torch.Generator().manual_seed(0)).numpy().tobytes()


@pytest.mark.parametrize("names", [("zstd",), ("lz4",), NAMES])
def test_frames_come_back_as_they_were_and_only_those_that_gain_are_changed(names: tuple[str, ...]) -> None:
    frames = [ids(200 * KIB), noise(200 * KIB), bytes(1 << 20), bytes(MIN_FRAME_BYTES - 1), bytearray(ids(64 * KIB))]
    ours, theirs = made(*names), made(*names)
    header, packed = ours.pack(b"\x93head", frames)
    assert [len(after) < len(before) for before, after in zip(frames, packed, strict=True)] == [
        True, False, True, False, True]
    came, expanded = theirs.unpack(header, packed)
    assert came == b"\x93head"
    assert [bytes(frame) for frame in expanded] == [bytes(frame) for frame in frames]
    before = 200 * KIB + (1 << 20) + 64 * KIB
    assert ours.counted["sent_before"] == theirs.counted["received_before"] == before
    assert ours.counted["sent_after"] == theirs.counted["received_after"] == sum(len(packed[i]) for i in (0, 2, 4))
    assert ours.counted["left_alone"] == 200 * KIB


def test_a_message_without_gain_is_as_it_was() -> None:
    frames = [noise(100 * KIB)]
    assert made().pack(b"head", frames) == (b"head", frames)
    assert made().unpack(b"head", frames) == (b"head", frames)


@pytest.mark.parametrize(("bytes_per_s", "pays"), [(1e6, True), (1e8, False)])
def test_it_pays_where_the_lane_is_slower_than_the_library(bytes_per_s: float, pays: bool) -> None:
    ticks = itertools.count()
    frames = [ids(256 * KIB)]
    # Each look at the clock is a millisecond after the one before: 32 MB/s for a sample, there and back.
    _, packed = made("zstd", bytes_per_s=bytes_per_s, clock=lambda: next(ticks) * 1e-3).pack(b"head", frames)
    assert (packed is not frames) is pays


def test_the_codec_that_makes_the_way_shortest_is_taken() -> None:
    header, _ = made(bytes_per_s=1e6).pack(b"", [ids(256 * KIB)])
    assert header[3] == 1, "zstd leaves less of numbers, and here only that counts"


def envelope(*entries: tuple[int, int, int], count: int | None = None, rest: bytes = b"\x90") -> bytes:
    packed = b"".join(struct.pack("<BHQ", *entry) for entry in entries)
    return b"\xc1" + struct.pack("<H", len(entries) if count is None else count) + packed + rest


def test_a_bomb_is_refused_before_anything_is_expanded(monkeypatch: pytest.MonkeyPatch) -> None:
    side = made(inflated_bytes=1 << 20)
    header, frames = made().pack(b"", [bytes(4 << 20)])
    assert len(frames[0]) < 20_000
    monkeypatch.setattr(side, "_by_number", {1: None, 2: None})      # whatever is expanded raises AttributeError
    with pytest.raises(MessageLimitError, match="4194304 bytes; at most 1048576"):
        side.unpack(header, frames)
    half = (1, 0, 600 * KIB), (1, 1, 600 * KIB)
    with pytest.raises(MessageLimitError, match="at most"):
        side.unpack(envelope(*half), [b"", b""])


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize("said", [MIN_FRAME_BYTES, (4 << 20) + 1, (4 << 20) - 1])
def test_a_frame_that_holds_something_else_than_it_says_is_refused(number: int, said: int) -> None:
    name = NAMES[number - 1]
    _, frames = made(name).pack(b"", [bytes(4 << 20)])
    with pytest.raises(ProtocolError):
        made(name).unpack(envelope((number, 0, said)), frames)


@pytest.mark.parametrize(("header", "frames"), [
    (b"\xc1", [b"x"]), (b"\xc1\x01", [b"x"]), (envelope(count=0), []), (envelope(count=3), [b"x"] * 3),
    (envelope((9, 0, 100_000)), [b"x"]), (envelope((1, 1, 100_000)), [b"x"]), (envelope((1, 0, 1)), [b"x"]),
    (envelope((1, 0, 100_000), (1, 0, 100_000)), [b"x"]), (envelope((1, 0, 100_000)), [b"x"]),
    (envelope((2, 0, 100_000)), [b"x"]), (envelope((1, 0, 100_000)), [b""]), (envelope((2, 0, 100_000)), [b""]),
])
def test_envelopes_that_cannot_be_are_refused(header: bytes, frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        made().unpack(header, frames)


@given(st.binary(max_size=60), st.lists(st.binary(max_size=200), max_size=3))
def test_random_bytes_are_an_error_of_ours_or_a_message(header: bytes, frames: list[bytes]) -> None:
    try:
        made().unpack(b"\xc1" + header, frames)
    except ProtocolError:       # MessageLimitError is one
        return
    raise AssertionError("frames this small hold nothing that may be compressed")


@pytest.mark.parametrize(("names", "rate"), [((), 1e8), (("zip",), 1e8), ((7,), 1e8), (("zstd", "zip"), 1e8),
                                             (("zstd",), 0.0), (("zstd",), float("nan")), (("zstd",), float("inf"))])
def test_what_cannot_be_agreed_on_is_refused(names: tuple[Any, ...], rate: float) -> None:
    with pytest.raises(ProtocolError, match="compression by"):
        Compression(names, rate)


def test_a_library_that_is_named_and_missing_is_an_error_that_says_how_to_get_it(
        monkeypatch: pytest.MonkeyPatch) -> None:
    assert wanted("off") == ()
    assert wanted("auto") == NAMES
    def absent() -> Any:
        raise ImportError

    monkeypatch.setitem(compression._MAKERS, "zstd", ("zstandard", absent))
    monkeypatch.setattr(compression, "installed", compression.installed.__wrapped__)
    assert wanted("auto") == wanted("lz4") == ("lz4",)
    with pytest.raises(ConfigError, match=r"pip install 'genie-dynamo\[compression\]'"):
        genie.init(workers=1, compression="zstd")


def test_threads_compress_at_the_same_time() -> None:
    """Each connection has contexts of its own: zstd's are of one thread."""
    frame = bytes(range(256)) * 4096
    failures: list[BaseException] = []

    def work() -> None:
        try:
            mine = Compression(("zstd",), 1e6)
            for _ in range(60):
                header, frames = mine.pack(b"message", [frame])
                assert is_packed(header) and len(frames[0]) < len(frame)
                assert mine.unpack(header, frames)[1] == [frame]
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ------------------------------------------------------------- between a client and a worker
@pytest.fixture
def _far(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """This host's workers count as another's, at the end of 10 MB/s."""
    native()
    monkeypatch.setattr(negotiation, "leaves_host", lambda address: True)
    monkeypatch.setattr(negotiation, "_rate", lambda connection, token: 0.01)
    yield
    genie.shutdown()
    sessions._config = None


def counted() -> dict[str, Any]:
    row: dict[str, Any] = genie.get_stats()["workers"]["w0"]["lane"]
    return row


@pytest.mark.parametrize("lane", ["tcp", "zmq"])
@pytest.mark.usefixtures("_far", "fresh_dynamo")
def test_what_gains_travels_compressed_both_ways_and_logical_bytes_are_counted(
        tcp_worker: str, lane: str) -> None:  # noqa: F811
    genie.init(workers=[tcp_worker], require_lane=lane, compression="auto", strict=True)
    net = torch.nn.Linear(1000, 1000, bias=False)          # 4 MB, in pieces
    with torch.no_grad():
        net.weight.copy_(torch.arange(1000) % 5)

    def forward(x: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return net(x), noise + 1

    x = torch.zeros(200, 1000)
    run = torch.compile(forward, backend="genie")
    before = counted()
    with torch.no_grad():
        for shift in range(4):                             # also when calls repeat
            other = torch.randn(200, 1000)                 # what a worker has already stays there
            expected = forward(x + shift, other)
            assert all(map(torch.equal, run(x + shift, other), expected))
    stats, after = genie.get_stats(), counted()
    assert stats["by_reason"]["weights"]["sent"] == net.weight.nbytes
    assert stats["by_reason"]["inputs"]["sent"] == stats["by_reason"]["outputs"]["received"] == 8 * x.nbytes
    found = after["compression"]
    assert found["agreed"].startswith("zstd or lz4")
    assert found["sent_before"] == net.weight.nbytes + 4 * x.nbytes
    assert found["sent_after"] < found["sent_before"] / 10
    assert found["received_before"] == 4 * x.nbytes
    assert found["received_after"] < found["received_before"] / 10
    assert found["left_alone"] == 4 * other.nbytes
    if lane == "tcp":
        gone = after["bytes_sent"] - before["bytes_sent"]
        assert found["sent_after"] + found["left_alone"] <= gone < found["sent_after"] + found["left_alone"] + 20_000


@pytest.mark.usefixtures("_far")
def test_a_worker_without_the_library_is_used_uncompressed_and_that_is_said(tcp_worker: str,  # noqa: F811
                                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    agree = negotiation.agree_on_compression
    monkeypatch.setattr("genie_dynamo.runtime.client.workers.agree_on_compression",
                        lambda connection, welcome, *rest: agree(
                            connection, welcome._replace(facts={**welcome.facts, "codecs": ("lz4",)}), *rest))
    genie.init(workers=[tcp_worker], compression="zstd", require_lane="tcp")
    x = torch.zeros(100_000)
    assert torch.equal(torch.compile(lambda x: x + 1, backend="genie")(x), x + 1)
    found = counted()["compression"]
    assert found == {"agreed": "off: the worker has ('lz4',), this side may use ('zstd',)",
                     **dict.fromkeys(("sent_before", "sent_after", "received_before", "received_after",
                                      "left_alone"), 0)}


def test_on_this_host_nothing_is_compressed(tcp_worker: str) -> None:  # noqa: F811
    native()
    try:
        genie.init(workers=[tcp_worker], compression="auto", require_lane="tcp")
        assert counted()["compression"]["agreed"].endswith("is this host")
    finally:
        genie.shutdown()
        sessions._config = None


@pytest.mark.usefixtures("_far")
def test_what_was_not_agreed_on_is_refused_and_the_worker_lives_on(tcp_worker: str) -> None:  # noqa: F811
    session = genie.init(workers=[tcp_worker], require_lane="tcp")
    (link,) = session.links
    with link.connection() as connection:
        assert connection.end is not None
        header, frames = made().pack(pack(m.to_wire(m.Ping())), [bytes(1 << 20)])
        connection.end.send(header, frames, lambda: None)
        connection._streaming = True
        answer, _, _ = connection.receive(float("inf"))
        assert isinstance(answer, m.Failure) and "not agreed on" in answer.message
        bad = connection.next_request()
        with pytest.raises(ProtocolError, match="compression by"):
            connection.ask(m.Compress(bad, ("zip",), 1e8), float("inf"))
        connection.compression = Compression(NAMES, 1e6, Counter())
        with pytest.raises(ProtocolError, match="not agreed on"):
            negotiation._echo(connection, session.token, torch.zeros(1 << 20))
