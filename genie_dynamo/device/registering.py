"""Gives every aten op its kernel on the device. Done once, when the first op reaches the device."""
from __future__ import annotations

from typing import Any

import torch
from torch._ops import OpOverload

from genie_dynamo.core.allowlist import denial
from genie_dynamo.device.drawing import drawing
from genie_dynamo.device.kernels import functional, mutation, view
from genie_dynamo.device.refused import QUANTIZING, refuse_ops
from genie_dynamo.device.special import COMPOSED, SPECIAL, inplace_view

_LEFT_TO_TORCH = frozenset({
    # These make an alias with the same layout: C++ does it, and nothing is to be recorded.
    "aten::alias", "aten::detach", "aten::detach_", "aten::lift_fresh", "aten::lift",
     "aten::_nested_view_from_buffer", "aten::requires_grad_",
})

_VIEWS_UNSAID = frozenset({"aten::_unsafe_view", "aten::unsafe_split.Tensor", "aten::unsafe_split_with_sizes"})
"""They make views, whatever their schemas say."""


def register_kernels() -> list[Any]:
    """Register; the libraries returned hold the registrations."""
    library: Any = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for qualified in torch._C._dispatch_get_all_op_names():
        if qualified.startswith("aten::"):
            kernel = _kernel_of(qualified)
            if kernel is not None:
                target = _overload(qualified)
                if target is not None and any(a.name == "generator" for a in target._schema.arguments):
                    kernel = drawing(target, kernel)
                library.impl(qualified.removeprefix("aten::"), kernel, "PrivateUse1")
    for name, composed in COMPOSED.items():
        library.impl(name, composed, "AutogradPrivateUse1")
        library.impl(name, composed, "PrivateUse1")
    refuse_ops(library)
    own: Any = torch.library.Library("genie", "IMPL")  # type: ignore[no-untyped-call]
    for name in ("sdpa", "sdpa_bw"):
        own.impl(name, functional(getattr(torch.ops.genie, name).default), "PrivateUse1")
    return [library, own]


def _kernel_of(qualified: str) -> Any:
    special = SPECIAL.get(qualified)
    if special is not None:
        return special
    if qualified in _LEFT_TO_TORCH or qualified.removeprefix("aten::") in {*COMPOSED, *QUANTIZING}:
        return None
    if torch._C._dispatch_has_kernel_for_dispatch_key(qualified, "CompositeImplicitAutograd"):
        return None
    target = _overload(qualified)
    if target is None:
        return None
    if torch.Tag.inplace_view in target.tags:
        return inplace_view(target)
    if denial(target) is not None:
        return None
    schema = target._schema
    if schema.is_mutable:
        return mutation(target)
    if not schema.returns or not all("Tensor" in str(r.type) for r in schema.returns):
        return None
    if qualified in _VIEWS_UNSAID or any(r.alias_info is not None for r in schema.returns):
        return view(target)
    return functional(target)


def _overload(qualified: str) -> OpOverload | None:
    name, _, overload = qualified.removeprefix("aten::").partition(".")
    target = getattr(getattr(torch.ops.aten, name), overload or "default", None)
    return target if isinstance(target, OpOverload) else None
