"""How often payload is copied on its way over shared pages, as genie.get_stats() says it, and that what is not copied
is nobody else's afterwards."""
from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from tests.runtime.lanes.ends import native

FLOATS = 1 << 20                     # 4 MiB
Model = Callable[..., torch.Tensor]


@pytest.fixture(autouse=True)
def shared_pages(session: Any, fresh_dynamo: None) -> Iterator[None]:
    native()
    if genie.get_stats()["workers"]["w0"]["lane"]["name"] != "shm":
        pytest.skip("no shared pages between this process and its worker")
    with torch.no_grad():
        yield


def compiled(model: Model) -> Model:
    return torch.compile(model, backend="genie", options={"strict": True})  # type: ignore[no-any-return]


def per_byte(direction: str, model: Model, make: Callable[[int], torch.Tensor], calls: int = 4) -> float:
    """Copies per byte of calls with new inputs, each compared with eager, after what is learnt in the first ones."""
    run = compiled(model)
    for k in range(6):
        run(make(k))
    genie.reset_stats()
    for k in range(calls):
        x = make(k)
        assert torch.equal(run(x), model(x))
    counted = genie.get_stats()["copies"][direction]
    assert counted["bytes_moved"] >= calls * FLOATS * 4
    return float(counted["per_byte"])


def small(k: int) -> torch.Tensor:
    return torch.arange(1024.0).add_(k)


def large(k: int) -> torch.Tensor:
    return torch.arange(float(FLOATS)).add_(k)


def widened(x: torch.Tensor) -> torch.Tensor:
    return x.view(-1, 1) * torch.ones(1, 1024)


def test_an_output_made_where_it_leaves_from_is_never_copied() -> None:
    assert per_byte("received", widened, small) < 0.01


def test_an_output_whose_op_makes_its_own_memory_is_copied_once() -> None:
    assert per_byte("received", lambda x: widened(x).relu(), small) == pytest.approx(1.0, abs=0.01)


def test_an_input_is_copied_once_by_the_client_and_read_where_it_lies() -> None:
    assert per_byte("sent", lambda x: x.sum(), large) == pytest.approx(1.0, abs=0.01)
    by_whom = genie.get_stats()["copies"]["sent"]["bytes_copied"]
    assert by_whom["worker"] < 0.01 * by_whom["client"]


def test_an_input_with_gaps_is_gathered_into_the_lane_and_scattered_once() -> None:
    def strided(k: int) -> torch.Tensor:
        return torch.arange(2.0 * FLOATS).add_(k).view(-1, 2)[:, 0]

    assert per_byte("sent", lambda x: x.sum(), strided) == pytest.approx(2.0, abs=0.01)


def test_weights_are_copied_into_the_lane_and_to_where_they_stay() -> None:
    layer = torch.nn.Linear(1024, 1024, bias=False)
    run = compiled(layer)
    genie.reset_stats()
    run(torch.ones(1, 1024))
    counted = genie.get_stats()["copies"]["sent"]
    assert counted["bytes_moved"] >= FLOATS * 4 and counted["per_byte"] == pytest.approx(2.0, abs=0.05)


def test_a_result_is_the_callers_alone() -> None:
    """Its memory was the worker's: what the caller does to it touches no later result, and no earlier one."""
    run, kept = compiled(widened), []
    for k in range(10):
        made = run(small(k))
        kept.append(made)
        made.add_(1)
    for k, made in enumerate(kept):
        assert torch.equal(made, widened(small(k)) + 1)
    assert len({made.data_ptr() for made in kept}) == len(kept)


def test_a_result_that_stays_on_the_worker_is_not_torn_by_the_callers_edits() -> None:
    def step(x: torch.Tensor) -> torch.Tensor:
        return x * 1.5 + 1

    run = compiled(step)
    x = expected = torch.ones(FLOATS)
    for k in range(12):
        if k % 3 == 2:
            x.mul_(0.5)                      # the worker may have it as it was
            expected = expected * 0.5
        before, was = x, x.clone()
        x, expected = run(x), step(expected)
        assert torch.equal(x, expected) and torch.equal(before, was)


def test_counters_begin_with_the_session_and_are_reset() -> None:
    genie.reset_stats()
    counted = genie.get_stats()["copies"]
    assert all(row["bytes_moved"] < 10_000 for row in counted.values())
    compiled(lambda x: x.sum())(large(0))
    assert genie.get_stats()["copies"]["sent"]["bytes_moved"] >= FLOATS * 4
    genie.reset_stats()
    assert all(row["bytes_moved"] < 10_000 for row in genie.get_stats()["copies"].values())


def test_memory_for_the_next_answer_is_ready_while_this_one_is_held() -> None:
    """12 MiB take a segment each: without that the second answer would have to make one."""
    run = compiled(lambda x: x.view(-1, 1) * torch.ones(1, 3072))
    first = run(small(0))
    before = genie.get_stats()["workers"]["w0"]["lane_memory"]
    second = run(small(1))
    after = genie.get_stats()["workers"]["w0"]["lane_memory"]
    assert after["used_bytes"] == before["used_bytes"] + 12 * FLOATS
    assert after["reserved_bytes"] == before["reserved_bytes"]
    assert 0.0 <= after["fragmentation"] < 0.25 and after["num_refusals"] == 0
    assert first.data_ptr() != second.data_ptr()
