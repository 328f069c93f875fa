"""Cut graphs, rewritten: the same results, fewer bytes between workers, what the backward reads where it reads it."""
from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from genie_dynamo.core.hardware import LinkFacts
from genie_dynamo.core.plan import verify_plan
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.passes.twice import Rewritten, rewritten
from tests.passes.costs.tracing import call_node, trace
from tests.passes.test_partition import capture


def lane(start: int, end: int) -> LinkFacts:
    return LinkFacts(start=str(start), end=str(end), latency_s=1e-4, bytes_per_s=1e8, source="a test")


def masked(x: torch.Tensor, lengths: torch.Tensor) -> Any:
    mask = (torch.arange(512) < lengths[:, None]).float()
    return x * mask, (x + 1) * mask


def facts_of(gm: fx.GraphModule, static: tuple[int, ...] = (), kind: str = "inference") -> GraphFacts:
    return GraphFacts(kind=kind, static_inputs=static, bumped=frozenset(), num_outputs=2)


def masks(seconds: float = 1e-5) -> tuple[fx.GraphModule, tuple[torch.Tensor, ...], dict[str, int], Any]:
    args = (torch.randn(64, 512), torch.randint(1, 512, (64,)))
    gm = trace(masked, *args)
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    assign = {name: int(name in names[-2:]) for name in names}
    return gm, args, assign, {worker: dict.fromkeys(names, seconds) for worker in (0, 1)}


def moved_bytes(gm: fx.GraphModule, assign: Any) -> int:
    plan = plan_graph(gm, facts_of(gm), assign=lambda node: assign[node.name], num_workers=2)
    verify_plan(plan)
    sizes = {n.name: n.meta["val"].nbytes for n in gm.graph.nodes if isinstance(n.meta.get("val"), torch.Tensor)}
    made = {name: f.worker for f in plan.fragments for name in f.outputs}
    return sum(sizes[name] for f in plan.fragments for name in f.inputs if made.get(name, f.worker) != f.worker)


def test_a_mask_is_made_on_both_sides_and_gives_the_same() -> None:
    gm, args, assign, seconds = masks()
    found = rewritten(gm, facts_of(gm), assign, seconds, lane)
    assert found is not None and set(found.again) == {1}
    assert moved_bytes(found.gm, found.assign) < moved_bytes(gm, assign) / 50
    assert {found.assign[new] for new in found.origin} == {1}
    assert all(torch.equal(a, b) for a, b in zip(found.gm(*args), gm(*args), strict=True))


def test_what_only_another_worker_reads_moves_there_and_leaves_nothing_behind() -> None:
    gm, args, assign, seconds = masks()
    products = [n.name for n in gm.graph.nodes if "mul" in n.name]
    assign[products[0]] = 1
    found = rewritten(gm, facts_of(gm), assign, seconds, lane)
    assert found is not None
    names = {n.name for n in found.gm.graph.nodes}
    gone = [name for name in found.again[1] if name not in names]
    assert gone and not set(gone) & set(found.assign)
    moved_bytes(found.gm, found.assign)
    assert all(torch.equal(a, b) for a, b in zip(found.gm(*args), gm(*args), strict=True))


def test_dear_ops_and_weights_stay_where_they_are() -> None:
    gm, _, assign, seconds = masks(1.0)
    assert rewritten(gm, facts_of(gm), assign, seconds, lane) is None
    gm, _, assign, seconds = masks()
    client = LinkFacts(start="client", end="1", latency_s=1e-9, bytes_per_s=1e12, source="a test")
    brought = rewritten(gm, facts_of(gm), assign, seconds, lane, input_link=client)
    kept = rewritten(gm, facts_of(gm, static=(1,)), assign, seconds, lane, input_link=client)
    assert brought is not None and kept is not None
    assert len(kept.again[1]) <= len(brought.again[1])


def forward(kind: str = "forward") -> tuple[fx.GraphModule, GraphFacts, dict[str, int], str]:
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.GELU(), torch.nn.Linear(8, 8))
    gm, facts = capture(model.train(), torch.randn(4, 8), kind=kind)
    gelu = call_node(gm, "gelu")
    order = [n.name for n in gm.graph.nodes]
    assign = {n.name: int(order.index(n.name) > order.index(gelu.name)) for n in gm.graph.nodes
              if n.op == "call_function"}
    return gm, facts, assign, gelu.name


def test_an_activation_is_kept_where_it_is_read() -> None:
    gm, facts, assign, gelu = forward()
    found: Rewritten | None = rewritten(gm, facts, assign, {0: {}, 1: {}}, lane)
    assert found is not None and found.kept == {gelu: 1} and not found.again
    plan = plan_graph(found.gm, facts, assign=lambda node: found.assign[node.name], num_workers=2)
    home = {name: f.worker for f in plan.fragments for name in f.outputs}
    assert [home[o.name] for o in plan.outputs if o.name.startswith(gelu)] == [1]


@pytest.mark.parametrize("kind", ["inference"])
def test_without_a_backward_nothing_is_kept(kind: str) -> None:
    gm, facts, assign, _ = forward(kind)
    assert rewritten(gm, facts, assign, {0: {}, 1: {}}, lane) is None
