"""Which edits of parameters are seen, and that what is unchanged costs no second look."""
from __future__ import annotations

import gc
import itertools
from collections.abc import Callable

import pytest
import torch

from genie_dynamo.runtime.client.habits import Habit
from genie_dynamo.runtime.client.residency import Residency, Seen, StaticSet, full_key

NOTHING: frozenset[int] = frozenset()


class Table:
    """A residency table that records what it frees."""

    def __init__(self, num_samples: int = 8) -> None:
        self.freed: list[tuple[str, tuple[int, int]]] = []
        ids = itertools.count(1)
        self.residency = Residency(num_samples, lambda worker, key: self.freed.append((worker, key)), lambda: next(ids))


def epochs(seen: Seen) -> list[int]:
    return [entry.epoch for entry in seen.entries]


def test_unchanged_parameters_give_the_same_look() -> None:
    module = torch.nn.Linear(4, 4)
    args = list(module.parameters())
    statics = StaticSet(Table().residency, (0, 1), NOTHING)
    first = statics.check(args)
    assert statics.check(args) is first


def edit_in_place(p: torch.nn.Parameter) -> None:
    with torch.no_grad():
        p.add_(1)


def edit_view(p: torch.nn.Parameter) -> None:
    with torch.no_grad():
        p[0].zero_()


def swap_data(p: torch.nn.Parameter) -> None:
    p.data = torch.randn_like(p)


def step_sgd(p: torch.nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    torch.optim.SGD([p], lr=0.1).step()


def step_fused_adamw(p: torch.nn.Parameter) -> None:
    p.grad = torch.ones_like(p)
    torch.optim.AdamW([p], lr=0.1, fused=True).step()


def edit_all_of_data(p: torch.nn.Parameter) -> None:
    p.data.mul_(2)


def use_set(p: torch.nn.Parameter) -> None:
    with torch.no_grad():
        p.set_(torch.randn_like(p))


@pytest.mark.parametrize("edit", [edit_in_place, edit_view, swap_data, step_sgd, step_fused_adamw, edit_all_of_data,
                                  use_set])
def test_an_edit_is_seen_at_the_next_look(edit: Callable[[torch.nn.Parameter], None]) -> None:
    p = torch.nn.Parameter(torch.randn(4, 4))
    statics = StaticSet(Table().residency, (0,), NOTHING)
    before = epochs(statics.check([p]))
    edit(p)
    assert epochs(statics.check([p])) != before


def test_a_data_edit_of_a_frozen_tensor_needs_invalidate() -> None:
    table, p = Table(), torch.nn.Parameter(torch.randn(4, 4), requires_grad=False)
    statics = StaticSet(table.residency, (0,), NOTHING)
    before = epochs(statics.check([p]))
    p.data.mul_(2)
    assert epochs(statics.check([p])) == before, "if this is seen now, say so in the README's table"
    table.residency.touch([p])
    assert epochs(statics.check([p])) != before


@pytest.mark.parametrize("frozen", [True, False])
def test_memory_that_is_freed_and_given_out_again_is_another(frozen: bool) -> None:
    place = bytearray(64)
    parameter = torch.nn.Parameter(torch.zeros(16), requires_grad=not frozen)
    parameter.data = torch.frombuffer(place, dtype=torch.float32)
    statics = StaticSet(Table(num_samples=0).residency, (0,), NOTHING)
    before = epochs(statics.check([parameter]))
    address, version = parameter.data_ptr(), parameter._version
    parameter.data = torch.ones(16)
    parameter.data = torch.frombuffer(place, dtype=torch.float32)
    assert (parameter.data_ptr(), parameter._version) == (address, version)
    after = statics.check([parameter])
    assert epochs(after) != before
    assert statics.check([parameter]) is after


def test_a_data_edit_of_all_parameters_is_seen_in_one_look_however_many_there_are() -> None:
    module = torch.nn.Sequential(*[torch.nn.Linear(4, 4) for _ in range(20)])
    args = list(module.parameters())
    statics = StaticSet(Table().residency, tuple(range(len(args))), NOTHING)
    before = epochs(statics.check(args))
    for p in args:
        p.data.sub_(0.1)
    after = epochs(statics.check(args))
    assert all(a != b for a, b in zip(before, after, strict=True))


def test_a_version_that_autograd_raised_for_the_call_is_not_an_edit() -> None:
    buffer = torch.zeros(3)
    statics = StaticSet(Table().residency, (0,), frozenset({0}))
    torch.autograd.graph.increment_version((buffer,))
    first = statics.check([buffer])
    buffer.copy_(torch.ones(3))                              # the call's own commit
    statics._residency.committed(first.entries[0], buffer, (77, 5), "w0/i")
    statics.expect_after_commit([buffer], first, [0])
    torch.autograd.graph.increment_version((buffer,))
    second = statics.check([buffer])
    assert (second.entries[0].tensor_id, second.entries[0].epoch) == (77, 5)
    buffer.add_(1)                                           # the user's
    torch.autograd.graph.increment_version((buffer,))
    assert statics.check([buffer]).entries[0].epoch != 5


def test_another_tensor_in_a_dead_ones_place_is_another_tensor() -> None:
    table = Table()
    statics = StaticSet(table.residency, (0,), NOTHING)
    p = torch.nn.Parameter(torch.zeros(1000))
    entry = statics.check([p]).entries[0]
    entry.sent["w0/i"] = entry.epoch
    key = (entry.tensor_id, entry.epoch)
    del p
    gc.collect()
    assert table.freed == [("w0/i", key)]
    q = torch.nn.Parameter(torch.ones(1000))
    assert statics.check([q]).entries[0].tensor_id != key[0]


def test_a_lost_worker_holds_nothing() -> None:
    table, p = Table(), torch.nn.Parameter(torch.randn(3))
    statics = StaticSet(table.residency, (0,), NOTHING)
    first = statics.check([p])
    first.entries[0].sent["w0/i"] = first.entries[0].acked["w0/i"] = first.entries[0].epoch
    table.residency.worker_gone("w0/i")
    assert statics.check([p]) is not first and not first.entries[0].acked


def test_two_threads_that_meet_a_tensor_first_use_one_entry() -> None:
    table, tensor = Table().residency, torch.zeros(4)
    key = full_key(tensor, tensor._version)
    assert table.track(tensor, key, Habit("input")) is table.track(tensor, key, Habit("input"))


def test_an_old_content_is_freed_where_it_was() -> None:
    table, p = Table(), torch.nn.Parameter(torch.randn(3))
    statics = StaticSet(table.residency, (0,), NOTHING)
    entry = statics.check([p]).entries[0]
    old = (entry.tensor_id, entry.epoch)
    entry.sent["w0/i"] = entry.epoch
    edit_in_place(p)
    statics.check([p])
    assert table.freed == [("w0/i", old)]


def test_a_worker_that_is_not_trusted_gets_everything_under_handles_of_its_own() -> None:
    table, p = Table(), torch.nn.Parameter(torch.randn(4, 4))
    (entry,) = StaticSet(table.residency, (0,), NOTHING).check([p]).entries
    table.residency.placed(entry, "w")
    before = (entry.tensor_id, entry.epoch)
    table.residency.distrust("w")
    # Freed with the next message, which comes after the content that is sent again: it must be another handle.
    assert table.freed == [("w", before)] and (entry.tensor_id, entry.epoch) != before
    assert not entry.sent and not entry.acked
