"""Pieces of a recording that run while the rest is being recorded."""
from __future__ import annotations

import os
import signal
from typing import Any

import pytest
import torch

import genie_dynamo as genie
from genie_dynamo.device import engine as engines

DEVICE = "remote_accelerator"
current = engines.current


def _step(x: torch.Tensor, index: int = 0, at: int = 0) -> torch.Tensor:
    """Ops enough for two pieces and a rest; `index` picks a row after `at` of 150 rounds."""
    for number in range(150):
        x = (x * 1.01).tanh()
        if number == at:
            x = x + x[torch.tensor([index], device=x.device)]
    return x


def _repeat(x: torch.Tensor, count: int = 3) -> list[float]:
    return [_step(x).sum().item() for _ in range(count)]


@pytest.fixture
def under_way(session: object) -> Any:
    """A number of pieces is handed over before the read, once a loop is known."""
    _repeat(torch.ones(4, 4, device=DEVICE), 6)

    def count() -> int:
        return len(current._underway)

    return count


def test_a_known_loop_is_computed_while_it_is_recorded(under_way: Any) -> None:
    here = torch.rand(4, 4)
    there = here.to(DEVICE)
    before = torch.remote_accelerator.stats()
    y = _step(there)
    assert under_way() == 2
    assert y.sum().item() == pytest.approx(_step(here).sum().item(), rel=1e-5)
    assert under_way() == 0
    assert _repeat(there, 4) == pytest.approx(_repeat(here, 4), rel=1e-5)
    made = torch.remote_accelerator.stats()
    _repeat(there, 6)
    after = torch.remote_accelerator.stats()
    assert after["cuts"] - before["cuts"] >= 6
    assert after["programs"] == made["programs"]


def _slow(x: torch.Tensor) -> torch.Tensor:
    """More work than the worker does between two messages."""
    for _ in range(60):
        x = (x @ x).tanh()
    return x


def test_a_read_waits_for_what_it_needs_only(session: object) -> None:
    square = torch.full((600, 600), 1e-3, device=DEVICE)
    other = torch.full((4, 4), 0.5, device=DEVICE)
    torch.remote_accelerator.synchronize()
    y = _slow(square)
    assert (other + 1).sum().item() == 24
    assert len(current._underway) == 1                    # the products are handed over, and go on
    z = y.sum()
    assert (other + 2).sum().item() == 40
    assert z.item() == pytest.approx(_slow(torch.full((600, 600), 1e-3)).sum().item(), rel=1e-4)
    assert not current._underway


def test_little_that_a_read_does_not_need_waits_for_the_next_piece(session: object) -> None:
    here = torch.rand(4, 4)
    there = here.to(DEVICE)
    torch.remote_accelerator.synchronize()
    before = torch.remote_accelerator.stats()
    shared = there * 2
    rest = shared - 1
    assert (shared + 1).sum().item() == pytest.approx((here * 2 + 1).sum().item())
    assert torch.remote_accelerator.stats()["runs"] == before["runs"] + 1
    torch.testing.assert_close(rest.cpu(), here * 2 - 1)
    torch.testing.assert_close(shared.cpu(), here * 2)
    torch.remote_accelerator.synchronize()


@pytest.mark.parametrize("at", [10, 140])
def test_an_error_under_way_comes_with_the_read_and_takes_down_what_hangs_on_it(under_way: Any, at: int) -> None:
    there = torch.full((4, 4), 0.5, device=DEVICE)
    early = there * 3
    y = _step(there, index=9, at=at)
    late = there + 1
    assert under_way() == 2
    with pytest.raises(genie.RemoteExecutionError, match="out of bounds"):
        y.cpu()
    with pytest.raises(genie.RemoteExecutionError, match="out of bounds"):
        (y * 2).sum().item()
    assert (early.sum().item(), late.sum().item()) == (24, 24)
    assert _step(there).sum().item() == pytest.approx(_step(torch.full((4, 4), 0.5)).sum().item(), rel=1e-5)


def test_an_error_that_nobody_reads_disturbs_nobody(under_way: Any) -> None:
    there = torch.full((4, 4), 0.5, device=DEVICE)
    _step(there, index=9)
    assert under_way() == 2
    assert (there + 1).sum().item() == 24


def test_numbers_drawn_under_way_are_those_of_the_cpu_also_after_an_error(session: object) -> None:
    def draws(device: str, index: int) -> list[Any]:
        torch.manual_seed(3)
        found, submitted = [], 0
        for _ in range(6):
            x = torch.rand(3, 3, device=device)
            broken = None
            for _ in range(100):
                x = torch.nn.functional.dropout(x, 0.1)
            if current._underway and device == DEVICE:
                submitted += 1
                broken = x[torch.tensor([index], device=device)]
            x = x + torch.rand(3, 3, device=device)
            found.append(x.sum().item())
            if broken is not None and index > 2:
                with pytest.raises(genie.RemoteExecutionError, match="out of bounds"):
                    broken.cpu()
        assert submitted or device == "cpu"
        return [*found, torch.rand(2, device=device).tolist()]

    want = draws("cpu", 0)
    assert draws(DEVICE, 0) == want
    assert draws(DEVICE, 7) == want


def test_a_worker_lost_under_way_is_said_by_the_read(own_session: Any) -> None:
    session = own_session(workers=1)
    there = torch.ones(4, 4, device=DEVICE)
    _repeat(there, 6)
    y = _step(there)
    assert current._underway
    os.kill(session.links[0].embedded.pid, signal.SIGKILL)
    with pytest.raises(genie.WorkerLostError):
        y.cpu()
    assert not current._underway
    assert (torch.ones(2, device=DEVICE) * 3).tolist() == [3, 3]


def test_a_session_closed_under_way_is_said_by_the_read(own_session: Any) -> None:
    own_session(workers=1)
    there = torch.ones(4, 4, device=DEVICE)
    _repeat(there, 6)
    y = _step(there)
    assert current._underway
    own_session(workers=1)
    with pytest.raises(genie.StaleHandleError, match="session that was closed"):
        y.cpu()
    assert (torch.ones(2, device=DEVICE) * 3).tolist() == [3, 3]


def test_inside_a_capture_the_recording_stays_whole(under_way: Any) -> None:
    there = torch.ones(4, 4, device=DEVICE)
    with genie.capture():
        y = _step(there)
        assert under_way() == 0
        assert len(genie.get_graph().gm.graph.nodes) > 300
    assert y.shape == (4, 4)
