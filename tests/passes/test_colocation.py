"""What stays together: outputs that share memory, a cache with its attention; what is not trusted binds nothing."""
from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from genie_dynamo.core.cost_graph import CostGraph
from genie_dynamo.core.semantics import Region, SemanticGraph
from genie_dynamo.passes.colocation import together
from genie_dynamo.passes.partition import price
from genie_dynamo.passes.planning import plan_graph
from tests.passes.test_partition import WORKERS, Towers, capture, lane, place


class Twice(Towers):
    """Two views of one value: outputs that share memory."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> Any:  # type: ignore[override]
        a = self.a(x)
        return a[:, :8], a[:, 8:], self.b(y)


def groups(graph: CostGraph) -> dict[str, str | None]:
    return {node.id: node.colocation_group for node in graph.nodes}


def test_outputs_that_share_memory_are_made_on_one_worker_and_the_rest_is_still_cut(fresh_dynamo: None) -> None:
    graph = capture(Twice().eval(), torch.randn(256, 512), torch.randn(256, 512))
    found = place(graph)
    assert len(found.workers) == 2
    plan = plan_graph(*graph, assign=lambda n: found.assign.get(n.name, 0), num_workers=2)
    (shared,) = plan.aliases
    assert len({found.assign[name] for name in shared}) == 1


class Cached(nn.Module):
    """One step of attention over a cache that it makes longer."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(64, 64)

    def forward(self, x: torch.Tensor, k: torch.Tensor) -> Any:
        longer = torch.cat([k, x], 1)
        return torch.softmax(self.q(x) @ longer.transpose(1, 2), -1) @ longer, longer


def test_a_cache_stays_with_its_attention_where_both_are_trusted(fresh_dynamo: None) -> None:
    gm, facts = capture(Cached().eval(), torch.randn(2, 1, 64), torch.randn(2, 7, 64))
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    cache = [n for n in names if n.startswith("cat")]
    attention = [n for n in names if n.startswith(("bmm", "_softmax"))]
    regions = [Region(region_id="kv_cache.0", kind="kv_cache", nodes=tuple(cache), confidence=0.95, reason=""),
               Region(region_id="attention.0", kind="attention", nodes=tuple(attention), confidence=0.9, reason="")]
    graph, _ = price(gm, facts, WORKERS, [lane()])
    before = json.loads(graph.to_json())
    bound = groups(CostGraph.from_json(together(gm, before, SemanticGraph(regions=tuple(regions)))))
    assert len({bound[name] for name in (*cache, *attention)}) == 1 and bound[cache[0]] is not None
    for doubted in range(2):
        unsure = tuple(replace(r, confidence=0.6) if i == doubted else r for i, r in enumerate(regions))
        free = groups(CostGraph.from_json(together(gm, before, SemanticGraph(regions=unsure))))
        assert free[cache[0]] is None or free[cache[0]] != free[attention[0]]
