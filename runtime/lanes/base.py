"""The contract of a lane, as the Python side sees it.

A sender *stages* a tensor: it gets the tensor's wire form (core/tensors.py), whose payload is either the bytes
themselves or a ticket that the lane understands. A receiver *lands* a wire form: it gets a tensor of its own.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch


class Lane(Protocol):
    """A payload channel. Implementations keep no state between messages."""

    name: str

    def stage(self, tensor: torch.Tensor, frames: list[Any]) -> tuple[Any, ...]:
        """The wire form of `tensor`; buffers that must travel beside the message are appended to `frames`.

        The tensor's memory must not change until the peer has answered the message.
        """
        ...

    def land(self, wire: Any, frames: Sequence[Any], device: torch.device) -> torch.Tensor:
        """The tensor behind a wire form, with its strides, on `device`, in memory of its own.

        Raises: ProtocolError where the form, or the length of its payload, is not what it says.
        """
        ...
