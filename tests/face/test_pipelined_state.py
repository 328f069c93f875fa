"""Micro-batches of models that hold state: run and equal to eager, state included, or refused with the reason."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from genie_dynamo import parts, placed, sessions, worker_facts
from tests.face.test_placed import known

ROWS, LENGTH, WIDTH = 16, 32, 128


@pytest.fixture(autouse=True)
def two_workers(monkeypatch: pytest.MonkeyPatch, fresh_dynamo: None) -> Iterator[None]:
    monkeypatch.setattr(worker_facts, "facts_of", known)
    monkeypatch.setattr(parts, "_said", set())
    monkeypatch.setattr(placed, "TIME_LIMIT_S", None)
    genie.init(workers=2, num_threads=1, strict=True)
    yield
    genie.shutdown()
    sessions._config = None


class Layers(nn.Module):
    """Layers of attention over a cache of keys and values, and what a subclass does between."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.qkv = nn.ModuleList([nn.Linear(WIDTH, 3 * WIDTH) for _ in range(count)])
        self.mlp = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
                                  for _ in range(count)])

    def attend(self, number: int, h: torch.Tensor, cached: Callable[..., Any]) -> torch.Tensor:
        q, k, v = self.qkv[number](h).chunk(3, -1)
        keys, values = cached(number, k, v)
        h = h + nn.functional.scaled_dot_product_attention(q, keys, values)
        out: torch.Tensor = h + self.mlp[number](h)
        return out


class Growing(Layers):
    """The caches are arguments, and come back longer."""

    def forward(self, h: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        new = []

        def cached(number: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            new.append((torch.cat([past[number][0], k], 1), torch.cat([past[number][1], v], 1)))
            return new[-1]

        for number in range(len(self.qkv)):
            h = self.attend(number, h, cached)
        return h, new


class Static(Layers):
    """The caches are arguments of full length, and are written in place at given positions."""

    def forward(self, h: torch.Tensor, at: torch.Tensor, past: list[tuple[torch.Tensor, torch.Tensor]]) -> Any:
        def cached(number: int, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            keys, values = past[number]
            return keys.index_copy_(1, at, k), values.index_copy_(1, at, v)

        for number in range(len(self.qkv)):
            h = self.attend(number, h, cached)
        return h


class Recurrent(nn.Module):
    """A state for each row and layer, as argument and result."""

    def __init__(self) -> None:
        super().__init__()
        self.cells = nn.ModuleList([nn.GRUCell(4 * WIDTH, 4 * WIDTH) for _ in range(4)])

    def forward(self, x: torch.Tensor, states: list[torch.Tensor]) -> Any:
        new = []
        for cell, state in zip(self.cells, states, strict=True):
            x = cell(x, state)
            new.append(x)
        return x, new


class Buffered(nn.Module):
    """Layers, with something that happens to a buffer in the middle."""

    def __init__(self, buffer: torch.Tensor, change: Callable[[torch.Tensor, torch.Tensor], Any]) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4 * WIDTH, 4 * WIDTH) for _ in range(6)])
        self.register_buffer("state", buffer)
        self.change = change

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for number, layer in enumerate(self.layers):
            x = layer(x).relu()
            if number == 3:
                self.change(self.state, x)
        return x


def caches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.randn(ROWS, LENGTH, WIDTH), torch.randn(ROWS, LENGTH, WIDTH)) for _ in range(4)]


def runs_in_parts(model: nn.Module, *args: Any, calls: int = 2) -> dict[str, int]:
    """What eager gives, arguments and buffers after it included. Returns: calls on each worker."""
    mine, other = copy.deepcopy(args), copy.deepcopy(args)
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="genie", options={"microbatches": 4})
    with torch.no_grad():
        for _ in range(calls):
            torch.testing.assert_close(compiled(*mine), reference(*other), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), rtol=1e-4,
                                       atol=1e-4)
    assert not [event for event in genie.get_stats()["events"] if "microbatches not used" in event]
    return {name: row["calls"] for name, row in genie.get_stats()["workers"].items()}


