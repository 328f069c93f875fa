"""The README's table of edits, row by row: which of them the next call sees."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from genie_dynamo.runtime.client.binding import SETTLED_CALLS

pytestmark = pytest.mark.usefixtures("session", "fresh_dynamo")
X = torch.linspace(-1, 1, 12).view(2, 6)


@pytest.fixture
def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6)).eval()


def fused(kind: type[torch.optim.Optimizer]) -> Callable[[nn.Sequential], None]:
    def step(net: nn.Sequential) -> None:
        optimizer = kind(net.parameters(), lr=0.1, fused=True)  # type: ignore[call-arg]
        for parameter in net.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()

    return step


def in_place(net: nn.Sequential) -> None:
    with torch.no_grad():
        net[0].weight.add_(1)
        net[0].bias[0] = 5
        net[1].running_mean.mul_(3).add_(1)


def load(net: nn.Sequential) -> None:
    net.load_state_dict({key: value + 1 for key, value in net.state_dict().items()})


def new_data(net: nn.Sequential) -> None:
    net[0].weight.data = torch.randn(6, 6)


def replaced(net: nn.Sequential) -> None:
    net[0].weight = nn.Parameter(torch.randn(6, 6))


def frozen_by_numpy(net: nn.Sequential) -> None:
    net[1].running_mean.numpy()[:] = 7


def one_element(net: nn.Sequential) -> None:
    net[0].weight.data[3, 3] = 9          # not one of those that are sampled


def right(compiled: Callable[[torch.Tensor], torch.Tensor], net: nn.Module) -> bool:
    with torch.no_grad():
        return torch.allclose(compiled(X), net(X), rtol=1e-5, atol=1e-5)


BEFORE = pytest.mark.parametrize("calls", [1, SETTLED_CALLS + 4], ids=["first", "settled"])


@BEFORE
@pytest.mark.parametrize("edit", [in_place, load, new_data, replaced, fused(torch.optim.SGD),
                                  fused(torch.optim.Adam), fused(torch.optim.AdamW)])
def test_seen_at_the_next_call(edit: Callable[[nn.Sequential], None], net: nn.Sequential, calls: int) -> None:
    compiled = torch.compile(net, backend="genie")
    assert all([right(compiled, net) for _ in range(calls)])
    edit(net)
    assert right(compiled, net)


def scale_past_the_counter(net: nn.Sequential) -> None:
    net[0].weight.data.mul_(2)


def numpy_past_the_counter(net: nn.Sequential) -> None:
    net[0].weight.detach().numpy()[:] = 0.25


@BEFORE
@pytest.mark.parametrize("edit", [scale_past_the_counter, numpy_past_the_counter])
def test_seen_within_as_many_calls_as_there_are_trainable_parameters(
        edit: Callable[[nn.Sequential], None], net: nn.Sequential, calls: int) -> None:
    compiled = torch.compile(net, backend="genie")
    assert all([right(compiled, net) for _ in range(calls)])
    edit(net)
    assert any([right(compiled, net) for _ in net.parameters()])
    assert right(compiled, net)


@BEFORE
@pytest.mark.parametrize("edit", [frozen_by_numpy, one_element])
def test_not_seen_before_invalidate(edit: Callable[[nn.Sequential], None], net: nn.Sequential, calls: int) -> None:
    compiled = torch.compile(net, backend="genie")
    assert all([right(compiled, net) for _ in range(calls)])
    edit(net)
    assert not any([right(compiled, net) for _ in range(6)])
    genie.invalidate(net)
    assert right(compiled, net)


def test_a_call_that_began_with_old_parameters_is_begun_anew(net: nn.Sequential) -> None:
    compiled = torch.compile(net, backend="genie")
    assert all([right(compiled, net) for _ in range(SETTLED_CALLS + 4)])
    genie.reset_stats()
    in_place(net)
    assert all([right(compiled, net) for _ in range(3)])
    assert genie.get_stats()["events"] == {"parameters changed, call begun anew": 1}
    assert genie.get_stats()["calls"] == 3
