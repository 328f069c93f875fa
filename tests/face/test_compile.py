"""What a user does with torch.compile(backend="genie") and genie.compile, against eager."""
from __future__ import annotations

import copy
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import genie_dynamo as genie
from tests.face.comparing import check, gradients, net_and_input, same, until

pytestmark = pytest.mark.usefixtures("session", "fresh_dynamo")


def remote_runs() -> int:
    return int(genie.get_stats()["fragment_runs"])


# -- what kinds of things can be compiled ---------------------------------------------------------------------


def test_a_function_a_method_a_module_and_a_class() -> None:
    @genie.compile
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    class Scaler:
        factor = 3

        @genie.compile(fullgraph=True)
        def scale(self, x: torch.Tensor) -> torch.Tensor:
            return x * self.factor

    @genie.compile
    class Net(nn.Module):
        def __init__(self) -> None:
            super(Net, self).__init__()  # noqa: UP008 - the old form must work in a decorated class too
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.linear(x).relu()

    x = torch.randn(4, 3)
    same(double(x), x * 2)
    same(Scaler().scale(x), x * 3)
    net = Net()
    assert isinstance(net, nn.Module) and set(dict(net.named_parameters())) == {"linear.weight", "linear.bias"}
    same(net(x), net.linear(x).relu())
    module = genie.compile(nn.Linear(3, 2))
    assert isinstance(module, nn.Module)
    module(x)
    assert remote_runs() == 4


def test_compile_with_workers_opens_a_session_with_them(own_session: Callable[..., Any]) -> None:
    net = nn.Linear(3, 2)
    compiled = genie.compile(net, workers=2, dynamic=True, fullgraph=True, strict=True)
    opened = genie.session()
    assert len(opened.links) == 2
    for rows in (2, 5):
        x = torch.randn(rows, 3)
        same(compiled(x), net(x))
    genie.compile(nn.Linear(3, 2), workers=2)
    assert genie.session() is opened, "one with these workers is open"


def test_one_submodule_of_a_model_whose_rest_stays_local() -> None:
    net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    expected = net(x := torch.randn(3, 4))
    net[0] = genie.compile(net[0])
    same(net(x), expected)
    assert remote_runs() == 1


@pytest.mark.parametrize("target", [3, "text", dict, nn.Linear])
def test_other_things_are_refused(target: Any) -> None:
    with pytest.raises(genie.ConfigError):
        genie.compile(target)


# -- shapes, layouts ----------------------------------------------------------------------------------


def test_dynamic_shapes_compile_once() -> None:
    counter = torch._dynamo.testing.CompileCounterWithBackend("genie")
    compiled = torch.compile(lambda x: (x.softmax(-1) * x.shape[0]).sum(0), backend=counter, dynamic=True)
    for rows, columns in ((3, 4), (5, 2), (7, 9), (11, 3)):
        x = torch.randn(rows, columns)
        same(compiled(x), (x.softmax(-1) * rows).sum(0))
    assert counter.frame_count == 1


def test_shapes_become_dynamic_by_themselves() -> None:
    compiled = torch.compile(lambda x: x.sum(1) + x.size(1), backend="genie")
    for size in (3, 4, 5, 6, 1):
        x = torch.randn(2, size)
        same(compiled(x), x.sum(1) + size)


@pytest.mark.parametrize("make", [
    lambda: torch.randn(2, 3, 5, 4).to(memory_format=torch.channels_last),
    lambda: torch.randn(2, 3, 5, 4).transpose(0, 3),
    lambda: torch.randn(2, 6, 10, 4)[:, ::2, ::2],
    lambda: torch.randn(1, 3, 1, 4).expand(2, 3, 5, 4),
    lambda: torch.randn(3).as_strided((2, 3, 5, 4), (0, 1, 0, 0)),
    lambda: torch.randn(0, 3, 5, 4),
])
def test_strides_of_inputs_and_outputs(make: Callable[[], torch.Tensor]) -> None:
    check(lambda x: (x + 1, x.relu().transpose(1, 2), x.sum(0), nn.functional.pad(x, (1, 1))), make())


def test_convolution_in_channels_last_forward_and_backward() -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    net = net.to(memory_format=torch.channels_last)
    reference = copy.deepcopy(net)
    x = torch.randn(2, 3, 12, 12).to(memory_format=torch.channels_last)
    compiled = torch.compile(net, backend="genie")
    for _ in range(2):
        a, b = compiled(x), reference(x)
        same(a, b)
        a.square().sum().backward()
        b.square().sum().backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        same(p.grad, q.grad)
    for p, q in zip(net.buffers(), reference.buffers(), strict=True):
        same(p, q)


