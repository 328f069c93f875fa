"""Tensors of other devices that recorded ops meet.

As on CUDA they are an error, but for tensors without dimensions, and indices. Inside
`genie.capture()` tensors of the CPU go up as inputs.
"""
from __future__ import annotations

import threading
from typing import Any

import torch

from genie_dynamo.device.nodes import Node, uploaded

Tensor = torch.Tensor

NAME = "remote_accelerator"


class _Admission(threading.local):
    depth = 0
    tensors: dict[int, tuple[Tensor, int, Node]] | None = None


admission = _Admission()
"""Of this thread: how many captures it is inside, and the CPU tensors they have met."""


def admit(tensor: Tensor, target: Any, *, indices: bool) -> Node:
    """A node for a tensor that is not of the device.

    Raises: RuntimeError where eager would refuse to mix devices.
    """
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or tensor.device.type == NAME:
        raise RuntimeError(f"{target}: a tensor of layout {tensor.layout} on {tensor.device} cannot be used on {NAME}")
    if tensor.device.type == "cpu":
        if admission.depth:
            return _admitted(tensor)
        if tensor.dim() == 0 or (indices and not tensor.dtype.is_floating_point):
            return uploaded(tensor.detach().clone())
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
        f"{tensor.device}! (in {target}; move the tensor with .to({NAME!r}), or record inside genie.capture())")


def _admitted(tensor: Tensor) -> Node:
    """The node of a CPU tensor inside a capture: sent once while it is unchanged."""
    known = admission.tensors
    assert known is not None
    version = -1 if tensor.is_inference() else tensor._version
    found = known.get(id(tensor))
    if found is not None and found[0] is tensor and found[1] == version and version >= 0:
        return found[2]
    node = uploaded(tensor.detach().clone())
    known[id(tensor)] = (tensor, version, node)
    return node
