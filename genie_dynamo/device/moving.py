"""`module.to("remote_accelerator")` keeps each Parameter the object that it is.

To and from devices that torch does not list as dense, `Module._apply` makes new Parameters: weights that were tied come
apart, and an optimizer that was made before loses them. Swapping the content of the two, which torch has a switch for,
does what `.to("cuda")` does.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

_original: Callable[..., Any] = torch.nn.Module._apply


def patch_modules(name: str) -> None:
    """Once per process, before the first module is moved. Args: name: of the device."""

    def _apply(self: torch.nn.Module, fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if torch.__future__.get_swap_module_params_on_conversion() or not _crosses(self, fn, name):
            return _original(self, fn, *args, **kwargs)
        torch.__future__.set_swap_module_params_on_conversion(True)
        try:
            return _original(self, fn, *args, **kwargs)
        finally:
            torch.__future__.set_swap_module_params_on_conversion(False)

    torch.nn.Module._apply = _apply  # type: ignore[method-assign]


def _crosses(module: torch.nn.Module, fn: Callable[..., Any], name: str) -> bool:
    """Whether the module is on the device and leaves it, or the other way round."""
    is_lazy: Callable[[Any], bool] = torch.nn.parameter.is_lazy
    for parameter in module.parameters():
        if is_lazy(parameter):
            continue           # it has no shape yet
        probe = parameter.detach()[:0] if parameter.dim() else parameter.detach()
        try:
            moved = fn(probe)
        except Exception:      # whatever fn wants of its argument, the real call will say
            return False
        return isinstance(moved, torch.Tensor) and (moved.device.type == name) != (parameter.device.type == name)
    return False
