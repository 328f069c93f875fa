"""What the tests of the face share: compiled against eager, and waiting for what happens in the background."""
from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import genie_dynamo as genie


def same(actual: Any, expected: Any) -> None:
    """Equal values, dtypes and strides, through tuples and None."""
    if isinstance(expected, torch.Tensor):
        if actual.is_inference() and expected.is_inference():
            actual, expected = actual.clone(), expected.clone()      # assert_close cannot print them
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5, equal_nan=True)
        assert actual.stride() == expected.stride() and actual.requires_grad == expected.requires_grad
    elif isinstance(expected, tuple | list):
        assert len(actual) == len(expected)
        for a, e in zip(actual, expected, strict=True):
            same(a, e)
    else:
        assert actual == expected


def check(f: Callable[..., Any], *args: Any, **compile_options: Any) -> None:
    """Compiled and eager give the same, on inputs of their own, and leave their inputs the same."""
    theirs = copy.deepcopy(args)
    torch.manual_seed(7)
    expected = f(*theirs)
    state = torch.get_rng_state()
    for _ in range(2):
        inputs = copy.deepcopy(args)
        torch.manual_seed(7)
        same(torch.compile(f, backend="genie", **compile_options)(*inputs), expected)
        assert torch.equal(torch.get_rng_state(), state)
        same(list(inputs), list(theirs))
    assert genie.get_stats()["fragment_runs"] >= 1


def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.02)


def net_and_input() -> tuple[nn.Module, torch.Tensor]:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(4, 16), nn.Tanh(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 2)), torch.randn(6, 4)


def gradients(run: Callable[[], torch.Tensor], net: nn.Module, **options: Any) -> list[torch.Tensor]:
    net.zero_grad()
    loss = run()
    loss.backward(**options)
    return [p.grad.clone() for p in net.parameters() if p.grad is not None]
