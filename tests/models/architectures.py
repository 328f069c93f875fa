"""Tiny models of many architectures, built from configurations alone: random weights, no hub, no network.

    model, inputs = build("llama")                   # eval mode, keyword arguments of forward
    model, inputs = build("llama", training=True)    # train mode; the inputs hold labels where the model takes them
    loss = loss_of(model(**inputs))

The classes are those of `transformers`; the sizes are the smallest that keep the shape of the architecture. Weights
and inputs depend on nothing but the name.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from tests.models import inputs as make

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """How to make one model.

    Fields:  kind: decoder, encoder, seq2seq, vision, multimodal, audio, moe or state_space.
             model, config: names of classes of `transformers`.  options: of the configuration; a nested configuration
             is a dict.  inputs: makes the arguments of forward from the configuration.  labels: makes those of
             training from the inputs; None where the model computes no loss (see `loss_of`).
             custom_ops: namespaces of ops that are not torch's own and that the graph may hold.
             frozen: a submodule that does not learn, as in fine-tuning.
             breaks_in_training: forward with labels cannot be one graph (a log line, a branch on data).
             first_call_in_eager: the class sets itself up in its first call, in a way that Dynamo cannot trace.
    """

    kind: str
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[Any], Inputs] = make.text
    labels: Callable[[Any, Inputs], Inputs] | None = None
    custom_ops: tuple[str, ...] = ()
    frozen: str | None = None
    breaks_in_training: bool = False
    first_call_in_eager: bool = False


def build(name: str, *, training: bool = False) -> tuple[nn.Module, Inputs]:
    """The model of an architecture with reproducible weights, and the keyword arguments of one forward call.

    Raises: KeyError for a name that `ARCHITECTURES` does not have.
    """
    import transformers

    architecture = ARCHITECTURES[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(zlib.crc32(name.encode()))
        config = getattr(transformers, architecture.config)(**architecture.options)
        model = getattr(transformers, architecture.model)(config).train(training)
        _spread_weights(model)
        if architecture.frozen is not None:
            model.get_submodule(architecture.frozen)._freeze_parameters()
        inputs = architecture.inputs(config)
        if training and architecture.labels is not None:
            inputs |= architecture.labels(config, inputs)
        if architecture.first_call_in_eager:
            with torch.no_grad():
                model(**inputs)
    return model, inputs


def loss_of(outputs: Any) -> Tensor:
    """The model's own loss; where it has none, a sum of every floating point output with weights of both signs.

    (A mean square would not do: many outputs are normalised, and it would be a constant without gradients.)
    """
    loss = getattr(outputs, "loss", None)
    if loss is not None:
        return loss  # type: ignore[no-any-return]
    flat = torch.cat([out.float().flatten() for out in output_tensors(outputs)])
    return (flat * torch.arange(flat.numel()).cos()).sum()


def output_tensors(outputs: Any) -> list[Tensor]:
    """The floating point tensors of a model's output in order, with those of a cache that it returns."""
    found: list[Any] = []
    for value in outputs.values():
        found += value if isinstance(value, (tuple, list)) else [value]
        for layer in getattr(value, "layers", ()):
            found += vars(layer).values()
    return [item for item in found if isinstance(item, Tensor) and item.is_floating_point()]


def _spread_weights(model: nn.Module) -> None:
    """Some classes start with zeros or with a spread of 0.02: a wrong result would hide in outputs near zero."""
    with torch.no_grad():
        for parameter in model.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 0
            if fan_in and parameter.std() < (std := max(0.05, fan_in**-0.5)):
                nn.init.normal_(parameter, std=std)


