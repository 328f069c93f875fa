"""Training loops of every common kind compute what eager computes, with forward and backward on the worker."""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, grad_and_value, vmap
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import genie_dynamo as genie
from tests.models.tiny_gpt import TinyGPT


@pytest.fixture(autouse=True)
def _apart(fresh_dynamo: None) -> Iterator[None]:
    yield


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Linear(16, 4))


def batches(count: int, rows: int = 16) -> list[tuple[torch.Tensor, torch.Tensor]]:
    data = torch.Generator().manual_seed(1)
    return [(torch.randn(rows, 8, generator=data), torch.randn(rows, 4, generator=data)) for _ in range(count)]


def close(actual: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=10 * tolerance, atol=tolerance)


# ---------------------------------------------------------------- torch.func
def _squares(net: nn.Module, params: Any, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return F.mse_loss(functional_call(net, params, (x,)), y)


STEPS: dict[str, Callable[[nn.Module, Any, torch.Tensor, torch.Tensor], Any]] = {
    "functional_call": lambda net, params, x, y: _squares(net, params, x, y),
    "grad_and_value": lambda net, params, x, y: grad_and_value(lambda p: _squares(net, p, x, y))(params),
    "vmap": lambda net, params, x, y: vmap(lambda row: functional_call(net, params, (row,)))(x),
    "per-sample gradients": lambda net, params, x, y: vmap(
        grad(lambda p, a, b: _squares(net, p, a[None], b[None])), (None, 0, 0))(params, x, y),
    "a whole step": lambda net, params, x, y: {
        name: p - 0.1 * g for (name, p), g in zip(
            params.items(), grad(lambda q: _squares(net, q, x, y))(params).values(), strict=True)},
}


@pytest.mark.parametrize("name", STEPS)
def test_steps_of_torch_func_are_one_graph(session: object, name: str) -> None:
    net = network()
    params = {key: p.detach() for key, p in net.named_parameters()}
    ((x, y),) = batches(1)
    step = STEPS[name]
    compiled: Any = torch.compile(lambda p, a, b: step(net, p, a, b), backend="genie", fullgraph=True)
    genie.reset_stats()
    close(compiled(params, x, y), step(net, params, x, y))
    assert genie.get_stats()["fragment_runs"] == 1 and not genie.get_stats()["fallbacks"]


# ---------------------------------------------------------------- loops
Loss = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def _accumulate(net: nn.Module, loss_of: Loss) -> list[float]:
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    for index, (x, y) in enumerate(batches(8)):
        loss = loss_of(x, y) / 4
        loss.backward()
        losses.append(loss.item())
        if index % 4 == 3:
            optimizer.step()
            optimizer.zero_grad()
    return losses


def _no_sync(net: nn.Module, loss_of: Loss) -> list[float]:
    """Gradients meet only in the last part of each batch, as under DistributedDataParallel.no_sync."""
    synchronised = 0

    @contextlib.contextmanager
    def no_sync() -> Iterator[None]:
        nonlocal synchronised
        yield
        synchronised -= 1

    optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.05), []
    for x, y in batches(3):
        for part in range(4):
            with no_sync() if part < 3 else contextlib.nullcontext():
                loss = loss_of(x[4 * part:4 * part + 4], y[4 * part:4 * part + 4]) / 4
                loss.backward()
            synchronised += 1
            losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)
    assert synchronised == 3
    return losses


def _clip(how: str) -> Callable[[nn.Module, Loss], list[float]]:
    def loop(net: nn.Module, loss_of: Loss) -> list[float]:
        optimizer, losses = torch.optim.SGD(net.parameters(), lr=0.5, momentum=0.9), []
        for x, y in batches(5):
            loss = loss_of(10 * x, y)
            loss.backward()
            if how == "norm":
                losses.append(float(nn.utils.clip_grad_norm_(net.parameters(), 0.1)))
            else:
                nn.utils.clip_grad_value_(net.parameters(), 0.01)
            losses.append(loss.item())
            optimizer.step()
            optimizer.zero_grad()
        return losses

    return loop


SCHEDULERS: dict[str, Callable[[torch.optim.Optimizer], Any]] = {
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5),
    "one cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=6),
    "plateau": lambda optimizer: torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0),
}


