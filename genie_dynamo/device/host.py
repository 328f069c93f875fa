"""What torch asks an accelerator's C++ for and a device from Python cannot answer, asked here instead.

    Tensor.pin_memory, is_pinned   host memory is all the same to a worker: a copy, which counts as pinned
    torch.accelerator              synchronize and memory counters, which `torch.remote_accelerator` has
    torch.load(map_location=)      storages of the device have no bytes: content is loaded to the CPU, then moved

Each function is replaced by one that looks whether it is about this device, and otherwise calls the original.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakIdKeyDictionary

_pinned: Any = WeakIdKeyDictionary()


def patch_host(name: str, module: Any) -> None:
    """Once per process, when the device becomes known. Args: name: of the device. module: `torch.<name>`."""
    _patch_pinning(name)
    _patch_accelerator(name, module)
    torch.load = torch.serialization.load = _loading(torch.serialization.load, name)


def _patch_pinning(name: str) -> None:
    pin, is_pinned = torch.Tensor.pin_memory, torch.Tensor.is_pinned

    def pin_memory(self: torch.Tensor, device: Any = None) -> torch.Tensor:
        if device is None and torch.cuda.is_available():
            return pin(self, "cuda")           # torch would ask for this device's allocator
        if self.device.type != "cpu" or (device is not None and torch.device(device).type != name):
            return pin(self) if device is None else pin(self, device)
        copied = self.detach().clone().requires_grad_(self.requires_grad)
        _pinned[copied] = True
        return copied

    def is_pinned_(self: torch.Tensor, device: Any = None) -> bool:
        if self in _pinned:
            return device is None or torch.device(device).type == name
        if device is None and torch.cuda.is_available():
            return is_pinned(self, "cuda")
        return is_pinned(self) if device is None else is_pinned(self, device)

    torch.Tensor.pin_memory = functools.update_wrapper(pin_memory, pin)  # type: ignore[method-assign,assignment]
    torch.Tensor.is_pinned = functools.update_wrapper(is_pinned_, is_pinned)  # type: ignore[method-assign,assignment]


_ASKED = ("synchronize", "empty_cache", "memory_allocated", "max_memory_allocated", "reset_peak_memory_stats")


def _patch_accelerator(name: str, module: Any) -> None:
    for function in _ASKED:
        original = getattr(torch.accelerator, function, None)
        if original is not None:
            setattr(torch.accelerator, function, _answered(original, getattr(module, function), name))


def _answered(original: Callable[..., Any], ours: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        device: Any = args[0] if args else None
        if isinstance(device, str | torch.device) and torch.device(device).type != name:
            return original(*args, **kwargs)   # which says that it is not the accelerator
        return ours()

    return call


def _loading(original: Callable[..., Any], name: str) -> Callable[..., Any]:
    @functools.wraps(original)
    def load(f: Any, map_location: Any = None, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(map_location, str | torch.device) or torch.device(map_location).type != name:
            return original(f, map_location, *args, **kwargs)
        moved: dict[int, Any] = {}

        def move(leaf: Any) -> Any:
            if isinstance(leaf, torch.nn.Module):
                return leaf.to(name)
            if isinstance(leaf, torch.Tensor) and id(leaf) not in moved:
                moved[id(leaf)] = _moved(leaf, name)
            return moved.get(id(leaf), leaf)

        return pytree.tree_map(move, original(f, "cpu", *args, **kwargs))

    return load


def _moved(tensor: torch.Tensor, name: str) -> torch.Tensor:
    there = tensor.detach().to(name)
    if isinstance(tensor, torch.nn.Parameter):
        return torch.nn.Parameter(there, tensor.requires_grad)
    return there.requires_grad_(tensor.requires_grad)
