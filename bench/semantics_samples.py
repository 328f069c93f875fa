"""Graphs to judge the patterns by: calls of many architectures in three captures, and where each node comes from.

    forward       one call of a model, without labels
    labelled      the same with labels, so that a loss is in the graph
    decode        one token more on a cache, or a state, that an earlier call filled
    optimizer     one step of an optimizer over a small model's parameters
"""
from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import nn

from bench.semantics_architectures import TUNED
from bench.semantics_held_out import HELD_OUT
from bench.semantics_optimizers import OPTIMIZERS, optimizer_step
from bench.semantics_truth import Origin
from genie_dynamo.passes.semantics.reading import read_graph
from genie_dynamo.passes.semantics.view import GraphView
from tests.models import architectures, handwritten
from tests.models.captures import Capture, compiled_captures, frames_of, modules_of, recorded_capture

_WORKLOAD = {"decoder": "llm", "encoder": "llm", "seq2seq": "llm", "moe": "llm", "state_space": "llm",
             "vision": "vision", "audio": "audio", "multimodal": "multimodal"}
_MODALITIES = {"llm": {"text"}, "vision": {"vision"}, "audio": {"audio"}, "multimodal": {"text", "vision"},
               "recsys": {"tabular"}, "unknown": {"tabular"}}
_SOUND_AND_TEXT = ("clap",)
_KEEPS_INSIDE = ("recurrent_gemma",)       # whose modules hold the cache, so that no output shows it
_CACHES = ("past_key_values", "cache_params", "state")
DECODED = ("gpt2", "gpt_neox", "falcon", "llama", "mistral", "qwen3", "gemma2", "mixtral", "gpt_oss", "mamba", "t5",
           "deepseek_v3")


@dataclass(frozen=True, slots=True, kw_only=True)
class Sample:
    """One graph and what is known of it. Fields that are "" or None are not judged."""

    subject: str
    form: str                                  # forward | labelled | decode | optimizer
    capture: str                               # dynamo | aot | recorded
    view: Callable[[bool], GraphView]          # with names or without; a new one each time, since patterns write in it
    origins: tuple[Origin, ...]
    workload: str = ""
    modalities: frozenset[str] | None = None
    phase: str = ""

    @property
    def family(self) -> str:
        """Architectures that are told apart by little count as one where one is left out."""
        known = {**architectures.ARCHITECTURES, **TUNED, **HELD_OUT}
        return known[self.subject].kind if self.subject in known else self.form if self.form == "optimizer" \
            else "handwritten"


def all_names() -> tuple[str, ...]:
    """What patterns were written and tuned with."""
    return (*architectures.ARCHITECTURES, *handwritten.MODELS, *TUNED)


def forward_samples(names: tuple[str, ...]) -> Iterator[Sample]:
    """Three captures of one call of each."""
    for name in names:
        model, inputs = build(name)
        captures, outputs = _captures(model, inputs)
        keeps = name in _KEEPS_INSIDE or _holds_cache(outputs)
        workload = _workload(name)
        yield from _samples(name, "forward", captures, workload=workload, phase="prefill" if keeps else "forward",
                            modalities=_modalities(name, workload, inputs))


def _holds_cache(outputs: Any) -> bool:
    """Whether a cache is among the outputs, or among those of a model inside."""
    return any(getattr(outputs, cache, None) is not None for cache in _CACHES) or (
        isinstance(outputs, dict) and any(_holds_cache(value) for value in outputs.values() if isinstance(value, dict)))


def labelled_samples(names: tuple[str, ...]) -> Iterator[Sample]:
    """The same calls with labels, where a model takes them and stays one graph."""
    known = {**architectures.ARCHITECTURES, **TUNED, **HELD_OUT}
    for name in names:
        if name not in known or known[name].labels is None or known[name].breaks_in_training:
            continue
        model, inputs = build(name, training=True)
        captures, _ = _captures(model.eval(), inputs)
        yield from _samples(name, "labelled", captures)


def decode_samples(names: tuple[str, ...] = DECODED) -> Iterator[Sample]:
    """One token more, after a call that filled a cache."""
    for name in names:
        model, inputs = build(name)
        ids = inputs["input_ids"]
        with torch.no_grad():
            if "decoder_input_ids" in inputs:
                target = inputs["decoder_input_ids"]
                first = model(**{**inputs, "decoder_input_ids": target[:, :-1]}, use_cache=True)
                call = {"encoder_outputs": (first.encoder_last_hidden_state,), "decoder_input_ids": target[:, -1:],
                        "past_key_values": first.past_key_values}
            else:
                first = model(input_ids=ids[:, :-1], use_cache=True)
                cache = next(c for c in _CACHES if getattr(first, c, None) is not None)
                call = {"input_ids": ids[:, -1:], cache: getattr(first, cache)}
        captures, _ = _captures(model, call)
        yield from _samples(name, "decode", captures, workload="llm", phase="decode")


def optimizer_samples(names: tuple[str, ...] = tuple(OPTIMIZERS)) -> Iterator[Sample]:
    """One step of each optimizer, tensor by tensor and over lists."""
    for name in names:
        for foreach in (False, True):
            step, modules = optimizer_step(name, foreach=foreach)
            with quiet():
                compiled = compiled_captures(step, {}, fullgraph=False)     # torch breaks it around the step itself
                captures = [*_largest(compiled), recorded_capture(step, {}, modules)]
            yield from _samples(name, "optimizer", captures, phase="optimizer")


def build(name: str, *, training: bool = False) -> tuple[nn.Module, dict[str, Any]]:
    """A model of any of the lists, and the arguments of one call."""
    if name in handwritten.MODELS:
        return handwritten.build(name)
    with mock.patch.dict(architectures.ARCHITECTURES, {**TUNED, **HELD_OUT}):
        return architectures.build(name, training=training)


def _captures(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[list[Capture], Any]:
    with quiet(), torch.no_grad():
        captures = [*compiled_captures(model, inputs), recorded_capture(model, inputs, {"": model})]
        return captures, model(**inputs)


def _largest(captures: list[Capture]) -> list[Capture]:
    """Of each kind of capture the graph that does most."""
    return [max((c for c in captures if c.kind == kind), key=lambda c: len(c.gm.graph.nodes))
            for kind in dict.fromkeys(c.kind for c in captures)]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries that talk about what does not matter here are not heard."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


def _samples(name: str, form: str, captures: list[Capture], **facts: Any) -> Iterator[Sample]:
    for capture in captures:
        yield Sample(subject=name, form=form, capture=capture.kind, origins=_origins(capture), **facts,
                     view=lambda named, c=capture: read_graph(c.gm, roles=c.roles, names=named))


def _origins(capture: Capture) -> tuple[Origin, ...]:
    found = []
    for node in capture.gm.graph.nodes:
        if node.op.startswith("call"):
            value = node.meta.get("val", node.meta.get("example_value"))
            shape = tuple(value.shape) if isinstance(value, torch.Tensor) else ()
            found.append(Origin(node.name, modules_of(node), frames_of(node), shape))
    return tuple(found)


def _workload(name: str) -> str:
    known = {**architectures.ARCHITECTURES, **TUNED, **HELD_OUT}
    return _WORKLOAD[known[name].kind] if name in known else handwritten.MODELS[name][2]


def _modalities(name: str, workload: str, inputs: Mapping[str, Any]) -> frozenset[str]:
    found = {"audio", "text"} if name in _SOUND_AND_TEXT else set(_MODALITIES[workload])
    return frozenset(found | ({"text"} if "decoder_input_ids" in inputs else set()))
