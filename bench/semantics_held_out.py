"""Architectures that no pattern, and no rule of the truth, was changed because of.

Chosen by what they are made of, before any of them was analysed: `python -m bench semantics` prints what they get. Who
changes a pattern, or the truth, because of one moves it to `semantics_architectures.TUNED` and adds others here.
"""
from __future__ import annotations

from typing import Any

import torch

from bench.semantics_architectures import _language_and_vision, _llama, _text_with_boxes
from tests.models import architectures as A
from tests.models import inputs as make

# ruff: noqa: E501
# fmt: off
_MOE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}


def _image_places_and_words(config: Any) -> A.Inputs:
    """Four places for an image, then words."""
    words = make._tokens(config.text_config, 8)
    return make.image(config) | {"input_ids": torch.cat([torch.full((2, 4), config.image_token_index), words], 1)}


def _frames_and_words(config: Any) -> A.Inputs:
    return make.text(config.text_config) | {"pixel_values": torch.randn(2, 2, 3, 32, 32)}


def _places_and_words(config: Any) -> A.Inputs:
    """The places of an image are told by a mask."""
    places = torch.zeros(2, 12, dtype=torch.long)
    places[:, 1:5] = 1
    return make.image(config) | {"input_ids": make._tokens(config.text_config), "image_embeds_position_mask": places}


def _spectrum(config: Any) -> A.Inputs:
    return {"input_features": torch.randn(2, 48, 16)}


def _spectrum_with_mask(config: Any) -> A.Inputs:
    return {"input_features": torch.randn(2, 16, 48), "input_features_mask": torch.ones(2, 48, dtype=torch.long)}


def _clip(config: Any) -> A.Inputs:
    return {"pixel_values_videos": torch.randn(2, 4, 3, 32, 32)}


def _speech_and_words(config: Any) -> A.Inputs:
    return {"input_values": torch.randn(2, 4000), "decoder_input_ids": make._tokens(config.decoder, 8)}


