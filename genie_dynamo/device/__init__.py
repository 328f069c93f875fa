"""The device `remote_accelerator`: tensors that live on a worker, and ops that are recorded until a value is read.

`register()` makes the name known to torch; everything else is imported when the first tensor of the device is made.
"""
from __future__ import annotations

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

NAME = "remote_accelerator"

_libraries: list[Any] = []
_refusals: list[Any] = []
unavailable = ""
"""Why the device cannot be had in this process; empty where it can."""


def arrange() -> None:
    """Register the device now where torch is there, else as soon as it is: torch itself is not imported for it.

    An embedded worker has its own devices and does not want this one.
    """
    if "genie_dynamo.runtime.worker" in sys.orig_argv:
        return
    after_import("torch", register)


def after_import(name: str, action: Callable[[], None]) -> None:
    """Run an action when the module is there: now, or when its import has ended."""
    if name in sys.modules:
        action()
    elif not any(isinstance(finder, _After) and finder.name == name for finder in sys.meta_path):
        sys.meta_path.insert(0, _After(name, action))


class _After(importlib.abc.MetaPathFinder):
    """Sees the import of one module, and runs an action when it has ended."""

    def __init__(self, name: str, action: Callable[[], None]) -> None:
        self.name, self._action = name, action

    def find_spec(self, fullname: str, path: Sequence[str] | None = None,
                  target: ModuleType | None = None) -> importlib.machinery.ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            spec.loader = _Then(spec.loader, self._action)
        return spec


class _Then(importlib.abc.Loader):
    """A loader that runs an action after its module."""

    def __init__(self, loader: Any, action: Callable[[], None]) -> None:
        self._loader, self._action = loader, action

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)  # type: ignore[no-any-return]

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._action()


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
        from genie_dynamo.device.module import Unavailable

        setattr(torch, NAME, Unavailable(unavailable))
        return
    from genie_dynamo.device.generators import patch_generator, untraced
    from genie_dynamo.device.guard import Guard
    from genie_dynamo.device.host import patch_host
    from genie_dynamo.device.module import RemoteAccelerator
    from genie_dynamo.device.moving import patch_modules
    from genie_dynamo.device.refused import refuse_layouts
    from genie_dynamo.device.streams import without_streams

    module = RemoteAccelerator()
    _setup_privateuseone_for_python_backend(NAME, backend_module=module, device_guard=Guard())
    patch_host(NAME, module)
    patch_modules(NAME)
    patch_generator()
    after_import("torch._dynamo.eval_frame", untraced)
    after_import("torch._dynamo.variables.streams", without_streams)
    fallback: Any = torch.library.Library("_", "IMPL")  # type: ignore[no-untyped-call]
    fallback.fallback(_first_op, "PrivateUse1")
    _libraries.append(fallback)
    _refusals.extend(refuse_layouts())


def _first_op(op: Any, *args: Any, **kwargs: Any) -> Any:
    """Stands for every op until the first one comes: then all get their kernels."""
    activate()
    return op(*args, **kwargs)


def activate() -> None:
    """Load the device's kernels."""
    if len(_libraries) == 1:
        from genie_dynamo.device.autocast import register_autocast
        from genie_dynamo.device.patches import patch_torch
        from genie_dynamo.device.registering import register_kernels

        fallback = _libraries.pop()
        fallback._destroy()
        _libraries.extend([None, *register_kernels(), *register_autocast()])
        patch_torch()
