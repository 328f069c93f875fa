"""Payload between lanes and a CUDA device, through page-locked memory and on streams of its own.

Without it a copy to or from the device waits for everything that the device is doing, and the processor waits with it.
Here the lanes' own memory is page-locked (native/gpu/pinning.h), so the device reads what has arrived where it lies
and writes what will leave where it leaves from; uploads and downloads each have a stream beside the one that computes.

    up      the copy is queued; what computes on the tensor waits for it on the device, the processor does not
    begin   a result is final but not yet asked for: its copy to the host is queued behind what makes it
    down    the host's copy is complete when this returns

It is used where it has been proven: a pattern goes up and down when the worker starts, and if that fails, copies are
made the plain way, and the log says why. Not verified on hardware: no machine with a GPU ran this.
"""
from __future__ import annotations

import logging
from collections import Counter, deque
from typing import Any

import torch

from genie_dynamo.core.tensors import is_dense
from genie_dynamo.runtime.lanes import native

log = logging.getLogger(__name__)

SMALL_BYTES = 64 << 10
"""Below this the plain copy is as fast: the driver sends it along with the command."""
MAX_BEGUN = 256
"""Results whose copy was begun and which nobody has asked for yet."""
_PROOF_BYTES = 1 << 20


class Staging:
    """See the module's docstring. Used by the worker's one thread.

    Args:
        device: a CUDA device.
        pool:   lends page-locked memory: `allocate(size)` -> a buffer, or MemoryError; one of genie_dynamo._native.
        streams: torch.cuda, or what stands in for it in tests (Stream, stream, current_stream).
    """

    def __init__(self, device: torch.device, pool: Any, streams: Any = torch.cuda) -> None:
        self._device = device
        self._pool = pool
        self._streams = streams
        self._uploads, self._downloads = streams.Stream(device), streams.Stream(device)
        self._under_way: deque[tuple[Any, torch.Tensor]] = deque()
        self._begun: dict[int, tuple[torch.Tensor, torch.Tensor, Any]] = {}
        self.counted: Counter[str] = Counter()
        """Bytes that went `up` and `down` so, and those that took the `plain` way because no memory was to be had."""

    def up(self, host: torch.Tensor) -> torch.Tensor:
        """The dense host tensor on the device, once what computes there gets to it."""
        self._sweep()
        if host.nbytes < SMALL_BYTES or not is_dense(host.shape, host.stride()):
            return host.to(self._device)
        if not host.is_pinned():
            lent = self._lend(host)
            if lent is None:
                return host.to(self._device)
            host = lent.copy_(host)
        with self._streams.stream(self._uploads):
            made = torch.empty_strided(host.shape, host.stride(), dtype=host.dtype, device=self._device)
            made.copy_(host, non_blocking=True)
            copied = self._uploads.record_event()
        compute = self._streams.current_stream(self._device)
        compute.wait_event(copied)
        made.record_stream(compute)              # its memory is the upload stream's, and must not go back before
        self._under_way.append((copied, host))
        self.counted["up"] += host.nbytes
        return made

    def begin(self, value: torch.Tensor) -> bool:
        """Queue the copy of a final result to the host; `down` will find it. False where that gains nothing."""
        if id(value) in self._begun:
            return True
        if value.nbytes < SMALL_BYTES or not is_dense(value.shape, value.stride()) or value.is_conj() \
                or value.is_neg() or value._is_zerotensor():
            return False
        host = self._lend(value)
        if host is None:
            return False
        while len(self._begun) >= MAX_BEGUN:     # of runs that failed: nobody asks for them any more
            _, _, copied = self._begun.pop(next(iter(self._begun)))
            copied.synchronize()                 # the device writes to that memory until then
        self._downloads.wait_stream(self._streams.current_stream(self._device))
        with self._streams.stream(self._downloads):
            host.copy_(value, non_blocking=True)
            copied = self._downloads.record_event()
        value.record_stream(self._downloads)
        self._begun[id(value)] = (value, host, copied)
        return True

    def down(self, value: torch.Tensor) -> torch.Tensor:
        """The host's copy of a tensor of the device, complete."""
        self._sweep()
        if not self.begin(value):
            return value.cpu()
        _, host, copied = self._begun.pop(id(value))
        copied.synchronize()
        self.counted["down"] += host.nbytes
        return host

    def _sweep(self) -> None:
        """Let go of host memory that the device has read."""
        while self._under_way and self._under_way[0][0].query():
            self._under_way.popleft()

    def _lend(self, like: torch.Tensor) -> torch.Tensor | None:
        try:
            memory = self._pool.allocate(like.nbytes)
        except MemoryError as error:
            log.info("staging memory is short, a plain copy is made: %s", error)
            self.counted["plain"] += like.nbytes
            return None
        flat = native.to_tensor(memory)[:like.nbytes].view(like.dtype)
        return flat.as_strided(like.shape, like.stride())


def open_staging(device: torch.device) -> Staging | None:
    """Staging for a worker's device, where it has been proven to work. To be called before there are lanes."""
    module = native.module()
    if device.type != "cuda" or module is None:
        return None
    possible, why_not = module.pin_segments()
    if not possible:
        log.warning("payload takes the plain way to %s: %s", device, why_not)
        return None
    try:
        staging = Staging(device, module.Pool())
        prove(staging)
    except (RuntimeError, MemoryError) as error:
        log.warning("payload takes the plain way to %s, staging does not work here: %s", device, error)
        return None
    return staging


def prove(staging: Staging) -> None:
    """Send a pattern up and down. Raises: RuntimeError where it does not come back as it went."""
    pattern = torch.arange(_PROOF_BYTES, device="cpu").remainder(251).to(torch.uint8)
    if not torch.equal(staging.down(staging.up(pattern) ^ 255), pattern ^ 255):
        raise RuntimeError("a pattern came back changed")
    if staging.counted["plain"]:
        raise RuntimeError("no staging memory")
