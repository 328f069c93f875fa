"""Times of a plan's steps, taken in a few of its ordinary runs: nothing is run for the sake of being timed.

    plan._steps = [timed(step), ...]  --RUNS runs later-->  plan._steps = [step, ...]

A plan that is not being timed runs the very steps it was built with, so the hot path has no switch to look at.
"""
from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from genie_dynamo.runtime.steps import Step

RUNS = 5
"""Runs whose median counts."""


class StepTimes:
    """Puts timed steps into a plan's place, and takes them out again once the last of them has run RUNS times.

    Runs of one plan may be interleaved, and one may have begun before: each step counts its own times.

    Args: use: makes the plan run other steps, one for one.
    """

    def __init__(self, steps: Sequence[Step], node_of_step: Sequence[int], num_nodes: int, device: torch.device,
                 use: Callable[[list[Step]], None]) -> None:
        self._node_of_step, self._num_nodes = node_of_step, num_nodes
        self._samples: list[list[float]] = [[] for _ in steps]
        # What a device was told to do is over only when it says so.
        self._wait: Callable[[], Any] | None = torch.cuda.synchronize if device.type == "cuda" else None
        timed = [self._timed(step, samples) for step, samples in zip(steps, self._samples, strict=True)]
        if timed:
            plain, last, samples = list(steps), timed[-1], self._samples[-1]

            def last_step(registers: list[Any]) -> None:
                last(registers)
                if len(samples) >= RUNS:
                    use(plain)

            timed[-1] = last_step
            use(timed)

    def _timed(self, step: Step, samples: list[float], clock: Callable[[], float] = time.perf_counter) -> Step:
        wait = self._wait

        def timed(registers: list[Any]) -> None:
            before_s = clock()
            step(registers)
            after_s = clock()
            if len(samples) < RUNS:
                samples.append(after_s - before_s)

        def waited(registers: list[Any]) -> None:
            assert wait is not None
            wait()
            before_s = clock()
            step(registers)
            wait()
            after_s = clock()
            if len(samples) < RUNS:
                samples.append(after_s - before_s)

        return timed if wait is None else waited

    def seconds(self) -> tuple[float, ...] | None:
        """Median seconds of each node, with what freeing its arguments takes; None until all have run."""
        if any(not samples for samples in self._samples):
            return None
        seconds = [0.0] * self._num_nodes
        for node, samples in zip(self._node_of_step, self._samples, strict=True):
            seconds[node] += statistics.median(samples)
        return tuple(seconds)
