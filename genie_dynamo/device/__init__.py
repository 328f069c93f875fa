"""The device `remote_accelerator`: tensors that live on a worker, and ops that are recorded until a value is read.

`register()` makes the name known to torch; everything else is imported when the first tensor of the device is made.
"""
from __future__ import annotations

from typing import Any

NAME = "remote_accelerator"

_libraries: list[Any] = []
unavailable = ""
"""Why the device cannot be had in this process; empty where it can."""


def register() -> None:
    """Make torch know the device. Does nothing the second time, or where another backend has the place."""
    import torch
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    global unavailable
    if _libraries or unavailable:
        return
    holder = torch._C._get_privateuse1_backend_name()
    if holder != "privateuseone":
        unavailable = (f"torch has room for one device from outside, and in this process {holder!r} has taken it; "
                       f"torch.compile(backend=\"genie\") works all the same")
        return
    from genie_dynamo.device.module import RemoteAccelerator

    _setup_privateuseone_for_python_backend(NAME, backend_module=RemoteAccelerator())
    fallback: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    fallback.fallback(_first_op, "PrivateUse1")
    _libraries.append(fallback)


def _first_op(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands for every op until the first one comes: then all get their kernels."""
    activate()
    return op(*args, **kwargs)


def activate() -> None:
    """Load the device's kernels."""
    if len(_libraries) == 1:
        from genie_dynamo.device.patches import patch_torch
        from genie_dynamo.device.registering import register_kernels

        fallback = _libraries.pop()
        fallback._destroy()
        _libraries.extend([None, *register_kernels()])
        patch_torch()
