"""State of every kind stays on the worker: what moves in the three modes, which edits are seen, and what it costs."""
from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import genie_dynamo as genie
from genie_dynamo.core.errors import WorkerMemoryError
from tests.face.comparing import same, until

pytestmark = pytest.mark.usefixtures("session", "fresh_dynamo")

WIDTH, ROW_BYTES = 64, 2 * 64 * 4


class Decoder(nn.Module):
    """One attention layer with a cache that the caller holds: (2, length, WIDTH) each."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def attend(self, x: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self.out(torch.softmax(self.q(x) @ k.transpose(1, 2) / 8, -1) @ v)

    def forward(self, x: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        k, v = torch.cat([k, self.k(x)], 1), torch.cat([v, self.v(x)], 1)
        return self.attend(x, k, v), k, v


class InPlaceDecoder(Decoder):
    """The same with a cache of fixed length that is written to."""

    def forward(self, x: Tensor, k: Tensor, v: Tensor, at: Tensor) -> Tensor:  # type: ignore[override]
        k.index_copy_(1, at, self.k(x))
        v[:, at] = self.v(x)
        return self.attend(x, k, v)


def moved() -> dict[str, tuple[int, int]]:
    return {reason: (row["sent"], row["received"]) for reason, row in genie.get_stats()["by_reason"].items()}


def start(length: int = 32) -> tuple[Decoder, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return Decoder().eval(), torch.randn(2, 1, WIDTH), torch.randn(2, length, WIDTH), torch.randn(2, length, WIDTH)


def compiled_of(net: nn.Module, **options: Any) -> Callable[..., Any]:
    return torch.compile(net, backend="genie", dynamic=True, options=options)


@torch.no_grad()
@pytest.mark.parametrize("awareness", ["full", "weights", "blind"])
def test_bytes_of_a_cache_that_is_appended_to(awareness: str) -> None:
    net, x, k, v = start()
    run = compiled_of(net, awareness=awareness)
    weights = sum(p.nbytes for p in net.parameters())
    eager_k, eager_v = k, v
    for step in range(6):
        genie.reset_stats()
        out, k, v = run(x, k, v)
        expected, eager_k, eager_v = net(x, eager_k, eager_v)
        same((out, k, v), (expected, eager_k, eager_v))
        length, whole = 32 + step, (32 + step) * ROW_BYTES
        bytes_of = moved()
        assert bytes_of["weights"][0] == (weights if step == 0 or awareness == "blind" else 0)
        if awareness == "full":
            assert bytes_of["state"] == (2 * whole if step == 0 else 0, 2 * ROW_BYTES), length
            assert (bytes_of["inputs"][0], bytes_of["outputs"][1]) == (x.nbytes, out.nbytes)
        else:
            assert bytes_of["inputs"][0] == x.nbytes + 2 * whole and bytes_of["state"] == (0, 0)
            assert bytes_of["outputs"][1] == out.nbytes + 2 * (whole + ROW_BYTES)


@torch.no_grad()
@pytest.mark.parametrize("awareness", ["full", "weights", "blind"])
def test_bytes_of_a_cache_that_is_written_to(awareness: str) -> None:
    torch.manual_seed(0)
    net = InPlaceDecoder().eval()
    x, k, v = torch.randn(2, 1, WIDTH), torch.zeros(2, 32, WIDTH), torch.zeros(2, 32, WIDTH)
    eager_k, eager_v = k.clone(), v.clone()
    run, whole = compiled_of(net, awareness=awareness), 32 * ROW_BYTES
    for step in range(5):
        at = torch.tensor([step])
        genie.reset_stats()
        same(run(x, k, v, at), net(x, eager_k, eager_v, at))
        same((k, v), (eager_k, eager_v))
        bytes_of = moved()
        if awareness == "full":
            sent, received = bytes_of["state"]
            assert sent == (2 * whole if step == 0 else 0) and received == 2 * ROW_BYTES
        else:
            assert bytes_of["inputs"][0] == x.nbytes + at.nbytes + 2 * whole
            assert bytes_of["outputs"][1] + bytes_of["state"][1] == x.nbytes + 2 * whole


class BufferCache(nn.Module):
    """A cache that is a buffer of the model."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("cache", torch.zeros(64, WIDTH))
        self.lin = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        self.cache[at] = self.lin(x)
        return self.cache.sum(0)


@torch.no_grad()
def test_a_buffer_that_is_written_to_comes_down_as_rows() -> None:
    nets = []
    for _ in range(2):
        torch.manual_seed(0)
        nets.append(BufferCache())
    run, x = compiled_of(nets[0]), torch.randn(1, WIDTH)
    for step in range(4):
        genie.reset_stats()
        at = torch.tensor([step * 3])
        same(run(x, at), nets[1](x, at))
        same(nets[0].cache, nets[1].cache)
        assert moved()["state"] == (0, x.nbytes) and (step == 0 or moved()["weights"][0] == 0)


