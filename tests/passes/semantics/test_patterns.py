"""Each pattern on the three captures, without names: what it must find, and near misses that it must refuse."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from tests.models import handwritten
from tests.passes.semantics import blocks as b
from tests.passes.semantics import variants as v

CACHE = {"x": torch.randn(b.B, 1, b.D), "keys": torch.randn(b.B, b.H, 7, 4), "values": torch.randn(b.B, b.H, 7, 4)}
IMAGE = {"image": torch.randn(2, 3, 32, 32)}

POSITIVE: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], str, dict[str, Any]]] = {
    "attention_fused": (b.Attention, b.hidden, "attention", {"variant": "self", "fused": True}),
    "attention_unfused": (lambda: b.Attention("plain"), b.hidden, "attention", {"variant": "self", "fused": False}),
    "attention_einsum": (lambda: b.Attention("einsum"), b.hidden, "attention", {"variant": "self"}),
    "attention_baddbmm": (lambda: b.Attention("baddbmm"), b.hidden, "attention", {"variant": "self"}),
    "attention_grouped": (lambda: b.Attention("fused", 2), b.hidden, "attention", {"query_heads_per_key": 2}),
    "attention_cross": (b.Attention, lambda: {**b.hidden(), "context": torch.randn(b.B, 9, b.D)}, "attention",
                        {"variant": "cross"}),
    "attention_window": (b.SlidingWindow, b.hidden, "attention", {"window": 4, "causal": True}),
    "cache_append": (b.AppendCache, lambda: dict(CACHE), "kv_cache",
                     {"operation": "append", "past_length": 7, "query_length": 1}),
    "cache_write": (b.WriteCache, lambda: {**{k: v.clone() for k, v in CACHE.items()}, "position": torch.tensor([6])},
                    "kv_cache", {"operation": "write", "storage": "static"}),
    "cache_latent": (b.LatentCache, lambda: {"x": torch.randn(b.B, 1, b.D), "latent": torch.randn(b.B, 7, 6)},
                     "kv_cache", {"operation": "append", "past_length": 7, "latent": True}),
    "gated_mlp_normalised": (b.NormalisedGate, b.hidden, "gated_mlp", {"activation": "silu"}),
    "mlp_pixelwise": (lambda: b.PixelwiseMLP(gate=False), lambda: dict(IMAGE), "mlp", {"activation": "relu"}),
    "experts_one_by_one": (b.SplitExperts, b.hidden, "moe_experts", {"experts": 3}),
    "constant_table": (b.ConstantTable, b.hidden, "positional", {"variant": "sinusoidal"}),
    "state_kept": (lambda: b.Lstm(kept=True), lambda: {**b.hidden(), "h": torch.zeros(1, b.B, b.D),
                                                       "c": torch.zeros(1, b.B, b.D)}, "recurrent",
                   {"past": True, "kept": True, "query_length": b.T}),
    "state_made_anew": (lambda: b.Lstm(kept=False), b.hidden, "recurrent", {"past": False, "kept": False}),
    "loss_written_out": (lambda: b.Contrastive(report=False), lambda: {**b.hidden(), "labels": torch.randint(
        5, (b.B, b.T))}, "loss", {"variant": "written_out"}),
    "mlp": (lambda: b.FeedForward(gated=False), b.hidden, "mlp", {}),
    "gated_mlp": (lambda: b.FeedForward(gated=True), b.hidden, "gated_mlp", {}),
    "norm_op": (lambda: nn.LayerNorm(b.D), lambda: {"input": torch.randn(2, b.D)}, "norm", {"variant": "layer_norm"}),
    "norm_chain": (b.RootMeanSquare, b.hidden, "norm", {"variant": "rms_norm"}),
    "rotary": (b.Rotary, b.hidden, "positional", {"variant": "rotary"}),
    "embedding": (b.Lookup, lambda: {"ids": torch.randint(50, (b.B, b.T))}, "embedding", {"variant": "dense"}),
    "learned_positions": (b.Lookup, lambda: {"ids": torch.randint(50, (b.B, b.T))}, "positional",
                          {"variant": "learned"}),
    "bag": (lambda: handwritten.build("dlrm")[0], lambda: handwritten.build("dlrm")[1], "embedding",
            {"variant": "bag"}),
    "router": (b.Experts, b.hidden, "moe_router", {"experts": 4, "chosen": 2}),
    "patches": (lambda: b.Patches(keep_image=False), lambda: dict(IMAGE), "patch_embedding", {"kernel": 8}),
    "pooling": (lambda: b.Pooled(1), b.hidden, "pooling", {"variant": "mean"}),
    "head": (lambda: b.Head(residual=False), b.hidden, "logits_head", {}),
    "state_space": (b.SelectiveScan, b.hidden, "state_space", {"variant": "selective scan"}),
    "recurrent": (lambda: handwritten.build("lstm_lm")[0], lambda: handwritten.build("lstm_lm")[1], "recurrent", {}),
    "recurrent_cell": (lambda: handwritten.build("elman_lm")[0], lambda: handwritten.build("elman_lm")[1], "recurrent",
                       {"variant": "cell"}),
    **{f"cells_{form}": (lambda form=form: b.Cells(form), b.hidden, "recurrent",
                         {"query_length": b.T, "past": False, "kept": False})
       for form in ("elman", "gru", "lstm", "joined", "op")},
    "cells_kept": (lambda: b.Cells("lstm"), lambda: {**b.hidden(), "h": torch.randn(b.B, b.D), "c": torch.randn(
        b.B, b.D)}, "recurrent", {"query_length": b.T, "past": True, "kept": True}),
    "cell_step": (lambda: b.Cells("joined"), lambda: {"x": torch.randn(b.B, 1, b.D), "h": torch.randn(b.B, b.D),
                                                      "c": torch.randn(b.B, b.D)}, "recurrent",
                  {"query_length": 1, "past": True, "kept": True}),
    "state_in_exponents": (b.Exponents, b.hidden, "state_space", {"variant": "exponents"}),
    "experts_all_at_once": (b.BatchedExperts, b.hidden, "moe_experts", {"experts": 3}),
    "router_of_the_best": (b.BestExpert, b.hidden, "moe_router", {"experts": 3, "chosen": 1}),
    "norm_by_power": (b.PowerNorm, b.hidden, "norm", {"variant": "rms_norm"}),
    "pooling_side_by_side": (b.TwoMeans, lambda: dict(IMAGE), "pooling", {"variant": "mean"}),
    "table_in_an_attribute": (b.AttributeTable, b.hidden, "positional", {"variant": "constant"}),
    "attention_by_angles": (v.AngleAttention, b.hidden, "attention", {"variant": "self", "softmax": False}),
    "attention_linear": (v.LinearAttention, b.hidden, "attention", {"variant": "self", "softmax": False}),
    "mlp_with_a_written_activation": (v.WrittenActivation, b.hidden, "mlp", {"activation": "expm1"}),
    "gated_mlp_with_an_adapter": (v.AdaptedGate, b.hidden, "gated_mlp", {"activation": "gelu"}),
    "mlp_normalised": (v.NormalisedMLP, b.hidden, "mlp", {"activation": "gelu"}),
    "embedding_behind_a_prompt": (v.PromptedLookup, v.ids, "embedding", {"variant": "dense"}),
    "pooling_of_frames": (v.PooledFrames, lambda: {"frames": torch.randn(b.B, 3, b.T, b.D)}, "pooling",
                          {"variant": "mean"}),
    "sines_written_twice": (v.SinesTwice, b.hidden, "positional", {"table": True}),
    "loss": (b.Loss, lambda: {**b.hidden(), "labels": torch.randint(5, (b.B, b.T))}, "loss", {}),
}

NEGATIVE: dict[str, tuple[Callable[[], nn.Module], Callable[[], dict[str, Any]], str, str, str]] = {
    "router_is_no_attention": (b.Router, b.hidden, "attention", "attention", "no product of two activations"),
    "no_cache": (b.Attention, b.hidden, "kv_cache", "kv_cache", "not kept"),
    "learned_prefix_is_no_cache": (b.LearnedPrefix, b.hidden, "kv_cache", "kv_cache", "computed in this call"),
    "scratch_is_no_cache": (b.ScratchKeys, b.hidden, "kv_cache", "kv_cache", "not kept"),
    "gate_of_channels_is_no_mlp": (lambda: b.PixelwiseMLP(gate=True), lambda: dict(IMAGE), "mlp", "mlp", "a gate"),
    "share_of_right_is_no_loss": (lambda: b.Contrastive(report=True), lambda: {**b.hidden(), "labels": torch.randint(
        5, (b.B, b.T))}, "loss", "loss", "a report"),
    "transform_is_no_mlp": (b.NormalisedTransform, b.hidden, "mlp", "mlp", "no linear layer reads"),
    "inverse_root_is_no_norm": (b.InverseRoot, b.hidden, "norm", "norm", "not the root of a mean"),
    "mirror_is_no_rotation": (b.Mirrored, b.hidden, "positional", "rotary", "not multiplied"),
    "sampling_is_no_routing": (b.BestTokens, b.hidden, "moe_router", "moe_router", "route nothing"),
    "strided_stem_is_no_patches": (lambda: b.Patches(keep_image=True), lambda: dict(IMAGE), "patch_embedding",
                                   "patch_embedding", "stays an image"),
    "mean_of_features_is_no_pooling": (lambda: b.Pooled(2), b.hidden, "pooling", "pooling", "not over positions"),
    "residual_linear_is_no_head": (lambda: b.Head(residual=True), b.hidden, "logits_head", "logits_head",
                                   "goes on into add"),
    "shared_layer_is_no_recurrence": (b.SharedLayer, b.hidden, "recurrent", "recurrent", "an input and a state"),
    "decay_is_no_attention": (v.DecayingProducts, b.hidden, "attention", "kernel_attention", "decays"),
    "covariance_is_no_attention": (v.Covariance, b.hidden, "attention", "kernel_attention", "not all projections"),
    "mean_of_heads_is_no_pooling": (v.MeanOfHeads, b.hidden, "pooling", "pooling", "not over positions"),
    "mask_is_not_pooled": (v.PooledMask, v.masked, "pooling", "pooling", "a mask"),
    "softplus_alone_is_no_state": (lambda: b.SelectiveScan(rates=False), b.hidden, "state_space", "state_space",
                                   "exponential of a weight"),
}


@pytest.mark.parametrize("name", POSITIVE)
def test_finds(name: str) -> None:
    make, inputs, kind, annotations = POSITIVE[name]
    torch.manual_seed(0)
    for capture, report in b.reports(make().eval(), inputs()).items():
        found = [f.match for f in report.found if f.match.kind == kind]
        assert found, (capture, [(r.pattern, r.node, r.reason) for r in report.refusals])
        assert any(annotations.items() <= match.annotations.items() for match in found), (capture, found)
        assert all(match.reason for match in found)


@pytest.mark.parametrize("name", NEGATIVE)
def test_refuses_with_the_reason(name: str) -> None:
    make, inputs, kind, pattern, reason = NEGATIVE[name]
    torch.manual_seed(0)
    for capture, report in b.reports(make().eval(), inputs()).items():
        assert not [f.match for f in report.found if f.match.kind == kind], (capture, report.found)
        reasons = [r.reason for r in report.refusals if r.pattern == pattern]
        assert any(reason in given for given in reasons), (capture, reasons)


@pytest.mark.parametrize("form", ["lstm", "joined"])
def test_the_steps_of_a_layer_are_one_region_and_layers_are_not_mixed(form: str) -> None:
    for capture, report in b.reports(b.Cells(form, layers=2), b.hidden()).items():
        found = [f for f in report.found if f.match.kind == "recurrent"]
        assert len(found) == 2, capture
        assert [f.match.annotations["query_length"] for f in found] == [b.T, b.T]


def test_regions_do_not_share_nodes() -> None:
    model, inputs = handwritten.build("dlrm")
    for report in b.reports(model, inputs).values():
        names = [node.name for f in report.found for node in f.nodes]
        assert len(names) == len(set(names))
