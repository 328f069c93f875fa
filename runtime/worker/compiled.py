"""Inductor's code for one fragment: compiled beside the loop, used when asked for ("inductor") or faster ("auto")."""
from __future__ import annotations

import logging
import statistics
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal

import torch

from genie_dynamo.core.fragment import GraphSpec
from genie_dynamo.runtime.inductor import compile_with_inductor

log = logging.getLogger(__name__)

RUNS: Counter[str] = Counter()
"""What ran in this process where Inductor was asked for: "code", "flat", and how often "auto" has "settled"."""

_TRIALS = 3
"""Runs of each kind that "auto" measures before it settles on one."""


class CompiledFragment:
    """Decides, per run, between the flat plan and Inductor's code. Used from the worker's loop only.

    inductor   runs wait for the compilation, then use its code
    auto       the flat plan runs meanwhile; then each kind is measured and the faster one stays
    A graph that Inductor refuses runs flat; `refusal` says why.
    """

    def __init__(self, spec: GraphSpec, mode: str, device: torch.device, namespaces: frozenset[str],
                 wake: Callable[[], None]) -> None:
        self.refusal = ""
        self._spec, self._mode, self._device, self._wake = spec, mode, device, wake
        self._namespaces = namespaces
        self._code: Callable[[list[Any]], list[Any]] | None = None
        self._thread: threading.Thread | None = None
        self._flat_s: list[float] = []
        self._code_s: list[float] = []
        self._settled: Literal["flat", "code"] | None = None

    def choose(self, inputs: list[Any]) -> Literal["wait", "flat", "code"]:
        """What the next run should use."""
        if self.refusal:
            return "flat"
        if self._code is None:
            if self._thread is None:
                self._start(inputs)
            return "wait" if self._mode == "inductor" else "flat"
        if self._mode == "inductor":
            return "code"
        if self._settled is None:
            if len(self._code_s) <= _TRIALS:
                return "code"
            if len(self._flat_s) < _TRIALS:
                return "flat"
            # The first run of the code warms it up and does not count.
            faster = statistics.median(self._code_s[1:]) < statistics.median(self._flat_s[-_TRIALS:])
            self._settled = "code" if faster else "flat"
            RUNS["settled"] += 1
            log.info("auto settled on %s: code %s s, flat %s s", self._settled, self._code_s, self._flat_s)
        return self._settled

    def flat_took(self, seconds: float) -> None:
        """Report a run of the flat plan."""
        RUNS["flat"] += 1
        if self._settled is None:
            self._flat_s.append(seconds)
            del self._flat_s[:-_TRIALS]

    def run(self, inputs: list[Any]) -> list[Any]:
        """Run Inductor's code."""
        assert self._code is not None
        started = time.perf_counter()
        outputs = self._code(inputs)
        RUNS["code"] += 1
        if self._mode == "auto" and self._settled is None:
            self._code_s.append(time.perf_counter() - started)
        return outputs

    def _start(self, inputs: list[Any]) -> None:
        # A CUDA build without a device replaces its device guard when fake tensors are first used; done by the
        # compiling thread, that ends the process (seen with torch 2.11).
        torch._C._ensureCUDADeviceGuardSet()
        examples = [x.detach() if isinstance(x, torch.Tensor) else x for x in inputs]
        self._thread = threading.Thread(target=self._compile, args=(examples,), name="genie-inductor", daemon=True)
        self._thread.start()

    def _compile(self, examples: list[Any]) -> None:
        try:
            self._code = compile_with_inductor(self._spec, examples, device=self._device,
                                               extra_namespaces=self._namespaces)
        except Exception as error:
            # Whatever Inductor dislikes, the flat plan can run; the reason is kept and reported.
            self.refusal = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
            log.warning("inductor refused a fragment, it runs flat: %s", self.refusal)
        finally:
            self._wake()