_TOKENS = {"vocab_size": 96, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_TEXT = {**_TOKENS, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_LLAMA = {**_TEXT, "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 64}
_BERT = {**_TEXT, "intermediate_size": 64, "max_position_embeddings": 64}
# fmt: off
_BART = {
    **_TOKENS, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "max_position_embeddings": 64,
    "decoder_start_token_id": 1,
}
_VIT = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64, "image_size": 32,
    "patch_size": 8,
}
_SPEECH = {
    **_BERT, "conv_dim": (16, 16, 16), "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2),
    "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4,
    "layerdrop": 0.0, "apply_spec_augment": False, "mask_time_prob": 0.0,
}
# fmt: on
_MOE = {**_LLAMA, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}


def _architecture(
    kind: str,
    model: str,
    config: str,
    options: dict[str, Any],
    *,
    inputs: Callable[[Any], Inputs] = make.text,
    labels: Callable[[Any, Inputs], Inputs] | None = make.next_tokens,
    **more: Any,
) -> Architecture:
    return Architecture(kind=kind, model=model, config=config, options=options, inputs=inputs, labels=labels, **more)


_decoder = partial(_architecture, "decoder")
_encoder = partial(_architecture, "encoder")
_seq2seq = partial(_architecture, "seq2seq", inputs=make.source_and_target, labels=make.target_tokens)
_vision = partial(_architecture, "vision", inputs=make.image, labels=make.image_class)
_multimodal = partial(_architecture, "multimodal")
_audio = partial(_architecture, "audio", inputs=make.waveform, labels=None)
_moe = partial(_architecture, "moe", custom_ops=("transformers",))
_state_space = partial(_architecture, "state_space")

# fmt: off
ARCHITECTURES: dict[str, Architecture] = {
    # decoders
    "gpt2": _decoder(
        "GPT2LMHeadModel", "GPT2Config",
        {**_TOKENS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
        breaks_in_training=True,
    ),
    "gpt_neox": _decoder("GPTNeoXForCausalLM", "GPTNeoXConfig", _BERT),
    "opt": _decoder(
        "OPTForCausalLM", "OPTConfig",
        {**_TEXT, "ffn_dim": 64, "max_position_embeddings": 64, "word_embed_proj_dim": 32},
    ),
    "bloom": _decoder("BloomForCausalLM", "BloomConfig", {**_TOKENS, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "falcon": _decoder("FalconForCausalLM", "FalconConfig", _TEXT),
    "llama": _decoder("LlamaForCausalLM", "LlamaConfig", _LLAMA),
    "mistral": _decoder("MistralForCausalLM", "MistralConfig", {**_LLAMA, "sliding_window": 8}),
    "qwen3": _decoder("Qwen3ForCausalLM", "Qwen3Config", {**_LLAMA, "head_dim": 8}),
    "gemma2": _decoder("Gemma2ForCausalLM", "Gemma2Config", {**_LLAMA, "head_dim": 8, "sliding_window": 8}),
    "phi3": _decoder("Phi3ForCausalLM", "Phi3Config", _LLAMA),
    # encoders
    "bert": _encoder("BertForMaskedLM", "BertConfig", _BERT),
    "roberta": _encoder("RobertaForMaskedLM", "RobertaConfig", _BERT),
    "distilbert": _encoder(
        "DistilBertForMaskedLM", "DistilBertConfig",
        {"vocab_size": 96, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 64},
    ),
    "albert": _encoder("AlbertForMaskedLM", "AlbertConfig", {**_BERT, "embedding_size": 16}),
    "electra": _encoder("ElectraForMaskedLM", "ElectraConfig", {**_BERT, "embedding_size": 16}),
    "deberta_v2": _encoder(
        "DebertaV2ForMaskedLM", "DebertaV2Config",
        {**_BERT, "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_biased_input": False},
    ),
    "modernbert": _encoder(
        "ModernBertForMaskedLM", "ModernBertConfig",
        {**_BERT, "local_attention": 8, "cls_token_id": 1, "sep_token_id": 2},
    ),
    # encoder and decoder
    "t5": _seq2seq(
        "T5ForConditionalGeneration", "T5Config",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4,
         "decoder_start_token_id": 0},
    ),
    "bart": _seq2seq("BartForConditionalGeneration", "BartConfig", _BART),
    "marian": _seq2seq("MarianMTModel", "MarianConfig", _BART),
    # vision
    "vit": _vision("ViTForImageClassification", "ViTConfig", _VIT),
    "dinov2": _vision("Dinov2ForImageClassification", "Dinov2Config", {**_VIT, "mlp_ratio": 2}),
    "swin": _vision(
        "SwinForImageClassification", "SwinConfig",
        {"image_size": 32, "patch_size": 4, "embed_dim": 16, "depths": [2, 2], "num_heads": [2, 4], "window_size": 4},
    ),
    "convnext": _vision(
        "ConvNextForImageClassification", "ConvNextConfig",
        {"hidden_sizes": [8, 16, 32, 64], "depths": [1, 1, 2, 1], "layer_scale_init_value": 1.0},
    ),
    "resnet": _vision(
        "ResNetForImageClassification", "ResNetConfig",
        {"embedding_size": 16, "hidden_sizes": [16, 32], "depths": [2, 2], "layer_type": "basic"},
    ),
    "mobilenet_v2": _vision(
        "MobileNetV2ForImageClassification", "MobileNetV2Config",
        {"depth_multiplier": 0.25, "image_size": 32, "output_stride": 8},
    ),
    "segformer": _vision(
        "SegformerForImageClassification", "SegformerConfig",
        {"num_encoder_blocks": 2, "depths": [1, 1], "sr_ratios": [2, 1], "hidden_sizes": [16, 32],
         "patch_sizes": [7, 3], "strides": [4, 2], "num_attention_heads": [2, 4], "mlp_ratios": [2, 2]},
    ),
    "detr": _vision(
        "DetrModel", "DetrConfig",
        {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
         "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_queries": 5, "use_timm_backbone": False,
         "use_pretrained_backbone": False, "backbone": None,
         "backbone_config": {"model_type": "resnet", "embedding_size": 16, "hidden_sizes": [16, 32],
                             "depths": [1, 1], "layer_type": "basic", "out_features": ["stage2"]}},
        labels=None, breaks_in_training=True,
    ),
    # several modalities
    "clip": _multimodal(
        "CLIPModel", "CLIPConfig",
        {"text_config": _BERT, "vision_config": _VIT, "projection_dim": 16},
        inputs=make.image_and_text, labels=make.contrastive,
    ),
    "siglip": _multimodal(
        "SiglipModel", "SiglipConfig",
        {"text_config": _BERT, "vision_config": _VIT},
        inputs=make.image_and_text, labels=make.contrastive,
    ),
    "blip": _multimodal(
        "BlipForConditionalGeneration", "BlipConfig",
        {"text_config": {**_BERT, "encoder_hidden_size": 32, "sep_token_id": 2},
         "vision_config": {**_VIT, "initializer_range": 0.02}, "projection_dim": 16, "image_text_hidden_size": 16},
        inputs=make.image_and_text,
    ),
    "llava": _multimodal(
        "LlavaForConditionalGeneration", "LlavaConfig",
        {"text_config": {"model_type": "llama", **_LLAMA},
         "vision_config": {"model_type": "clip_vision_model", **_VIT}, "image_token_index": 95, "image_seq_length": 16},
        inputs=make.text_with_image_tokens, labels=make.next_tokens, first_call_in_eager=True,
    ),
    "paligemma": _multimodal(
        "PaliGemmaForConditionalGeneration", "PaliGemmaConfig",
        {"text_config": {"model_type": "gemma", **_LLAMA, "head_dim": 8},
         "vision_config": {"model_type": "siglip_vision_model", **_VIT, "projection_dim": 32, "vision_use_head": False},
         "image_token_index": 95, "projection_dim": 32, "hidden_size": 32},
        inputs=make.text_with_image_tokens_and_types, labels=make.next_tokens,
    ),
    "vilt": _multimodal(
        "ViltModel", "ViltConfig",
        {**_VIT, "vocab_size": 96, "max_position_embeddings": 64},
        inputs=make.image_and_text_embeddings, labels=None,
    ),
    # audio
    "wav2vec2": _audio("Wav2Vec2ForCTC", "Wav2Vec2Config", _SPEECH, frozen="wav2vec2.feature_extractor"),
    "hubert": _audio("HubertModel", "HubertConfig", _SPEECH, frozen="feature_extractor"),
    "whisper": _audio(
        "WhisperForConditionalGeneration", "WhisperConfig",
        {**_BART, "num_mel_bins": 16, "max_source_positions": 20, "max_target_positions": 32, "suppress_tokens": None,
         "begin_suppress_tokens": None},
        inputs=make.spectrogram_and_target, labels=make.target_tokens,
    ),
    "audio_spectrogram_transformer": _audio(
        "ASTForAudioClassification", "ASTConfig",
        {**_VIT, "num_mel_bins": 16, "max_length": 24, "frequency_stride": 8, "time_stride": 8},
        inputs=make.spectrogram, labels=make.audio_class,
    ),
    # mixtures of experts
    "mixtral": _moe(
        "MixtralForCausalLM", "MixtralConfig",
        {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    ),
    "qwen3_moe": _moe("Qwen3MoeForCausalLM", "Qwen3MoeConfig", {**_MOE, "head_dim": 8, "decoder_sparse_step": 1}),
    "olmoe": _moe("OlmoeForCausalLM", "OlmoeConfig", _MOE),
    "gpt_oss": _moe(
        "GptOssForCausalLM", "GptOssConfig",
        {**_LLAMA, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
    ),
    # state spaces and recurrences
    "mamba": _state_space(
        "MambaForCausalLM", "MambaConfig",
        {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4, "use_mambapy": False},
    ),
    "mamba2": _state_space(
        "Mamba2ForCausalLM", "Mamba2Config",
        {**_TOKENS, "hidden_size": 16, "num_hidden_layers": 2, "state_size": 8, "num_heads": 4, "head_dim": 8,
         "n_groups": 2, "chunk_size": 8},
    ),
    "recurrent_gemma": _state_space(
        "RecurrentGemmaForCausalLM", "RecurrentGemmaConfig",
        {**_LLAMA, "num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 8},
    ),
}
# fmt: on
