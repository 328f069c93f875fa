"""The native extension, where it was built: its lanes, and what a received buffer becomes.

It is optional. Without it payload takes the lanes of the standard library (stream.py) and of ZeroMQ (zmq_frames.py).
"""
from __future__ import annotations

import ctypes
from collections.abc import Iterable
from typing import Any

import torch

from genie_dynamo.core.stencil import Form
from genie_dynamo.runtime.lanes import copies

API_VERSION = 3
"""Of native/lane/lane.h: an extension that was built from older sources is not used."""

_module: Any = None
_why_not = ""
try:
    from genie_dynamo import _native

    if getattr(_native, "API_VERSION", 1) == API_VERSION:
        _module = _native
    else:
        _why_not = "the native extension was built from other sources than these: build it again (pip install -e .)"
except ImportError as error:
    _why_not = (f"the native extension is not there ({error}); it needs CMake, a C++20 compiler and pybind11 when the "
                "package is built: GENIE_REQUIRE_NATIVE=1 pip install ... says what is missing")

COPY_BELOW_BYTES = 256 << 10
"""Results below this size are copied out of the worker's pages at once: they would keep a whole slab each."""


def module() -> Any:
    """genie_dynamo._native, or None; `why_not` then says why."""
    return _module


def why_not() -> str:
    """Why there is no native lane in this process; empty where there are some."""
    return _why_not


def lane_version() -> int:
    """What this side's native lanes speak; 0 where there are none."""
    return int(_module.LANE_VERSION) if _module is not None else 0


def stencil(form: Form) -> Any:
    """The extension's view of what is remembered of a message."""
    return _module.Stencil(form.data, list(form.holes))


def sum_memory(pools: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """The numbers of several lanes' pools as those of one; empty where there is none."""
    rows = [row for row in pools if row]
    if not rows:
        return {}
    total = {name: sum(row[name] for row in rows)
             for name in ("reserved_bytes", "used_bytes", "asked_bytes", "num_segments", "num_refusals")}
    used = total["used_bytes"]
    return {**total, "fragmentation": round(1 - total["asked_bytes"] / used, 3) if used else 0.0,
            "pages": ", ".join(sorted({row["pages"] for row in rows}))}


def to_tensor(memory: Any) -> torch.Tensor:
    """A uint8 tensor over a received buffer, which lives as long as the tensor. It may be another process's pages."""
    return torch.frombuffer(memory, dtype=torch.uint8) if len(memory) else torch.empty(
        0, dtype=torch.uint8, device="cpu")


def to_own_tensor(memory: Any) -> torch.Tensor:
    """The same for who may write to it: what is small is copied, so that it does not hold a slab of the sender's."""
    tensor = to_tensor(memory)
    if not memory.foreign or (not memory.read_only and len(memory) >= COPY_BELOW_BYTES):
        return tensor
    copies.copied_in(len(memory))
    return copied(tensor)


def copied(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of a contiguous CPU tensor, by this thread alone.

    torch would share it out, and the other threads of its pool then stay awake for milliseconds, on the core that the
    worker needs for the next call.
    """
    own = torch.empty_like(tensor)
    ctypes.memmove(own.data_ptr(), tensor.data_ptr(), tensor.nbytes)
    return own


def copy_rows(target: torch.Tensor, start: int, rows: torch.Tensor, dim: int) -> None:
    """Copy into `target` from `start` of `dim` on, by this thread alone (see `copied`).

    Args: target, rows: contiguous CPU tensors of one dtype, and of one shape but for `dim`.
    """
    step = target.stride(dim) * target.element_size()        # of one row
    to_bytes, from_bytes = target.shape[dim] * step, rows.shape[dim] * step
    count = rows.nbytes // from_bytes if from_bytes else 0
    to, source = target.data_ptr() + start * step, rows.data_ptr()
    if _module is not None:
        _module.copy_blocks(to, to_bytes, source, from_bytes, from_bytes, count)
        return
    for block in range(count):
        ctypes.memmove(to + block * to_bytes, source + block * from_bytes, from_bytes)


def is_foreign(tensor: torch.Tensor) -> bool:
    """Whether a CPU tensor's memory is another process's pages, which must not be written to or kept."""
    return _module is not None and tensor.device.type == "cpu" and bool(_module.in_foreign_pages(tensor.data_ptr()))
