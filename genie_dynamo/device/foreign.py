"""Tensors of other devices that recorded ops meet.

As on CUDA they are an error, but for tensors without dimensions, and indices. Inside
`genie.capture()` tensors of the CPU go up as inputs.
"""
from __future__ import annotations

import threading
from collections.abc import Iterable, MutableMapping
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from genie_dynamo.device.nodes import Failed, Node, layout

Tensor = torch.Tensor

NAME = "remote_accelerator"


class _Admission(threading.local):
    depth = 0
    spread: Any = None


admission = _Admission()
"""How many captures this thread is inside, and the device.spread.Spread that its recordings run over, if any."""

_known: MutableMapping[Tensor, tuple[Any, Node]] = WeakIdKeyDictionary()
"""By tensor: its version, layout and some elements when it was sent, and the node of what it held."""


def check_ordinal(device: torch.device) -> None:
    """Raises: RuntimeError for a device of ours that is not there."""
    if device.type == NAME and device.index not in (None, 0):
        raise RuntimeError(f"{device}: invalid device ordinal; there is one {NAME}, number 0")


def admit(tensor: Tensor, target: Any, *, indices: bool) -> Node:
    """A node for a tensor that is not of the device.

    Raises: RuntimeError where eager would refuse to mix devices.
    """
    if tensor.device.type == "meta" or tensor.layout is not torch.strided or tensor.device.type == NAME:
        raise RuntimeError(f"{target}: a tensor of layout {tensor.layout} on {tensor.device} cannot be used on {NAME}")
    if tensor.device.type == "cpu":
        if admission.depth:
            return _sent_once(tensor)
        if tensor.dim() == 0 or (indices and not tensor.dtype.is_floating_point):
            return _upload(tensor)
    raise RuntimeError(
        f"Expected all tensors to be on the same device, but found at least two devices, {NAME}:0 and "
        f"{tensor.device}! (in {target}; move the tensor with .to({NAME!r}), or record inside genie.capture())")


def _sent_once(tensor: Tensor) -> Node:
    """The node of a CPU tensor inside a capture; sent again only where it has changed."""
    if tensor.is_inference():
        return _upload(tensor)
    if admission.spread is not None and tensor._base is None:
        return admission.spread.leaf(tensor)  # type: ignore[no-any-return]
    base = tensor._base
    if base is not None and base.dtype == tensor.dtype and base.is_contiguous() and not tensor.is_conj():
        # What a layer makes of its weight on the way here is a new tensor each time; the weight itself is not.
        from genie_dynamo.device.moves import as_strided

        offset: Any = tensor.storage_offset() - base.storage_offset()
        return as_strided(_sent_once(base), layout(tensor.shape, tensor.stride(), offset, tensor.dtype))
    key = (tensor._version, tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), _sample(tensor))
    found = _known.get(tensor)
    if found is not None and found[0] == key and type(found[1].value) is not Failed:
        return found[1]
    node = _upload(tensor, stays=True)
    _known[tensor] = (key, node)
    return node


SAMPLES = 8


def _sample(tensor: Tensor) -> bytes:
    """Some elements: `p.data.copy_(new)` changes a tensor behind its version. Edits of a few are not always seen."""
    if not tensor.numel() or not tensor.is_contiguous():
        return b""
    count = min(tensor.numel(), SAMPLES)
    some = tensor.detach().resolve_conj().resolve_neg()
    some = some.as_strided((count,), (tensor.numel() // count,), some.storage_offset()).clone()
    return some.view(torch.uint8).numpy().tobytes()


def forget(tensors: Iterable[Tensor]) -> None:
    """Send these again when they are met next."""
    for tensor in tensors:
        _known.pop(tensor if tensor._base is None else tensor._base, None)


def admitted_node(tensor: Tensor) -> Node | None:
    """The node under which a CPU tensor was admitted last."""
    found = _known.get(tensor)
    return found[1] if found is not None else None


def _upload(tensor: Tensor, *, stays: bool = False) -> Node:
    from genie_dynamo.device.engine import current

    return current.upload(tensor, stays=stays)
