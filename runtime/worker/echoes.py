"""Payload to another worker and back over a native lane: a proof that the lane works, and how fast it is.

Both wait for the other worker's answer, so they belong into a thread beside the worker's loop: two workers that do it
to each other at the same time must both go on answering.
"""
from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import Any

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import GenieError, ProtocolError
from genie_dynamo.core.program import Offers
from genie_dynamo.core.wire import pack, unpack
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.ends import NativeEnd, connect_native
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames

log = logging.getLogger(__name__)

TIMEOUT_S = 5.0

ECHOES = 5
"""Round trips of each size; the fastest counts."""


def echo(end: NativeEnd, session: bytes, payload: torch.Tensor) -> torch.Tensor:
    """What comes back. Raises: OSError, GenieError."""
    frames: list[Any] = []
    lane = ZmqFrames()
    header = pack(m.to_wire(m.Echo(1, session, (m.INLINE, lane.stage(payload, frames)))))
    end.send(header, frames, _too_late)
    try:
        came = end.read()
    except BlockingIOError:
        _too_late()
    if came is None:
        raise ProtocolError("a lane that says its answers come elsewhere")
    answer = m.from_wire(unpack(came[0], flat=True))
    if not isinstance(answer, m.Result):
        raise ProtocolError(f"an echo was answered with {type(answer).__name__}")
    return lane.land(answer.values[0][1][1], came[1], torch.device("cpu"))


class LaneTimes:
    """Times of echoes over the first native lane that opens, taken in a thread of its own.

    name      the lane; "" where none opened, or while the thread is at it
    best_s    seconds of the fastest round trip, by size
    """

    def __init__(self, offers: Offers, session: bytes, sizes_bytes: Sequence[int]) -> None:
        self.name = ""
        self.best_s: dict[int, float] = {}
        self._offers, self._session, self._sizes_bytes = offers, session, sizes_bytes
        self._thread = threading.Thread(target=self._run, name="genie-lane-times", daemon=True)
        self._thread.start()

    def wait(self, timeout_s: float) -> bool:
        """Whether the thread has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        for name, version, address in self._offers if native.module() is not None else ():
            if version != native.lane_version():
                continue
            try:
                end = connect_native(name, address, TIMEOUT_S, TIMEOUT_S)
            except OSError as error:
                log.info("no %s lane to time: %s", name, error)
                continue
            try:
                best_s = {size: min(self._seconds(end, size) for _ in range(ECHOES)) for size in self._sizes_bytes}
            except (OSError, GenieError) as error:
                log.info("a %s lane opens but cannot be timed: %s", name, error)
                continue
            finally:
                end.close()
            self.name, self.best_s = name, best_s
            return

    def _seconds(self, end: NativeEnd, size_bytes: int) -> float:
        payload = torch.ones(size_bytes, dtype=torch.uint8)
        started_s = time.perf_counter()
        echo(end, self._session, payload)
        return time.perf_counter() - started_s


def _too_late() -> None:
    raise TimeoutError(f"nothing came back within {TIMEOUT_S:g} s")
