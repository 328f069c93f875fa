"""Keeps what Dynamo asks of every accelerator's streams away from a device that has none.

Where torch knows an accelerator, Dynamo makes every compiled call of any backend fetch that accelerator's current
stream and register it, whether the call has to do with it or not. As on a machine without accelerators, tracing begins
here without a current stream, and the calls fetch none.
"""
from __future__ import annotations

import collections
from typing import Any

import torch


def without_streams() -> None:
    """Once per process, when Dynamo's streams are imported."""
    from torch._dynamo.variables import streams

    state: Any = streams.SymbolicStreamState
    original = state.__init__

    def __init__(self: Any) -> None:
        if torch.cuda.is_available():          # its streams are real, and code that is traced may ask for them
            original(self)
        else:
            self.cur_stream_stack = collections.deque()

    state.__init__ = __init__
