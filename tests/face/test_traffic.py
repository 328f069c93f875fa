"""What stays on the workers, what that saves, when it is freed, and how it is counted."""
from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from tests.face.comparing import gradients, net_and_input, same, until

pytestmark = pytest.mark.usefixtures("session", "fresh_dynamo")


def test_weights_go_up_once_and_again_when_they_change() -> None:
    net = nn.Linear(100, 100)
    size = sum(p.numel() * 4 for p in net.parameters())
    compiled, x = torch.compile(net, backend="genie"), torch.randn(2, 100)
    sent = []
    with torch.no_grad():
        for edit in (None, None, lambda: net.weight.mul_(2), None, lambda: net.load_state_dict(net.state_dict()),
                     lambda: genie.invalidate(net), None):
            if edit is not None:
                edit()
            genie.reset_stats()
            same(compiled(x), net(x))
            sent.append(genie.get_stats()["by_reason"]["weights"]["sent"])
    assert sent == [size, 0, 40000, 0, size, size, 0]


def test_blind_sends_everything_every_time_and_is_as_right() -> None:
    net, x = net_and_input()
    compiled = torch.compile(net, backend="genie", options={"awareness": "blind"})
    expected = gradients(lambda: net(x).square().sum(), net)
    for _ in range(2):
        genie.reset_stats()
        same(gradients(lambda: compiled(x).square().sum(), net), expected)
        moved = genie.get_stats()["by_reason"]
        assert moved["weights"]["sent"] >= sum(p.numel() * 4 for p in net.parameters())
        assert moved["state"]["received"] > 0, "activations come down"


def test_a_dropped_graph_and_its_weights_leave_the_worker(own_session: Callable[..., Any]) -> None:
    def resident() -> tuple[int, int]:
        row = genie.get_stats()["workers"]["w0"]
        return row["programs"], row["resident_tensors"]

    own_session(workers=1)        # one that holds nothing of other tests
    assert resident() == (0, 0)
    net = nn.Linear(5, 5)
    compiled = torch.compile(net, backend="genie")
    compiled(torch.randn(2, 5)).sum().backward()
    programs, tensors = resident()
    assert programs == 2 and tensors >= 2
    del compiled, net
    torch._dynamo.reset()
    gc.collect()
    until(lambda: resident() == (0, 0))


def test_verify_compares_with_a_local_run() -> None:
    net, x = net_and_input()
    compiled = torch.compile(net, backend="genie", options={"verify": 1.0})
    expected = gradients(lambda: net(x).square().sum(), net)
    same(gradients(lambda: compiled(x).square().sum(), net), expected)
    assert genie.get_stats()["events"]["call verified"] == 2


def test_stats_have_the_documented_shape() -> None:
    torch.compile(lambda x: x + 1, backend="genie")(torch.ones(256))
    stats = genie.get_stats()
    documented = {"calls", "fragment_runs", "bytes_sent", "bytes_received", "by_reason", "seconds", "fallbacks",
                  "workers"}
    assert documented <= set(stats)
    assert set(stats["by_reason"]) == {"weights", "inputs", "outputs", "state", "gradients", "activations", "control"}
    assert set(stats["seconds"]) == {"dispatch", "wait", "transfer", "compute"}
    assert stats["by_reason"]["inputs"]["sent"] == stats["by_reason"]["outputs"]["received"] == 1024
    assert stats["bytes_sent"] == sum(r["sent"] for r in stats["by_reason"].values())
    worker = stats["workers"]["w0"]
    assert worker["calls"] == stats["calls"] == 1 and worker["memory_bytes"] > 0 and worker["incarnation"]
    genie.reset_stats()
    assert genie.get_stats()["calls"] == 0
