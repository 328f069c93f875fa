"""A large resident tensor that comes in pieces (core/messages.py: Piece): in its memory from the first piece on.

One piece is what a worker takes in at a go, so that no call waits for the whole of an upload.
"""
from __future__ import annotations

import ctypes
import hashlib
from collections.abc import Sequence
from typing import Any

import torch

from genie_dynamo.core import tensors
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.messages import piece_bytes
from genie_dynamo.runtime.lanes.zmq_frames import payload_of


class Assembly:
    """One tensor on its way.

    Args:   wire: the wire form of any of its pieces.
    Raises: ProtocolError; RuntimeError where there is no memory for it.
    """

    def __init__(self, wire: Any) -> None:
        self._form = tensors.form_of(wire)
        self.size_bytes = self._form.size_bytes
        self._piece_bytes = piece_bytes(self.size_bytes)
        self._memory = torch.empty(self.size_bytes, dtype=torch.uint8, device="cpu")
        self._come: set[int] = set()
        self._left_bytes = self.size_bytes
        self._hash = hashlib.sha256()
        self._hashed_bytes = 0

    @property
    def whole(self) -> bool:
        return self._left_bytes == 0

    def add(self, wire: Any, offset: int, frames: Sequence[Any], *, digest: bool) -> None:
        """Put a piece in its place; one that has come before changes nothing.

        Args:   digest: whether `sha256` will be asked for; then pieces come in order.
        Raises: ProtocolError for what is not a piece of this tensor.
        """
        data = payload_of(wire, frames)
        size = len(data)
        if tensors.form_of(wire) != self._form:
            raise ProtocolError(f"a piece of a {self._form.dtype} tensor of shape {self._form.shape} comes with the "
                                f"form {wire[:3]!r:.80}")
        if not 0 <= offset < self.size_bytes or offset % self._piece_bytes \
                or size != min(self._piece_bytes, self.size_bytes - offset):
            raise ProtocolError(f"{size} bytes at {offset} are not a piece of {self.size_bytes} bytes")
        if offset in self._come:
            return
        if digest:
            if offset != self._hashed_bytes:
                raise ProtocolError(f"a piece at {offset} came where the one at {self._hashed_bytes} was due")
            self._hash.update(tensors.view_memory(data, size) if isinstance(data, torch.Tensor) else data)
            self._hashed_bytes += size
        target = self._memory.data_ptr() + offset
        if isinstance(data, torch.Tensor):
            ctypes.memmove(target, data.data_ptr(), size)      # by this thread alone: see lanes/native.py
        else:
            memoryview(tensors.view_memory(self._memory, size, offset)).cast("B")[:] = data
        self._come.add(offset)
        self._left_bytes -= size

    @property
    def sha256(self) -> bytes:
        return self._hash.digest()

    def wire(self, wire: Any) -> tuple[tuple[Any, ...], list[Any]]:
        """The wire form and the frames of the whole, where any piece's form was `wire`."""
        return (*wire[:3], 0, *wire[4:]), [self._memory]