# -- edits ------------------------------------------------------------------------------------------------------


def edit_in_place(k: Tensor) -> Tensor:
    return k.mul_(2)


def edit_a_view(k: Tensor) -> Tensor:
    k[:, 1:3].zero_()
    return k


def edit_past_the_counter(k: Tensor) -> Tensor:
    k.data.add_(1)
    genie.invalidate(k)
    return k


def new_storage(k: Tensor) -> Tensor:
    return k.set_(torch.randn(k.shape))     # type: ignore[call-overload,no-any-return]


def resized(k: Tensor) -> Tensor:
    return k.resize_(2, k.shape[1] - 3, WIDTH)


def reordered(k: Tensor) -> Tensor:
    return k.index_select(0, torch.tensor([1, 1]))


def replaced(k: Tensor) -> Tensor:
    k.data = k.data * 3
    return k


@torch.no_grad()
@pytest.mark.parametrize("edit", [edit_in_place, edit_a_view, edit_past_the_counter, new_storage, resized, reordered,
                                  replaced])
def test_edits_between_calls_are_seen_and_counted(edit: Callable[[Tensor], Tensor]) -> None:
    net, x, k, v = start()
    run = compiled_of(net)
    eager_k, eager_v = k.clone(), v.clone()
    for step in range(4):
        genie.reset_stats()
        out, k, v = run(x, k, v)
        expected, eager_k, eager_v = net(x, eager_k, eager_v)
        same((out, k, v), (expected, eager_k, eager_v))
        if step == 2:
            assert moved()["state"][0] == k.nbytes - ROW_BYTES, "k alone went up again"
        elif step:
            assert moved()["state"][0] == 0
        if step == 1:
            torch.manual_seed(5)
            k = edit(k)
            torch.manual_seed(5)
            eager_k = edit(eager_k)
            if edit is resized:
                v, eager_v = v[:, 3:], eager_v[:, 3:]


@torch.no_grad()
def test_a_view_of_a_resident_tensor_goes_as_handle_and_view() -> None:
    net, x, k, v = start()
    run = compiled_of(net)
    for _ in range(2):
        _, k, v = run(x, k, v)
    for crop in (slice(None, -5), slice(4, None), slice(0, 1)):
        genie.reset_stats()
        same(run(x, k[:, crop], v[:, crop]), net(x, k[:, crop], v[:, crop]))
        assert moved()["state"][0] == 0, crop
    genie.reset_stats()
    same(run(x, k.flip(0)[:, :3], v[:, :3]), net(x, k.flip(0)[:, :3], v[:, :3]))
    assert moved()["state"][0] > 0, "a flip is no view"


@torch.no_grad()
def test_an_output_of_one_graph_is_not_sent_to_the_next() -> None:
    torch.manual_seed(0)
    encoder, head = nn.Linear(WIDTH, 128), nn.Linear(128, 4)
    encode, decode = compiled_of(encoder), compiled_of(lambda e, bias: head(e) + bias)
    for turn in range(3):
        states = encode(torch.randn(40, WIDTH))
        for step in range(3):
            genie.reset_stats()
            same(decode(states, torch.full((4,), float(step))), head(states) + step)
            assert moved()["inputs"][0] == 16 and moved()["state"][0] == 0, (turn, step)
    assert {"worker": "w0", "why": "output fed back", "tensors": 1, "bytes": states.nbytes} in \
        genie.get_stats()["resident"]


@torch.no_grad()
def test_an_input_that_stays_the_same_is_sent_once_and_others_are_not_kept() -> None:
    torch.manual_seed(0)
    lin = nn.Linear(WIDTH, WIDTH)
    run = compiled_of(lambda picture, x: lin(x) @ picture)
    picture = torch.randn(WIDTH, 32)
    for step in range(8):
        genie.reset_stats()
        x = torch.randn(20, WIDTH)
        same(run(picture, x), lin(x) @ picture)
        assert moved()["inputs"][0] == x.nbytes + (picture.nbytes if step == 0 else 0)
    rows = {row["why"]: row["tensors"] for row in genie.session().residency.summary()}
    assert rows["input seen again"] == 1 and "input, on trial" not in rows, rows


