"""Fused optimizers under `parameters="remote"`: Dynamo leaves their kernel to eager code, and no backend hears of it.

So it is said here: around a compiled call that asks for remote parameters, a step of a fused optimizer is counted as a
fallback.
"""
from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from genie_dynamo import sessions
from genie_dynamo.runtime.client import stale

log = logging.getLogger(__name__)

REASON = "torch.compile runs fused optimizers eagerly: parameters='remote' keeps nothing of them on a worker"

_calls = threading.local()


@contextlib.contextmanager
def remote_call() -> Iterator[None]:
    """Around a call that was compiled with `parameters="remote"`: stale.lifted, and fused steps are watched for."""
    before = getattr(_calls, "remote", False)
    _calls.remote = True
    try:
        with stale.lifted():
            yield
    finally:
        _calls.remote = before


def _before_step(optimizer: torch.optim.Optimizer, *_: object) -> None:
    if getattr(_calls, "remote", False) and any(group.get("fused") for group in optimizer.param_groups) \
            and sessions.session().telemetry.fallback(REASON) == 1:
        log.warning("%s.step: %s; construct it with fused=False", type(optimizer).__name__, REASON)


register_optimizer_step_pre_hook(_before_step)
