"""generate() with a compiled forward beside generate() in eager, over the tiny architectures."""
from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.architectures import build

PROMPT_KEYS = ("input_ids", "attention_mask", "input_features", "decoder_input_ids")


def pair(name: str, *, batch: int = 2, dynamic: bool | None = None,
         **options: Any) -> tuple[nn.Module, nn.Module, dict[str, Tensor]]:
    """An eager model, the same one with a compiled forward, and the arguments of generate()."""
    model, inputs = build(name)
    prompt = {key: value[:batch] for key, value in inputs.items() if key in PROMPT_KEYS and key != "decoder_input_ids"}
    if "attention_mask" in prompt:
        prompt["attention_mask"] = torch.ones_like(prompt["attention_mask"])     # generate() pads on the left
    compiled = copy.deepcopy(model)
    compiled.forward = torch.compile(compiled.forward, backend="genie", dynamic=dynamic, options=options)
    return model, compiled, prompt


def generate(model: Any, prompt: dict[str, Tensor], **how: Any) -> Tensor:
    """Tokens, after a fixed seed."""
    torch.manual_seed(11)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(**prompt, **{"max_new_tokens": 8, "do_sample": False, **how})
