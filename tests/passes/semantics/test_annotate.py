"""Whole graphs: architectures, phases of generation, training, what AOTAutograd carries over, and time."""
from __future__ import annotations

import gc
import time
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

from bench.semantics import accuracy, samples
from bench.semantics_optimizers import OPTIMIZERS
from bench.semantics_samples import DECODED, all_names, optimizer_samples
from bench.semantics_time import synthetic
from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.semantics.annotate import Annotator
from genie_dynamo.passes.semantics.carry import AnnotateSemantics, carry_over, mark, marked
from genie_dynamo.passes.semantics.reading import read_graph
from tests.models import architectures, handwritten
from tests.models.captures import Capture, compiled_captures, recorded_capture
from tests.passes.semantics import blocks as b
from tests.passes.semantics import variants as v

pytestmark = pytest.mark.heavy


def graphs(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> dict[str, SemanticGraph]:
    """What each capture means, without names."""
    with torch.no_grad():
        captures = [*compiled_captures(model, inputs, **options), recorded_capture(model, inputs, {"": model})]
    return {c.kind: annotate(c) for c in captures}


def annotate(capture: Capture) -> SemanticGraph:
    return Annotator(names=False).annotate(capture.gm, roles=capture.roles, part=capture.part)


def count(graph: SemanticGraph, kind: str) -> int:
    return len(graph.of_kind(kind))


def test_regions_against_ground_truth() -> None:
    """A handful of architectures; the bench and the slow test take all."""
    for (capture, _), outcome in accuracy(samples(("gpt2", "whisper", "olmoe", "detector", "deep_fm"))).items():
        assert not outcome.regions, capture
        assert not any(outcome.wrong.values()), (capture, outcome.wrong)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_every_architecture() -> None:
    for key, outcome in accuracy(samples(all_names(), decoded=DECODED, optimizers=tuple(OPTIMIZERS))).items():
        assert not outcome.silent, key
        for kind, tally in outcome.kinds.items():
            assert tally.precision is None or tally.precision >= 0.95, (key, kind, outcome.regions)
            assert tally.recall is None or tally.recall >= 0.95, (key, kind, outcome.regions)
        for what, wrong in outcome.wrong.items():
            assert len(wrong) <= 0.05 * outcome.graphs[what], (key, what, wrong)


def decode_inputs(model: Any, ids: torch.Tensor, past: int) -> dict[str, Any]:
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=ids[:, :past], past_key_values=cache)
    return {"input_ids": ids[:, past:], "past_key_values": cache}


@pytest.mark.parametrize(("past", "phase"), [(11, "decode"), (8, "decode")])
def test_decode_with_a_dynamic_cache(past: int, phase: str) -> None:
    model, inputs = architectures.build("llama")
    arguments = decode_inputs(model, inputs["input_ids"], past)
    with torch.no_grad():
        captures = compiled_captures(model, arguments)
    for capture in captures:
        graph = annotate(capture)
        assert graph.phase == phase
        assert [r.annotation("past_length") for r in graph.of_kind("kv_cache")] == [past, past]
        assert graph.workload == "llm"


def test_one_dynamic_graph_serves_both_phases() -> None:
    model, inputs = architectures.build("llama")
    arguments = decode_inputs(model, inputs["input_ids"], 5)
    with torch.no_grad():
        captures = compiled_captures(model, arguments, dynamic=True)
    for capture in captures:
        graph = annotate(capture)
        rule = graph.phase_rule
        assert rule is not None and rule.symbolic
        assert isinstance(rule.query_length, str) and isinstance(rule.past_length, str)
        sizes = {rule.query_length: 1, rule.past_length: 40}
        assert graph.phase_at(sizes) == "decode"
        assert graph.phase_at({**sizes, rule.query_length: 200}) == "prefill"


def test_static_cache() -> None:
    from transformers import StaticCache

    model, inputs = architectures.build("llama")
    cache = StaticCache(config=model.config, max_cache_len=16)
    ids = inputs["input_ids"]
    with torch.no_grad():
        model(input_ids=ids[:, :4], past_key_values=cache)
        captures = compiled_captures(model, {"input_ids": ids[:, 4:5], "past_key_values": cache})
    for capture in captures:
        graph = annotate(capture)
        assert [r.annotation("operation") for r in graph.of_kind("kv_cache")] == ["write", "write"], capture.kind
        assert graph.phase == "decode"


