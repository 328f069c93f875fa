"""One step of each of torch's optimizers, over the parameters of a small model that has gradients."""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "sgd": ("SGD", {"lr": 0.1}),
    "sgd_momentum": ("SGD", {"lr": 0.1, "momentum": 0.9}),
    "sgd_nesterov": ("SGD", {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    "adam": ("Adam", {}),
    "adamw": ("AdamW", {}),
    "adagrad": ("Adagrad", {}),
    "rmsprop": ("RMSprop", {}),
}
"""Name -> (class of torch.optim, options). Those that the patterns were written with."""

HELD_OUT_OPTIMIZERS: dict[str, tuple[str, dict[str, Any]]] = {
    "adadelta": ("Adadelta", {}),
    "adamax": ("Adamax", {}),
    "nadam": ("NAdam", {}),
    "radam": ("RAdam", {}),
    "rprop": ("Rprop", {}),
    "asgd": ("ASGD", {}),
    "rmsprop_centered": ("RMSprop", {"centered": True, "momentum": 0.5}),
    "amsgrad": ("AdamW", {"amsgrad": True}),
}


def optimizer_step(name: str, *, foreach: bool) -> tuple[Callable[[], None], Mapping[str, nn.Module]]:
    """A step that has its state, and the modules whose parameters it moves."""
    kind, options = {**OPTIMIZERS, **HELD_OUT_OPTIMIZERS}[name]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    optimizer = getattr(torch.optim, kind)(model.parameters(), foreach=foreach, **options)
    model(torch.randn(4, 6)).square().sum().backward()
    optimizer.step()

    def step() -> None:
        optimizer.step()

    return step, {"": model}
