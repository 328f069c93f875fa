"""`torch.utils.swap_tensors`, by which `Module.to` may exchange the contents of two tensors.

It refuses tensors that somebody has a weak reference to, and a session has one to each tensor that a worker holds. What
is known of the two is forgotten before, so that they travel again with the next call.
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.utils

from genie_dynamo.runtime.client.residency import forget_everywhere
from genie_dynamo.runtime.client.stale import bring_home, is_referred_to

_patched: list[Callable[..., None]] = []


def patch_torch() -> None:
    """Before the first tensor is known. Once: whoever patches it later is left in place."""
    if not _patched:
        _patched.append(_forgetting(torch.utils.swap_tensors))
        torch.utils.swap_tensors = _patched[0]


def _forgetting(original: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(original)
    def swap_tensors(t1: Any, t2: Any) -> None:
        for tensor in (t1, t2):
            if isinstance(tensor, torch.Tensor):
                if is_referred_to(tensor):
                    bring_home()
                forget_everywhere(tensor)
        original(t1, t2)

    return swap_tensors
