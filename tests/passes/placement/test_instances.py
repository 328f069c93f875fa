"""The published instances: what the importer makes of them, and values that must not get worse."""
from __future__ import annotations

from pathlib import Path

import pytest

import genie_dynamo as genie
from genie_dynamo.core.errors import CostGraphError
from genie_dynamo.passes.placement.importer import import_instance, read_instance
from tests.passes.placement import reference

DATA = Path(__file__).resolve().parents[3] / "bench" / "data" / "placement"
# (nodes, colocation groups, accelerators, best value known from the authors' programs)
KNOWN = {
    "bert24_inference": (32, 32, 6, 17.778), "bert24_training": (64, 32, 6, 39.943),
    "gnmt_inference": (96, 96, 6, 31.783), "resnet50_inference": (177, 177, 6, 33.775),
    "bert_l-3_inference": (235, 117, 3, 27.574), "bert_l-3_training": (600, 121, 3, 65.303),
    "resnet50_operators_inference": (604, 176, 6, 124.349),
}


@pytest.mark.parametrize("name", KNOWN)
def test_imported_whole(name: str) -> None:
    graph, devices = read_instance(DATA / f"{name}.json")
    nodes, groups, accelerators, _ = KNOWN[name]
    assert len(graph.nodes) == nodes
    assert len({n.colocation_group for n in graph.nodes} - {None}) == groups
    assert [d.pays_transfers for d in devices] == [True] * accelerators + [False]
    assert all(d.memory_bytes == 17185374208 for d in devices[:-1]) and devices[-1].memory_bytes is None


@pytest.mark.parametrize("name", KNOWN)
def test_the_heuristic_alone_is_within_two_percent_of_the_best_known(name: str) -> None:
    graph, devices = read_instance(DATA / f"{name}.json")
    placed = genie.place(graph, devices=devices, policy="max_throughput")
    assert reference.obeys_limits(graph, devices, placed.device)
    assert placed.objective_value == pytest.approx(max(reference.loads(graph, devices, placed.device).values()))
    assert placed.lower_bound is not None and placed.lower_bound <= placed.objective_value <= KNOWN[name][3] * 1.02


def test_the_solver_proves_a_value_that_is_better_than_the_published_one() -> None:
    graph, devices = read_instance(DATA / "bert_l-3_inference.json")
    placed = genie.place(graph, devices=devices, policy="max_throughput", time_limit_s=30)
    assert placed.objective_value < KNOWN["bert_l-3_inference"][3] * 0.8 and placed.gap is not None
    assert placed.gap < 1e-5 and "proven optimal" in placed.method and placed.seconds < 30


@pytest.mark.parametrize("data", [{}, {"nodes": [{"id": 1}], "edges": []}, {"nodes": 3}])
def test_what_is_no_instance(data: dict[str, object]) -> None:
    with pytest.raises(CostGraphError, match="not a placement instance"):
        import_instance(data)
