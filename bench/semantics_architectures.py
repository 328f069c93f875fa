"""Architectures beyond those of the tests that patterns, and rules of the truth, were tuned with.

Those that no pattern ever saw stand in `semantics_held_out`.
"""
from __future__ import annotations

from typing import Any

import torch

from tests.models import architectures as A
from tests.models import inputs as make

# ruff: noqa: E501
# fmt: off
_T5 = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0}
_GPT2 = {**A._TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
_MOE = {"moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
_LATENT = {"num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_TWO_TOWERS = {"text_config": A._BERT, "vision_config": A._VIT, "projection_dim": 16}


def _llama(**options: Any) -> dict[str, Any]:
    return {**A._LLAMA, **options}


def _language_and_vision(text: str, vision: str, **options: Any) -> dict[str, Any]:
    return {"text_config": {"model_type": text, **A._LLAMA}, "vision_config": {"model_type": vision, **A._VIT}, **options}


def _image_and_target(config: Any) -> A.Inputs:
    return make.image(config.encoder) | {"decoder_input_ids": make._tokens(config.decoder, 8)}


def _image_and_words(config: Any) -> A.Inputs:
    return make.text(config) | make.image(config)


def _video(config: Any) -> A.Inputs:
    return {"pixel_values": torch.randn(2, config.num_frames, 3, 32, 32)}


def _speech_and_target(config: Any) -> A.Inputs:
    return {"input_features": torch.randn(2, 40, config.input_feat_per_channel), "decoder_input_ids": make._tokens(config, 8)}


def _speech_features(config: Any) -> A.Inputs:
    return {"input_features": torch.randn(2, 24, config.feature_projection_input_dim)}


def _waveform_and_target(config: Any) -> A.Inputs:
    return {"input_values": torch.randn(2, 4000), "decoder_input_ids": make._tokens(config, 8)}


def _sound_and_text(config: Any) -> A.Inputs:
    return {"input_features": torch.randn(2, 1, 64, 64), **make.text(config.text_config)}


def _regions_and_text(config: Any) -> A.Inputs:
    """Vectors of five regions of an image, made elsewhere."""
    return make.text(config) | {
        "visual_embeds": torch.randn(2, 5, config.visual_embedding_dim), "visual_attention_mask": torch.ones(2, 5),
        "visual_token_type_ids": torch.ones(2, 5, dtype=torch.long)}


def _boxes_and_text(config: Any) -> A.Inputs:
    return make.text(config) | {"visual_feats": torch.randn(2, 5, config.visual_feat_dim), "visual_pos": torch.rand(2, 5, 4)}


def _text_with_boxes(config: Any) -> A.Inputs:
    return make.text(config) | {"bbox": torch.randint(0, 50, (2, 12, 4)).sort(-1).values}


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


TUNED: dict[str, A.Architecture] = {
    # held out in the first release of the patterns
    "gptj": A._decoder("GPTJForCausalLM", "GPTJConfig", {**A._TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "codegen": A._decoder("CodeGenForCausalLM", "CodeGenConfig", {**A._TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 64}),
    "mpt": A._decoder("MptForCausalLM", "MptConfig", {**A._TOKENS, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64}),
    "stablelm": A._decoder("StableLmForCausalLM", "StableLmConfig", A._LLAMA),
    "cohere": A._decoder("CohereForCausalLM", "CohereConfig", A._LLAMA),
    "starcoder2": A._decoder("Starcoder2ForCausalLM", "Starcoder2Config", A._LLAMA),
    "phi": A._decoder("PhiForCausalLM", "PhiConfig", A._LLAMA),
    "granite": A._decoder("GraniteForCausalLM", "GraniteConfig", A._LLAMA),
    "olmo2": A._decoder("Olmo2ForCausalLM", "Olmo2Config", A._LLAMA),
    "glm": A._decoder("GlmForCausalLM", "GlmConfig", {**A._LLAMA, "head_dim": 8}),
    "gpt_bigcode": A._decoder("GPTBigCodeForCausalLM", "GPTBigCodeConfig", {**A._TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "xglm": A._decoder("XGLMForCausalLM", "XGLMConfig", {**A._TOKENS, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 64, "max_position_embeddings": 64}),
    "deepseek_v3": A._moe("DeepseekV3ForCausalLM", "DeepseekV3Config", {**A._LLAMA, "num_key_value_heads": 4, "moe_intermediate_size": 16, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 16, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}),
    "qwen2_moe": A._moe("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**A._MOE, "shared_expert_intermediate_size": 32}),
    "camembert": A._encoder("CamembertForMaskedLM", "CamembertConfig", A._BERT),
    "mpnet": A._encoder("MPNetForMaskedLM", "MPNetConfig", A._BERT),
    "ernie": A._encoder("ErnieForMaskedLM", "ErnieConfig", A._BERT),
    "conv_bert": A._encoder("ConvBertForMaskedLM", "ConvBertConfig", A._BERT),
    "pegasus": A._seq2seq("PegasusForConditionalGeneration", "PegasusConfig", A._BART),
    "mbart": A._seq2seq("MBartForConditionalGeneration", "MBartConfig", A._BART),
    "deit": A._vision("DeiTForImageClassification", "DeiTConfig", A._VIT),
    "beit": A._vision("BeitForImageClassification", "BeitConfig", A._VIT),
    "convnextv2": A._vision("ConvNextV2ForImageClassification", "ConvNextV2Config", {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1]}),
    "regnet": A._vision("RegNetForImageClassification", "RegNetConfig", {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [1, 1], "groups_width": 8}),
    "pvt_v2": A._vision("PvtV2ForImageClassification", "PvtV2Config", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}),
    "wavlm": A._audio("WavLMModel", "WavLMConfig", A._SPEECH),
    "data2vec_audio": A._audio("Data2VecAudioModel", "Data2VecAudioConfig", A._SPEECH),
    "falcon_mamba": A._state_space("FalconMambaForCausalLM", "FalconMambaConfig", {**A._TOKENS, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "use_mambapy": False}),
    "chinese_clip": A._multimodal("ChineseCLIPModel", "ChineseCLIPConfig", {"text_config": A._BERT, "vision_config": A._VIT, "projection_dim": 16}, inputs=make.image_and_text),
    # found by looking at them
    "openai_gpt": A._decoder("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", _GPT2, breaks_in_training=True),
    "nemotron": A._decoder("NemotronForCausalLM", "NemotronConfig", A._LLAMA),
    "bitnet": A._decoder("BitNetForCausalLM", "BitNetConfig", A._LLAMA),
    "cohere2": A._decoder("Cohere2ForCausalLM", "Cohere2Config", _llama(sliding_window=8)),
    "deepseek_v2": A._moe("DeepseekV2ForCausalLM", "DeepseekV2Config", _llama(num_key_value_heads=4, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)),
    "glm4_moe": A._moe("Glm4MoeForCausalLM", "Glm4MoeConfig", _llama(head_dim=8, moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)),
    "xlm": A._encoder("XLMWithLMHeadModel", "XLMConfig", {**A._TOKENS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    "nomic_bert": A._encoder("NomicBertForMaskedLM", "NomicBertConfig", A._BERT),
    "mt5": A._seq2seq("MT5ForConditionalGeneration", "MT5Config", _T5),
    "umt5": A._seq2seq("UMT5ForConditionalGeneration", "UMT5Config", _T5),
    "plbart": A._seq2seq("PLBartForConditionalGeneration", "PLBartConfig", A._BART),
    "yolos": A._vision("YolosForObjectDetection", "YolosConfig", {**A._VIT, "image_size": [32, 32], "num_detection_tokens": 5}, labels=None),
    "swinv2": A._vision("Swinv2ForImageClassification", "Swinv2Config", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "mobilenet_v1": A._vision("MobileNetV1ForImageClassification", "MobileNetV1Config", {"depth_multiplier": 0.25, "image_size": 32, "min_depth": 8}),
    "mobilevit": A._vision("MobileViTForImageClassification", "MobileViTConfig", {"image_size": 64, "hidden_sizes": [16, 24, 32], "neck_hidden_sizes": [8, 8, 16, 16, 24, 24, 32], "num_attention_heads": 4}),
    "poolformer": A._vision("PoolFormerForImageClassification", "PoolFormerConfig", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}),
    "dinov3": A._vision("DINOv3ViTModel", "DINOv3ViTConfig", A._VIT, labels=None),
    "upernet": A._vision("UperNetForSemanticSegmentation", "UperNetConfig", {"hidden_size": 16, "use_auxiliary_head": False, "pool_scales": [1, 2], "backbone_config": {"model_type": "convnext", "hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1], "out_features": ["stage1", "stage2", "stage3", "stage4"]}}, labels=None),
    "timesformer": A._vision("TimesformerForVideoClassification", "TimesformerConfig", {**A._VIT, "num_frames": 2}, inputs=_video),
    "depth_anything": A._vision("DepthAnythingForDepthEstimation", "DepthAnythingConfig", {"reassemble_hidden_size": 32, "patch_size": 8, "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16, "head_hidden_size": 8, "backbone_config": {"model_type": "dinov2",**A._VIT, "num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"], "reshape_hidden_states": False}}, labels=None),
    "speech_to_text": A._audio("Speech2TextForConditionalGeneration", "Speech2TextConfig", {**A._BART, "input_feat_per_channel": 16, "conv_channels": 32, "max_source_positions": 60, "max_target_positions": 32}, inputs=_speech_and_target),
    "wav2vec2_conformer": A._audio("Wav2Vec2ConformerModel", "Wav2Vec2ConformerConfig", A._SPEECH),
    "metaclip_2": A._multimodal("MetaClip2Model", "MetaClip2Config", _TWO_TOWERS, inputs=make.image_and_text),
    "groupvit": A._multimodal("GroupViTModel", "GroupViTConfig", {"text_config": A._BERT, "vision_config": {**A._VIT, "depths": [1, 1, 1], "num_group_tokens": [4, 2, 0], "num_output_groups": [4, 2, 0]}, "projection_dim": 16, "projection_intermediate_dim": 32}, inputs=make.image_and_text),
    "git": A._multimodal("GitForCausalLM", "GitConfig", {**A._BERT, "vision_config": A._VIT}, inputs=_image_and_words),
    "lxmert": A._multimodal("LxmertModel", "LxmertConfig", {**A._BERT, "l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 16}, inputs=_boxes_and_text, labels=None),
    "trocr": A._multimodal("VisionEncoderDecoderModel", "VisionEncoderDecoderConfig", {"encoder": {"model_type": "vit",**A._VIT}, "decoder": {"model_type": "trocr",**A._BART, "decoder_layers": 2, "is_decoder": True, "add_cross_attention": True}, "decoder_start_token_id": 1, "pad_token_id": 0}, inputs=_image_and_target, labels=None),
    "falcon_h1": A._state_space("FalconH1ForCausalLM", "FalconH1Config", _llama(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8)),
    "gemma3": A._decoder("Gemma3ForCausalLM", "Gemma3TextConfig", _llama(head_dim=8, sliding_window=8)),
    "qwen2": A._decoder("Qwen2ForCausalLM", "Qwen2Config", A._LLAMA),
    "biogpt": A._decoder("BioGptForCausalLM", "BioGptConfig", A._BERT),
    "exaone4": A._decoder("Exaone4ForCausalLM", "Exaone4Config", _llama(sliding_window=8, sliding_window_pattern=2)),
    "glm4": A._decoder("Glm4ForCausalLM", "Glm4Config", _llama(head_dim=8)),
    "nanochat": A._decoder("NanoChatForCausalLM", "NanoChatConfig", A._LLAMA),
    "granitemoe": A._moe("GraniteMoeForCausalLM", "GraniteMoeConfig", _llama(num_local_experts=4, num_experts_per_tok=2)),
    "jetmoe": A._moe("JetMoeForCausalLM", "JetMoeConfig", {**A._TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_key_value_heads": 2, "kv_channels": 8, "intermediate_size": 64, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "layoutlm": A._encoder("LayoutLMForMaskedLM", "LayoutLMConfig", {**A._BERT, "max_2d_position_embeddings": 64}, inputs=_text_with_boxes),
    "mobilebert": A._encoder("MobileBertForMaskedLM", "MobileBertConfig", {**A._BERT, "embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16}),
    "nystromformer": A._encoder("NystromformerForMaskedLM", "NystromformerConfig", A._BERT),
    "roformer": A._encoder("RoFormerForMaskedLM", "RoFormerConfig", A._BERT),
    "xlnet": A._encoder("XLNetLMHeadModel", "XLNetConfig", {**A._TOKENS, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 64}),
    "megatron_bert": A._encoder("MegatronBertForMaskedLM", "MegatronBertConfig", A._BERT),
    "esm": A._encoder("EsmForMaskedLM", "EsmConfig", {**A._BERT, "position_embedding_type": "rotary", "mask_token_id": 5}),
    "m2m_100": A._seq2seq("M2M100ForConditionalGeneration", "M2M100Config", A._BART),
    "blenderbot": A._seq2seq("BlenderbotForConditionalGeneration", "BlenderbotConfig", A._BART),
    "prophetnet": A._seq2seq("ProphetNetForConditionalGeneration", "ProphetNetConfig", {**A._TOKENS, "hidden_size": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_encoder_layers": 1, "num_decoder_layers": 1, "num_encoder_attention_heads": 4, "num_decoder_attention_heads": 4, "max_position_embeddings": 64, "decoder_start_token_id": 1}),
    "efficientnet": A._vision("EfficientNetForImageClassification", "EfficientNetConfig", {"image_size": 64, "width_coefficient": 0.25, "depth_coefficient": 0.3, "hidden_dim": 320}),
    "dpt": A._vision("DPTForDepthEstimation", "DPTConfig", {**A._VIT, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3], "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16, "reassemble_factors": [4, 2, 1, 0.5]}, labels=None, first_call_in_eager=True),
    "ijepa": A._vision("IJepaForImageClassification", "IJepaConfig", A._VIT),
    "swiftformer": A._vision("SwiftFormerForImageClassification", "SwiftFormerConfig", {"image_size": 64, "embed_dims": [16, 24, 32, 48], "depths": [1, 1, 1, 1]}),
    "hgnet_v2": A._vision("HGNetV2ForImageClassification", "HGNetV2Config", {"embedding_size": 16}),
    "owlvit": A._multimodal("OwlViTModel", "OwlViTConfig", _TWO_TOWERS, inputs=make.image_and_text),
    "persimmon": A._decoder("PersimmonForCausalLM", "PersimmonConfig", _llama(num_key_value_heads=4)),
    "smollm3": A._decoder("SmolLM3ForCausalLM", "SmolLM3Config", A._LLAMA),
    "helium": A._decoder("HeliumForCausalLM", "HeliumConfig", _llama(head_dim=8)),
    "ernie4_5": A._decoder("Ernie4_5ForCausalLM", "Ernie4_5Config", _llama(head_dim=8)),
    "arcee": A._decoder("ArceeForCausalLM", "ArceeConfig", A._LLAMA),
    "phimoe": A._moe("PhimoeForCausalLM", "PhimoeConfig", _llama(num_local_experts=4, num_experts_per_tok=2)),
    "ernie4_5_moe": A._moe("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig", _llama(moe_num_experts=4, moe_k=2, moe_intermediate_size=16, moe_layer_start_index=1, moe_num_shared_experts=1)),
    "minimax": A._moe("MiniMaxForCausalLM", "MiniMaxConfig", _llama(num_local_experts=4, num_experts_per_tok=2, head_dim=8)),
    "rembert": A._encoder("RemBertForMaskedLM", "RemBertConfig", {**A._BERT, "input_embedding_size": 16, "output_embedding_size": 16}),
    "squeezebert": A._encoder("SqueezeBertForMaskedLM", "SqueezeBertConfig", {**A._BERT, "embedding_size": 32}),
    "ibert": A._encoder("IBertForMaskedLM", "IBertConfig", A._BERT),
    "deberta": A._encoder("DebertaForMaskedLM", "DebertaConfig", {**A._BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"]}),
    "pvt": A._vision("PvtForImageClassification", "PvtConfig", {"image_size": 32, "num_encoder_blocks": 2, "depths": [1, 1], "sequence_reduction_ratios": [2, 1], "hidden_sizes": [16, 32], "patch_sizes": [4, 2], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]}),
    "bit": A._vision("BitForImageClassification", "BitConfig", {"embedding_size": 16, "hidden_sizes": [32, 64], "depths": [1, 1], "num_groups": 8}),
    "vit_msn": A._vision("ViTMSNForImageClassification", "ViTMSNConfig", A._VIT),
    "dinov2_reg": A._vision("Dinov2WithRegistersForImageClassification", "Dinov2WithRegistersConfig", {**A._VIT, "mlp_ratio": 2}),
    "textnet": A._vision("TextNetForImageClassification", "TextNetConfig", {"image_size": [64, 64]}),
    "glpn": A._vision("GLPNForDepthEstimation", "GLPNConfig", {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 16, 24, 32], "num_attention_heads": [1, 2, 2, 4], "decoder_hidden_size": 16}, labels=None),
    "unispeech": A._audio("UniSpeechModel", "UniSpeechConfig", A._SPEECH),
    "unispeech_sat": A._audio("UniSpeechSatModel", "UniSpeechSatConfig", A._SPEECH),
    "clipseg": A._multimodal("CLIPSegModel", "CLIPSegConfig", _TWO_TOWERS, inputs=make.image_and_text),
    "vipllava": A._multimodal("VipLlavaForConditionalGeneration", "VipLlavaConfig",_language_and_vision("llama", "clip_vision_model", image_token_index=95, image_seq_length=16, vision_feature_layers=[-1, -2]), inputs=make.text_with_image_tokens, first_call_in_eager=True),
    "clap": A._multimodal("ClapModel", "ClapConfig", {"text_config": A._BERT, "audio_config": {"patch_embeds_hidden_size": 16, "spec_size": 64, "num_mel_bins": 64, "window_size": 4, "depths": [1, 1], "num_attention_heads": [2, 4], "hidden_size": 32, "projection_dim": 16, "enable_fusion": False}, "projection_dim": 16}, inputs=_sound_and_text, labels=None),
    "rwkv": A._state_space("RwkvForCausalLM", "RwkvConfig", {**A._TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32, "intermediate_size": 64}),
    "jamba": A._state_space("JambaForCausalLM", "JambaConfig", _llama(num_hidden_layers=4, num_experts=1, attn_layer_period=2, attn_layer_offset=1, mamba_d_state=4, use_mamba_kernels=False, mamba_dt_rank=2)),
    "lfm2": A._decoder("Lfm2ForCausalLM", "Lfm2Config", _llama(layer_types=["conv", "full_attention"])),
    "fnet": A._encoder("FNetForMaskedLM", "FNetConfig", A._BERT),
    "gemma": A._decoder("GemmaForCausalLM", "GemmaConfig", _llama(head_dim=8)),
    "gpt_neo": A._decoder("GPTNeoForCausalLM", "GPTNeoConfig", {**A._TOKENS, "hidden_size": 32, "num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]], "max_position_embeddings": 64, "window_size": 8}),
    "olmo": A._decoder("OlmoForCausalLM", "OlmoConfig", A._LLAMA),
    "diffllama": A._decoder("DiffLlamaForCausalLM", "DiffLlamaConfig", _llama(num_key_value_heads=4)),
    "seed_oss": A._decoder("SeedOssForCausalLM", "SeedOssConfig", _llama(head_dim=8)),
    "hunyuan": A._decoder("HunYuanDenseV1ForCausalLM", "HunYuanDenseV1Config", _llama(head_dim=8)),
    "minicpm3": A._decoder("MiniCPM3ForCausalLM", "MiniCPM3Config", _llama(num_key_value_heads=4, q_lora_rank=16, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)),
    "doge": A._decoder("DogeForCausalLM", "DogeConfig", A._LLAMA),
    "flex_olmo": A._moe("FlexOlmoForCausalLM", "FlexOlmoConfig", _llama(num_experts=4, num_experts_per_tok=2)),
    "dots1": A._moe("Dots1ForCausalLM", "Dots1Config", _llama(moe_intermediate_size=16, n_routed_experts=8, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=1, n_shared_experts=1)),
    "xlm_roberta": A._encoder("XLMRobertaForMaskedLM", "XLMRobertaConfig", A._BERT),
    "flaubert": A._encoder("FlaubertWithLMHeadModel", "FlaubertConfig", {**A._TOKENS, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "max_position_embeddings": 64}),
    "eurobert": A._encoder("EuroBertForMaskedLM", "EuroBertConfig", A._LLAMA),
    "longt5": A._seq2seq("LongT5ForConditionalGeneration", "LongT5Config", {**_T5, "local_radius": 3}),
    "focalnet": A._vision("FocalNetForImageClassification", "FocalNetConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [1, 1], "hidden_sizes": [16, 32], "focal_levels": [2, 2], "focal_windows": [3, 3]}),
    "conditional_detr": A._vision("ConditionalDetrModel", "ConditionalDetrConfig", A.ARCHITECTURES["detr"].options, labels=None),
    "videomae": A._vision("VideoMAEForVideoClassification", "VideoMAEConfig", {**A._VIT, "num_frames": 4}, inputs=_video),
    "sew": A._audio("SEWModel", "SEWConfig", {**A._SPEECH, "squeeze_factor": 2}),
    "wav2vec2_bert": A._audio("Wav2Vec2BertModel", "Wav2Vec2BertConfig", {**A._BERT, "feature_projection_input_dim": 16}, inputs=_speech_features),
    "moonshine": A._audio("MoonshineForConditionalGeneration", "MoonshineConfig", {**A._TOKENS, "hidden_size": 32, "intermediate_size": 64, "encoder_num_hidden_layers": 1, "decoder_num_hidden_layers": 1, "encoder_num_attention_heads": 4, "decoder_num_attention_heads": 4, "decoder_start_token_id": 1}, inputs=_waveform_and_target),
    "altclip": A._multimodal("AltCLIPModel", "AltCLIPConfig", {**_TWO_TOWERS, "text_config": {**A._BERT, "project_dim": 16}}, inputs=make.image_and_text),
    "visual_bert": A._multimodal("VisualBertModel", "VisualBertConfig", {**A._BERT, "visual_embedding_dim": 16}, inputs=_regions_and_text, labels=None),
    "bamba": A._state_space("BambaForCausalLM", "BambaConfig", _llama(num_hidden_layers=2, attn_layer_indices=[1], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=1)),
    "qwen3_next": A._moe("Qwen3NextForCausalLM", "Qwen3NextConfig", _llama(head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16, layer_types=["linear_attention", "full_attention"], linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8)),
    "aimv2": A._multimodal("Aimv2Model", "Aimv2Config", {"text_config": {**A._TEXT, "intermediate_size": 64, "max_position_embeddings": 64}, "vision_config": A._VIT, "projection_dim": 16}, inputs=make.image_and_text, labels=None),
    "bert_generation": A._encoder("BertGenerationEncoder", "BertGenerationConfig", A._BERT, labels=None),
    "dinov3_convnext": A._vision("DINOv3ConvNextModel", "DINOv3ConvNextConfig", {"hidden_sizes": [8, 16, 24, 32], "depths": [1, 1, 1, 1]}, labels=None),
    "dpr": A._encoder("DPRQuestionEncoder", "DPRConfig", {**A._BERT, "projection_dim": 16}, labels=None),
    "funnel": A._encoder("FunnelForMaskedLM", "FunnelConfig", {"vocab_size": 96, "block_sizes": [1, 1], "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 64, "num_decoder_layers": 1}),
    "gemma3n": A._decoder("Gemma3nForCausalLM", "Gemma3nTextConfig", _llama(head_dim=8, vocab_size_per_layer_input=96, hidden_size_per_layer_input=8, num_kv_shared_layers=0, laurel_rank=4, intermediate_size=[64, 64], layer_types=["sliding_attention", "full_attention"], activation_sparsity_pattern=[0.0, 0.0], sliding_window=8)),
    "gte": A._encoder("GteForMaskedLM", "GteConfig", A._BERT),
    "jina_embeddings_v3": A._encoder("JinaEmbeddingsV3ForMaskedLM", "JinaEmbeddingsV3Config", A._BERT),
    "lfm2_moe": A._moe("Lfm2MoeForCausalLM", "Lfm2MoeConfig", _llama(layer_types=["conv", "full_attention"], num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, num_dense_layers=1)),
    "llama4": A._moe("Llama4ForCausalLM", "Llama4TextConfig", _llama(head_dim=8, intermediate_size_mlp=64, num_local_experts=4, num_experts_per_tok=1, interleave_moe_layer_step=2, attention_chunk_size=8)),
    "markuplm": A._encoder("MarkupLMModel", "MarkupLMConfig", {**A._BERT, "max_depth": 4, "max_xpath_tag_unit_embeddings": 20, "max_xpath_subs_unit_embeddings": 20, "tag_pad_id": 19, "subs_pad_id": 19, "xpath_unit_hidden_size": 8}, labels=None),
    "ministral": A._decoder("MinistralForCausalLM", "MinistralConfig", _llama(head_dim=8, sliding_window=8)),
    "nemotron_h": A._state_space("NemotronHForCausalLM", "NemotronHConfig", _llama(num_hidden_layers=3, layers_block_type=["mamba", "attention", "moe"], ssm_state_size=8, mamba_num_heads=4, mamba_head_dim=16, n_groups=1, chunk_size=8, head_dim=8, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, moe_shared_expert_intermediate_size=16, n_group=1, topk_group=1)),
    "owlv2": A._multimodal("Owlv2Model", "Owlv2Config", _TWO_TOWERS, inputs=make.image_and_text),
    "pp_lcnet": A._vision("PPLCNetForImageClassification", "PPLCNetConfig", {"scale": 0.25}),
    "roc_bert": A._encoder("RoCBertForMaskedLM", "RoCBertConfig", {**A._BERT, "shape_vocab_size": 20, "pronunciation_vocab_size": 20, "pronunciation_embed_dim": 8, "shape_embed_dim": 8}),
    "wav2vec2_stable": A._audio("Wav2Vec2ForCTC", "Wav2Vec2Config", {**A._SPEECH, "do_stable_layer_norm": True, "feat_extract_norm": "layer"}),
    "sew_d": A._audio("SEWDModel", "SEWDConfig", {**A._SPEECH, "squeeze_factor": 2, "position_buckets": 16, "max_position_embeddings": 64}),
    "splinter": A._encoder("SplinterModel", "SplinterConfig", A._BERT, labels=None),
    "swin2sr": A._vision("Swin2SRForImageSuperResolution", "Swin2SRConfig", {"image_size": 16, "embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 4, "upscale": 2}, labels=None),
    "table_transformer": A._vision("TableTransformerModel", "TableTransformerConfig", A.ARCHITECTURES["detr"].options, labels=None),
    "tapas": A._encoder("TapasModel", "TapasConfig", {**A._BERT, "type_vocab_sizes": [3, 8, 8, 2, 8, 8, 4]}, labels=None),
    "vit_mae": A._vision("ViTMAEModel", "ViTMAEConfig", {**A._VIT, "mask_ratio": 0.0}, labels=None),
    "vivit": A._vision("VivitForVideoClassification", "VivitConfig", {**A._VIT, "num_frames": 4, "tubelet_size": [2, 8, 8]}, inputs=_video),
    "xlm_roberta_xl": A._encoder("XLMRobertaXLForMaskedLM", "XLMRobertaXLConfig", A._BERT),
    "zoedepth": A._vision("ZoeDepthForDepthEstimation", "ZoeDepthConfig", {"reassemble_factors": [4, 2, 1, 0.5], "neck_hidden_sizes": [8, 16, 24, 32], "fusion_hidden_size": 16, "bottleneck_features": 16, "num_relative_features": 8, "backbone_config": {"model_type": "beit", **A._VIT, "num_hidden_layers": 4, "out_features": ["stage1", "stage2", "stage3", "stage4"], "reshape_hidden_states": False, "use_relative_position_bias": True}}, labels=None),
    # held out until the rules were mended because of some of them
    "afmoe": A._moe("AfmoeForCausalLM", "AfmoeConfig", _llama(head_dim=8, moe_intermediate_size=16, num_experts=4, num_experts_per_tok=2, num_dense_layers=1, sliding_window=8)),
    "apertus": A._decoder("ApertusForCausalLM", "ApertusConfig", A._LLAMA),
    "big_bird": A._encoder("BigBirdForMaskedLM", "BigBirdConfig", {**A._BERT, "attention_type": "original_full"}),
    "blenderbot_small": A._seq2seq("BlenderbotSmallForConditionalGeneration", "BlenderbotSmallConfig", A._BART),
    "canine": A._encoder("CanineModel", "CanineConfig", {**A._BERT, "num_hash_functions": 2, "num_hash_buckets": 32, "local_transformer_stride": 8, "downsampling_rate": 4, "upsampling_kernel_size": 4}, labels=None),
    "cwm": A._decoder("CwmForCausalLM", "CwmConfig", _llama(head_dim=8, sliding_window=8, layer_types=["sliding_attention", "full_attention"])),
    "donut_swin": A._vision("DonutSwinForImageClassification", "DonutSwinConfig", {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4}),
    "fsmt": A._seq2seq("FSMTForConditionalGeneration", "FSMTConfig", {**A._BART, "langs": ["en", "de"], "src_vocab_size": 96, "tgt_vocab_size": 96}, breaks_in_training=True),
    "gpt_neox_japanese": A._decoder("GPTNeoXJapaneseForCausalLM", "GPTNeoXJapaneseConfig", {**A._TEXT, "intermediate_multiple_size": 2, "max_position_embeddings": 64}),
    "granitemoehybrid": A._state_space("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", _llama(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32, layer_types=["mamba", "attention"], mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, mamba_chunk_size=8, mamba_n_groups=1)),
    "granitemoeshared": A._moe("GraniteMoeSharedForCausalLM", "GraniteMoeSharedConfig", _llama(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32)),
    "hunyuan_moe": A._moe("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config", _llama(head_dim=8, num_experts=4, moe_topk=2, moe_intermediate_size=16, num_shared_expert=1)),
    "imagegpt": A._decoder("ImageGPTForCausalImageModeling", "ImageGPTConfig", {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "luke": A._encoder("LukeModel", "LukeConfig", {**A._BERT, "entity_vocab_size": 20, "entity_emb_size": 16}, labels=None),
    "minimax_m2": A._moe("MiniMaxM2ForCausalLM", "MiniMaxM2Config", _llama(head_dim=8, num_local_experts=4, num_experts_per_tok=2)),
    "mlcd": A._vision("MLCDVisionModel", "MLCDVisionConfig", A._VIT, labels=None),
    "modernbert_decoder": A._decoder("ModernBertDecoderForCausalLM", "ModernBertDecoderConfig", {**A._BERT, "local_attention": 8, "global_attn_every_n_layers": 2, "cls_token_id": 1, "sep_token_id": 2}),
    "mvp": A._seq2seq("MvpForConditionalGeneration", "MvpConfig", A._BART),
    "olmo3": A._decoder("Olmo3ForCausalLM", "Olmo3Config", _llama(sliding_window=8)),
    "parakeet": A._audio("ParakeetEncoder", "ParakeetEncoderConfig", {**A._TEXT, "intermediate_size": 64, "num_mel_bins": 16, "subsampling_conv_channels": 8, "max_position_embeddings": 64, "conv_kernel_size": 5}, inputs=lambda c: {"input_features": torch.randn(2, 48, 16)}),
    "pegasus_x": A._seq2seq("PegasusXForConditionalGeneration", "PegasusXConfig", {**A._BART, "block_size": 4, "num_global_tokens": 2}),
    "roberta_prelayernorm": A._encoder("RobertaPreLayerNormForMaskedLM", "RobertaPreLayerNormConfig", A._BERT),
    "flava": A._multimodal("FlavaModel", "FlavaConfig", {"text_config": A._BERT, "image_config": A._VIT, "multimodal_config": {**A._VIT, "num_hidden_layers": 1}, "hidden_size": 32, "projection_dim": 16}, inputs=make.image_and_text, labels=None),
    "solar_open": A._moe("SolarOpenForCausalLM", "SolarOpenConfig", _llama(head_dim=8, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1)),
    "speecht5": A._audio("SpeechT5ForSpeechToText", "SpeechT5Config", {**A._SPEECH, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "decoder_start_token_id": 1, "mask_feature_prob": 0.0}, inputs=_waveform_and_target),
    "vaultgemma": A._decoder("VaultGemmaForCausalLM", "VaultGemmaConfig", _llama(head_dim=8, sliding_window=8)),
    "vision_text_dual": A._multimodal("VisionTextDualEncoderModel", "VisionTextDualEncoderConfig", {"vision_config": {"model_type": "vit", **A._VIT}, "text_config": {"model_type": "bert", **A._BERT}, "projection_dim": 16}, inputs=make.image_and_text),
    "vitdet": A._vision("VitDetModel", "VitDetConfig", {**A._VIT, "window_size": 2, "window_block_indices": [0]}, labels=None),
    "yoso": A._encoder("YosoForMaskedLM", "YosoConfig", {**A._BERT, "use_expectation": True, "hash_code_len": 4, "num_hash": 4}),
    "zamba2": A._state_space("Zamba2ForCausalLM", "Zamba2Config", {**A._TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 64, "mamba_d_state": 8, "mamba_ngroups": 1, "n_mamba_heads": 4, "mamba_headdim": 16, "layers_block_type": ["mamba", "hybrid"], "chunk_size": 8, "max_position_embeddings": 64}),
    # the second group that was held out, until it was looked at
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
