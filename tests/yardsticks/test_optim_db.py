"""torch's optim_db through the backend: a compiled `step`, a few times, against the eager optimizer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

from tests.yardsticks.harness import Case, CompileFn, parametrize, seed_everything, unique

NUM_STEPS = 3
# One implementation per call: the loop over tensors, the multi-tensor one, the fused kernel.
IMPLEMENTATIONS = ("forloop", "foreach", "fused")


def cases() -> list[Case]:
    """Every case of this file."""
    return unique(_cases())


def _cases() -> Iterator[Case]:
    for info in optim_db:
        for options in _chosen_options(info):
            yield _optimizer_case(info, "forloop", options)
        for implementation in IMPLEMENTATIONS[1:]:
            if implementation in info.supported_impls:
                yield _optimizer_case(info, implementation, _chosen_options(info)[-1])


def _chosen_options(info: OptimizerInfo) -> list[dict[str, Any]]:
    """The defaults, a learning rate that is a tensor where the entry has one, and the entry's longest options."""
    options = [entry.kwargs for entry in info.optim_inputs_func(device="cpu")]
    tensor_lr = [entry for entry in options if isinstance(entry.get("lr"), torch.Tensor)]
    return [options[0], *tensor_lr[:1], max(options[1:], key=len)]


def _optimizer_case(info: OptimizerInfo, implementation: str, options: dict[str, Any]) -> Case:
    def observe(compile_fn: CompileFn) -> Any:
        return trained(info, implementation, options, compile_fn)

    text = ",".join(f"{key}={_text(value)}" for key, value in options.items()) or "defaults"
    key = f"optim_db/{implementation}/{_class_of(info).__name__}/{text}"
    return Case(key=key, observe=observe, fullgraph=False)  # torch breaks the graph at the entry of every step


def trained(info: OptimizerInfo, implementation: str, options: dict[str, Any], compile_fn: CompileFn,
            device: str = "cpu") -> Any:
    """What a few steps of a small net come to, with `step` as `compile_fn` makes it."""
    flags = {name: name == implementation for name in IMPLEMENTATIONS[1:] if name in info.supported_impls}
    seed_everything()
    model = _net(info).to(device)
    # A fresh learning rate each time: as a tensor it is an input, which a step may not change.
    fresh = {key: value.clone() if isinstance(value, torch.Tensor) else value for key, value in options.items()}
    optimizer = _class_of(info)(model.parameters(), **fresh, **flags)
    return {
        "losses": _train(model, optimizer, compile_fn(optimizer.step), info, device),
        "parameters": dict(model.named_parameters()),
        "state": optimizer.state_dict()["state"],
        "learning_rate": fresh.get("lr"),
    }


def _class_of(info: OptimizerInfo) -> Callable[..., torch.optim.Optimizer]:
    return info.optim_cls  # type: ignore[return-value]  # annotated as an instance in torch


def _text(value: Any) -> str:
    return f"tensor({value.item():g})" if isinstance(value, torch.Tensor) else str(value)


def _net(info: OptimizerInfo) -> nn.Module:
    bias = _class_of(info) is not torch.optim.Muon  # Muon takes matrices only
    return nn.Sequential(nn.Linear(4, 8, bias=bias), nn.Tanh(), nn.Linear(8, 2, bias=bias))


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, step: Any, info: OptimizerInfo,
           device: str) -> list[torch.Tensor]:
    inputs, targets = torch.randn(5, 4).to(device), torch.randn(5, 2).to(device)
    losses = []

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(inputs), targets)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    for _ in range(NUM_STEPS):
        if info.step_requires_closure:
            losses.append(step(closure).detach())
            continue
        losses.append(closure().detach())
        if info.only_supports_sparse_grads:
            for parameter in model.parameters():
                parameter.grad = parameter.grad.to_sparse() if parameter.grad is not None else None
        step()
    return losses


@parametrize(cases())
def test_optimizer_step(case: Case) -> None:
    case.run()