def _schedule(name: str) -> Callable[[nn.Module, Loss], list[float]]:
    def loop(net: nn.Module, loss_of: Loss) -> list[float]:
        optimizer, losses = torch.optim.AdamW(net.parameters(), lr=5e-2), []
        scheduler = SCHEDULERS[name](optimizer)
        for x, y in batches(6):
            loss = loss_of(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step(*([loss.item()] if name == "plateau" else []))
            losses += [loss.item(), optimizer.param_groups[0]["lr"]]
        return losses

    return loop


def _scaled(net: nn.Module, loss_of: Loss) -> list[float]:
    optimizer, losses = torch.optim.AdamW(net.parameters(), lr=1e-2), []
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
    for index, (x, y) in enumerate(batches(6)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(x if index != 3 else x * float("inf"), y)      # a step that has to be skipped
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses += [loss.item() if index != 3 else 0.0, scaler.get_scale()]
    return losses


LOOPS: dict[str, Callable[[nn.Module, Loss], list[float]]] = {
    "accumulation": _accumulate, "no_sync": _no_sync, "clip norm": _clip("norm"), "clip value": _clip("value"),
    **{name: _schedule(name) for name in SCHEDULERS}, "autocast, GradScaler": _scaled,
}


@pytest.mark.parametrize("name", LOOPS)
def test_loops_compute_what_eager_computes(session: object, name: str) -> None:
    results = []
    for is_remote in (False, True):
        net = network()
        loss_of: Any = lambda x, y, net=net: F.mse_loss(net(x).float(), y)  # noqa: E731
        if is_remote:
            loss_of = torch.compile(loss_of, backend="genie", fullgraph=True)
        results.append((LOOPS[name](net, loss_of), [p.detach() for p in net.parameters()]))
    close(results[1], results[0], 1e-3 if "autocast" in name else 1e-5)
    assert not genie.get_stats()["fallbacks"]


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(session: object, reentrant: bool) -> None:
    """Inside a compiled function (not reentrant: a graph of its own), and around one (both kinds)."""
    results = []
    for how in ("eager", "inside", "around"):
        torch.manual_seed(3)
        first, second = nn.Linear(8, 16), nn.Sequential(nn.GELU(), nn.Dropout(0.25), nn.Linear(16, 4))
        x = torch.randn(16, 8, requires_grad=True)
        block: Any = second
        if how == "around":
            block = torch.compile(second, backend="genie", fullgraph=True)

        def loss_of(x: torch.Tensor, first: Any = first, block: Any = block) -> torch.Tensor:
            hidden: torch.Tensor = checkpoint(block, first(x), use_reentrant=reentrant)
            return hidden.square().mean()

        run: Any = loss_of
        if how == "inside":
            if reentrant:
                continue                        # torch.compile does not take it: its own graph break, eager's way
            run = torch.compile(loss_of, backend="genie", fullgraph=True)
        torch.manual_seed(11)
        loss = run(x)
        loss.backward()
        results.append((loss.detach(), x.grad, [p.grad for p in (*first.parameters(), *second.parameters())]))
    for result in results[1:]:
        close(result, results[0])


# ---------------------------------------------------------------- curves and bytes
def test_a_loss_curve_of_200_steps_is_eagers(session: object) -> None:
    curves = []
    for is_remote in (False, True):
        net = network()
        loss_of: Any = lambda x, y, net=net: F.mse_loss(net(x), y)  # noqa: E731
        if is_remote:
            loss_of = torch.compile(loss_of, backend="genie", fullgraph=True)
        optimizer, losses = torch.optim.AdamW(net.parameters(), lr=3e-3), []
        data = batches(8)
        for index in range(200):
            loss = loss_of(*data[index % 8])
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        curves.append(losses)
    close(curves[1], curves[0], 1e-4)
    assert curves[0][-1] < 0.8 * curves[0][0]


def test_bytes_of_a_step(session: object) -> None:
    """Activations stay, gradients come down, parameters go up when they have changed and only then."""
    torch.manual_seed(0)
    model = TinyGPT()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(0))
    loss_of: Any = torch.compile(lambda ids: model(ids[:, :-1], ids[:, 1:]), backend="genie", fullgraph=True)
    size = sum(p.numel() * p.element_size() for p in model.parameters())

    def moved(*, step: bool) -> dict[str, Any]:
        genie.reset_stats()
        loss_of(ids).backward()
        if step:
            optimizer.step()
        optimizer.zero_grad()
        found: dict[str, Any] = genie.get_stats()["by_reason"]
        return found

    moved(step=True)
    changed = moved(step=False)
    assert changed["weights"]["sent"] == size
    assert changed["gradients"]["received"] == size and changed["gradients"]["sent"] <= 8
    assert changed["state"]["total"] == 0 and changed["outputs"]["received"] == 4
    assert changed["inputs"]["sent"] == ids.nbytes
    unchanged = moved(step=False)
    assert unchanged["weights"]["sent"] == 0 and unchanged["gradients"]["received"] == size
