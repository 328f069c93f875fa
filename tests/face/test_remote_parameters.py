"""`parameters="remote"`: parameters and optimizer state stay on the worker, and no stale one is read in silence."""
from __future__ import annotations

import copy
import io
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import genie_dynamo as genie
from genie_dynamo import fused
from genie_dynamo.core.errors import ConfigError, WorkerLostError
from genie_dynamo.runtime.client import stale

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2),
    "sgd": lambda params: torch.optim.SGD(params, lr=5e-2, momentum=0.9),
    "rmsprop": lambda params: torch.optim.RMSprop(params, lr=1e-3),
}


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))


class Loop:
    """A training loop, eager or with forward, backward and step on the worker."""

    def __init__(self, remote: bool, optimizer: str = "adamw", **options: Any) -> None:
        net = self.net = network()
        opt = self.optimizer = OPTIMIZERS[optimizer](net.parameters())
        loss_of: Any = lambda x, y: F.mse_loss(net(x), y)  # noqa: E731
        step: Any = lambda: opt.step()  # noqa: E731
        self.loss_of, self._step = loss_of, step
        if remote:
            self.loss_of = torch.compile(loss_of, backend="genie", fullgraph=True, options=options)
            self._step = torch.compile(step, backend="genie", options={"parameters": "remote", **options})
        self._data = torch.Generator().manual_seed(1)

    def run(self, steps: int) -> list[float]:
        losses = []
        for _ in range(steps):
            x, y = torch.randn(16, 8, generator=self._data), torch.randn(16, 4, generator=self._data)
            loss = self.loss_of(x, y)
            loss.backward()
            self._step()
            self.optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    @property
    def weight(self) -> nn.Parameter:
        weight: nn.Parameter = self.net[0].weight  # type: ignore[index, assignment]
        return weight


@pytest.fixture(autouse=True)
def _apart(fresh_dynamo: None) -> Iterator[None]:
    yield
    genie.synchronize(lost="rollback")