@torch.no_grad()
def test_tensors_that_share_memory_without_sharing_a_version_are_never_taken_for_unchanged() -> None:
    def halves(x: Tensor) -> tuple[Tensor, ...]:
        return torch.chunk(x * 2, 2)

    split, use = compiled_of(halves), compiled_of(lambda x: x.sum(1))
    for _ in range(2):
        low, high = split(torch.randn(8, 512))
        low.as_strided((8, 512), (512, 1)).zero_()
        same((use(high), use(low)), (torch.zeros(4), torch.zeros(4)))
        same(use(low), torch.zeros(4))


@torch.no_grad()
def test_a_buffer_of_numpy_that_is_filled_again_is_never_taken_for_unchanged() -> None:
    buffer = np.zeros((16, WIDTH), dtype=np.float32)
    picture = torch.from_numpy(buffer)
    read, write = compiled_of(lambda x: x.sum(0)), compiled_of(lambda x, at: x.index_fill_(0, at, 3.0).sum(0))
    for step in range(6):
        buffer[:] = step
        same(read(picture), picture.sum(0))
        expected = picture.clone().index_fill_(0, torch.tensor([step]), 3.0).sum(0)
        same(write(picture, torch.tensor([step])), expected)


@torch.no_grad()
def test_a_tensor_that_gets_the_memory_of_numpy_later_is_never_taken_for_unchanged() -> None:
    picture, read = torch.zeros(16, WIDTH), compiled_of(lambda x: x.sum(0))
    for _ in range(3):
        same(read(picture), picture.sum(0))
    buffer = np.zeros((16, WIDTH), dtype=np.float32)
    picture.data = torch.from_numpy(buffer)
    for step in range(3):
        buffer[:] = step
        same(read(picture), picture.sum(0))


@torch.no_grad()
def test_state_dies_with_the_callers_tensor(own_session: Callable[..., Any]) -> None:
    own_session(workers=1)
    net, x, k, v = start()
    run = compiled_of(net)
    for _ in range(4):
        _, k, v = run(x, k, v)
    gc.collect()

    def resident() -> int:
        return sum(row["tensors"] for row in genie.get_stats()["resident"] if row["why"] == "cache")

    assert resident() == 2
    del k, v
    until(lambda: resident() == 0 and genie.get_stats()["workers"]["w0"]["resident_tensors"]
          <= len(list(net.parameters())) + 1)


@torch.no_grad()
def test_a_lost_worker_costs_one_upload_from_the_local_truth(own_session: Callable[..., Any]) -> None:
    session = own_session(workers=1)
    net, x, k, v = start()
    run = compiled_of(net)
    for step in range(5):
        if step == 3:
            session.links[0].embedded.process.kill()
        genie.reset_stats()
        expected = net(x, k, v)
        out, k, v = run(x, k, v)
        same((out, k, v), expected)
        assert moved()["state"][0] == (k.nbytes + v.nbytes - 2 * ROW_BYTES if step in (0, 3) else 0)


@torch.no_grad()
def test_what_does_not_fit_the_quota_goes_and_is_sent_again(own_session: Callable[..., Any]) -> None:
    net, x, k, v = start()
    weights = sum(p.nbytes for p in net.parameters())
    room = weights + 3 * k.nbytes
    own_session(workers=1, resident_quota_gib=room / 2**30)
    run = compiled_of(net)
    pairs = [(k + i, v + i) for i in range(4)]
    for _ in range(3):
        for index, (key, value) in enumerate(pairs):
            expected = net(x, key, value)
            out = run(x, key, value)
            same(out, expected)
            pairs[index] = out[1:]
            assert genie.get_stats()["workers"]["w0"]["resident_bytes"] <= room
    stats = genie.get_stats()
    assert stats["events"]["evicted by a worker"] > 0 and "stale handle, call repeated" not in stats["events"]
    assert stats["by_reason"]["state"]["sent"] > 4 * 2 * k.nbytes


@torch.no_grad()
def test_a_call_that_needs_more_than_the_quota_fails_clearly_and_the_worker_lives(
        own_session: Callable[..., Any]) -> None:
    net, x, k, v = start()
    own_session(workers=1, resident_quota_gib=sum(p.nbytes for p in net.parameters()) / 2**31)
    run = compiled_of(net)
    with pytest.raises(WorkerMemoryError, match=r"may keep .* MiB .* raise the quota"):
        run(x, k, v)
    same(torch.compile(lambda a: a + 1, backend="genie")(x), x + 1)


@torch.no_grad()
def test_worker_and_client_agree_after_a_call_that_raises() -> None:
    net, x, k, v = start()
    run = compiled_of(net)
    _, k, v = run(x, k, v)
    bad = compiled_of(lambda k, index: k[:, index].sum())
    for _ in range(2):
        with pytest.raises(RuntimeError):
            bad(k, torch.tensor([10_000]))
        genie.reset_stats()
        expected = net(x, k, v)
        out, k, v = run(x, k, v)
        same((out, k, v), expected)
        assert moved()["state"][0] == 0


