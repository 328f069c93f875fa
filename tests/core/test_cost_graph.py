"""Cost graphs: JSON there and back, and what is refused."""
from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings

from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device
from genie_dynamo.core.errors import CostGraphError, GenieError
from tests.passes.placement.graphs import cost_graphs


def graph(nodes: str, edges: list[tuple[str, str]], **more: Any) -> CostGraph:
    return CostGraph(tuple(CostNode(id=n, seconds={"gpu": 1.0}) for n in nodes),
                     tuple(CostEdge(src=a, dst=b, **(more or {"seconds": 1.0})) for a, b in edges))


@settings(deadline=None, derandomize=True)
@given(cost_graphs())
def test_json_there_and_back(made: CostGraph) -> None:
    assert CostGraph.from_json(made.to_json()) == made
    assert CostGraph.from_json(json.loads(made.to_json())) == made


def test_the_format_is_the_published_one() -> None:
    data = {"nodes": [{"id": "a", "seconds": {"gpu": 0.5, "cpu": None}, "memory_bytes": 7, "colocation_group": "g",
                       "backward": True},
                      {"id": "b", "seconds": {"gpu": 1}, "memory_bytes": 0, "colocation_group": None,
                       "backward": False}],
            "edges": [{"src": "a", "dst": "b", "bytes": 4096}]}
    made = CostGraph.from_json(data)
    assert json.loads(made.to_json()) == data
    assert made.nodes[0] == CostNode(id="a", seconds={"gpu": 0.5, "cpu": None}, memory_bytes=7, colocation_group="g",
                                     backward=True)
    assert made.edges == (CostEdge(src="a", dst="b", size_bytes=4096),)


def test_fields_that_may_be_left_out() -> None:
    made = CostGraph.from_json('{"nodes": [{"id": "a", "seconds": {"gpu": 1}}]}')
    assert made.nodes == (CostNode(id="a", seconds={"gpu": 1}),) and made.edges == ()


def test_a_cycle_is_named() -> None:
    with pytest.raises(CostGraphError, match="cycle: ") as caught:
        graph("xabcy", [("x", "a"), ("a", "b"), ("b", "c"), ("c", "a"), ("c", "y")])
    cycle = caught.value.facts["cycle"]
    assert cycle[0] == cycle[-1] and set(cycle) == set("abc") and " -> ".join(cycle) in str(caught.value)
    following = {"a": "b", "b": "c", "c": "a"}
    assert all(following[a] == b for a, b in itertools.pairwise(cycle))
    with pytest.raises(CostGraphError, match="a -> a"):
        graph("a", [("a", "a")])


@pytest.mark.parametrize(("nodes", "edges", "more", "message"), [
    ("aa", [], {}, "'a' is given twice"),
    ("ab", [("a", "z")], {}, "'a' -> 'z': there is no node 'z'"),
    ("ab", [("z", "b")], {}, "there is no node 'z'"),
    ("ab", [("a", "b")], {"seconds": -1.0}, "'a' -> 'b': seconds must be finite and not negative, got -1.0"),
    ("ab", [("a", "b")], {"size_bytes": -5}, "bytes must be finite and not negative, got -5"),
    ("ab", [("a", "b")], {"seconds": math.nan}, "not negative, got nan"),
    ("ab", [("a", "b")], {"seconds": 1.0, "size_bytes": 1}, "both is given"),
    ("ab", [("a", "b")], {"seconds": None}, "neither is given"),
])
def test_what_a_graph_refuses(nodes: str, edges: list[tuple[str, str]], more: dict[str, Any], message: str) -> None:
    with pytest.raises(CostGraphError, match=message):
        graph(nodes, edges, **more)


@pytest.mark.parametrize(("seconds", "memory_bytes", "message"), [
    (-0.1, 0, "node 'a': seconds on 'gpu' must be finite and not negative, got -0.1"),
    (math.inf, 0, "got inf"), (math.nan, 0, "got nan"), (True, 0, "must be a number, got True"),
    ("1", 0, "must be a number, got '1'"), (1.0, -3, "node 'a': memory_bytes must be finite and not negative, got -3"),
])
def test_costs_that_cannot_be(seconds: Any, memory_bytes: int, message: str) -> None:
    with pytest.raises(CostGraphError, match=message):
        CostGraph((CostNode(id="a", seconds={"gpu": seconds}, memory_bytes=memory_bytes),))


def test_out_edges_that_differ_are_named() -> None:
    nodes = tuple(CostNode(id=n, seconds={"gpu": 1.0}) for n in "abc")
    with pytest.raises(CostGraphError, match=r"node 'a' has one output.*1.0 seconds to 'b', 2.0 seconds to 'c'"):
        CostGraph(nodes, (CostEdge(src="a", dst="b", seconds=1.0), CostEdge(src="a", dst="c", seconds=2.0)))
    CostGraph(nodes, (CostEdge(src="a", dst="b", seconds=1.0), CostEdge(src="b", dst="c", seconds=2.0)))


@pytest.mark.parametrize(("text", "message"), [
    ("[]", "must be an object"), ("{", "not a cost graph"), ('{"edges": []}', "nodes missing"),
    ('{"nodes": [{"id": "a"}]}', "node 'a': seconds missing"),
    ('{"nodes": [{"id": "a", "seconds": {}, "flops": 3}]}', "node 'a': unknown field.s. flops; known are"),
    ('{"nodes": [{"id": "a", "seconds": {"gpu": NaN}}]}', "got nan"),
    ('{"nodes": [{"id": "a", "seconds": 3}]}', "not a cost graph"),
])
def test_json_that_is_no_cost_graph(text: str, message: str) -> None:
    with pytest.raises(CostGraphError, match=message):
        CostGraph.from_json(text)


@pytest.mark.parametrize(("field", "value", "message"), [
    ("memory_bytes", -1, "device 'g': memory_bytes must be finite and not negative, got -1"),
    ("network_latency_s", math.nan, "network_latency_s"), ("price_per_hour", -2.0, "price_per_hour"),
    ("network_gbps", 0, "network_gbps is 0; leave it None"),
])
def test_devices_that_cannot_be(field: str, value: Any, message: str) -> None:
    with pytest.raises(CostGraphError, match=message):
        Device(id="g", kind="gpu", **{field: value})


def test_a_cost_graph_error_is_a_value_error_too() -> None:
    assert issubclass(CostGraphError, ValueError) and issubclass(CostGraphError, GenieError)
