"""Architectures that no pattern, and no rule of the truth, was changed because of.

Chosen by what they are made of, before any of them was analysed: `python -m bench semantics` prints what they get. Who
changes a pattern, or the truth, because of one moves it to `semantics_architectures.TUNED` and adds others here.
"""
from __future__ import annotations

from typing import Any

import torch

from bench.semantics_architectures import _LATENT, _MOE, _T5, _llama
from tests.models import architectures as A
from tests.models import inputs as make

# ruff: noqa: E501
# fmt: off
_SOUND = {"num_mel_bins": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32, "d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 64, "max_source_positions": 24}


def _spectrum(config: Any) -> A.Inputs:
    return {"input_features": torch.randn(2, 16, 48)}


def _frames(config: Any) -> A.Inputs:
    return {"hidden_states": torch.randn(2, 24, 16)}


def _places(config: Any) -> A.Inputs:
    """Four places for an image, then words."""
    words = make._tokens(config.text_config, 8)
    return make.image(config) | {"input_ids": torch.cat([torch.full((2, 4), 95), words], 1)}


def _places_and_types(config: Any) -> A.Inputs:
    inputs = _places(config)
    return inputs | {"token_type_ids": (inputs["input_ids"] == 95).long()}


def _places_and_question(config: Any) -> A.Inputs:
    question = make._tokens(config.text_config, 6)
    return _places(config) | {"qformer_input_ids": question, "qformer_attention_mask": torch.ones_like(question)}


HELD_OUT: dict[str, A.Architecture] = {
    "mellum": A._moe("MellumForCausalLM", "MellumConfig", _llama(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, sliding_window=8)),
    "hy_v3": A._moe("HYV3ForCausalLM", "HYV3Config", _llama(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_shared_experts=1, first_k_dense_replace=1)),
    "laguna": A._moe("LagunaForCausalLM", "LagunaConfig", _llama(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)),
    "axk1": A._moe("AXK1ForCausalLM", "AXK1Config", _llama(**_LATENT, n_group=2, topk_group=1, first_k_dense_replace=1, **{**_MOE, "n_routed_experts": 8})),
    "mistral4": A._moe("Mistral4ForCausalLM", "Mistral4Config", _llama(**_LATENT, n_group=1, topk_group=1, first_k_dense_replace=1, n_shared_experts=1, **_MOE)),
    "gemma4_text": A._decoder("Gemma4ForCausalLM", "Gemma4TextConfig", _llama(head_dim=8, sliding_window=8)),
    "xmod": A._encoder("XmodForMaskedLM", "XmodConfig", {**A._BERT, "languages": ["en_XX"], "default_language": "en_XX", "adapter_reduction_factor": 2}),
    "pop2piano": A._seq2seq("Pop2PianoForConditionalGeneration", "Pop2PianoConfig", _T5),
    "sam_vision": A._vision("SamVisionModel", "SamVisionConfig", {**A._VIT, "output_channels": 16, "window_size": 2, "global_attn_indexes": [1], "mlp_dim": 64}, labels=None),
    "pixtral_vision": A._vision("PixtralVisionModel", "PixtralVisionConfig", A._VIT, labels=None),
    "rf_detr_dinov2": A._vision("RfDetrDinov2Backbone", "RfDetrDinov2Config", {**A._VIT, "num_windows": 1, "out_features": ["stage2"]}, labels=None),
    "uvdoc_backbone": A._vision("UVDocBackbone", "UVDocBackboneConfig", {}, labels=None),
    "radio": A._vision("RadioModel", "RadioConfig", A._VIT, labels=None),
    "maskformer_swin": A._vision("MaskFormerSwinModel", "MaskFormerSwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}, labels=None),
    "internvl_vision": A._vision("InternVLVisionModel", "InternVLVisionConfig", {**A._VIT, "image_size": [32, 32], "patch_size": [8, 8]}, labels=None),
    "qwen2_audio_encoder": A._audio("Qwen2AudioEncoder", "Qwen2AudioEncoderConfig", _SOUND, inputs=_spectrum),
    "voxtral_encoder": A._audio("VoxtralEncoder", "VoxtralEncoderConfig", _SOUND, inputs=_spectrum),
    "glmasr_encoder": A._audio("GlmAsrEncoder", "GlmAsrEncoderConfig", _SOUND, inputs=_spectrum),
    "granite_speech_encoder": A._audio("GraniteSpeechCTCEncoder", "GraniteSpeechEncoderConfig", {"input_dim": 16, "hidden_dim": 32, "num_layers": 2, "num_heads": 4, "dim_head": 8, "feedforward_mult": 2, "context_size": 12, "max_pos_emb": 16, "output_dim": 20, "conv_kernel_size": 5}, inputs=_frames),
    "cohere2_vision": A._multimodal("Cohere2VisionForConditionalGeneration", "Cohere2VisionConfig", {"text_config": {"model_type": "cohere2", **_llama(sliding_window=8)}, "vision_config": {"model_type": "siglip_vision_model", **A._VIT}, "image_token_id": 95, "downsample_factor": 2, "alignment_intermediate_size": 64}, inputs=_places, first_call_in_eager=True),
    "shieldgemma2": A._multimodal("Gemma3ForConditionalGeneration", "Gemma3Config", {"text_config": _llama(head_dim=8, sliding_window=8), "vision_config": {**A._VIT}, "mm_tokens_per_image": 4, "image_token_index": 95, "image_token_id": 95}, inputs=_places_and_types, first_call_in_eager=True),
    "instructblip": A._multimodal("InstructBlipForConditionalGeneration", "InstructBlipConfig", {"text_config": {"model_type": "opt", **A._TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, "vision_config": A._VIT, "qformer_config": {**A._BERT, "encoder_hidden_size": 32}, "num_query_tokens": 4, "image_token_index": 95}, inputs=_places_and_question, first_call_in_eager=True, labels=None),
}
# fmt: on
