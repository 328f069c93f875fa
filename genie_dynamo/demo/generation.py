"""Generation with a key-value cache by a small Llama architecture. Its weights are random: what is shown is
that the tokens are the same as eager's, not that they mean anything."""
from __future__ import annotations

import copy
import os
from typing import Any

import torch
from tqdm import tqdm

PROMPT = "def reverse(text):\n    "


def build_llama(seed: int = 0) -> Any:
    """LlamaForCausalLM over bytes: 4 layers, width 256, 3.0 M random parameters from `seed`, eval mode."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=256, hidden_size=256, intermediate_size=704, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=4, max_position_embeddings=512, initializer_range=0.1,   # wide: no near ties
        bos_token_id=None, eos_token_id=None, pad_token_id=None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config).eval()  # type: ignore[no-untyped-call]


def compiled_copy(model: Any, backend: str) -> Any:
    """A copy whose forward goes through the backend; generate() itself stays ordinary Python."""
    model = copy.deepcopy(model)
    model.forward = torch.compile(model.forward, backend=backend, dynamic=True)
    return model


def generate(model: Any, num_new_tokens: int, *, title: str = "generate", progress: bool = True) -> list[int]:
    """The new tokens after PROMPT, greedily, with the cache of transformers (DynamicCache)."""
    from transformers.generation.streamers import BaseStreamer

    with tqdm(total=num_new_tokens, desc=title, unit="token", disable=not progress) as bar:

        class Bar(BaseStreamer):
            seen_prompt = False

            def put(self, value: torch.Tensor) -> None:
                if self.seen_prompt:
                    bar.update(value.numel())
                self.seen_prompt = True

            def end(self) -> None:
                bar.refresh()

        prompt_1L = torch.tensor([list(PROMPT.encode())])
        with torch.no_grad():
            tokens_1L = model.generate(
                prompt_1L, attention_mask=torch.ones_like(prompt_1L), max_new_tokens=num_new_tokens,
                do_sample=False, use_cache=True, streamer=Bar())
    new: list[int] = tokens_1L[0, prompt_1L.shape[1]:].tolist()
    return new
