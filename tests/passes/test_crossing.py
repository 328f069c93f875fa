"""What a backward reads on another worker: kept, moved or computed again by seconds, with the same gradients."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from functorch.compile import default_partition, make_boxed_func
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.core.hardware import LinkFacts
from genie_dynamo.passes import crossing
from genie_dynamo.passes.crossing import crossed
from genie_dynamo.passes.facts import GraphFacts, read_facts
from genie_dynamo.passes.partition import Partition
from genie_dynamo.passes.planning import plan_graph
from tests.passes.test_partition import WORKERS, lane

CLIENT = LinkFacts(start="client", end="w1", latency_s=1e-5, bytes_per_s=1e9, source="made up for tests")
SLOW, FAST = lane(bytes_per_s=1e6), lane(latency_s=1e-7, bytes_per_s=1e12)
Graphs = tuple[fx.GraphModule, GraphFacts, fx.GraphModule, tuple[torch.Tensor, ...], list[Any]]


def gated(lengths: torch.Tensor, x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """A mask made of a few numbers, a product, and what reads both."""
    mask = (torch.arange(64)[None, :] < lengths[:, None]).float()
    return ((x @ w) * mask).sin() * mask


def captured() -> Graphs:
    """Forward and backward graph of `gated`, the forward's arguments, and its results in eager."""
    found: dict[str, Any] = {}

    def keep(kind: str) -> Callable[..., Any]:
        def compiler(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
            found[kind] = (gm, read_facts(gm, kind))
            return make_boxed_func(gm.forward)
        return compiler

    torch._dynamo.reset()
    torch.manual_seed(0)
    x, w = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64, requires_grad=True)
    args = (torch.randint(1, 64, (64,)), x, w)          # in the order in which they are read, as Dynamo has them
    backend = aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"), partition_fn=default_partition)
    out = torch.compile(gated, backend=backend)(*args)
    out.sum().backward()
    assert x.grad is not None and w.grad is not None
    return *found["forward"], found["backward"][0], args, [out.detach(), x.grad, w.grad]


def placed(gm: fx.GraphModule, there: Callable[[str], int]) -> Partition:
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    return Partition(workers=("w0", "w1"), assign={n: there(n) for n in names}, seconds={}, memory_bytes={}, est_s=1.0,
                     alternatives=(), placement=None, pinned=False)


def run(found: Partition, graphs: Graphs) -> list[Any]:
    """Result and gradients, computed here by the two graphs that would run on the workers."""
    forward, _, backward, args, _ = graphs
    results = list(found.over(forward)(*args))
    (outputs,) = forward.graph.output_node().args
    copies = results[len(outputs):]                                      # type: ignore[arg-type]
    assert found.crossings is not None and len(copies) == found.crossings.copies
    saved = dict(zip((o.name for o in outputs), results, strict=False))  # type: ignore[union-attr]
    inputs = [n.name for n in backward.graph.nodes if n.op == "placeholder"]
    values = [saved.get(name, torch.ones(64, 64)) for name in inputs]
    gradients = found.crossings.backward(*values, *copies)
    return [results[0], *(g for g in gradients if g is not None)]


def decide(monkeypatch: pytest.MonkeyPatch, link: LinkFacts, there: Callable[[str], int],
           backward_on: int = 1) -> tuple[Partition, Graphs]:
    """The forward placed by `there`, all of the backward on one worker."""
    graphs = captured()
    forward, facts, backward, _, _ = graphs
    monkeypatch.setattr(crossing, "follow", lambda gm, homes, copies: {
        n.name: backward_on for n in gm.graph.nodes if n.op == "call_function"})
    found = crossed(placed(forward, there), forward, facts, backward, WORKERS, [link, CLIENT])
    return found, graphs


def check(found: Partition, graphs: Graphs) -> None:
    for mine, other in zip(run(found, graphs), graphs[-1], strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
    forward, facts, *_ = graphs
    plan = plan_graph(found.over(forward), facts, assign=lambda node: found.assign[node.name], num_workers=2)
    made = {name: f.worker for f in plan.fragments for name in f.outputs}
    assert {made[n] for n in made if n.endswith("_kept_on_1")} <= {1}


def test_over_a_slow_lane_what_is_cheap_is_computed_again_and_no_product_is(monkeypatch: pytest.MonkeyPatch) -> None:
    dear = {"mm": 1.0}
    real = crossing.price
    monkeypatch.setattr(crossing, "price", lambda *a, **k: _with_seconds(real(*a, **k), dear))
    found, graphs = decide(monkeypatch, SLOW, lambda name: 0)
    assert found.crossings is not None
    how = {d.name: d.how for d in found.crossings.decisions}
    (mask,) = [name for name in how if "convert" in name or "to_copy" in name]
    assert how[mask] == "again" and all(h in ("again", "moved") for h in how.values())
    assert "mm" not in how or how["mm"] == "moved"
    assert not any(n.name.startswith("mm_again") for n in found.crossings.backward.graph.nodes)
    for d in found.crossings.decisions:
        if d.how == "again":
            assert d.again_s is not None and d.again_s < d.move_s
    check(found, graphs)


def _with_seconds(priced: tuple[Any, Any], dear: dict[str, float]) -> tuple[Any, Any]:
    graph, devices = priced
    nodes = tuple(replace(n, seconds={d.kind: dear[n.id] for d in devices}) if n.id in dear else n for n in graph.nodes)
    return replace(graph, nodes=nodes), devices


def test_over_a_fast_lane_all_of_it_is_moved(monkeypatch: pytest.MonkeyPatch) -> None:
    found, graphs = decide(monkeypatch, FAST, lambda name: 0)
    assert found.crossings is not None and found.crossings.copies == len(found.crossings.decisions) > 0
    assert {d.how for d in found.crossings.decisions} == {"moved"}
    check(found, graphs)


def test_what_the_forward_has_brought_there_is_kept_and_not_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    found, graphs = decide(monkeypatch, SLOW, lambda name: int(name.startswith(("mul", "sin"))))
    assert found.crossings is not None
    mask = {d.name: d for d in found.crossings.decisions if "convert" in d.name or "to_copy" in d.name}
    assert [d.how for d in mask.values()] == ["kept"] and next(iter(mask.values())).move_s == 0.0
    check(found, graphs)


def test_a_backward_that_is_where_its_forward_was_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = decide(monkeypatch, SLOW, lambda name: 0, backward_on=0)
    assert found.crossings is None and found.twice is None
