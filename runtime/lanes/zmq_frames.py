"""Payload in ZeroMQ message frames: small tensors inside the message, larger ones as frames of their own.

A frame from ZERO_COPY_BYTES on is handed to libzmq without a copy, and a received one becomes the tensor's
memory. Below that, copying costs less than the bookkeeping of a shared buffer.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import zmq

from genie_dynamo.core import tensors
from genie_dynamo.core.errors import ProtocolError

INLINE_BYTES = 16 << 10
ZERO_COPY_BYTES = 256 << 10
_ALIGNMENT_BYTES = 8


class ZmqFrames:
    """See runtime/lanes/base.py."""

    name = "zmq"

    def stage(self, tensor: torch.Tensor, frames: list[Any]) -> tuple[Any, ...]:
        plain, (code, shape, stride, gaps) = tensors.describe(tensor)
        size_bytes = plain.numel() * plain.element_size()
        payload: Any
        if size_bytes <= INLINE_BYTES:
            payload = tensors.copy_out(plain, size_bytes)
        else:
            payload = len(frames)
            frames.append(tensors.view_memory(plain, size_bytes))
        return (code, shape, stride, payload, True) if gaps else (code, shape, stride, payload)

    def land(self, wire: Any, frames: Sequence[Any], device: torch.device) -> torch.Tensor:
        dtype, shape, stride, payload, gaps = tensors.check_form(wire)
        core = tensors.core_shape(shape, stride)
        core_stride = _contiguous(core) if gaps else stride
        data = _payload(payload, frames)
        expected = tensors.numel(core) * dtype.itemsize
        if len(data) != expected:
            raise ProtocolError(f"a {dtype} tensor of shape {core} takes {expected} bytes, {len(data)} came")
        if type(data) is bytes:
            flat = torch.empty_strided(core, core_stride, dtype=dtype)
            tensors.copy_in(flat, data)
        else:
            flat = _adopt(data, dtype).as_strided(core, core_stride)
        if gaps:
            scattered = torch.empty_strided(core, stride, dtype=dtype)
            flat = scattered.copy_(flat)
        if device.type != "cpu":
            flat = flat.to(device)
        return flat if core == shape else flat.as_strided(shape, stride)


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def _payload(payload: Any, frames: Sequence[Any]) -> Any:
    """bytes, or a writable memoryview over a frame."""
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
