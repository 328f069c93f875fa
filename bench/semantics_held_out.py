"""Architectures that no pattern was written or tuned with: what accuracy is worth elsewhere.

A pattern that is changed because of one of these makes it an ordinary one: move it to tests/models/architectures.py
and put another here.
"""
from __future__ import annotations

from tests.models import architectures as A
from tests.models import inputs as make

# ruff: noqa: E501
# fmt: off
HELD_OUT: dict[str, A.Architecture] = {
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
}
# fmt: on
