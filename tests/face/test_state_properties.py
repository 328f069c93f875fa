"""Calls, edits, deletions, restarts and threads in any order: after each step everything is what eager has.

Two worlds go through the same steps, one with compiled graphs and one in eager. A world holds named tensors; a step
runs a graph on some of them, or edits, views, copies or forgets one.
"""
from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import genie_dynamo as genie
from tests.face.comparing import same

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROWS, WIDTH = 4, 96


class Draws:
    """Random tensors by a generator of their own: threads share torch's."""

    def __init__(self, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator)

    def order(self, count: int) -> Tensor:
        return torch.randperm(count, generator=self._generator)


class Graphs:
    """The graphs of one world."""

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        draws = Draws(0)
        self.lin = nn.Linear(WIDTH, WIDTH)
        with torch.no_grad():
            for parameter in self.lin.parameters():
                parameter.copy_(draws.normal(*parameter.shape) * 0.06)
        self.register = nn.Parameter(draws.normal(WIDTH), requires_grad=False)
        self.append = wrap(self._append)
        self.crop = wrap(self._crop)
        self.write = wrap(self._write)
        self.recur = wrap(self._recur)
        self.halves = wrap(self._halves)
        self.both = wrap(self._both)

    def _append(self, cache: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        grown = torch.cat([cache, self.lin(x)], 0)
        return grown.sum(0) * self.register, grown

    def _crop(self, cache: Tensor, x: Tensor) -> Tensor:
        return torch.cat([cache, torch.tanh(x)], 0)[-12:]

    def _write(self, cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
        cache.index_copy_(0, at, x * 2)
        return cache.sum(1)

    def _recur(self, cache: Tensor, x: Tensor) -> Tensor:
        cache.copy_(torch.tanh(cache * 0.5 + self.lin(x).sum(0)))
        return cache[:2] + 1

    def _halves(self, cache: Tensor) -> tuple[Tensor, ...]:
        return torch.chunk(cache * 2, 2)

    def _both(self, cache: Tensor, other: Tensor) -> Tensor:
        return torch.cat([cache, other], 0) if cache.shape[0] < 40 else cache + other.mean()


class World:
    """Named tensors and the graphs that run on them."""

    def __init__(self, wrap: Callable[[Any], Any]) -> None:
        self.graphs = Graphs(wrap)
        draws = Draws(1)
        self.held = {name: draws.normal(16, WIDTH) for name in "abc"}

    def step(self, kind: str, name: str, other: str, number: int) -> Any:
        """Carry out one step; returns what its caller gets."""
        draws = Draws(number)
        graphs, held, cache = self.graphs, self.held, self.held[name]
        x = draws.normal(ROWS, WIDTH)
        if kind == "append":
            out, held[name] = graphs.append(cache[-24:], x)
            return out
        if kind == "crop":
            held[name] = graphs.crop(cache, x)
        elif kind == "write":
            at = draws.order(cache.shape[0])[:ROWS]
            return graphs.write(cache, x[:at.shape[0]], at)
        elif kind == "recur":
            return graphs.recur(cache, x)
        elif kind == "halves":
            held[name], held[other] = graphs.halves(cache)
            if held[name].shape[0] < ROWS:
                held[name], held[other] = draws.normal(16, WIDTH), draws.normal(16, WIDTH)
        elif kind == "both":
            held[name] = graphs.both(cache, held[other])
        else:
            self._edit(kind, name, other, draws)
        return None

    def _edit(self, kind: str, name: str, other: str, draws: Draws) -> None:
        held, cache = self.held, self.held[name]
        if kind == "in place":
            cache.mul_(0.5)
        elif kind == "one element":
            cache[1, 2] = 7
        elif kind == "through a view":
            cache[1:3].t()[4:9].zero_()
        elif kind == "past the counter":
            cache.data.add_(0.25)
            genie.invalidate(cache)
        elif kind == "set_":
            cache.set_(draws.normal(*cache.shape))      # type: ignore[call-overload]
        elif kind == "resize":
            cache.resize_(max(ROWS, cache.shape[0] - 2), WIDTH)
        elif kind == "swap data" and held[name].is_inference() != held[other].is_inference():
            pass                              # what such a tensor is afterwards torch itself does not know
        elif kind == "swap data":
            held[name].data, held[other].data = held[other].data, held[name].data
        elif kind == "swap":
            torch.utils.swap_tensors(cache, held[other])
        elif kind == "swap weights":
            new = nn.Parameter(draws.normal(WIDTH, WIDTH) * 0.1)
            torch.utils.swap_tensors(self.graphs.lin.weight, new)
        elif kind == "inference":
            with torch.inference_mode():
                held[name] = cache * 0.5
        elif kind == "inference in place":
            with torch.inference_mode():
                cache.sub_(0.25)
        elif kind == "deepcopy":
            held[name] = copy.deepcopy(held[other])
        elif kind == "reorder":
            held[name] = cache.index_select(0, draws.order(cache.shape[0]))
        elif kind == "view":
            held[name] = cache[1:] if cache.shape[0] > 8 else draws.normal(16, WIDTH)
        elif kind == "alias":
            held[name] = held[other]
        elif kind == "forget":
            held[name] = draws.normal(16, WIDTH)
        elif kind == "weights":
            self.graphs.lin.weight.data.copy_(draws.normal(WIDTH, WIDTH) * 0.1)
            genie.invalidate(self.graphs.lin)
        elif kind == "optimizer":
            self._optimize(torch.optim.SGD(self.graphs.lin.parameters(), lr=0.1, fused=True), draws)
        elif kind == "optimizer, not fused":
            self._optimize(torch.optim.AdamW(self.graphs.lin.parameters(), lr=0.1, fused=False), draws)
        elif kind == "load":
            self.graphs.lin.load_state_dict({k: v * 0.9 for k, v in self.graphs.lin.state_dict().items()})
        else:
            assert kind == "nothing", kind


    def _optimize(self, optimizer: torch.optim.Optimizer, draws: Draws) -> None:
        for parameter in self.graphs.lin.parameters():
            parameter.grad = draws.normal(*parameter.shape)
        optimizer.step()


CALLS = ("append", "crop", "write", "recur", "halves", "both")
EDITS = ("in place", "one element", "through a view", "past the counter", "set_", "resize", "swap data", "reorder",
         "view", "alias", "forget", "weights", "optimizer", "optimizer, not fused", "load", "swap", "swap weights",
         "inference", "inference in place", "deepcopy", "nothing")


def compiled(function: Any) -> Any:
    return torch.compile(function, backend="genie", dynamic=True)


def outcome(world: World, kind: str, name: str, other: str, number: int) -> Any:
    """What a step returns, or how torch refuses it: writing to a tensor of inference mode outside of it, say."""
    try:
        return world.step(kind, name, other, number)
    except RuntimeError as error:
        if isinstance(error, genie.GenieError):
            raise
        return str(error).partition("\n")[0]


def walk(seed: int, steps: int, between: Callable[[random.Random], None] = lambda _: None) -> None:
    chance = random.Random(seed)
    ours, theirs = World(compiled), World(lambda function: function)
    trace = []
    with torch.no_grad():
        for number in range(steps):
            kind = chance.choice(CALLS if chance.random() < 0.6 else EDITS)
            name, other = chance.sample("abc", 2)
            trace.append(f"{kind} {name} {other}")
            between(chance)
            got, expected = (outcome(world, kind, name, other, number) for world in (ours, theirs))
            try:
                same(got, expected)
                for held in "abc":
                    same(ours.held[held], theirs.held[held])
            except AssertionError as error:
                raise AssertionError(f"seed {seed}, after {' | '.join(trace[-12:])}: {error}") from error


@pytest.mark.parametrize("seed", [*range(3), *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 30))])
def test_any_order_of_calls_and_edits(seed: int, session: object) -> None:
    walk(seed, 60)


