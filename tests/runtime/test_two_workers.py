"""A plan made by hand that cuts a model across two workers: intermediates go from worker to worker."""
from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from functorch.compile import default_partition
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

import genie_dynamo as genie
from genie_dynamo import sessions
from genie_dynamo.backend import compile_aten
from genie_dynamo.core.plan import GuardFacts


@pytest.fixture(scope="module", autouse=True)
def two_workers() -> Iterator[None]:
    genie.init(workers=2, num_threads=1, strict=True)
    yield
    genie.shutdown()
    sessions._config = None


def cut(assign_of: Callable[[int, int], int]) -> Callable[..., Any]:
    """A backend whose plans put node k of n on worker assign_of(k, n)."""

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        def compiler(kind: str) -> Callable[..., Any]:
            def compile_one(graph: fx.GraphModule, _: Any) -> Any:
                body = [n for n in graph.graph.nodes if n.op == "call_function"]
                place = {n: assign_of(k, len(body)) for k, n in enumerate(body)}
                return compile_aten(graph, kind, GuardFacts(), sessions.default_config(),
                                    assign=lambda n: place.get(n, 0), num_workers=2)

            return compile_one

        return aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"),
                            inference_compiler=compiler("inference"), partition_fn=default_partition,
                            keep_inference_input_mutations=True)(gm, inputs)

    return backend


def halves(k: int, n: int) -> int:
    return 0 if k < n // 2 else 1


def alternating(k: int, n: int) -> int:
    return k % 2


def model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.3), nn.Linear(32, 32), nn.Tanh(),
                         nn.Dropout(0.3), nn.Linear(32, 3))


@pytest.mark.parametrize("assign", [halves, alternating])
def test_inference_equals_eager_and_the_intermediate_does_not_pass_the_client(assign: Any, fresh_dynamo: None) -> None:
    net, x = model().eval(), torch.randn(16, 8)
    compiled = torch.compile(net, backend=cut(assign))
    with torch.no_grad():
        expected = net(x)
        compiled(x)
        genie.reset_stats()
        actual = compiled(x)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    stats = genie.get_stats()
    assert stats["workers"]["w0"]["fragment_runs"] >= 1 and stats["workers"]["w1"]["fragment_runs"] >= 1
    # Only x goes up and only the result comes down; the hidden activations (16 x 32) went between the workers.
    assert stats["by_reason"]["inputs"]["sent"] == x.numel() * 4
    assert stats["by_reason"]["outputs"]["received"] == expected.numel() * 4
    assert stats["by_reason"]["weights"]["sent"] == 0


@pytest.mark.parametrize("assign", [halves, alternating])
def test_training_with_dropout_and_batchnorm_equals_eager(assign: Any, fresh_dynamo: None) -> None:
    net = model().train()
    reference = copy.deepcopy(net)
    compiled = torch.compile(net, backend=cut(assign))
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, reference)]
    x = torch.randn(16, 8)
    for step in range(3):
        losses = []
        for run, optimizer in zip((compiled, reference), optimizers, strict=True):
            torch.manual_seed(step)
            loss = run(x).square().sum()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append((loss.item(), torch.get_rng_state()))
        assert losses[0][0] == pytest.approx(losses[1][0], rel=1e-5)
        assert torch.equal(losses[0][1], losses[1][1]), "the generator is where eager leaves it"
    for a, b in zip(net.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_an_op_that_fails_on_one_worker_fails_the_call_and_changes_nothing(fresh_dynamo: None) -> None:
    table = torch.arange(6.0).reshape(3, 2)
    counter = torch.zeros(2)

    def f(index: torch.Tensor, counter: torch.Tensor) -> torch.Tensor:
        rows = torch.nn.functional.embedding(index, table * 2)
        counter.add_(rows.sum(0))
        return rows + 1

    compiled = torch.compile(f, backend=cut(halves))
    good = torch.tensor([0, 2])
    expected = table[good] * 2 + 1
    torch.testing.assert_close(compiled(good, counter), expected)
    before = counter.clone()
    with pytest.raises(IndexError):
        compiled(torch.tensor([0, 7]), counter)
    assert torch.equal(counter, before)
    torch.testing.assert_close(compiled(good, counter), expected)


def test_large_intermediates_and_outputs_are_made_in_the_lane_they_take(fresh_dynamo: None) -> None:
    """4 MiB each: what one call has made is not overwritten while the next worker, or the caller, still reads it."""
    def widened(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        wide = x.view(-1, 1) * torch.ones(1, 1024)
        return wide * 2 + 1, wide.sin() * wide

    compiled, kept = torch.compile(widened, backend=cut(halves)), []
    with torch.no_grad():
        for k in range(8):
            x = torch.arange(1024.0) + k
            made = compiled(x)
            kept.append((x, made))
            for one, other in zip(made, widened(x), strict=True):
                assert torch.equal(one, other)
        for x, made in kept:
            for one, other in zip(made, widened(x), strict=True):
                assert torch.equal(one, other)
        made[0].zero_()
        assert torch.equal(kept[0][1][1], widened(kept[0][0])[1])