def close(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def pair(steps: int = 3) -> tuple[Loop, Loop]:
    """An eager loop and a remote one after some steps; the remote one's parameters are stale."""
    eager, remote = Loop(False), Loop(True)
    eager.run(steps)
    remote.run(steps)
    assert stale.is_stale(remote.weight)
    return eager, remote


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_trains_as_eager_does_and_moves_no_parameters(session: object, name: str) -> None:
    eager, remote = Loop(False, name), Loop(True, name)
    close(remote.run(3), eager.run(3))
    genie.reset_stats()
    close(remote.run(5), eager.run(5))
    moved = genie.get_stats()["by_reason"]
    num_bytes = sum(4 * p.numel() for p in remote.net.parameters())
    assert moved["weights"]["total"] == 0 and moved["state"]["received"] == 0
    assert moved["gradients"]["received"] == 5 * num_bytes
    weight = remote.weight
    genie.synchronize(remote.net)
    assert weight is remote.weight and type(weight) is nn.Parameter and not stale.any_stale()
    close(list(remote.net.parameters()), list(eager.net.parameters()))
    close(remote.optimizer.state_dict()["state"], eager.optimizer.state_dict()["state"])


def _saved(p: torch.Tensor) -> Any:
    buffer = io.BytesIO()
    torch.save(p, buffer)
    buffer.seek(0)
    return torch.load(buffer)


READS: dict[str, Callable[[nn.Parameter], Any]] = {
    "op": lambda p: p + 1,
    "no_grad op": lambda p: p.detach() * 2,
    "data": lambda p: p.data.clone(),
    "numpy": lambda p: torch.from_numpy(p.detach().numpy().copy()),
    "asarray": lambda p: torch.tensor(np.asarray(p.detach())),
    "dlpack": lambda p: torch.from_dlpack(p.detach()).clone(),
    "tolist": lambda p: torch.tensor(p.tolist()),
    "item": lambda p: torch.tensor(p[1, 2].item()),
    "index": lambda p: p[3],
    "iteration": lambda p: torch.stack(list(p)),
    "deepcopy": copy.deepcopy,
    "copy": lambda p: copy.copy(p),
    "pickle": lambda p: pickle.loads(pickle.dumps(p)),
    "save": _saved,
    "storage": lambda p: torch.tensor(p.untyped_storage().nbytes()),
    "print": lambda p: len(repr(p)) and repr(p),
    "format": lambda p: f"{p[0, 0]:.4f}",
    "str": str,
    "norm": lambda p: torch.linalg.vector_norm(p),
    "foreach": lambda p: torch._foreach_norm([p])[0],
    "list": lambda p: torch.cat([p, p]),
    "ema": lambda p: torch.zeros_like(p).lerp_(p.detach(), 0.5),
    "vector": lambda p: nn.utils.parameters_to_vector([p]),
    "to": lambda p: p.to(torch.float64),
    "compare": lambda p: p > 0,
    "bool": lambda p: torch.tensor(bool((p != 0).any())),
    "view": lambda p: p.view(-1)[4:9],
    "copy_": lambda p: torch.zeros(16, 8).copy_(p.detach()),
    "out": lambda p: torch.add(p.detach(), 1, out=torch.zeros(16, 8)),
    "functional": lambda p: F.linear(torch.ones(2, 8), p),
    "share_memory": lambda p: p.detach().clone().share_memory_(),
}


def test_only_what_has_parameters_is_synchronised() -> None:
    with pytest.raises(TypeError, match="a module, an optimizer, a tensor or nothing, got 3"):
        genie.synchronize(3)


def test_a_read_synchronises(session: object) -> None:
    eager, remote = pair(2)
    for name, read in READS.items():
        eager.run(1)
        remote.run(1)
        assert stale.is_stale(remote.weight), name
        actual, expected = read(remote.weight), read(eager.weight)
        assert not stale.any_stale(), name
        if isinstance(expected, str):
            assert actual.splitlines()[0] == expected.splitlines()[0], name
        else:
            assert type(actual) is type(expected), name
            torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5, msg=lambda text, name=name:
                                       f"{name}: {text}")
        del actual, expected                     # some are views, which would keep the next ones from being stale


def test_what_is_known_without_the_content_brings_nothing(session: object) -> None:
    _, remote = pair()
    p = remote.weight
    assert p.shape == (16, 8) and p.dtype is torch.float32 and p.device.type == "cpu" and p.requires_grad and p.is_leaf
    assert p.grad is None and p.size(0) == 16 and p.numel() == 128 and p.dim() == 2 and isinstance(p, nn.Parameter)
    assert hash(p) == id(p) and p in {p} and p.is_contiguous() and p.stride() == (8, 1)
    remote.optimizer.zero_grad(set_to_none=True)
    assert sum(q.numel() for q in remote.net.parameters()) == 212
    p.grad = torch.ones(16, 8)
    nn.utils.clip_grad_norm_(remote.net.parameters(), 1.0)
    nn.utils.clip_grad_value_(remote.net.parameters(), 0.1)
    assert stale.is_stale(p)


def test_aliases_that_are_held_stay_true(session: object) -> None:
    eager, remote = pair()
    view, kept = remote.weight.detach(), remote.net.state_dict()
    expected = eager.weight.detach(), eager.net.state_dict()
    eager.run(2)
    remote.run(2)
    close((view, kept), expected)
    del view, kept
    eager.run(1)
    remote.run(1)
    assert stale.is_stale(remote.weight)
    close(remote.weight, eager.weight)


def test_a_fused_optimizer_is_said_and_counted(session: object) -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), fused=True)
    step = torch.compile(lambda: optimizer.step(), backend="genie", options={"parameters": "remote"})
    before = genie.get_stats()["fallbacks"].get(fused.REASON, 0)
    for _ in range(2):
        net(torch.randn(2, 8)).sum().backward()
        step()
        optimizer.step()
    assert genie.get_stats()["fallbacks"][fused.REASON] == before + 2