def refused(model: nn.Module, *args: Any, reason: str) -> None:
    """An error that says why in strict mode; else the whole batch, with eager's results, state and random numbers."""
    with torch.no_grad(), pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=reason):
        torch.compile(copy.deepcopy(model), backend="genie", options={"microbatches": 4})(*copy.deepcopy(args))
    torch._dynamo.reset()
    reference = copy.deepcopy(model)
    compiled = torch.compile(model, backend="genie", options={"microbatches": 4, "strict": False})
    with torch.no_grad():
        for seed in range(2):
            found = []
            for run in (compiled, reference):
                torch.manual_seed(seed)
                found.append((run(*args), torch.rand(1)))
            torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(dict(model.named_buffers()), dict(reference.named_buffers()), rtol=1e-5,
                                       atol=1e-5)
    assert any("microbatches not used" in event for event in genie.get_stats()["events"])


def test_a_cache_that_grows_is_cut_by_rows() -> None:
    assert min(runs_in_parts(Growing().eval(), torch.randn(ROWS, LENGTH, WIDTH), caches()).values()) == 2


def test_a_cache_that_is_written_in_place_is_cut_by_rows() -> None:
    found = runs_in_parts(Static().eval(), torch.randn(ROWS, 29, WIDTH), torch.arange(3, 32), caches())
    assert min(found.values()) == 2


def test_recurrent_state_is_cut_by_rows() -> None:
    states = [torch.randn(256, 4 * WIDTH) for _ in range(4)]
    assert min(runs_in_parts(Recurrent().eval(), torch.randn(256, 4 * WIDTH), states).values()) == 2


def test_a_sum_over_rows_that_only_a_buffer_takes_is_put_together() -> None:
    def count(state: torch.Tensor, x: torch.Tensor) -> None:
        state += x.sum(0)

    assert min(runs_in_parts(Buffered(torch.zeros(4 * WIDTH), count), torch.randn(256, 4 * WIDTH)).values()) == 2


def test_a_buffer_with_a_place_for_each_row() -> None:
    def write(state: torch.Tensor, x: torch.Tensor) -> None:
        state.copy_(x)

    assert min(runs_in_parts(Buffered(torch.zeros(256, 4 * WIDTH), write), torch.randn(256, 4 * WIDTH)).values()) == 2


@pytest.mark.parametrize("write", [
    lambda state, x: state.index_copy_(0, torch.arange(7, 263) % 512, x),
    lambda state, x: state.index_put_((torch.arange(256) % 3,), x, accumulate=True),
], ids=["index_copy", "index_put"])
def test_a_buffer_written_by_index(write: Any) -> None:
    runs_in_parts(Buffered(torch.zeros(512, 4 * WIDTH), write), torch.randn(256, 4 * WIDTH))


def test_state_that_every_row_reads_after_all_have_written_it_is_refused() -> None:
    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList([nn.Linear(4 * WIDTH, 4 * WIDTH) for _ in range(6)])
            self.register_buffer("mean", torch.zeros(4 * WIDTH))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for number, layer in enumerate(self.layers):
                x = layer(x).relu()
                if number == 2:
                    self.mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
                    x = x - self.mean
            return x

    refused(Running(), torch.randn(256, 4 * WIDTH), reason="rows")


@pytest.mark.parametrize("norm", [True, False], ids=["training", "evaluation"])
def test_batch_norm(norm: bool) -> None:
    model = nn.Sequential(*[layer for _ in range(6) for layer in (
        nn.Linear(4 * WIDTH, 4 * WIDTH), nn.BatchNorm1d(4 * WIDTH), nn.ReLU())])
    x = torch.randn(256, 4 * WIDTH)
    if norm:
        refused(model.train(), x, reason="BatchNorm in training")
    else:
        assert min(runs_in_parts(model.eval(), x).values()) == 2


def test_dropout_is_refused_and_draws_eagers_numbers() -> None:
    model = nn.Sequential(*[layer for _ in range(6) for layer in (
        nn.Linear(4 * WIDTH, 4 * WIDTH), nn.Dropout(0.3))]).train()
    refused(model, torch.randn(256, 4 * WIDTH), reason="random numbers")