# -- outputs, aliasing, side effects --------------------------------------------------------------------------


def test_none_scalars_inputs_and_aliases_among_the_outputs() -> None:
    def f(x: torch.Tensor, n: int) -> tuple[Any, ...]:
        y = x * n
        return None, x, y, y[0], y.view(-1), n, (y.sum(), [x.t()])

    check(f, torch.randn(3, 4), 5)
    x = torch.randn(3, 4)
    out = torch.compile(f, backend="genie")(x, 5)
    assert out[1] is x
    out[2].zero_()
    assert not out[3].any() and not out[4].any(), "views of an output are views"
    x.fill_(2)
    assert bool((out[6][1][0] == 2).all()), "a view of an input is a view"


def test_inputs_and_buffers_are_changed_in_place() -> None:
    def f(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        a.add_(1)
        b[1:].mul_(2)
        b.t_()
        return a.sum() + b.sum()

    check(f, torch.randn(3), torch.randn(4, 2))


def test_batchnorm_buffers_follow_through_training_and_eval() -> None:
    net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    reference = copy.deepcopy(net)
    compiled = torch.compile(net, backend="genie")
    for step in range(6):
        for module in (net, reference):
            module.train(step % 3 != 2)
        x = torch.randn(8, 4)
        same(compiled(x), reference(x))
        for a, b in zip(net.buffers(), reference.buffers(), strict=True):
            same(a, b)


def test_graph_breaks_and_python_side_effects() -> None:
    log: list[int] = []

    def f(x: torch.Tensor) -> torch.Tensor:
        y = x.sin()
        log.append(len(log))
        torch._dynamo.graph_break()
        return y.cos() if y.sum() > 0 else y.tan()

    compiled = torch.compile(f, backend="genie")
    for x in (torch.ones(3), -torch.ones(3), torch.randn(3)):
        same(compiled(x), f(x))
    assert log == list(range(6)) and remote_runs() >= 4


def test_tied_weights_and_tensor_constants() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(7, 4)
            self.head = nn.Linear(4, 7, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, i: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(i) + torch.tensor([1.0, 2.0, 3.0, 4.0]))

    net = Tied()
    reference = copy.deepcopy(net)
    compiled, i = torch.compile(net, backend="genie"), torch.tensor([1, 5, 5])
    for run, module in ((compiled, net), (reference, reference)):
        run(i).logsumexp(-1).sum().backward()
        del module
    same(net.head.weight.grad, reference.head.weight.grad)


# -- modes ----------------------------------------------------------------------------------------------------


def test_dropout_and_random_ops_with_a_seed() -> None:
    check(lambda x: (nn.functional.dropout(x, 0.5), torch.rand_like(x), torch.randint(0, 9, (3,)),
                     torch.bernoulli(x.sigmoid())),
          torch.randn(6, 6))
    net = nn.Sequential(nn.Linear(4, 32), nn.Dropout(0.5), nn.Linear(32, 1))
    reference = copy.deepcopy(net)
    compiled, x = torch.compile(net, backend="genie"), torch.randn(5, 4)
    for run in (compiled, reference):
        torch.manual_seed(3)
        run(x).sum().backward()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        same(p.grad, q.grad)


def test_higher_order_ops() -> None:
    from torch._higher_order_ops.associative_scan import associative_scan
    from torch._higher_order_ops.scan import scan
    from torch._higher_order_ops.while_loop import while_loop
    from torch.nn.attention.flex_attention import flex_attention

    check(lambda x: torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,)), torch.randn(4))
    check(lambda n, x: while_loop(lambda n, x: n < 5, lambda n, x: (n + 1, x * 2), (n, x)),
          torch.tensor(0), torch.randn(3))
    check(lambda x: scan(lambda c, x: (c + x, c * x), torch.zeros(3), x, dim=0), torch.randn(5, 3))
    check(lambda x: associative_scan(torch.add, x, dim=0, combine_mode="generic"), torch.randn(8, 3))
    q, k, v = (torch.randn(1, 2, 16, 8) for _ in range(3))
    check(lambda q, k, v: flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (i - j)), q, k, v)


