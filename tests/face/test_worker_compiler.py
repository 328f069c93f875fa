"""worker_compiler: Inductor's code on the worker gives what the flat plan gives."""
from __future__ import annotations

import copy
import time
from typing import Any

import pytest
import torch
from torch import nn

import genie_dynamo as genie

pytestmark = [pytest.mark.usefixtures("session", "fresh_dynamo"), pytest.mark.slow]


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Dropout(0.5), nn.Linear(16, 3))


def compiler_facts() -> dict[str, Any]:
    return dict(genie.get_stats()["workers"]["w0"]["compilers"])


def test_inductor_in_inference_with_changing_shapes() -> None:
    model = net().eval()
    compiled = torch.compile(model, backend="genie", dynamic=True, options={"worker_compiler": "inductor"})
    before = compiler_facts().get("code", 0)
    with torch.no_grad():
        for rows in (3, 5, 9):
            x = torch.randn(rows, 8)
            torch.testing.assert_close(compiled(x), model(x), rtol=1e-5, atol=1e-5)
    assert compiler_facts()["code"] > before, "it was Inductor's code that ran"


def test_inductor_in_training_without_random_ops() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GELU(), nn.Linear(16, 3))
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="genie", options={"worker_compiler": "inductor"})
    before = compiler_facts().get("code", 0)
    for _ in range(3):
        x = torch.randn(6, 8)
        a, b = compiled(x).square().sum(), reference(x).square().sum()
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        a.backward()
        b.backward()
    for p, q in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    for p, q in zip(model.buffers(), reference.buffers(), strict=True):
        torch.testing.assert_close(p, q)
    assert compiler_facts()["code"] >= before + 6


def test_auto_runs_flat_at_once_and_settles() -> None:
    model = net().eval()
    compiled = torch.compile(model, backend="genie", options={"worker_compiler": "auto"})
    x = torch.randn(4, 8)
    with torch.no_grad():
        expected = model(x)
        deadline_s = time.monotonic() + 120
        while not compiler_facts().get("settled", 0):
            assert time.monotonic() < deadline_s, f"auto did not settle: {compiler_facts()}"
            for _ in range(20):
                torch.testing.assert_close(compiled(x), expected, rtol=1e-5, atol=1e-5)
