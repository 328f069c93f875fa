"""State that lies on a worker: it draws what reads it, and a decode's cache moves for what many tokens gain."""
from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import fx, nn

from genie_dynamo.core.semantics import Region, SemanticGraph
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.held import TOKENS_PER_MOVE, held_inputs
from genie_dynamo.passes.partition import Partition, partition
from genie_dynamo.passes.placement.interfaces import Limits
from genie_dynamo.passes.placement.planner import Planner
from tests.passes.test_partition import HARDWARE, WORKERS, capture, lane

FASTER = replace(HARDWARE, name="fast", matmul_flops_per_s=(("float32", 1e11),),
                 memory_bytes_per_s=((1, 2e10),), elementwise_ops_per_s=(("float32", 4e9),))
UNEQUAL = (WORKERS[0], replace(WORKERS[1], hardware=FASTER))


class Attend(nn.Module):
    """A query, and a cache that is large for the little that is done with it."""

    def forward(self, query: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        return torch.softmax(query @ cache.transpose(-1, -2), -1) @ cache


@pytest.fixture(scope="module")
def attend() -> tuple[fx.GraphModule, GraphFacts]:
    gm, facts = capture(Attend().eval(), torch.randn(8, 16, 256), torch.randn(8, 4096, 256))
    return gm, facts


def name_of_cache(gm: fx.GraphModule) -> str:
    return next(n.name for n in gm.graph.nodes if n.op == "placeholder" and n.meta["val"].shape[1] == 4096)


def meant(gm: fx.GraphModule, phase: str) -> None:
    """Let the graph be known as one that reads a cache."""
    cache = name_of_cache(gm)
    readers = tuple(n.name for n in gm.graph.nodes if any(a.name == cache for a in n.all_input_nodes))
    region = Region(region_id="kv_cache.0", kind="kv_cache", nodes=readers, confidence=0.9, phase=phase,
                    reason="a test")
    gm.meta["genie"] = SemanticGraph(phase=phase, regions=(region,))


def place(graph: Any, held: dict[str, str] | None, phase: str = "", workers: Any = UNEQUAL) -> Partition:
    gm, facts = graph
    return partition(gm, facts, workers, (lane(bytes_per_s=1e9),), "min_latency", Planner(time.monotonic), Limits(),
                     held=None if held is None else held_inputs(gm, held, phase))


def test_without_state_the_faster_worker_runs_it(attend: Any) -> None:
    assert place(attend, None).workers == ("w1",)


def test_a_large_cache_keeps_its_reader(attend: Any) -> None:
    meant(attend[0], "forward")
    found = place(attend, {name_of_cache(attend[0]): "w0"}, "forward")
    assert found.workers == ("w0",)
    assert any("to move state there" in a.reason for a in found.alternatives if a.name == "w1")
    assert all(n.op == "call_function" for n in attend[0].graph.nodes if n.name in found.assign)


def test_in_decode_it_moves_once_for_many_tokens(attend: Any) -> None:
    gm = attend[0]
    cache = name_of_cache(gm)
    meant(gm, "decode")
    assert place(attend, {cache: "w0"}, "decode").workers == ("w1",)
    held = held_inputs(gm, {cache: "w0"}, "decode")
    size = next(n.meta["val"].nbytes for n in gm.graph.nodes if n.name == cache)
    assert held.charged_bytes == {cache: size // TOKENS_PER_MOVE}
    assert held_inputs(gm, {cache: "w0"}, "prefill").charged_bytes == {cache: size}


def test_state_where_the_work_is_anyway_costs_nothing(attend: Any) -> None:
    cache = name_of_cache(attend[0])
    assert place(attend, {cache: "w1"}).est_s == pytest.approx(place(attend, None).est_s)
