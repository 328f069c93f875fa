"""Which lanes this machine can use, why not the others, and how fast they are here: `genie lanes`, `genie doctor`.

Rates are measured between two ends of this process, with one copy into the lane's memory where it makes one; between
two processes or hosts they are measured when a session is opened (LaneChoice in runtime/client/negotiation.py).
"""
from __future__ import annotations

import os
import secrets
import threading
import time
from dataclasses import asdict, dataclass
from typing import Any

from genie_dynamo.runtime.lanes import dpdk, native

NAMES = ("shm", "tcp", "dpdk", "cuda_staging", "gpudirect")
SAMPLE_BYTES = 16 << 20
SAMPLES = 6
_TIMEOUT_S = 10.0
_VERIFIED = frozenset({"shm", "tcp"})     # on the hardware they are for; the others' modules speak for themselves


@dataclass(frozen=True, slots=True, kw_only=True)
class LaneFacts:
    """One kind of lane on this machine."""

    name: str
    usable: bool
    reason: str                      # why not, or what it is
    gb_per_s: float | None           # measured here and now; None where it was not
    hardware_verified: bool          # has been run on the hardware that it is for

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def survey(*, measure: bool = True) -> tuple[LaneFacts, ...]:
    """Probe every kind of lane; where `measure`, time those that two ends of this process can use (under a second)."""
    found = _probes()
    rows = []
    for name in NAMES:
        usable, reason = found[name]
        rate = None
        if measure and usable and name in _VERIFIED:
            try:
                rate = round(gb_per_s(name), 2)
            except OSError as error:
                usable, reason = False, f"it was probed but does not work: {error}"
        verified = name in _VERIFIED
        if not verified and name != "dpdk":
            reason = f"{reason}; not verified on hardware"
        rows.append(LaneFacts(name=name, usable=usable, reason=reason, gb_per_s=rate, hardware_verified=verified))
    return tuple(rows)


def _probes() -> dict[str, tuple[bool, str]]:
    module = native.module()
    if module is None:
        return dict.fromkeys(NAMES, (False, native.why_not()))
    why_not = dpdk.why_not()
    return {"dpdk": (not why_not, why_not or dpdk.describe()), **module.probe()}


def gb_per_s(name: str, size_bytes: int = SAMPLE_BYTES, samples: int = SAMPLES) -> float:
    """The best rate of one-way transfers between two ends in this process, in 1e9 bytes a second. Raises: OSError."""
    module = native.module()
    listener = module.listen(name, f"@genie-survey-{os.getpid()}-{secrets.token_hex(4)}" if name == "shm"
                             else "127.0.0.1:0")
    thread = threading.Thread(target=_answer, args=(listener, samples + 1), daemon=True)
    thread.start()
    channel = module.connect(name, listener.address, _TIMEOUT_S)
    payload = bytearray(size_bytes)
    best_s = float("inf")
    try:
        for sample in range(samples + 1):
            started_s = time.perf_counter()
            channel.send([b"", payload])
            if channel.receive(_TIMEOUT_S) is None:
                raise TimeoutError(f"the {name} lane took longer than {_TIMEOUT_S:g} s for {size_bytes} bytes")
            if sample:                                 # the first touches new pages
                best_s = min(best_s, time.perf_counter() - started_s)
    finally:
        channel.close()
        thread.join(_TIMEOUT_S)
        listener.close()
    return size_bytes / best_s / 1e9


def _answer(listener: Any, count: int) -> None:
    """The other end: says that it has each message."""
    until_s = time.monotonic() + _TIMEOUT_S
    channel = None
    while channel is None and time.monotonic() < until_s:
        channel = listener.accept()
        if channel is None:
            time.sleep(0.001)
    if channel is None:
        return
    try:
        for _ in range(count):
            if channel.receive(_TIMEOUT_S) is None:
                return
            channel.send([b""])
        channel.quiesce(_TIMEOUT_S)
    except OSError:
        return               # the measuring end says what went wrong
    finally:
        channel.close()