def test_inference_tensors_are_right_though_they_travel() -> None:
    net, x, k, v = start()
    run = compiled_of(net)
    with torch.inference_mode():
        for _ in range(3):
            expected = net(x, k, v)
            out, k, v = run(x, k, v)
            same((out, k, v), expected)
            k.mul_(2)


@torch.no_grad()
def test_a_cache_moves_once_from_the_worker_that_made_it_to_the_one_that_uses_it(
        own_session: Callable[..., Any]) -> None:
    session = own_session(workers=2)
    net, x, k, v = start()
    prefill, decode = compiled_of(lambda x, k, v: net(x, k, v)), compiled_of(net)
    _, k, v = prefill(x, k, v)
    home = next(iter(session.residency.find(k).acked))
    other = next(link for link in session.links if link.key != home)
    first = next(link for link in session.links if link.key == home)
    _, k, v = prefill(x, k, v)
    from genie_dynamo.runtime.client.attempt import Attempts

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attempts, "_near_state", lambda self, session, args: other)
        for step in range(3):
            genie.reset_stats()
            expected, held_bytes = net(x, k, v), k.nbytes + v.nbytes
            out, k, v = decode(x, k, v)
            same((out, k, v), expected)
            stats = genie.get_stats()
            assert stats["events"].get("state moved between workers", 0) == (2 if step == 0 else 0)
            between = stats["by_reason"]["state"]["worker_to_worker"]
            assert between == (held_bytes if step == 0 else 0)
            assert moved()["state"] == (0, 2 * ROW_BYTES), "nothing of the cache goes through the client"
    # The worker that has it is lost before it could send it: the local truth goes up.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Attempts, "_near_state", lambda self, session, args: first)
        other.embedded.process.kill()
        other.embedded.process.wait()
        genie.reset_stats()
        expected = net(x, k, v)
        same(decode(x, k, v), expected)
        stats = genie.get_stats()
        assert stats["events"].get("state moved between workers", 0) == 0
        assert stats["by_reason"]["state"]["sent"] == k.nbytes + v.nbytes


@torch.no_grad()
def test_a_buffer_that_the_caller_fills_anew_for_each_call_travels_after_a_few_trials() -> None:
    run = torch.compile(torch.sin, backend="genie")
    x = torch.zeros(4096)
    rows = []
    for _ in range(8):
        x += 1
        genie.reset_stats()
        same(run(x), torch.sin(x))
        rows.append({row["why"]: row["bytes"] for row in genie.get_stats()["resident"]})
    assert rows[0]["input, on trial"] == x.nbytes
    assert "input, on trial" not in rows[-1] and "input seen again" not in rows[-1]
    genie.reset_stats()
    for _ in range(3):
        same(run(x), torch.sin(x))
    assert moved()["inputs"][0] + moved()["state"][0] == x.nbytes      # now it comes back: stored once, and named then


@torch.no_grad()
def test_what_has_come_back_and_does_so_no_more_travels_again() -> None:
    run = torch.compile(torch.cos, backend="genie")
    x = torch.zeros(4096)
    for _ in range(4):
        same(run(x), torch.cos(x))
    rows = []
    for _ in range(12):
        x += 1
        genie.reset_stats()
        same(run(x), torch.cos(x))
        rows.append(moved())
    assert rows[0]["state"][0] == x.nbytes and rows[0]["inputs"][0] == 0
    assert rows[-1]["inputs"][0] == x.nbytes and rows[-1]["state"][0] == 0


@torch.no_grad()
def test_a_cache_that_does_not_arrive_is_sent_from_here_soon_and_that_way_is_not_taken_again(
        own_session: Callable[..., Any]) -> None:
    from genie_dynamo.runtime.client import state
    from genie_dynamo.runtime.client.attempt import Attempts

    session = own_session(workers=2)
    net, x, k, v = start()
    first, second = session.links
    run = compiled_of(net)
    nobody = "tcp://127.0.0.1:9"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "MOVE_GRACE_S", 0.1)
        patch.setattr(state, "_route_to", lambda link: (nobody, ""))     # between the workers all is lost
        for step, link in enumerate((first, first, second, first, second)):
            patch.setattr(Attempts, "_near_state", lambda self, session, args, link=link: link)
            genie.reset_stats()
            expected = net(x, k, v)
            started_s = time.monotonic()
            out, k, v = run(x, k, v)
            same((out, k, v), expected)
            assert time.monotonic() - started_s < 15.0
            events = genie.get_stats()["events"]
            lost = step in (2, 3)
            assert events.get("state did not come from another worker", 0) == lost, (step, events)
            assert ("state moved between workers" in events) == lost
