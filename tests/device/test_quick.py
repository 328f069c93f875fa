"""Recording calls that are known: the extension's kernels and Python's record the same, and fail the same."""
from __future__ import annotations

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from genie_dynamo.device.engine import current
from genie_dynamo.device.kernels import functional, mutation, recorder, view
from genie_dynamo.device.memory import memory_of, node_of
from genie_dynamo.device.nodes import Node
from genie_dynamo.device.quick import General
from genie_dynamo.device.record import op

DEVICE = "remote_accelerator"
needs_native = pytest.mark.skipif(isinstance(recorder, General), reason="the native extension is not built")
aten = torch.ops.aten
Tensor = torch.Tensor

CALLS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "two tensors": lambda x, y: x + y,
    "a number": lambda x, y: (x * 1.5, x * 2, x * -0.0),
    "an integer and a bool are told apart": lambda x, y: (x.to(torch.bool), x.sum(0, True), x.sum(0, False)),
    "a list of tensors": lambda x, y: torch.cat([x, y, x], 1),
    "keywords": lambda x, y: (torch.zeros_like(x), x.sum(dtype=torch.float64), torch.full_like(x, 3.0)),
    "literals": lambda x, y: (torch.nn.functional.gelu(x, approximate="tanh"), torch.nn.functional.leaky_relu(x, 0.25)),
    "several outputs": lambda x, y: torch.nn.functional.layer_norm(x, (4,)),
    "outputs left out": lambda x, y: aten.native_layer_norm_backward(x, y, [4], x[:, :1], y[:, :1], None, None,
                                                                     [True, False, False]),
    "a list of outputs": lambda x, y: torch._foreach_add([x, y], 1.0),
    "a larger than usual list": lambda x, y: torch._foreach_mul([x, y] * 20, [y, x] * 20),
    "views": lambda x, y: (x.t(), x.view(2, 8), x[1], x[1:3], x[..., 1], x.expand(2, 4, 4), x.t()[1].unsqueeze(0)),
    "views of other dtypes": lambda x, y: x.view(torch.int32) + 1,
    "several views": lambda x, y: x.split(2),
    "in place": lambda x, y: (x.add_(y), x.mul_(2.0), x.relu_()),
    "in place, with a cast": lambda x, y: x.add_(y.to(torch.int32)),
    "part of a tensor": lambda x, y: (x[1].fill_(2.0), x[:, 0].add_(1), x.t().mul_(2), x.view(-1)[::3].zero_()),
    "an item": lambda x, y: x.__setitem__((1, 2), 3.0),
    "copies": lambda x, y: (x.copy_(y), x[1].copy_(y[0]), x[2].copy_(y[0, :1]), y[3].copy_(y[2].to(torch.float64))),
    "lists in place": lambda x, y: (torch._foreach_add_([x, y], 2.0), torch._foreach_mul_([x[0], y[1]], [y[0], x[1]])),
    "what has no layout of its own": lambda x, y: (x.t() @ y).as_strided((2, 3), (1, 4), 1).neg(),
}


def _on_both(call: Callable[[Tensor, Tensor], Any]) -> None:
    """The call, three times over, leaves the same here and there."""
    here = torch.arange(16.0).reshape(4, 4) / 8, torch.arange(16.0).reshape(4, 4).sin()
    there = here[0].to(DEVICE), here[1].to(DEVICE)
    for _ in range(3):
        wanted, got = call(*here), call(*there)
        flat_wanted, flat_got = torch.utils._pytree.tree_leaves(wanted), torch.utils._pytree.tree_leaves(got)
        for one, other in zip([*flat_wanted, *here], [*flat_got, *there], strict=True):
            if isinstance(one, Tensor):
                assert other.shape == one.shape and other.dtype == one.dtype
                torch.testing.assert_close(other.cpu(), one, equal_nan=True)
            else:
                assert other is None


@pytest.mark.parametrize("name", CALLS)
def test_known_calls_mean_what_eager_means(session: object, way: str, name: str) -> None:
    _on_both(CALLS[name])


def _recorded(call: Callable[[Tensor, Tensor], Any]) -> tuple[Any, ...]:
    """What a call records: every node's call, layout and scalars, and how they hang together."""
    there = torch.ones(4, 4).to(DEVICE), torch.ones(4, 4).to(DEVICE) + 1
    torch.remote_accelerator.synchronize()
    call(*there), call(*there)
    torch.remote_accelerator.synchronize()
    held = call(*there)
    found = current.recorded()
    del held
    return found.key, found.numbers, [(id(n.call), id(n.layout), n.scalars, type(n.inputs)) for n in found.nodes]


