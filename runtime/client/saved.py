"""Activations that stay on their worker between forward and backward.

The caller's autograd graph holds a placeholder: one element of memory with strides of 0, and a handle. It must not
be a view (AOTAutograd detaches views, and the handle would be lost). When the placeholder dies, the activation is
freed on its worker.
"""
from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from genie_dynamo.core.tensors import DTYPES

if TYPE_CHECKING:
    from genie_dynamo.runtime.client.workers import WorkerLink

_ATTRIBUTE = "_genie_handle"


class SavedHandle:
    """(worker incarnation, id, epoch 0) of a resident activation; freed there when this object dies."""

    __slots__ = ("__weakref__", "address", "beside", "form", "link", "tensor_id")

    def __init__(self, link: WorkerLink, tensor_id: int, form: Any) -> None:
        self.link = link
        self.tensor_id = tensor_id
        self.form = form
        self.address = 0
        self.beside: tuple[object, tuple[torch.Tensor, ...]] | None = None      # see keep_beside
        link.num_saved += 1

    def __del__(self) -> None:
        _live.pop(self.address, None)
        self.link.num_saved -= 1
        self.link.frees.append((self.tensor_id, 0))


_live: dict[int, weakref.ref[SavedHandle]] = {}
"""Address of a placeholder's memory -> its handle: an alias that lost the attribute is still recognised."""


def placeholder(handle: SavedHandle) -> torch.Tensor:
    """A tensor of the right dtype and shape that stands for the handle."""
    code, shape, _ = handle.form
    # At least one element of memory, also for empty shapes: the address must be its own.
    tensor = torch.empty((1,), dtype=DTYPES[code], device="cpu").as_strided_(shape, (0,) * len(shape))
    handle.address = tensor.untyped_storage().data_ptr()
    _live[handle.address] = weakref.ref(handle)
    setattr(tensor, _ATTRIBUTE, handle)
    return tensor


def handle_of(value: Any) -> SavedHandle | None:
    """The handle a placeholder, or an alias of one, carries; None for an ordinary tensor or number."""
    handle: SavedHandle | None = getattr(value, _ATTRIBUTE, None)
    if handle is None and isinstance(value, torch.Tensor) and _live:
        reference = _live.get(value.untyped_storage().data_ptr()) if value.layout is torch.strided else None
        handle = reference() if reference is not None else None
    return handle


def collect_handles(args: Sequence[Any]) -> dict[int, SavedHandle]:
    """The placeholders among arguments, by position."""
    handles: dict[int, SavedHandle] = {}
    for index, value in enumerate(args):
        handle = handle_of(value)
        if handle is not None:
            handles[index] = handle
    return handles


def keep_beside(saved: Sequence[Any], owner: object, copies: tuple[torch.Tensor, ...]) -> None:
    """Let placeholders that autograd knows nothing of live as long as those that it saves.

    Args:  saved: what autograd saves; where none of it stayed on a worker, the copies are dropped.
           owner: who made them.
    """
    handles = collect_handles(saved)
    if handles and all(handle_of(copy) is not None for copy in copies):
        handles[min(handles)].beside = (owner, copies)


def beside(saved: Sequence[Any], owner: object) -> tuple[torch.Tensor, ...] | None:
    """The copies that this owner has kept beside one of these values; None where there are none."""
    for handle in collect_handles(saved).values():
        if handle.beside is not None and handle.beside[0] is owner:
            return handle.beside[1]
    return None


def hooks_active() -> bool:
    """Whether the user's saved_tensors_hooks would see (and copy) what autograd saves now."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None