def test_a_step_whose_new_contents_cannot_be_fetched_has_changed_nothing(
        session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    eager, remote = pair()
    last = list(remote.net.parameters())[-1]
    view, fetch, failed = last.detach(), type(session).fetch, []

    def fail_once(self: Any, *args: Any) -> Any:
        if not failed:
            failed.append(stale.any_stale())
            raise WorkerLostError("the worker went after it had answered")
        return fetch(self, *args)

    monkeypatch.setattr(type(session), "fetch", fail_once)
    eager.run(1)
    remote.run(1)
    assert failed == [False]
    expected = list(eager.net.parameters())
    close((view, list(remote.net.parameters())), (expected[-1], expected))


EDITS: dict[str, Callable[[Loop], Any]] = {
    "data": lambda loop: loop.weight.data.mul_(0.5),
    "in place": lambda loop: nn.init.constant_(loop.weight, 0.25),
    "data =": lambda loop: setattr(loop.weight, "data", torch.full((16, 8), 0.125)),
    "load_state_dict": lambda loop: loop.net.load_state_dict(network().state_dict()),
    "state": lambda loop: loop.optimizer.state[loop.weight]["exp_avg"].zero_(),
    "numpy": lambda loop: (loop.weight.detach().numpy().fill(0.5), genie.invalidate(loop.weight)),
    "replaced": lambda loop: nn.utils.vector_to_parameters(torch.full((212,), 0.1), loop.net.parameters()),
}


def test_edits_go_up_with_the_next_call(session: object) -> None:
    eager, remote = pair()
    for name, edit in EDITS.items():
        edit(eager)
        edit(remote)
        torch.testing.assert_close(remote.run(2), eager.run(2), rtol=1e-4, atol=1e-5, msg=lambda text, name=name:
                                   f"{name}: {text}")
    close(list(remote.net.parameters()), list(eager.net.parameters()))


def test_an_eager_step_between_reads_and_writes_the_truth(session: object) -> None:
    eager, remote = pair()
    for loop in (eager, remote):
        F.mse_loss(loop.net(torch.ones(2, 8)), torch.ones(2, 4)).backward()
        loop.optimizer.step()
        loop.optimizer.zero_grad()
    close(remote.run(2), eager.run(2))


def test_hooks_of_the_optimizer_see_the_truth(session: object) -> None:
    seen: dict[bool, list[float]] = {False: [], True: []}
    for is_remote in (False, True):
        loop, log = Loop(is_remote), seen[is_remote]
        loop.optimizer.register_step_pre_hook(
            lambda *_, loop=loop, log=log: log.append(float(loop.weight.detach().sum())))
        loop.optimizer.register_step_post_hook(
            lambda *_, loop=loop, log=log: log.append(float(loop.weight.detach().sum())))
        loop.run(3)
    close(seen[True], seen[False])


@pytest.mark.fallback
def test_eager_code_between_graphs_sees_the_truth(session: object) -> None:
    eager, remote = pair()

    def broken(net: nn.Module, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        y = net(x)
        torch._dynamo.graph_break()
        read = float(net[0].weight.detach().sum())  # type: ignore[index, union-attr, operator]
        return net(y.repeat(1, 2)), read

    with torch.no_grad():
        expected = broken(eager.net, torch.ones(2, 8))
        actual = torch.compile(broken, backend="genie")(remote.net, torch.ones(2, 8))
    close(actual, expected)


def test_a_lost_worker_takes_what_was_not_synchronised(own_session: Any) -> None:
    session = own_session(workers=1)
    eager, remote = pair()
    close(remote.weight, eager.weight)                     # the last synchronised state
    before = copy.deepcopy(eager.net.state_dict()), copy.deepcopy(eager.optimizer.state_dict())
    eager.run(2)
    remote.run(2)
    os.kill(session.links[0].embedded.pid, signal.SIGKILL)
    with pytest.raises(WorkerLostError, match="as of the last time they were synchronised"):
        remote.weight.sum()
    with pytest.raises(WorkerLostError, match='lost="rollback"'):
        remote.run(1)
    remote.optimizer.zero_grad()
    assert stale.is_stale(remote.weight)
    genie.synchronize(remote.net, lost="rollback")
    eager.net.load_state_dict(before[0])
    eager.optimizer.load_state_dict(before[1])
    close(list(remote.net.parameters()), list(eager.net.parameters()))
    eager._data.manual_seed(5)
    remote._data.manual_seed(5)
    close(remote.run(2), eager.run(2))


def test_what_somebody_else_can_read_goes_back_with_the_others(own_session: Any) -> None:
    session = own_session(workers=1)
    _, remote = pair()
    alias = remote.weight.data.numpy()
    remote.run(2)
    genie.synchronize(remote.net)
    parameters = list(remote.net.parameters())
    synchronised = [p.detach().clone() for p in parameters]
    remote.run(3)
    assert not stale.is_stale(remote.weight) and any(map(stale.is_stale, parameters))
    assert not np.array_equal(alias, synchronised[0].numpy())         # it came down, as the others have not
    os.kill(session.links[0].embedded.pid, signal.SIGKILL)
    genie.synchronize(remote.net, lost="rollback")
    assert [torch.equal(p, before) for p, before in zip(parameters, synchronised, strict=True)] == [True] * 4
    assert np.array_equal(alias, synchronised[0].numpy())


def test_what_was_noted_for_a_rollback_is_forgotten_once_nothing_is_stale(session: Any) -> None:
    """Else the rollback of another model, later, would set this one's tensor back as well."""
    shared = torch.zeros(3)
    stale.comes_down(session, shared)                  # and then every tensor beside it that was stale is collected
    shared.fill_(1.0)
    assert not stale.any_stale()
    genie.synchronize()
    stale.rollback()                                   # of a later loss
    assert shared.tolist() == [1.0] * 3


def test_closing_the_session_brings_them_home(own_session: Any) -> None:
    own_session(workers=1)
    eager, remote = pair()
    genie.shutdown()
    assert not stale.any_stale()
    close(list(remote.net.parameters()), list(eager.net.parameters()))


def test_with_two_workers_each_step_finds_what_the_last_one_left(own_session: Any) -> None:
    from genie_dynamo.runtime.client.attempt import Attempts

    session = own_session(workers=2)
    eager, remote = Loop(False), Loop(True)
    close(remote.run(3), eager.run(3))
    assert stale.is_stale(remote.weight)
    turns = iter(range(1000))
    with pytest.MonkeyPatch.context() as patch:
        # Calls that go now here, now there: what lives on one worker alone takes the long way to the other.
        patch.setattr(Attempts, "_near_state", lambda self, session, args: session.links[next(turns) // 3 % 2])
        close(remote.run(4), eager.run(4))
    assert next(turns) > 6
    close(list(remote.net.parameters()), list(eager.net.parameters()))
    assert all(not link.lost for link in session.links)


def test_calls_that_are_verified_compare_with_the_truth(session: object) -> None:
    eager, remote = Loop(False, "sgd"), Loop(True, "sgd", verify=1.0)
    genie.reset_stats()
    close(remote.run(3), eager.run(3))
    stats = genie.get_stats()
    assert stats["events"]["call verified"] == stats["calls"] > 0
    close(remote.weight, eager.weight)


def test_the_default_leaves_nothing_behind(session: object) -> None:
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    step: Any = torch.compile(lambda: optimizer.step(), backend="genie")
    net(torch.ones(2, 8)).sum().backward()
    step()
    assert not stale.any_stale() and type(next(net.parameters())) is nn.Parameter


def test_synchronize_names_what_it_takes(session: object) -> None:
    with pytest.raises(ConfigError, match="rollback"):
        genie.synchronize(lost="ignore")  # type: ignore[arg-type]
    genie.synchronize()
