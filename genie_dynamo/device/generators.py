"""`torch.Generator(device="remote_accelerator")`.

torch asks an accelerator's C++ for a new generator, and its hooks from Python leave that out. In newer versions (2.13;
not 2.11) the class of `torch.Generator` is written in Python, and can decide what calling `torch.Generator` does. A
generator of the device is the CPU's in everything but its device: it lies with the caller, and what it draws goes up
(drawing.py). On a CPU worker these are the numbers that the worker would draw from the same seed.
"""
from __future__ import annotations

from typing import Any

import torch

from genie_dynamo.device import NAME

TorchGenerator: Any = torch._C.Generator


class DeviceGenerator(TorchGenerator):  # type: ignore[misc]
    """Draws for tensors of the device."""

    @property
    def device(self) -> torch.device:
        """The device that it was made for."""
        return torch.device(NAME, 0)

    def clone_state(self) -> DeviceGenerator:
        """Another one that goes on from here."""
        return _restored(self.get_state())

    def __reduce__(self) -> Any:
        return _restored, (self.get_state(),)


def _restored(state: torch.Tensor) -> DeviceGenerator:
    made = DeviceGenerator()
    made.set_state(state)
    return made


def _call(cls: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands as `__call__` of the class of `torch.Generator`, which other classes have too."""
    if cls is TorchGenerator:
        asked = args[0] if args else kwargs.get("device")
        if isinstance(asked, str | torch.device) and torch.device(asked).type == NAME:
            from genie_dynamo.device.foreign import check_ordinal

            check_ordinal(torch.device(asked))
            return DeviceGenerator()
    return type.__call__(cls, *args, **kwargs)


def patch_generator() -> None:
    """Once per process, when the device becomes known. Does nothing where torch has no place for it."""
    kind: Any = type(TorchGenerator)
    if kind is not type and "__call__" not in vars(kind):
        kind.__call__ = _call


def untraced() -> None:
    """Have Dynamo, which breaks a graph where a generator is made, leave our part of that alone."""
    from torch._dynamo.eval_frame import skip_code

    skip_code(_call.__code__)
