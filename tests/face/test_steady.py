"""Calls that look alike take prepared messages; whatever does not look alike gets the same answer the ordinary way."""
from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from genie_dynamo.runtime.client import steady
from genie_dynamo.runtime.lanes import native
from tests.face.comparing import same

pytestmark = [pytest.mark.usefixtures("session", "fresh_dynamo"),
              pytest.mark.skipif(native.module() is None, reason="the native extension is not built")]

CALLS = 12


def add(x: torch.Tensor) -> torch.Tensor:
    return x * 2 + 1


def slow(x: torch.Tensor) -> torch.Tensor:
    """A small graph that takes some milliseconds."""
    for _ in range(4):
        x = (x[:, None] * torch.ones(1, 4096)).mean(1)
    return x


def remote(function: Any, **more: Any) -> Any:
    return torch.compile(function, backend="genie", fullgraph=True, **more)


def repeated() -> int:
    """Runs that the worker has recognised, ever."""
    return int(genie.get_stats()["workers"]["w0"]["repeated_runs"])


@pytest.fixture()
def prepared(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each steady call since, whether its message was filled in."""
    seen: list[bool] = []
    send = steady._send

    def watched(*args: Any) -> Any:
        begun = send(*args)
        seen.append(begun.prepared is not None)
        return begun

    monkeypatch.setattr(steady, "_send", watched)
    return seen


def check(compiled: Any, function: Any, *inputs: torch.Tensor) -> None:
    same(compiled(*inputs), function(*inputs))


def warm(compiled: Any, function: Any, size: int = 256) -> None:
    for seed in range(CALLS):
        check(compiled, function, torch.full((size,), float(seed)))


def test_calls_that_look_alike_are_prepared_on_both_sides(prepared: list[bool]) -> None:
    before = repeated()
    warm(remote(add), add)
    assert all(prepared[-4:])
    assert repeated() - before >= CALLS // 2


def test_what_is_counted_is_the_same_as_ever(prepared: list[bool]) -> None:
    compiled, counted = remote(add), []
    for seed in range(CALLS):
        genie.reset_stats()
        check(compiled, add, torch.full((256,), float(seed)))
        stats = genie.get_stats()
        counted.append((stats["calls"], stats["bytes_sent"], stats["bytes_received"],
                        {k: v["total"] for k, v in stats["by_reason"].items()}))
    last_encoded = CALLS - len(prepared) + prepared.index(True) - 1
    assert prepared[-1] and counted[-1] == counted[last_encoded]


@pytest.mark.parametrize("size", [256, 1 << 15, 1 << 17])
def test_results_are_the_callers_own(size: int, prepared: list[bool]) -> None:
    compiled = remote(add)
    results = [compiled(torch.full((size,), float(seed))) for seed in range(CALLS)]
    for seed, result in enumerate(results):
        same(result, add(torch.full((size,), float(seed))))
        result.zero_()
    assert prepared[-1] == (size * 4 < native.COPY_BELOW_BYTES)


def test_parameters_stay_there_and_their_edits_are_seen(prepared: list[bool]) -> None:
    net = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4)).requires_grad_(False)
    compiled, before = remote(net), repeated()
    for turn in range(40):
        if turn == 20:
            net[0].weight.mul_(2)
        if turn == 30:
            net[2].bias = nn.Parameter(torch.ones(4), requires_grad=False)
        check(compiled, net, torch.randn(3, 16))
    assert sum(prepared) >= 20 and repeated() > before


@torch._dynamo.config.patch(recompile_limit=64)
def test_inputs_that_are_not_like_the_last_ones() -> None:
    compiled = remote(add, dynamic=True)
    with torch.inference_mode():
        inference = torch.randn(16, 16)
    trained = torch.randn(16, 16, requires_grad=True)
    wide = torch.randn(16, 32)
    inputs = [torch.randn(16, 16), torch.randn(16, 16).t(), wide[:, ::2], wide[:, :16],
              torch.randn(1, 16).expand(16, 16), inference, torch.randn(8, 32), torch.randn(256, 256),
              torch.randn(16, 16), torch.empty(0, 4)]
    for turn in range(4 * len(inputs)):
        value = inputs[turn % len(inputs)]
        for _ in range(1 + turn % 4):
            check(compiled, add, value)
    same(compiled(trained).detach(), add(trained).detach())
    with torch.inference_mode():
        for _ in range(CALLS):
            check(compiled, add, torch.randn(16, 16))
            check(compiled, add, inference)


def test_conjugates_and_numbers() -> None:
    def scaled(x: torch.Tensor, factor: float, count: int) -> torch.Tensor:
        return x * factor + count

    compiled = torch.compile(scaled, backend="genie", dynamic=True)
    z = torch.randn(64, dtype=torch.complex64)
    for turn in range(3 * CALLS):
        for value in (z, z.conj(), z) if turn % 2 else (z,):
            same(compiled(value, 0.5 * turn, turn // 4), scaled(value, 0.5 * turn, turn // 4))


def test_outputs_that_are_conjugated_when_they_are_read() -> None:
    def changed(x: torch.Tensor) -> torch.Tensor:
        return (x * 2).conj()

    compiled = torch.compile(changed, backend="genie")
    for _ in range(CALLS):
        x = torch.randn(64, dtype=torch.complex64)
        torch.testing.assert_close(compiled(x), changed(x), rtol=0, atol=0)


def test_gradients_with_inputs_that_want_some() -> None:
    compiled = remote(add)
    for _ in range(CALLS):
        x = torch.randn(16, requires_grad=True)
        compiled(x).sum().backward()
        same(x.grad, torch.full((16,), 2.0))


def test_an_error_of_the_op_after_steady_calls(prepared: list[bool]) -> None:
    def pick(x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
        return x[index]

    compiled, x = remote(pick), torch.randn(8)
    for turn in range(2 * CALLS):
        check(compiled, pick, x, torch.tensor([turn % 8]))
    assert prepared[-1]
    for _ in range(2):
        with pytest.raises(IndexError):
            compiled(x, torch.tensor([99]))
        for turn in range(CALLS):
            check(compiled, pick, x, torch.tensor([turn % 8]))


def test_outputs_of_other_sizes_come_the_ordinary_way() -> None:
    def found(x: torch.Tensor) -> torch.Tensor:
        return x.nonzero()

    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        compiled = remote(found)
        for turn in range(3 * CALLS):
            check(compiled, found, (torch.arange(16) % (1 + turn // CALLS) == 0).float())


def test_inputs_that_are_written_to(prepared: list[bool]) -> None:
    def bump(x: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return x * 2

    compiled, mine, eager = remote(bump), torch.zeros(64), torch.zeros(64)
    for _ in range(CALLS):
        same(compiled(mine), bump(eager))
        same(mine, eager)
    assert not any(prepared)


def test_a_worker_killed_between_steady_calls(own_session: Callable[..., Any]) -> None:
    own_session(workers=1)
    compiled = remote(add)
    warm(compiled, add)
    os.kill(genie.session().links[0].embedded.pid, signal.SIGKILL)  # type: ignore[union-attr]
    warm(compiled, add)
    assert genie.get_stats()["events"]["worker replaced"] == 1
    assert repeated() > 0


def once_in_a_prepared_call(monkeypatch: pytest.MonkeyPatch, act: Callable[[Any], None]) -> list[Any]:
    """Do something to the connection of the next call that was filled in, once its message has been sent."""
    send, done = steady._send, []

    def acting(session: Any, connection: Any, *args: Any) -> Any:
        begun = send(session, connection, *args)
        if begun.prepared is not None and not done:
            done.append(connection)
            act(connection)
        return begun

    monkeypatch.setattr(steady, "_send", acting)
    return done


def test_a_worker_killed_in_a_steady_call(own_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own_session(workers=1)
    compiled = remote(slow)
    warm(compiled, slow)
    pid = genie.session().links[0].embedded.pid  # type: ignore[union-attr]
    done = once_in_a_prepared_call(monkeypatch, lambda connection: os.kill(pid, signal.SIGKILL))
    warm(compiled, slow)
    assert done and genie.get_stats()["events"]["call repeated after a worker was lost"] == 1


def test_a_lane_that_breaks_in_a_steady_call(own_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    own_session(workers=1)
    compiled = remote(slow)
    warm(compiled, slow)
    done = once_in_a_prepared_call(monkeypatch, lambda connection: connection.end.channel.close())
    warm(compiled, slow)
    assert done and genie.get_stats()["events"]["call repeated after a lane broke"] == 1


def test_a_worker_that_forgets_what_it_had(own_session: Callable[..., Any]) -> None:
    """A stale handle in a steady call: the worker has no such template or program any more."""
    from genie_dynamo.core import messages as m

    session = own_session(workers=1)
    net = nn.Linear(16, 16).requires_grad_(False)
    compiled, link = remote(net), session.links[0]
    for _ in range(30):
        check(compiled, net, torch.randn(2, 16))
    entries = [session.residency.find(p) for p in (net.weight, net.bias)]
    link.tell(m.Free(tuple((e.tensor_id, e.epoch) for e in entries)))
    for e in entries:
        e.sent.clear(), e.acked.clear()             # it is known that they are gone, not that a template was
    for _ in range(CALLS):
        check(compiled, net, torch.randn(2, 16))


def test_another_program_under_the_number_of_a_steady_one(
        own_session: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that does so gets an error; the worker lives."""
    from genie_dynamo.core import messages as m
    from genie_dynamo.runtime.client import binding

    programs: list[Any] = []
    load = binding._load

    def watched(session: Any, connection: Any, link: Any, program: Any, timeout_s: float) -> Any:
        programs.append(program)
        return load(session, connection, link, program, timeout_s)

    monkeypatch.setattr(binding, "_load", watched)
    session = own_session(workers=1)
    link = session.links[0]
    two, one = remote(lambda x: (x * 2, x + 1)), remote(add)
    same(two(torch.ones(256)), (torch.full((256,), 2.0), torch.full((256,), 2.0)))
    warm(one, add)
    assert repeated()
    link.ask(lambda request: m.Load(request, replace(programs[0], program_id=programs[1].program_id).to_wire()), 5.0)
    with pytest.raises(genie.ProtocolError, match="value 1 of 1"):
        one(torch.ones(256))
    assert link.embedded.alive
    genie.shutdown()


def test_threads_with_steady_calls() -> None:
    compiled = remote(add)
    warm(compiled, add)
    wrong: list[int] = []

    def calls(start: int) -> None:
        for seed in range(start, start + 40):
            x = torch.full((256,), float(seed))
            if not torch.equal(compiled(x), add(x)):
                wrong.append(seed)

    threads = [threading.Thread(target=calls, args=(1000 * n,)) for n in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)


def test_two_clients_with_steady_calls(own_session: Callable[..., Any]) -> None:
    """A second session on the same worker: its calls look the same, and are of other programs."""
    from genie_dynamo.runtime.client.session import Session
    from genie_dynamo.runtime.cluster import WorkerAddress

    first = own_session(workers=1)
    compiled = remote(add)
    warm(compiled, add)
    with Session(first.config, [WorkerAddress(address=first.links[0].address, name="w0")]) as second:
        for turn in range(CALLS):
            second.links[0].ask(lambda request: steady.m.Stats(request), 5.0)
            check(compiled, add, torch.full((256,), float(turn)))
    warm(compiled, add)
