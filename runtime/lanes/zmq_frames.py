"""Payload in ZeroMQ message frames: small tensors inside the message, larger ones as frames of their own.

A frame from ZERO_COPY_BYTES on is handed to libzmq without a copy, and a received one becomes the tensor's
memory. Below that, copying costs less than the bookkeeping of a shared buffer.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import zmq

from genie_dynamo.core import tensors
from genie_dynamo.core.errors import MessageLimitError, ProtocolError
from genie_dynamo.core.limits import DEFAULT_LIMITS
from genie_dynamo.core.messages import PIECE_BYTES, piece_bytes

INLINE_BYTES = 16 << 10
ZERO_COPY_BYTES = 256 << 10
MAX_FRAME_BYTES = DEFAULT_LIMITS.message_bytes
_ALIGNMENT_BYTES = 8


class ZmqFrames:
    """See runtime/lanes/base.py.

    Args: to_device: brings a dense tensor of this host to a device.
    """

    name = "zmq"

    def __init__(self, to_device: Callable[[torch.Tensor, torch.device], torch.Tensor] = torch.Tensor.to) -> None:
        self._to_device = to_device

    def stage(self, tensor: torch.Tensor, frames: list[Any]) -> tuple[Any, ...]:
        plain, (code, shape, stride, gaps) = tensors.describe(tensor)
        size_bytes = plain.numel() * plain.element_size()
        payload: Any
        if size_bytes <= INLINE_BYTES:
            payload = tensors.copy_out(plain, size_bytes)
        else:
            if size_bytes > MAX_FRAME_BYTES:     # the peer would close the connection without a word
                raise MessageLimitError(
                    f"a tensor of shape {tuple(plain.shape)}, {plain.dtype}, takes {size_bytes / 2**30:.1f} GiB; at "
                    f"most {MAX_FRAME_BYTES / 2**30:g} GiB travel as one tensor: split it", size_bytes=size_bytes,
                    limit_bytes=MAX_FRAME_BYTES)
            payload = len(frames)
            frames.append(tensors.view_memory(plain, size_bytes))
        return (code, shape, stride, payload, True) if gaps else (code, shape, stride, payload)

    def land(self, wire: Any, frames: Sequence[Any], device: torch.device) -> torch.Tensor:
        form = tensors.form_of(wire)
        data = payload_of(wire, frames)
        if len(data) != form.size_bytes:
            raise ProtocolError(f"a {form.dtype} tensor of shape {form.core} takes {form.size_bytes} bytes, "
                                f"{len(data)} came")
        if type(data) is bytes:
            flat = torch.empty_strided(form.core, form.core_stride, dtype=form.dtype, device="cpu")
            tensors.copy_in(flat, data)
        elif isinstance(data, torch.Tensor):
            flat = data.view(form.dtype).as_strided(form.core, form.core_stride)
        else:
            flat = _adopt(data, form.dtype).as_strided(form.core, form.core_stride)
        if form.gaps:
            scattered = torch.empty_strided(form.core, form.stride, dtype=form.dtype, device="cpu")
            flat = scattered.copy_(flat)
        if device.type != "cpu":
            flat = self._to_device(flat, device)
        return flat if form.core == form.shape else flat.as_strided(form.shape, form.stride)


def travels_in_pieces(tensor: torch.Tensor) -> bool:
    """Whether what travels of a tensor is more than one piece."""
    narrow = tensors.core_shape(tuple(tensor.shape), tensor.stride())
    return tensors.numel(narrow) * tensor.element_size() > PIECE_BYTES


def cut(tensor: torch.Tensor) -> Iterator[tuple[tuple[Any, ...], Any, int]]:
    """A tensor of more than PIECE_BYTES in pieces: (the wire form of the whole, with the piece as frame 0; the piece;
    where it begins). The tensor's memory must not change until the peer has answered a later message.
    """
    plain, (code, shape, stride, gaps) = tensors.describe(tensor)
    wire = (code, shape, stride, 0, True) if gaps else (code, shape, stride, 0)
    size_bytes = plain.numel() * plain.element_size()
    step = piece_bytes(size_bytes)
    for offset in range(0, size_bytes, step):
        yield wire, tensors.view_memory(plain, min(step, size_bytes - offset), offset), offset


def payload_of(wire: Any, frames: Sequence[Any]) -> Any:
    """bytes, a uint8 tensor that a stream has filled, or a memoryview over a ZeroMQ frame. Raises: ProtocolError."""
    payload = wire[3]
    if type(payload) is bytes:
        return payload
    if type(payload) is not int or not 0 <= payload < len(frames):
        raise ProtocolError(f"a payload is bytes or one of {len(frames)} frame numbers, got {payload!r:.80}")
    frame = frames[payload]
    return frame.buffer if isinstance(frame, zmq.Frame) else frame


def _adopt(data: memoryview, dtype: torch.dtype) -> torch.Tensor:
    """A flat tensor over the frame's memory, or over a copy where the memory is read-only or badly aligned."""
    flat = torch.frombuffer(data if not data.readonly else bytearray(data), dtype=torch.uint8)
    if flat.data_ptr() % _ALIGNMENT_BYTES:
        flat = flat.clone()
    return flat.view(dtype)


def send_parts(socket: zmq.Socket[bytes], parts: Sequence[Any], flags: int = 0) -> None:
    """Send a multipart message; parts from ZERO_COPY_BYTES on are not copied."""
    last = len(parts) - 1
    for index, part in enumerate(parts):
        more = flags | zmq.SNDMORE if index < last else flags
        if type(part) is bytes or len(part) < ZERO_COPY_BYTES:
            socket.send(part, more)
        else:
            socket.send(part, more, copy=False)
