"""Large tensors that come in pieces: cut here, whole there, with strides; and pieces that cannot be."""
from __future__ import annotations

import hashlib
from typing import Any

import pytest
import torch

from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.messages import MAX_PIECES, PIECE_BYTES, piece_bytes
from genie_dynamo.core.tensors import describe
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames, cut, travels_in_pieces
from genie_dynamo.runtime.worker.assembly import Assembly

N = PIECE_BYTES // 4
CPU = torch.device("cpu")


def as_frame(piece: Any, kind: str) -> Any:
    """As lanes bring it, and as ZeroMQ does."""
    data = bytearray(piece.raw)
    return torch.frombuffer(data, dtype=torch.uint8) if kind == "lane" else memoryview(bytes(data))


def pieces(tensor: torch.Tensor, kind: str = "lane") -> list[tuple[Any, Any, int]]:
    return [(wire, [as_frame(piece, kind)], offset) for wire, piece, offset in cut(tensor)]


@pytest.mark.parametrize("kind", ["lane", "zmq"])
@pytest.mark.parametrize("make", [
    lambda: torch.arange(2 * N + 3, dtype=torch.float32), lambda: torch.randn(3, N).t(),
    lambda: torch.randn(2, 2, N)[:, 0], lambda: torch.randn(2 * N, 1).expand(2 * N, 5),
], ids=["odd end", "transposed", "gaps", "expanded"])
def test_a_tensor_is_whole_again_with_its_strides(make: Any, kind: str) -> None:
    tensor = make()
    assert travels_in_pieces(tensor)
    came = pieces(tensor, kind)
    assembly = Assembly(came[0][0])
    for wire, frames, offset in came:
        assert not assembly.whole
        assembly.add(wire, offset, frames, digest=True)
    landed = ZmqFrames().land(*assembly.wire(came[0][0]), CPU)
    assert torch.equal(landed, tensor)
    assert landed.stride() == tensor.stride()
    plain, _ = describe(tensor)
    assert assembly.sha256 == hashlib.sha256(bytes(plain.untyped_storage())[:assembly.size_bytes]).digest()


def test_pieces_may_come_in_any_order_and_twice() -> None:
    tensor = torch.randn(5, N)
    assembly = Assembly(pieces(tensor)[0][0])
    for at in (4, 1, 4, 0, 2, 1, 3):
        assert not assembly.whole
        wire, frames, offset = pieces(tensor)[at]
        assembly.add(wire, offset, frames, digest=False)
    assert assembly.whole
    assert torch.equal(ZmqFrames().land(*assembly.wire(wire), CPU), tensor)


@pytest.mark.parametrize(("offset", "size", "digest"), [
    (1, PIECE_BYTES, False), (-PIECE_BYTES, PIECE_BYTES, False), (0, PIECE_BYTES - 1, False),
    (0, 2 * PIECE_BYTES, False),
    (3 * PIECE_BYTES, 4, False), (2 * PIECE_BYTES, PIECE_BYTES, False), (0, 0, False), (PIECE_BYTES, PIECE_BYTES, True),
])
def test_what_is_not_a_piece_is_refused_and_writes_nothing(offset: int, size: int, digest: bool) -> None:
    wire = (0, (2 * N + 1,), (1,), 0)
    assembly = Assembly(wire)
    with pytest.raises(ProtocolError):
        assembly.add(wire, offset, [torch.ones(size, dtype=torch.uint8)], digest=digest)
    assert not assembly.whole


def test_a_piece_of_another_form_is_refused() -> None:
    assembly = Assembly((0, (2 * N,), (1,), 0))
    with pytest.raises(ProtocolError, match="with the form"):
        assembly.add((0, (N, 2), (2, 1), 0), 0, [torch.ones(PIECE_BYTES, dtype=torch.uint8)], digest=False)


def test_a_tensor_has_few_pieces_and_most_are_small() -> None:
    assert piece_bytes(1) == piece_bytes(MAX_PIECES * PIECE_BYTES) == PIECE_BYTES
    for size in (MAX_PIECES * PIECE_BYTES + 1, 16 << 30, 1 << 40):
        assert -(-size // piece_bytes(size)) <= MAX_PIECES
