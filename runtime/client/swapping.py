"""`torch.utils.swap_tensors`, by which `Module.to` may exchange the contents of two tensors.

It refuses tensors that somebody has a weak reference to, and a session has one to each tensor that a worker holds. What
is known of the two is forgotten before, so that they travel again with the next call.
"""
from __future__ import annotations

from typing import Any

import torch
import torch.utils

from genie_dynamo.runtime.client.residency import forget_everywhere
from genie_dynamo.runtime.client.stale import bring_home, is_stale

_original: Any = torch.utils.swap_tensors


def patch_torch() -> None:
    """Before the first tensor is known. Harmless when it is done again."""
    torch.utils.swap_tensors = _swap_tensors


def _swap_tensors(t1: Any, t2: Any) -> None:
    for tensor in (t1, t2):
        if isinstance(tensor, torch.Tensor):
            if is_stale(tensor):
                bring_home()
            forget_everywhere(tensor)
    _original(t1, t2)
