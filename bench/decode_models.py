"""The models of the decode bench, random weights from a fixed seed, and what is done with them.

A scene is built once per way of running it. `run()` does all of it once and returns an Outcome: seconds per unit (a
token, a turn, a step), counters per unit, and numbers by which ways are compared.
"""
from __future__ import annotations

import time
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from transformers import (
    DynamicCache,
    EncoderDecoderCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    WhisperConfig,
    WhisperForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

PROMPT = 72
TOKENS = 50
Counters = Callable[[], Mapping[str, float]]
Wrap = Callable[[Callable[..., Any]], Callable[..., Any]]


class Outcome(NamedTuple):
    unit_s: float                       # mean over the units
    counters: Mapping[str, float]       # what one unit adds, mean
    checksum: list[float]


@dataclass(frozen=True, slots=True)
class Size:
    """What the floor of a token's bytes is made of."""

    parameter_bytes: int
    num_layers: int
    kv_row_bytes: int                   # of one token in one layer, keys and values
    logits_bytes: int

    @property
    def floor_bytes(self) -> int:
        """Token id up; logits and the new rows of the cache down."""
        return 8 + self.logits_bytes + self.num_layers * self.kv_row_bytes


def model_of(name: str) -> Any:
    """Random weights, the same in every process. Untied embeddings, so that greedy tokens differ from step to step."""
    torch.manual_seed(0)
    special = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    model: Any
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**special, **dropout))
    elif name == "llama":
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=768, num_hidden_layers=12, num_attention_heads=12, num_key_value_heads=4,
            intermediate_size=2048, vocab_size=32000, max_position_embeddings=2048, tie_word_embeddings=True,
            **special))
    elif name == "gpt2-30m":
        model = GPT2LMHeadModel(GPT2Config(n_layer=6, n_embd=384, n_head=6, **special, **dropout))
    elif name == "tiny":
        model = LlamaForCausalLM(LlamaConfig(
            hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=128,
            vocab_size=512, max_position_embeddings=512, **special))
    elif name in ("whisper", "whisper-tiny"):
        wide = name == "whisper"
        model = WhisperForConditionalGeneration(WhisperConfig(
            d_model=512 if wide else 64, encoder_layers=6 if wide else 2, decoder_layers=6 if wide else 2,
            encoder_attention_heads=8 if wide else 2, decoder_attention_heads=8 if wide else 2,
            encoder_ffn_dim=2048 if wide else 128, decoder_ffn_dim=2048 if wide else 128,
            vocab_size=51865 if wide else 512, dropout=0.0, **(special | {"pad_token_id": 0}),
            decoder_start_token_id=1))
    else:
        raise ValueError(f"no model {name!r}")
    return model.eval().requires_grad_(False)


def size_of(name: str) -> Size:
    """Counted without allocating the model."""
    with torch.device("meta"):
        model = model_of(name)
    model.tie_weights()
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return Size(sum(p.numel() * p.element_size() for p in dict.fromkeys(model.parameters())),
                config.num_hidden_layers, 2 * 4 * kv_heads * head, 4 * config.vocab_size)


