"""A first placement obeys memory and support."""
from __future__ import annotations

import pytest

import genie_dynamo as genie
from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device
from genie_dynamo.core.placement import Policy
from genie_dynamo.passes.placement.loads import fits
from genie_dynamo.passes.placement.packing import pack
from genie_dynamo.passes.placement.problem import build_problem
from tests.passes.placement import reference

NODES = tuple(CostNode(id=f"n{i}", seconds={"gpu": None if i % 3 == 0 else 1.0, "tpu": None if i % 3 == 1 else 2.0})
              for i in range(12))
GRAPH = CostGraph(NODES, tuple(CostEdge(src=f"n{i}", dst=f"n{i + 1}", seconds=0.1) for i in range(11)))
DEVICES = (Device(id="g", kind="gpu"), Device(id="t", kind="tpu"))


def test_a_node_goes_to_a_device_that_runs_it_where_memory_has_no_limit() -> None:
    """No device runs everything and no interval either, so that the start is a packing."""
    problem = build_problem(GRAPH, DEVICES)
    for seed in range(3):
        start_A = pack(problem, seed)
        assert start_A is not None and fits(problem, start_A)


@pytest.mark.parametrize("policy", ["max_throughput", "min_latency"])
def test_what_no_device_runs_alone_is_placed(policy: Policy) -> None:
    placed = genie.place(GRAPH, devices=DEVICES, policy=policy)
    assert reference.obeys_limits(GRAPH, DEVICES, placed.device)
    assert placed.objective_value < float("inf")