def test_training_is_carried_over_to_the_backward() -> None:
    """Regions keep their ids through AOTAutograd; the backward's phase is its own."""
    model, inputs = handwritten.build("residual_net")
    model.train()
    seen: dict[str, SemanticGraph] = {}

    def backend(gm: torch.fx.GraphModule, example_inputs: list[Any]) -> Any:
        from functorch.compile import default_partition, make_boxed_func
        from torch._dynamo.backends.common import aot_autograd

        from genie_dynamo.passes.base import CaptureFacts

        AnnotateSemantics().run(gm, CaptureFacts())

        def keep(part: str) -> Any:
            def compiler(graph: torch.fx.GraphModule, _: Any) -> Any:
                carry_over(gm, graph, part)
                found = marked(graph)
                assert found is not None
                seen[part] = found
                return make_boxed_func(graph.forward)
            return compiler

        return aot_autograd(fw_compiler=keep("forward"), bw_compiler=keep("backward"),
                            partition_fn=default_partition)(gm, example_inputs)

    torch._dynamo.reset()
    torch.compile(model, backend=backend, fullgraph=True)(**inputs).sum().backward()
    torch._dynamo.reset()
    assert (seen["forward"].phase, seen["backward"].phase) == ("forward", "backward")
    norms = {part: {r.region_id for r in graph.of_kind("norm")} for part, graph in seen.items()}
    assert norms["forward"] == norms["backward"]
    backward = {name: r for r in seen["backward"].of_kind("norm") for name in r.nodes}
    assert any("batch_norm_backward" in name for name in backward)


