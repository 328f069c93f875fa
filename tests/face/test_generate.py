"""generate() with a compiled forward: the tokens of eager, and the caches stay on the worker."""
from __future__ import annotations

from typing import Any

import pytest
import torch

import genie_dynamo as genie
from tests.models.generation import generate, pair

pytestmark = pytest.mark.usefixtures("session", "fresh_dynamo")

GREEDY: dict[str, Any] = {}
SAMPLED = {"do_sample": True, "temperature": 1.3}
BEAMS = {"num_beams": 3}
STATIC = {"cache_implementation": "static"}
MODELS = ("gpt2", "llama", "qwen3", "mixtral", "t5", "whisper", "mamba", "mistral")
SLOW = pytest.mark.slow


def same_tokens(name: str, how: dict[str, Any]) -> dict[str, Any]:
    eager, compiled, prompt = pair(name)
    expected = generate(eager, prompt, **how)
    genie.reset_stats()
    assert torch.equal(generate(compiled, prompt, **how), expected)
    stats = genie.get_stats()
    assert stats["calls"] >= 8 and not stats["fallbacks"]
    return stats


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name in ("gpt2", "mamba", "whisper") else SLOW) for name in MODELS])
def test_greedy(name: str) -> None:
    stats = same_tokens(name, GREEDY)
    # After the prompt and a first step nothing but ids, masks and positions goes up.
    assert stats["by_reason"]["state"]["sent"] == 0


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "llama" else SLOW) for name in MODELS])
def test_sampling_with_a_seed(name: str) -> None:
    same_tokens(name, SAMPLED)


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "gpt2" else SLOW) for name in MODELS if name != "mamba"])
def test_beam_search_sends_the_reordered_cache_and_says_so(name: str) -> None:
    stats = same_tokens(name, BEAMS)
    assert stats["by_reason"]["state"]["sent"] > 0, "eager code reorders the cache between two steps"


@pytest.mark.parametrize("name", [
    "llama", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "qwen3", "mixtral", "whisper", "mistral"))])
def test_static_cache(name: str) -> None:
    stats = same_tokens(name, STATIC)
    assert stats["by_reason"]["state"]["sent"] == 0


@pytest.mark.parametrize("name", ["llama", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "qwen3"))])
def test_assisted_generation_crops_the_cache(name: str) -> None:
    eager, compiled, prompt = pair(name, batch=1)
    assistant, compiled_assistant, _ = pair(name, batch=1)
    for model in (assistant, compiled_assistant):
        with torch.no_grad():
            # Not quite the same: some of its tokens are refused, and their rows are cropped.
            model.get_output_embeddings().weight.add_(0.05 * torch.randn(
                model.get_output_embeddings().weight.shape, generator=torch.Generator().manual_seed(3)))
    expected = generate(eager, prompt, assistant_model=assistant, max_new_tokens=12)
    genie.reset_stats()
    assert torch.equal(generate(compiled, prompt, assistant_model=compiled_assistant, max_new_tokens=12), expected)
    stats = genie.get_stats()
    assert stats["by_reason"]["state"]["sent"] == 0, "a cropped cache is a view of what the worker has"


def test_ten_turns_of_chat_send_each_turns_tokens_and_no_cache() -> None:
    from transformers import DynamicCache

    eager, compiled, prompt = pair("llama", batch=1, dynamic=True)
    histories = [prompt["input_ids"], prompt["input_ids"]]
    caches = [DynamicCache(), DynamicCache()]
    for turn in range(10):
        asked = torch.full((1, 2), 7 + turn)
        genie.reset_stats()
        for number, model in enumerate((eager, compiled)):
            ids = torch.cat([histories[number], asked], 1)
            histories[number] = generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)},
                                         past_key_values=caches[number], max_new_tokens=2)
        assert torch.equal(*histories), f"turn {turn}"
        assert genie.get_stats()["by_reason"]["state"]["sent"] == 0
    assert any(row["why"] == "cache" for row in genie.get_stats()["resident"])
