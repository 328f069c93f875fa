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


@pytest.mark.parametrize("name", [pytest.param(name, marks=() if name == "gpt2" else SLOW) for name in MODELS])
def test_beam_search_sends_the_reordered_cache_and_says_so(name: str) -> None:
    stats = same_tokens(name, BEAMS)
    assert stats["by_reason"]["state"]["sent"] > 0, "eager code reorders the cache between two steps"


@pytest.mark.parametrize("name", [
    "llama", *(pytest.param(name, marks=SLOW) for name in ("gpt2", "qwen3", "mixtral", "whisper", "mistral"))])
def test_static_cache(name: str) -> None:
    stats = same_tokens(name, STATIC)
    assert stats["by_reason"]["state"]["sent"] == 0


@pytest.mark.parametrize("name", [
    pytest.param(name, marks=() if name == "llama" else SLOW)
    for name in ("gpt2", "llama", "qwen3", "mixtral", "t5", "whisper", "mistral")])
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
    if name == "whisper":
        assert stats["by_reason"]["state"]["sent"] > 0, "its generate() stacks the assistant's caches anew, row by row"
    else:
        assert stats["by_reason"]["state"]["sent"] == 0, "a cropped cache is a view of what the worker has"


def test_transformers_refuses_to_assist_a_model_whose_state_cannot_be_cropped() -> None:
    eager, compiled, prompt = pair("mamba", batch=1)
    for model in (eager, compiled):
        with pytest.raises(ValueError, match="not supported with stateful models"):
            generate(model, prompt, assistant_model=eager)


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


def medium_llama() -> Any:
    """Large enough for a handle to be small beside a row of the cache."""
    import transformers

    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(
        vocab_size=2048, hidden_size=256, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256)).eval()


@torch.no_grad()
def test_bytes_per_token_are_those_of_ids_logits_and_new_rows() -> None:
    from transformers import DynamicCache

    totals = {}
    for awareness in ("full", "weights"):
        model = medium_llama()
        forward = torch.compile(model.forward, backend="genie", dynamic=True, options={"awareness": awareness})
        ids, cache, length = torch.arange(72)[None], DynamicCache(), 72
        for step in range(12):
            if step == 4:
                genie.reset_stats()
            out = forward(input_ids=ids, past_key_values=cache, position_ids=torch.arange(
                length - ids.shape[1], length)[None], attention_mask=torch.ones(1, length, dtype=torch.long),
                use_cache=True, logits_to_keep=1)
            ids, length = out.logits[:, -1:].argmax(-1), length + 1
        stats = genie.get_stats()
        assert stats["calls"] == 8
        totals[awareness] = (stats["bytes_sent"] + stats["bytes_received"]) / 8
    row_bytes = 2 * 2 * 4 * 64 * 4
    needed = 8 + 8 + 8 * length + 2048 * 4 + row_bytes
    assert totals["full"] <= 1.2 * needed, (totals, needed)
    assert totals["full"] <= 0.03 * totals["weights"], totals