def own_code(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function with a code object of its own: Dynamo keeps what it has compiled by code object."""
    code = function.__code__.replace(co_name=name)
    return types.FunctionType(code, function.__globals__, name, function.__defaults__, function.__closure__)


class Meter:
    """Seconds and counters of a stretch of units; what lies between stretches is not measured."""

    def __init__(self, counters: Counters) -> None:
        self._counters = counters
        self._seconds, self._units = 0.0, 0
        self._sums: dict[str, float] = {}
        self._before: Mapping[str, float] = {}

    def start(self) -> None:
        self._before = dict(self._counters())
        self._started_s = time.perf_counter()

    def stop(self, units: int) -> None:
        self._seconds += time.perf_counter() - self._started_s
        self._units += units
        for key, value in self._counters().items():
            self._sums[key] = self._sums.get(key, 0.0) + value - self._before.get(key, 0.0)

    def outcome(self, checksum: list[float]) -> Outcome:
        return Outcome(self._seconds / self._units, {k: v / self._units for k, v in self._sums.items()}, checksum)


# ---------------------------------------------------------------- scenes
class Decode:
    """A prompt, then one token after another. A unit is a token after the first; the prompt is not measured."""

    def __init__(self, model: Any, wrap: Wrap, params: Mapping[str, Any]) -> None:
        self._config, self._num_tokens = model.config, params["tokens"]
        self._prompt = _tokens(model, params["prompt"])

        def decode_forward(ids: torch.Tensor, cache: Any) -> torch.Tensor:
            logits: torch.Tensor = model(
                input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
            return logits

        self._forward = wrap(decode_forward)

    def run(self, counters: Counters) -> Outcome:
        cache, meter = DynamicCache(config=self._config), Meter(counters)
        tokens, logits = [], self._forward(self._prompt, cache)
        meter.start()
        for _ in range(self._num_tokens):
            ids = logits[:, -1:].argmax(-1)
            tokens.append(int(ids))
            logits = self._forward(ids, cache)
        meter.stop(self._num_tokens)
        return meter.outcome([*map(float, tokens), float(logits.double().abs().sum())])


class Chat:
    """Ten turns with one cache: some tokens of the user's, then some of the model's. A unit is a turn."""

    TURNS = 10

    def __init__(self, model: Any, wrap: Wrap, params: Mapping[str, Any]) -> None:
        self._decode = Decode(model, wrap, params)
        self._turns = [_tokens(model, params["prompt"] + 3 * i, seed=i) for i in range(self.TURNS)]
        self._config, self._reply = model.config, params["tokens"]

    def run(self, counters: Counters) -> Outcome:
        cache, meter, forward = DynamicCache(config=self._config), Meter(counters), self._decode._forward
        tokens: list[float] = []
        for turn in self._turns:
            meter.start()
            logits = forward(turn, cache)
            for _ in range(self._reply):
                ids = logits[:, -1:].argmax(-1)
                tokens.append(float(int(ids)))
                logits = forward(ids, cache)
            meter.stop(1)
        return meter.outcome([*tokens, float(logits.double().abs().sum())])


class Whisper:
    """Speech in pieces of 30 s: each is encoded once, then transcribed token by token. A unit is a token."""

    PIECES = 2

    def __init__(self, model: Any, wrap: Wrap, params: Mapping[str, Any]) -> None:
        config, self._num_tokens = model.config, params["tokens"]
        frames = 2 * config.max_source_positions
        self._config = config
        self._pieces = [torch.randn(1, config.num_mel_bins, frames, generator=torch.Generator().manual_seed(i))
                        for i in range(self.PIECES)]

        def encode_piece(features: torch.Tensor) -> torch.Tensor:
            hidden: torch.Tensor = model.model.encoder(features).last_hidden_state
            return hidden

        def decode_piece(ids: torch.Tensor, encoded: torch.Tensor, cache: Any) -> torch.Tensor:
            logits: torch.Tensor = model(
                encoder_outputs=BaseModelOutput(last_hidden_state=encoded), decoder_input_ids=ids,
                past_key_values=cache, use_cache=True).logits
            return logits

        self._encode, self._decode = wrap(encode_piece), wrap(decode_piece)

    def run(self, counters: Counters) -> Outcome:
        meter, tokens = Meter(counters), []
        for piece in self._pieces:
            encoded = self._encode(piece)
            cache = EncoderDecoderCache(DynamicCache(config=self._config), DynamicCache(config=self._config))
            logits = self._decode(torch.tensor([[1, 2, 3, 4]]), encoded, cache)
            meter.start()
            for _ in range(self._num_tokens):
                ids = logits[:, -1:].argmax(-1)
                tokens.append(float(int(ids)))
                logits = self._decode(ids, encoded, cache)
            meter.stop(self._num_tokens)
        return meter.outcome([*tokens, float(logits.double().abs().sum())])


class Training:
    """Steps of AdamW on batches of random tokens. A unit is a step; the first of each run is not measured."""

    def __init__(self, model: Any, wrap: Wrap, params: Mapping[str, Any]) -> None:
        self._model = model.train().requires_grad_(True)
        self._optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        self._num_steps, self._vocabulary = params["tokens"], model.config.vocab_size
        self._length = params["prompt"]

        def loss_of(ids: torch.Tensor) -> torch.Tensor:
            logits = model(input_ids=ids, use_cache=False).logits
            return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

        self._loss, self._step = wrap(loss_of), self._optimizer.step
        if params.get("parameters") == "remote":
            def take_step() -> None:
                self._optimizer.step()

            self._step = wrap(take_step)
        self._steps_taken = 0

    def run(self, counters: Counters) -> Outcome:
        meter, losses = Meter(counters), []
        with torch.enable_grad():
            for index in range(self._num_steps + 1):
                self._steps_taken += 1
                ids = torch.randint(self._vocabulary, (2, self._length),
                                    generator=torch.Generator().manual_seed(self._steps_taken))
                if index == 1:
                    meter.start()
                loss = self._loss(ids)
                loss.backward()
                self._step()
                self._optimizer.zero_grad(set_to_none=True)
                losses.append(float(loss.detach()))
        meter.stop(self._num_steps)
        return meter.outcome(losses)


SCENES: dict[str, type[Any]] = {"decode": Decode, "chat": Chat, "whisper": Whisper, "training": Training}


def _tokens(model: Any, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (1, length), generator=torch.Generator().manual_seed(seed))
