"""What this machine can do, measured in under a second and remembered.

    steps = measure(device, num_threads)       # a generator: each step takes some tens of milliseconds
    facts = finish(steps)                      # or one step at a time, between other work

Measured once per machine, device, number of threads and torch release; kept in the user's cache directory.
"""
from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import platform
import resource
import time
from collections.abc import Callable, Generator
from typing import Any

import torch

from genie_dynamo.core import user_cache
from genie_dynamo.core.errors import CostError
from genie_dynamo.core.hardware import HardwareFacts

log = logging.getLogger(__name__)

Steps = Generator[None, None, HardwareFacts]

_MAX_FILE_BYTES = 64 << 10
_LEAST_S = 0.004
"""A timing shorter than this is repeated with more work."""
_REPEATS = 3
_MATMUL_SIZES = (64, 128, 256, 512, 1024, 2048, 4096)
_MAX_MATMUL_CPU = 1024
_ELEMENTS_IN_CACHE = 16 << 10
_TOUCHED_BYTES = (64 << 10, 512 << 10, 2 << 20, 8 << 20, 24 << 20, 64 << 20)
_OVERHEAD_CALLS = 300


def cached(device: torch.device, num_threads: int) -> HardwareFacts | None:
    """What was measured before on this machine; None where nothing was, or what is there cannot be used."""
    content = user_cache.read(_file_name(device, num_threads), _MAX_FILE_BYTES)
    if content is None:
        return None
    try:
        known = HardwareFacts.from_json(json.loads(content))
        # The limit is this process's own, not the machine's.
        return dataclasses.replace(known, memory_bytes=_memory_bytes(device))
    except (ValueError, RecursionError, CostError) as error:
        log.warning("measured facts of this machine cannot be used, they are measured again: %s", error)
        return None


def remember(device: torch.device, num_threads: int, facts: HardwareFacts) -> None:
    """Keep facts for the next process."""
    user_cache.write(_file_name(device, num_threads), json.dumps(facts.to_json()).encode())


def finish(steps: Steps) -> HardwareFacts:
    """Take all steps at once."""
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            facts: HardwareFacts = stop.value
            return facts


def measure(device: torch.device, num_threads: int, clock: Callable[[], float] = time.perf_counter) -> Steps:
    """Measure in steps; the generator's result is the facts."""
    timer = _Timer(device, clock)
    started_s = clock()
    overhead_s = timer.overhead()
    yield
    matmul = []
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        rate = yield from timer.matmul_rate(getattr(torch, dtype))
        matmul.append((dtype, rate))
    elementwise = []
    for dtype in ("float32", "float64", "bfloat16", "float16"):
        elementwise.append((dtype, timer.elementwise_rate(getattr(torch, dtype), overhead_s)))
        yield
    memory = yield from timer.memory_rates(overhead_s)
    seconds = clock() - started_s
    return HardwareFacts(
        name=_device_name(device), kind=device.type,
        source=f"measured in {seconds:.2f} s, torch {torch.__version__}, {num_threads} thread(s), {platform.node()}",
        matmul_flops_per_s=tuple(matmul), elementwise_ops_per_s=tuple(elementwise), memory_bytes_per_s=memory,
        op_overhead_s=overhead_s, memory_bytes=_memory_bytes(device), num_threads=num_threads)


class _Timer:
    """Times calls on a device. The fastest repeat counts: what disturbs a measurement only makes it longer."""

    def __init__(self, device: torch.device, clock: Callable[[], float]) -> None:
        self._device, self._clock = device, clock
        self._wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def seconds(self, call: Callable[[], object], calls: int = 1) -> float:
        """Seconds of one call, from `calls` of them in a row."""
        best = float("inf")
        for _ in range(_REPEATS):
            self._wait()
            started_s = self._clock()
            for _ in range(calls):
                call()
            self._wait()
            best = min(best, (self._clock() - started_s) / calls)
        return max(best, 1e-9)

    def overhead(self) -> float:
        x = torch.ones(1, device=self._device)
        return self.seconds(lambda: torch.add(x, x), _OVERHEAD_CALLS)

    def matmul_rate(self, dtype: torch.dtype) -> Generator[None, None, float]:
        """Flops per second at the first size that takes long enough to be timed."""
        rate = 0.0
        for size in _MATMUL_SIZES:
            x = torch.ones(size, size, dtype=dtype, device=self._device)
            seconds = self.seconds(lambda x=x: torch.mm(x, x))  # type: ignore[misc]
            rate = max(rate, 2 * size ** 3 / seconds)
            yield
            if seconds >= _LEAST_S or (self._device.type == "cpu" and size >= _MAX_MATMUL_CPU):
                break
        return rate

    def elementwise_rate(self, dtype: torch.dtype, overhead_s: float) -> float:
        """Adds per second over arguments that stay in the first levels of cache."""
        elements = _ELEMENTS_IN_CACHE if self._device.type == "cpu" else _ELEMENTS_IN_CACHE << 8
        x, out = (torch.ones(elements, dtype=dtype, device=self._device) for _ in range(2))
        seconds = self.seconds(lambda: torch.add(x, x, out=out), 50)
        return elements / max(seconds - overhead_s, seconds / 10)

    def memory_rates(self, overhead_s: float) -> Generator[None, None, tuple[tuple[int, float], ...]]:
        """Bytes per second by bytes touched: one read, one written."""
        source, target = (torch.ones(_TOUCHED_BYTES[-1] // 8, device=self._device) for _ in range(2))
        yield
        rates = []
        for touched in _TOUCHED_BYTES:
            x, out = source[: touched // 8], target[: touched // 8]
            calls = max(1, (2 << 20) // touched)
            seconds = self.seconds(lambda x=x, out=out: torch.add(x, 1, out=out), calls)  # type: ignore[misc]
            rates.append((touched, touched / max(seconds - overhead_s, seconds / 10)))
            yield
        return tuple(rates)


def _file_name(device: torch.device, num_threads: int) -> str:
    identity = "\n".join([platform.node(), _device_name(device), str(os.cpu_count()), str(num_threads),
                          str(torch.__version__), "2"])
    return f"hardware-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.json"


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return str(device)
    capability: Any = torch.backends.cpu.get_cpu_capability()
    return f"{platform.machine()} {_cpu_model()} {capability}".strip()


def _cpu_model() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:  # noqa: PTH123
            lines = (line for line in file if line.startswith("model name"))
            return next(lines, ":").split(":", 1)[1].strip()
    except OSError:
        return platform.processor()


def _memory_bytes(device: torch.device) -> int | None:
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "cpu":
        # A worker sets itself a limit (worker/main.py), and its owner may have set one for it.
        memory_bytes = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        limits = (resource.getrlimit(kind)[0] for kind in (resource.RLIMIT_DATA, resource.RLIMIT_AS))
        return min([memory_bytes, *(limit for limit in limits if limit != resource.RLIM_INFINITY)])
    return None
