"""Activations that do not fit a worker are computed again: the same gradients, fewer bytes kept."""
from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo import sessions
from genie_dynamo.core.errors import WorkerMemoryError

QUOTA_GIB = 4 / 1024


@pytest.fixture(autouse=True)
def small_worker(fresh_dynamo: None) -> Iterator[None]:
    genie.init(workers=1, num_threads=1, strict=True, resident_quota_gib=QUOTA_GIB)
    yield
    genie.shutdown()
    sessions._config = None


class Deep(torch.nn.Module):
    """Activations of half a megabyte, five for each of eight products."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(64, 64) for _ in range(8)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = (layer(x).sin().exp() * 0.5).tanh().sigmoid()
        return x


def gradients(call: Any, model: torch.nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    call(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


def kept_bytes(call: Any, x: torch.Tensor) -> int:
    """What the worker keeps between forward and backward."""
    out = call(x)
    kept = int(next(iter(genie.get_stats()["workers"].values()))["resident_bytes"])
    out.sum().backward()
    return kept


def test_what_has_no_room_is_computed_again() -> None:
    torch.manual_seed(0)
    model, x = Deep(), torch.randn(1024, 64)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="genie")
    for mine, other in zip(gradients(compiled, model, x), gradients(reference, reference, x), strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-7)
    assert kept_bytes(compiled, x) <= QUOTA_GIB * 2**30


def test_unaware_it_does_not_fit() -> None:
    compiled = torch.compile(Deep(), backend="genie", options={"awareness": "weights"})
    with pytest.raises(WorkerMemoryError, match="this session may keep"):
        compiled(torch.randn(1024, 64))


def test_what_fits_is_kept() -> None:
    model, x = Deep(), torch.randn(128, 64)
    compiled = torch.compile(model, backend="genie")
    aware = kept_bytes(compiled, x)
    torch._dynamo.reset()
    plain = torch.compile(model, backend="genie", options={"awareness": "weights"})
    # Beside activations an aware call leaves its output there, in case it comes back.
    assert 0 <= aware - kept_bytes(plain, x) <= x.nbytes