def test_optimizer_step() -> None:
    parameter = torch.randn(4, 4)
    moments = [torch.zeros(4, 4), torch.zeros(4, 4)]

    def step(p: torch.Tensor, gradient: torch.Tensor, first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
        first = first * 0.9 + gradient * 0.1
        second = second * 0.99 + gradient * gradient * 0.01
        return torch.addcdiv(p, first, second.sqrt() + 1e-8, value=-0.1)

    for capture in compiled_captures(step, {
            "p": parameter, "gradient": parameter.cos(), "first": moments[0], "second": moments[1]}):
        graph = annotate(capture)
        assert graph.phase == "optimizer"
        assert count(graph, "optimizer_update") == 1


@pytest.mark.parametrize("name", ["sgd", "sgd_nesterov", "adamw"])
def test_every_parameter_of_an_optimizer_step_moves_in_a_region(name: str) -> None:
    for sample in optimizer_samples((name,)):
        view = sample.view(False)
        graph, _ = Annotator(names=False).annotate_view(view)
        held = {n for region in graph.of_kind("optimizer_update") for n in region.nodes}
        assert graph.phase == "optimizer", (name, sample.capture)
        for parameter in (n for n in view.nodes if n.op == "parameter" and n.kind != "call" and n.users):
            assert any(user.name in held for user in parameter.users), (name, sample.capture, parameter)


def test_what_is_written_but_not_moved_is_no_optimizer() -> None:
    """A weight that is set, and an average that follows values: neither is a step of a parameter."""
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4))
            self.register_buffer("average", torch.zeros(4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.weight.copy_(x)
            self.average.lerp_(x, 0.1)
            return x * 2

    for graph in graphs(Keeps(), {"x": torch.randn(4)}).values():
        assert graph.phase == "forward"
        assert not graph.of_kind("optimizer_update")


@pytest.mark.parametrize(("steps", "given", "phase"), [
    (1, True, "decode"), (6, True, "prefill"), (6, False, "prefill"), (1, False, "prefill")])
def test_recurrent_state_has_a_phase(steps: int, given: bool, phase: str) -> None:
    state = {name: torch.zeros(1, b.B, b.D) for name in ("h", "c")} if given else {}
    inputs = {"x": torch.randn(b.B, steps, b.D), **state}
    for capture, graph in graphs(b.Lstm(kept=True).eval(), inputs).items():
        assert graph.phase == phase, capture
    for capture, graph in graphs(b.Lstm(kept=False).eval(), {"x": inputs["x"]}).items():
        assert graph.phase == "forward", capture


def test_a_prompt_of_one_token_is_prefill() -> None:
    model, inputs = architectures.build("llama")
    for graph in graphs(model, {"input_ids": inputs["input_ids"][:, :1]}).values():
        assert graph.phase == "prefill"


def test_modalities_and_where_they_meet() -> None:
    for name, variant, encoders in (("llava", "sequence", ["vision"]), ("clip", "late_interaction", ["text", "vision"]),
                                    ("whisper", "cross_attention", ["audio"])):
        model, inputs = architectures.build(name)
        for capture, graph in graphs(model, inputs).items():
            assert [r.annotation("variant") for r in graph.of_kind("fusion")] == [variant], (name, capture)
            assert sorted(r.modality for r in graph.of_kind("modality_encoder")) == encoders, (name, capture)


def test_recommenders_have_bags_and_interactions() -> None:
    model, inputs = handwritten.build("dlrm")
    for graph in graphs(model, inputs).values():
        assert (graph.workload, graph.modalities) == ("recsys", ("tabular",))
        assert [r.annotation("variant") for r in graph.of_kind("embedding")] == ["bag"] * 4
        assert [r.annotation("variant") for r in graph.of_kind("fusion")] == ["feature_interaction"]


@pytest.mark.parametrize("name", ["dlrm", "wide_and_deep", "deep_fm"])
def test_lookups_need_bandwidth_and_towers_compute(name: str) -> None:
    import genie_dynamo as genie

    model, inputs = handwritten.build(name)
    graph = genie.analyze(model, **inputs)
    sparse = [r.arithmetic_intensity for r in graph.of_kind("embedding")]
    dense = [r.arithmetic_intensity for r in graph.of_kind("mlp")]
    assert all(a is not None and b is not None and a * 4 < b for a in sparse for b in dense)
    assert all(r.bytes_moved for r in graph.of_kind("embedding"))


def test_ids_that_are_hashed_are_text() -> None:
    for graph in graphs(v.HashedLookup(), v.ids()).values():
        assert (graph.workload, graph.modalities) == ("llm", ("text",))


def test_rows_that_stay_a_sequence_make_no_sure_recommender() -> None:
    """Positions mixed by a Fourier transform: no rule knows it, so the answer has a warning."""
    class Fourier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.segments, self.norm = nn.Embedding(50, b.D), nn.Embedding(9, b.D), nn.LayerNorm(b.D)

        def forward(self, ids: torch.Tensor, kinds: torch.Tensor) -> torch.Tensor:
            x = self.table(ids) + self.segments(kinds)
            return self.norm(x + torch.fft.fft(x, dim=1).real)  # type: ignore[no-any-return]

    ids = torch.randint(9, (b.B, b.T))
    for graph in graphs(Fourier(), {"ids": ids, "kinds": ids}).values():
        assert graph.confidence < 0.7
        assert any("may be text" in warning for warning in graph.warnings)


def test_flows_follow_values_through_the_residual_stream() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.third = b.Attention(), b.FeedForward(gated=False), b.FeedForward(gated=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x = x + self.first(x)
            x = x + self.second(x)
            return x + self.third(x)  # type: ignore[no-any-return]

    for graph in graphs(Block(), b.hidden()).values():
        assert graph.flows == (("attention.0", "mlp.0"), ("mlp.0", "mlp.1"))


def test_a_detector_has_backbone_neck_and_head() -> None:
    model, inputs = handwritten.build("detector")
    for graph in graphs(model, inputs).values():
        roles = [r.annotation("variant") for r in graph.of_kind("conv_stage")]
        assert sorted(map(str, roles)) == ["backbone"] * 4 + ["head"] * 3 + ["neck"] * 3


def test_what_is_unknown_is_said() -> None:
    model, inputs = handwritten.build("regression")
    for graph in graphs(model, inputs).values():
        assert graph.workload == "unknown"
        assert any("the workload is unknown" in warning for warning in graph.warnings)


def test_costs_are_summed_and_unknown_ones_are_not_guessed() -> None:
    model, inputs = handwritten.build("regression")
    (dynamo, _) = compiled_captures(model, inputs)
    priced = Annotator(cost=lambda name: (2.0, 4.0)).annotate(dynamo.gm, roles=dynamo.roles)
    assert [(r.flops, r.bytes_moved) for r in priced.regions] == [
        (2.0 * len(r.nodes), 4.0 * len(r.nodes)) for r in priced.regions]
    unknown = Annotator(cost=lambda name: None).annotate(dynamo.gm, roles=dynamo.roles)
    assert all(r.flops is None and r.arithmetic_intensity is None for r in unknown.regions)


def test_names_change_confidence_and_nothing_else() -> None:
    model, inputs = architectures.build("gpt2")
    capture = compiled_captures(model, inputs)[0]
    named = Annotator().annotate(capture.gm, roles=capture.roles)
    bare = Annotator(names=False).annotate(capture.gm, roles=capture.roles)
    assert [(r.kind, r.nodes) for r in named.regions] == [(r.kind, r.nodes) for r in bare.regions]
    assert sum(r.confidence for r in named.regions) > sum(r.confidence for r in bare.regions)
    assert {r.module_path for r in bare.regions} == {""}
    assert "transformer.h.0.attn" in {r.module_path for r in named.regions}


def test_writes_in_place_are_read_by_who_comes_after() -> None:
    def fill(x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        cache[:, 1] = x
        return cache * 2

    captures = compiled_captures(fill, {"x": torch.ones(3), "cache": torch.zeros(3, 2)})
    for capture in captures:
        view = read_graph(capture.gm)
        written, product = view.data_inputs[0], view.by_op["mul"][-1]
        assert written.taint & product.taint, capture.kind


def test_marks_name_the_innermost_region() -> None:
    model, inputs = handwritten.build("residual_net")
    capture = compiled_captures(model, inputs)[0]
    graph = Annotator().annotate(capture.gm, roles=capture.roles)
    mark(capture.gm, graph)
    norm = graph.of_kind("norm")[0]
    node = next(n for n in capture.gm.graph.nodes if n.name == norm.nodes[0])
    assert node.meta["custom"]["genie"] == norm.region_id
    assert norm.parent.startswith("conv_stage.")


def test_time_grows_with_the_graph_and_no_faster() -> None:
    """Bounds ten times what was measured, in CPU time, so that only a change of order fails."""
    annotator = Annotator()
    spent = []
    for size in (2_000, 20_000):
        view = synthetic(size)
        gc.disable()              # a collection costs what everything else in the process weighs
        try:
            started = time.thread_time()
            graph, _ = annotator.annotate_view(view)
            spent.append((time.thread_time() - started) / size)
        finally:
            gc.enable()
        assert count(graph, "attention") > size // 60
    assert spent[1] < 1e-4
    assert spent[1] < 5 * spent[0]
    started = time.thread_time()
    graph.to_json()
    assert time.thread_time() - started < 0.5
