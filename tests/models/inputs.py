"""Arguments of forward for the tiny architectures: each function reads the sizes it needs off a configuration.

Random draws come from torch's default generator, which the caller seeds. Shapes: B=2 samples, T=12 tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

BATCH = 2
NUM_TOKENS = 12
NUM_FRAMES = 24
NUM_SAMPLES = 640
IMAGE_SIZE = 32

Inputs = dict[str, Any]


def text(config: Any) -> Inputs:
    """Token ids (B, T) and a mask that hides the tail of the last sample."""
    mask = torch.ones(BATCH, NUM_TOKENS, dtype=torch.long)
    mask[-1, -3:] = 0
    return {"input_ids": _tokens(config), "attention_mask": mask}


def source_and_target(config: Any) -> Inputs:
    """Tokens of the encoder, and those that the decoder has so far."""
    return text(config) | {"decoder_input_ids": _tokens(config, NUM_TOKENS - 4)}


def image(config: Any) -> Inputs:
    """Pixels (B, 3, H, W)."""
    return {"pixel_values": torch.randn(BATCH, 3, IMAGE_SIZE, IMAGE_SIZE)}


def image_and_text(config: Any) -> Inputs:
    """Pixels, and tokens that end with the end-of-text token, where some models pool."""
    inputs = image(config) | text(config.text_config)
    inputs["input_ids"][:, -1] = 2
    return inputs


def image_and_text_embeddings(config: Any) -> Inputs:
    """For a model that samples patches from the image itself: the patches are given, so that nothing is drawn."""
    num_patches = (config.image_size // config.patch_size) ** 2
    return text(config) | {
        "image_embeds": torch.randn(BATCH, num_patches + 1, config.hidden_size),
        "pixel_mask": torch.ones(BATCH, num_patches + 1, dtype=torch.long),
    }


def text_with_image_tokens(config: Any) -> Inputs:
    """Pixels, and text that starts with one placeholder token per patch."""
    vision = config.vision_config
    num_patches = (vision.image_size // vision.patch_size) ** 2
    words = _tokens(config.text_config)
    placeholders = torch.full((BATCH, num_patches), config.image_token_index)
    return image(config) | {"input_ids": torch.cat([placeholders, words], dim=1)}


def text_with_image_tokens_and_types(config: Any) -> Inputs:
    """The same, and which tokens are a prefix (0) that sees itself whole, and which (1) see what came before."""
    inputs = text_with_image_tokens(config)
    return inputs | {"token_type_ids": (inputs["input_ids"] != config.image_token_index).long()}


def waveform(config: Any) -> Inputs:
    """Samples (B, N) of sound."""
    return {"input_values": torch.randn(BATCH, NUM_SAMPLES)}


def spectrogram(config: Any) -> Inputs:
    """Mel bands (B, frames, bands)."""
    return {"input_values": torch.randn(BATCH, config.max_length, config.num_mel_bins)}


def spectrogram_and_target(config: Any) -> Inputs:
    """Mel bands (B, bands, frames) of the encoder, tokens of the decoder."""
    features = torch.randn(BATCH, config.num_mel_bins, 2 * config.max_source_positions)
    return {"input_features": features, "decoder_input_ids": _tokens(config, NUM_TOKENS - 4)}


def next_tokens(config: Any, inputs: Inputs) -> Inputs:
    """Labels: the tokens themselves. A decoder shifts them itself; an encoder has to reproduce them."""
    return {"labels": inputs["input_ids"].clone()}


def target_tokens(config: Any, inputs: Inputs) -> Inputs:
    """Labels of the decoder."""
    return {"labels": inputs["decoder_input_ids"].clone()}


def image_class(config: Any, inputs: Inputs) -> Inputs:
    """One class per image."""
    return {"labels": torch.arange(BATCH) % config.num_labels}


audio_class = image_class


def contrastive(config: Any, inputs: Inputs) -> Inputs:
    """No labels: the pairs of the batch are the labels."""
    return {"return_loss": True}


def _tokens(config: Any, length: int = NUM_TOKENS) -> Tensor:
    return torch.randint(3, config.vocab_size - 1, (BATCH, length))