HELD_OUT: dict[str, A.Architecture] = {
    "jais2": A._decoder("Jais2ForCausalLM", "Jais2Config", A._LLAMA),
    "ministral3": A._decoder("Ministral3ForCausalLM", "Ministral3Config", _llama(head_dim=8)),
    "cpmant": A._decoder("CpmAntForCausalLM", "CpmAntConfig", {"vocab_size": 96, "hidden_size": 32, "num_attention_heads": 4, "dim_head": 8, "dim_ff": 64, "num_hidden_layers": 2, "prompt_length": 4, "segment_types": 4, "max_distance": 64, "position_bias_num_buckets": 16}),
    "youtu": A._decoder("YoutuForCausalLM", "YoutuConfig", _llama(**_LATENT)),
    "hyperclovax": A._decoder("HyperCLOVAXForCausalLM", "HyperCLOVAXConfig", A._LLAMA),
    "exaone_moe": A._moe("ExaoneMoeForCausalLM", "ExaoneMoeConfig", _llama(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, num_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)),
    "glm4_moe_lite": A._moe("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", _llama(**_LATENT, **_MOE, n_shared_experts=1, first_k_dense_replace=1, n_group=1, topk_group=1)),
    "mimo_v2_flash": A._moe("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig", _llama(head_dim=8, **_MOE)),
    "data2vec_text": A._encoder("Data2VecTextForMaskedLM", "Data2VecTextConfig", A._BERT),
    "esmc": A._encoder("EsmcForMaskedLM", "EsmcConfig", A._BERT),
    "mra": A._encoder("MraForMaskedLM", "MraConfig", A._BERT),
    "bigbird_pegasus": A._seq2seq("BigBirdPegasusForConditionalGeneration", "BigBirdPegasusConfig", {**A._BART, "attention_type": "original_full"}),
    "t5gemma": A._seq2seq("T5GemmaForConditionalGeneration", "T5GemmaConfig", {"encoder": _llama(head_dim=8, sliding_window=8), "decoder": _llama(head_dim=8, sliding_window=8), "vocab_size": 96}),
    "data2vec_vision": A._vision("Data2VecVisionForImageClassification", "Data2VecVisionConfig", A._VIT),
    "pixio": A._vision("PixioModel", "PixioConfig", A._VIT, labels=None),
    "vitpose_backbone": A._vision("VitPoseBackbone", "VitPoseBackboneConfig", {**A._VIT, "image_size": [32, 32], "patch_size": [8, 8], "out_features": ["stage2"]}, labels=None),
    "vjepa2": A._vision("VJEPA2Model", "VJEPA2Config", {**A._VIT, "crop_size": 32, "frames_per_clip": 4, "pred_hidden_size": 16, "pred_num_attention_heads": 2, "pred_num_hidden_layers": 1}, labels=None, inputs=_clip),
    "mgp_str": A._vision("MgpstrForSceneTextRecognition", "MgpstrConfig", {**A._VIT, "max_token_length": 5, "num_character_labels": 10, "num_bpe_labels": 20, "num_wordpiece_labels": 20, "image_size": [32, 32], "patch_size": 8}, labels=None),
    "rt_detr_resnet": A._vision("RTDetrResNetBackbone", "RTDetrResNetConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1]}, labels=None),
    "pp_lcnet_v3": A._vision("PPLCNetV3Backbone", "PPLCNetV3Config", {"scale": 0.25}, labels=None),
    "xclip": A._multimodal("XCLIPModel", "XCLIPConfig", {"text_config": A._BERT, "vision_config": {**A._VIT, "num_frames": 2, "mit_hidden_size": 32, "mit_intermediate_size": 64, "mit_num_attention_heads": 4}, "projection_dim": 32, "prompt_num_attention_heads": 4}, inputs=_frames_and_words),
    "kosmos2": A._multimodal("Kosmos2Model", "Kosmos2Config", {"text_config": {**A._TOKENS, "embed_dim": 32, "layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64}, "vision_config": A._VIT, "latent_query_num": 4}, inputs=_places_and_words, labels=None),
    "parakeet_ctc": A._audio("ParakeetForCTC", "ParakeetCTCConfig", {"vocab_size": 96, "encoder_config": {**A._TEXT, "intermediate_size": 64, "num_mel_bins": 16, "subsampling_conv_channels": 8, "max_position_embeddings": 64, "conv_kernel_size": 5}}, inputs=_spectrum),
    "lasr_ctc": A._audio("LasrForCTC", "LasrCTCConfig", {"vocab_size": 96, "encoder_config": {**A._TEXT, "intermediate_size": 64, "num_mel_bins": 16, "subsampling_conv_channels": 8, "max_position_embeddings": 64, "conv_kernel_size": 5}}, inputs=_spectrum),
    "audioflamingo3_encoder": A._audio("AudioFlamingo3Encoder", "AudioFlamingo3EncoderConfig", {"num_mel_bins": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "hidden_size": 32, "max_source_positions": 24}, inputs=_spectrum_with_mask),
    "csm_depth": A._decoder("CsmDepthDecoderForCausalLM", "CsmDepthDecoderConfig", A._LLAMA),
    "olmo_hybrid": A._state_space("OlmoHybridForCausalLM", "OlmoHybridConfig", _llama(layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)),
    "qwen3_5_text": A._state_space("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", _llama(head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)),
    "lilt": A._encoder("LiltModel", "LiltConfig", {**A._BERT, "hidden_size": 48, "max_2d_position_embeddings": 64, "channel_shrink_ratio": 2}, inputs=_text_with_boxes, labels=None),
    "aya_vision": A._multimodal("AyaVisionForConditionalGeneration", "AyaVisionConfig", _language_and_vision("llama", "siglip_vision_model", image_token_index=95, downsample_factor=2, adapter_layer_norm_eps=1e-6), inputs=_image_places_and_words, first_call_in_eager=True),
    "speech_encoder_decoder": A._audio("SpeechEncoderDecoderModel", "SpeechEncoderDecoderConfig", {"encoder": {"model_type": "wav2vec2", **A._SPEECH}, "decoder": {"model_type": "bert", **A._BERT, "is_decoder": True, "add_cross_attention": True}, "decoder_start_token_id": 1, "pad_token_id": 0}, inputs=_speech_and_words, labels=None),
    "blip_2": A._multimodal("Blip2ForConditionalGeneration", "Blip2Config", {"text_config": {"model_type": "opt", **A._TEXT, "ffn_dim": 64, "word_embed_proj_dim": 32, "max_position_embeddings": 64}, "vision_config": A._VIT, "qformer_config": {**A._BERT, "encoder_hidden_size": 32}, "num_query_tokens": 4, "image_token_index": 95}, inputs=_image_places_and_words, first_call_in_eager=True, labels=None),
}
# fmt: on
