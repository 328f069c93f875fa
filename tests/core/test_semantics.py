"""Semantic graphs as data: JSON and its versions, phases, reports."""
from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from genie_dynamo.core import semantics
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.core.plan import GuardFacts
from genie_dynamo.core.semantics import PhaseRule, Region, SemanticGraph
from tests.plugins.golden import Golden

GRAPH = SemanticGraph(
    workload="llm", confidence=0.95, phase="decode", modalities=("text",), reason="tokens, and attention over them",
    guards=GuardFacts(guards=(("L['x']", "TENSOR_MATCH", ""),), ranges=(("s0", "L['x'].size()[1]", "[2, 64]"),)),
    regions=(
        Region(region_id="attention.0", kind="attention", nodes=("q", "k", "sdpa"), confidence=0.97, modality="text",
               reason='one op; "same" <values>', pattern="attention", module_path="layers.0.attn", phase="decode",
               flops=2e6, bytes_moved=1e6, annotations=(("variant", "self"), ("window", 128), ("fused", True))),
        Region(region_id="mlp.0", kind="mlp", nodes=("up", "act"), confidence=0.55, reason="unsure", phase="decode",
               parent="modality_encoder.0"),
        Region(region_id="modality_encoder.0", kind="modality_encoder", nodes=("up", "act"), confidence=0.9,
               reason="alone", phase="decode")),
    flows=(("attention.0", "mlp.0"),), warnings=("mlp.0 is uncertain",),
    phase_rule=PhaseRule(query_length="s0", past_length="s1"), num_nodes=7)


def test_json_round_trip() -> None:
    assert SemanticGraph.from_json(GRAPH.to_json()) == GRAPH
    assert SemanticGraph.from_json(SemanticGraph().to_json()) == SemanticGraph()


@pytest.mark.golden
def test_json_is_stable(golden: Golden) -> None:
    golden("semantic_graph_schema_2", json.dumps(json.loads(GRAPH.to_json()), indent=1, sort_keys=True) + "\n")


@pytest.mark.golden
def test_table(golden: Golden) -> None:
    golden("semantic_graph_table", str(GRAPH) + "\n")


@pytest.mark.parametrize(("text", "message"), [
    ("{", "not a semantic graph"), ("[]", "not a semantic graph"), ("{}", "not a semantic graph"),
    ('{"schema": 99}', "reads up to 2"), ('{"schema": 2}', "wrong fields"), ('{"schema": "1"}', "reads up to"),
    ('{"schema": 1}', "wrong fields"),
    ('{"schema": 2, "regions": [{"x": 1}], "guards": {"guards": {}}, "phase_rule": null}', "wrong fields")])
def test_other_documents_are_refused(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        SemanticGraph.from_json(text)


def test_old_documents_are_migrated(monkeypatch: pytest.MonkeyPatch) -> None:
    def rename(document: dict[str, object]) -> dict[str, object]:
        document["workload"] = document.pop("task")
        return document

    monkeypatch.setitem(semantics._MIGRATIONS, 0, rename)
    old = json.loads((Path(__file__).parent / "golden" / "semantic_graph_schema_1.txt").read_text())
    expected = replace(GRAPH, flows=())                # which it did not have
    assert SemanticGraph.from_json(json.dumps(old)) == expected
    old["schema"], old["task"] = 0, old.pop("workload")
    assert SemanticGraph.from_json(json.dumps(old)) == expected


def test_guards_of_every_form_come_back() -> None:
    guards = GuardFacts(guards=(("L['y']", "TYPE_MATCH", ""), ("L['x']", "TENSOR_MATCH", "x.ndim == 2"),
                                ("", "GRAD_MODE", "")))
    graph = SemanticGraph(guards=guards)
    assert {*graph.guards.guards} == {*guards.guards}
    assert SemanticGraph.from_json(graph.to_json()) == graph


@pytest.mark.parametrize(("query", "past", "static", "phase"), [
    (12, 0, False, "prefill"),      # a prompt
    (1, 0, False, "prefill"),       # a prompt of one token
    (1, 12, False, "decode"),
    (5, 12, False, "decode"),       # assisted decode: a draft is checked
    (16, 12, False, "decode"), (17, 12, False, "prefill"), (512, 512, False, "prefill"),    # chunked prefill
    (1, 64, True, "decode"), (8, 64, True, "prefill")])
def test_phase_of_a_call(query: int, past: int, static: bool, phase: str) -> None:
    assert PhaseRule(query_length=query, past_length=past, static_cache=static).phase() == phase
    rule = PhaseRule(query_length="s0", past_length="s1", static_cache=static)
    assert rule.symbolic
    assert rule.phase({"s0": query, "s1": past}) == phase


def test_phase_needs_every_symbol() -> None:
    with pytest.raises(KeyError):
        GRAPH.phase_at({"s0": 1})
    assert GRAPH.phase_at({"s0": 1, "s1": 4}) == "decode"
    assert SemanticGraph(phase="forward").phase_at({}) == "forward"


def test_uncertain_regions_are_not_trusted() -> None:
    attention, mlp, _ = GRAPH.regions
    assert attention.trusted and not mlp.trusted
    assert attention.arithmetic_intensity == 2.0
    assert mlp.arithmetic_intensity is None
    assert attention.annotation("window") == 128
    assert mlp.annotation("window") is None


def test_html_is_one_file_and_escapes(tmp_path: Path) -> None:
    path = tmp_path / "graph.html"
    GRAPH.to_html(path)
    text = path.read_text()
    assert not re.search(r"https?:|src=|@import|url\(|<link|<script", text)
    assert "<values>" not in text and "&lt;values&gt;" in text
    assert all(region.region_id in text for region in GRAPH.regions)
    assert "mlp.0 is uncertain" in text


def test_dot_quotes_and_nests() -> None:
    text = GRAPH.to_dot()
    assert text.count("{") == text.count("}") == 2
    assert 'subgraph "cluster_modality_encoder.0"' in text
    assert '"attention.0" [label="attention.0\\nself\\nlayers.0.attn"' in text
    assert '"attention.0" -> "mlp.0";' in text and text.count("->") == 1


def test_a_document_of_before_flows_is_read() -> None:
    old = json.loads(GRAPH.to_json())
    del old["flows"]
    assert SemanticGraph.from_json(json.dumps(old)).flows == ()