@needs_native
@pytest.mark.parametrize("name", CALLS)
def test_both_ways_record_the_same(session: object, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for enabled in (True, False):
        monkeypatch.setattr(recorder, "enabled", enabled)
        found.append(_recorded(CALLS[name]))
    assert found[0] == found[1]


@needs_native
@pytest.mark.parametrize(("make", "target", "args"), [
    (functional, aten.add.Tensor, lambda x: (x, 1.5)),
    (functional, aten.native_layer_norm.default, lambda x: (x, [4], None, None, 1e-5)),
    (view, aten.select.int, lambda x: (x, 0, 1)),
    (mutation, aten.mul_.Tensor, lambda x: (x, 2.0)),
    (mutation, aten.fill_.Scalar, lambda x: (x[1], 2.0)),
    (mutation, aten._foreach_add_.Scalar, lambda x: ([x, x], 1.0)),
], ids=lambda value: str(value) if isinstance(value, torch._ops.OpOverload) else "")
def test_a_known_call_is_not_pythons(session: object, make: Any, target: Any, args: Any, no_lazy_bits: None,
                                     monkeypatch: pytest.MonkeyPatch) -> None:
    """Else this file would say nothing about the extension."""
    monkeypatch.setattr(recorder, "enabled", True)
    kernel, x = make(target), torch.ones(4, 4).to(DEVICE)
    kernel(*args(x))
    kernel(*args(x))
    seen: list[Any] = []
    given = args(x)
    sys.setprofile(lambda frame, event, _: seen.append(frame.f_code.co_qualname) if event == "call" else None)
    kernel(*given)
    sys.setprofile(None)
    assert not seen


def test_errors_are_eagers(session: object, way: str) -> None:
    x = torch.ones(4, 4).to(DEVICE)
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broadcast"):
            x + torch.ones(3, device=DEVICE)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(4, 4)
        with pytest.raises(RuntimeError, match="invalid for input of size"):
            x.view(3, 3)
        with pytest.raises(RuntimeError, match="must match the size"):
            x[0].copy_(torch.ones(3, device=DEVICE))
        with pytest.raises(IndexError):
            x.sum(7)
    assert x.sum().item() == 16


def test_nothing_is_left_of_what_was_recorded(session: object, way: str) -> None:
    """Shared objects keep their reference counts, and no node outlives its tensor."""
    x, y = torch.ones(4, 4).to(DEVICE), torch.ones(4, 4).to(DEVICE) + 1

    def calls() -> None:
        for name in ("two tensors", "a number", "several outputs", "keywords", "views", "a list of tensors"):
            CALLS[name](x, y)
        with pytest.raises(RuntimeError):
            x + torch.ones(3, device=DEVICE)

    def counts() -> list[int]:
        torch.remote_accelerator.synchronize()
        gc.collect()
        layouts = {id(node.layout): node.layout for node in (node_of(x), node_of(y))}
        shared = [node_of(x), node_of(y), memory_of(x), *layouts.values(), *op(aten.add.Tensor).calls.values()]
        return [*map(sys.getrefcount, shared), sum(type(thing) is Node for thing in gc.get_objects())]

    for _ in range(3):
        calls()
    before = counts()
    for _ in range(100):
        calls()
    assert counts() == before


def test_a_long_chain_is_let_go(session: object, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nodes hold those that they read: letting go of the last one must not recurse through all of them."""
    torch.remote_accelerator.synchronize()
    monkeypatch.setattr(current, "next_cut", 10**9)
    x = torch.ones(4).to(DEVICE)
    for _ in range(50_000):
        x = x + 1.0
    first = weakref.ref(node_of(x).inputs[0].inputs[0])
    assert first() is not None
    del x
    gc.collect()
    assert first() is None


def test_threads_record_at_once(session: object, way: str) -> None:
    results: dict[int, float] = {}

    def work(number: int) -> None:
        x, row = torch.full((4, 4), float(number)).to(DEVICE), torch.ones(4).to(DEVICE)
        for _ in range(200):
            x = x + 1.0
            x[1].add_(row)
        results[number] = x.sum().item()

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert results == {i: 16.0 * (i + 200) + 4 * 200 for i in range(4)}


@needs_native
def test_what_is_no_recorder_is_refused() -> None:
    with pytest.raises(KeyError):
        type(recorder)({})
    with pytest.raises(AttributeError):
        recorder.functional(len, object())  # type: ignore[arg-type]