@pytest.mark.parametrize("seed", [100, *(pytest.param(s, marks=pytest.mark.slow) for s in range(101, 106))])
def test_with_workers_that_die(seed: int, own_session: Callable[..., Any]) -> None:
    session = own_session(workers=2)

    def kill(chance: random.Random) -> None:
        if chance.random() < 0.06:
            chance.choice(session.links).embedded.process.kill()

    walk(seed, 50, kill)


@pytest.mark.parametrize("seed", [200, *(pytest.param(s, marks=pytest.mark.slow) for s in range(201, 206))])
def test_with_a_small_quota(seed: int, own_session: Callable[..., Any]) -> None:
    weights_bytes = 4 * (WIDTH * WIDTH + 2 * WIDTH)
    own_session(workers=1, resident_quota_gib=(weights_bytes + 60_000) / 2**30)
    walk(seed, 60)


def test_threads_with_state_of_their_own_and_shared_weights(own_session: Callable[..., Any]) -> None:
    own_session(workers=2)
    failures: list[BaseException] = []

    def run(seed: int) -> None:
        try:
            walk(seed, 25)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in (300, 301, 302)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures


@torch.no_grad()
def test_threads_that_share_a_cache(own_session: Callable[..., Any]) -> None:
    own_session(workers=1)
    torch.manual_seed(0)
    lin = nn.Linear(WIDTH, WIDTH)
    read = compiled(lambda cache, x: lin(x) @ cache.t())
    cache, failures = torch.randn(64, WIDTH), []
    barrier = threading.Barrier(3)

    def work(number: int) -> None:
        try:
            for turn in range(12):
                barrier.wait(60)
                if number == 0:
                    cache.add_(turn)
                barrier.wait(60)
                x = torch.full((2, WIDTH), float(number))
                with torch.no_grad():
                    same(read(cache, x), lin(x) @ cache.t())
        except BaseException as error:
            barrier.abort()
            failures.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures, failures
