"""A small GPT learns real text: the loss curve and the final weights of the compiled run are eager's."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.models.text import docstrings
from tests.models.tiny_gpt import TinyGPT
from tests.yardsticks.harness import (
    BACKEND,
    CompileFn,
    assert_same,
    observe_compiled,
    observe_eager,
    seed_everything,
)

NUM_STEPS = 60
BATCH = 8
CONTEXT = 64


@pytest.mark.usefixtures("runs_on_workers")
@pytest.mark.parametrize("dropout", [0.0, 0.1], ids=["no_dropout", "dropout"])
def test_loss_curve_equals_eagers(dropout: float) -> None:
    train = functools.partial(_train, dropout=dropout)
    expected = observe_eager(train)
    actual = observe_compiled(train, BACKEND)
    assert_same(actual, expected, where="training")
    first, last = sum(expected["losses"][:5]) / 5, sum(expected["losses"][-5:]) / 5
    assert last < first - 1.5, f"nothing was learnt: the loss went from {first:.3f} to {last:.3f}"


def _train(compile_fn: CompileFn, *, dropout: float) -> dict[str, Any]:
    """`NUM_STEPS` of AdamW; forward and backward compiled, the optimizer as users call it."""
    text = _text_bytes()
    seed_everything()
    model = TinyGPT(context=CONTEXT, dropout=dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    batches = torch.Generator().manual_seed(7)
    compiled = compile_fn(model)
    losses = []
    for _ in range(NUM_STEPS):
        starts = torch.randint(len(text) - CONTEXT - 1, (BATCH,), generator=batches).tolist()
        window_BT = torch.stack([text[start : start + CONTEXT + 1] for start in starts])
        optimizer.zero_grad()
        loss = compiled(window_BT[:, :-1].contiguous(), window_BT[:, 1:].contiguous())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return {"losses": losses, "rng": torch.get_rng_state(), "parameters": dict(model.named_parameters())}


def _text_bytes() -> Tensor:
    text = "\n\n".join(docstrings()).encode()
    assert len(text) > 50_000
    return torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