def test_a_custom_op_brings_its_library_to_embedded_workers() -> None:
    from tests.models.custom_ops import thrice

    before = genie.session().links[0].incarnation
    x = torch.randn(3, requires_grad=True)
    y = torch.compile(lambda x: thrice(x.sin()), backend="genie")(x)
    y.sum().backward()
    same(x.grad, 3 * x.detach().cos())
    assert genie.session().links[0].incarnation != before, "a new incarnation has imported it"


@pytest.mark.fallback
def test_a_custom_op_that_no_worker_can_import_runs_here() -> None:
    @torch.library.custom_op("genielocal::plus", mutates_args=())
    def plus(x: torch.Tensor) -> torch.Tensor:
        return x + 1

    plus.register_fake(torch.empty_like)
    plus._init_fn.__module__ = "__main__"
    x = torch.randn(3)
    for strict in (False, True):
        torch._dynamo.reset()
        compiled = torch.compile(lambda x: plus(x) * 2, backend="genie", options={"strict": strict})
        if strict:
            with pytest.raises(genie.UnsupportedGraphError, match="--op-library"):
                compiled(x)
        else:
            same(compiled(x), (x + 1) * 2)
            assert sum(genie.get_stats()["fallbacks"].values()) == 1


# -- autograd -------------------------------------------------------------------------------------------------


def test_backward_twice_with_retain_graph() -> None:
    net, x = net_and_input()
    compiled = torch.compile(net, backend="genie")
    loss = compiled(x).square().sum()
    loss.backward(retain_graph=True)
    loss.backward()
    twice = [p.grad / 2 for p in net.parameters() if p.grad is not None]
    same(twice, gradients(lambda: net(x).square().sum(), net))


@pytest.mark.parametrize("around", [
    lambda f, x: f(x),
    lambda f, x: checkpoint(f, x, use_reentrant=False),
    lambda f, x: checkpoint(f, x.requires_grad_(), use_reentrant=True),
])
def test_checkpoint_around_a_compiled_model(around: Callable[..., torch.Tensor]) -> None:
    net, x = net_and_input()
    compiled = torch.compile(net, backend="genie")
    expected = gradients(lambda: net(x).square().sum(), net)
    same(gradients(lambda: around(compiled, x).square().sum(), net), expected)


def test_saved_tensors_hooks_see_real_activations() -> None:
    net, x = net_and_input()
    compiled = torch.compile(net, backend="genie")
    expected = gradients(lambda: net(x).square().sum(), net)
    with torch.autograd.graph.save_on_cpu():
        same(gradients(lambda: compiled(x).square().sum(), net), expected)


def test_activations_stay_on_the_worker_and_are_freed() -> None:
    net, x = net_and_input()
    compiled = torch.compile(net, backend="genie")
    compiled(x).sum().backward()
    genie.reset_stats()
    loss = compiled(x).sum()
    moved = genie.get_stats()["by_reason"]
    assert moved["outputs"]["received"] == 6 * 2 * 4 and moved["state"]["received"] == 0
    held = genie.get_stats()["workers"]["w0"]["resident_tensors"]
    loss.backward()
    del loss
    gc.collect()
    until(lambda: genie.get_stats()["workers"]["w0"]["resident_tensors"] < held)
    assert genie.get_stats()["workers"]["w0"]["resident_tensors"] == len(list(net.parameters()))


def test_a_compiled_optimizer_step() -> None:
    net, x = net_and_input()
    reference = copy.deepcopy(net)
    optimizers = [torch.optim.AdamW(m.parameters(), lr=0.01) for m in (net, reference)]
    step = torch.compile(optimizers[0].step, backend="genie")
    compiled = torch.compile(net, backend="genie")
    for _ in range(4):
        for run, optimizer, go in ((compiled, optimizers[0], step), (reference, optimizers[1], optimizers[1].step)):
            optimizer.zero_grad()
            run(x).square().sum().backward()
            go()
    for p, q in zip(net.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("where", ["meta", "cpu"])
def test_a_default_device_of_the_callers_says_nothing_about_what_travels(where: str) -> None:
    run = torch.compile(lambda x, k: (x * 2, torch.cat([k, x])), backend="genie")
    x, k = torch.randn(3, 100), torch.randn(5, 100)
    for _ in range(3):
        with torch.device(where):
            made, k_new = run(x, k)
        assert torch.equal(made, x * 2) and torch.equal(k_new, torch.cat([k, x]))
        k = k_new
