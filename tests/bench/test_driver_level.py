"""The baseline of one message per op computes what eager computes, with everything resident."""
from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import genie_dynamo as genie
from bench.decode_models import Decode, model_of
from bench.driver_level import WINDOW, DriverLevel, RemoteTensor


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_a_decode_is_exact_and_moves_token_ids_alone(session: object) -> None:
    params = {"prompt": 12, "tokens": 5}
    expected = Decode(model_of("tiny"), lambda f: f, params).run(dict).checksum
    mode, model = DriverLevel(genie.session()), model_of("tiny")
    mode.place(model)
    scene = Decode(model, lambda f: f, params)
    with mode:
        for _ in range(2):
            outcome = scene.run(lambda: mode.counters)
            assert outcome.checksum == expected
    assert outcome.counters["up.inputs"] == 0 and outcome.counters["down.outputs"] == 8
    assert outcome.counters["launches"] > 20
    assert isinstance(model.lm_head.weight, RemoteTensor)


def test_views_cost_no_message_and_are_seen_right(session: object) -> None:
    x = torch.arange(24.0).reshape(4, 6)
    mode = DriverLevel(genie.session())
    with mode:
        remote = x + 1
        before = mode.counters["launches"]
        view = remote.t()[1:5:2, 1:].unsqueeze(0)
        first, second = torch.split(remote, [2, 4], 1)
        assert mode.counters["launches"] == before
        read = [mode.read(view * 2), mode.read(torch.cat([second, first], 1)), mode.read(view)]
    expected = x + 1
    view = expected.t()[1:5:2, 1:].unsqueeze(0)
    torch.testing.assert_close(read, [view * 2, torch.cat([expected[:, 2:], expected[:, :2]], 1), view],
                               rtol=0, atol=0)


def test_what_the_client_drops_is_freed(session: object) -> None:
    def resident() -> int:
        return int(genie.get_stats()["workers"]["w0"]["resident_tensors"])

    mode = DriverLevel(genie.session())
    with mode:
        total = torch.zeros(8)
        for _ in range(50):
            total = total + 1
        kept = mode.read(total)
        before = resident()
        for _ in range(400):
            total = total + 1
        mode.read(total)
        assert resident() <= before + WINDOW       # what the last ones under way have left
    assert torch.equal(kept, torch.full((8,), 50.0))


def test_an_error_there_is_an_error_here_and_in_place_is_refused(session: object) -> None:
    mode = DriverLevel(genie.session())
    with mode:
        index = torch.tensor([9])
        picked = torch.ones(3).index_select(0, index)      # shapes alone do not show it
        with pytest.raises(Exception, match="index"):
            mode.read(picked)
        with pytest.raises(NotImplementedError, match="in place"):
            (torch.ones(3) + 1).add_(1)
