"""Models whose costs are estimated and measured: every architecture of tests/models tiny, and some at sizes in use."""
from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

Inputs = dict[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Real:
    """A model of `transformers` at a size in use. Random weights.

    family: the tiny architecture of the same kind; the two are left out together in cross-validation.
    """

    family: str
    model: str
    config: str
    options: dict[str, Any] = field(default_factory=dict)
    inputs: Callable[[], Inputs]
    trains: bool = False


@dataclass(frozen=True, slots=True)
class Graph:
    """One captured graph with the inputs of its call."""

    name: str
    family: str
    is_tiny: bool
    gm: fx.GraphModule
    inputs: list[Any]


def _ids(batch: int, length: int, vocab: int = 1000) -> Callable[[], Inputs]:
    return lambda: {"input_ids": torch.randint(3, vocab, (batch, length))}


def _pixels(batch: int = 1, size: int = 224) -> Callable[[], Inputs]:
    return lambda: {"pixel_values": torch.randn(batch, 3, size, size)}


def _whisper() -> Inputs:
    return {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.randint(3, 1000, (1, 16))}


def _t5() -> Inputs:
    return {"input_ids": torch.randint(3, 1000, (1, 64)), "decoder_input_ids": torch.randint(3, 1000, (1, 16))}


_SMALL_VIT = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "intermediate_size": 1536}
_MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}
_LLAMA = {"hidden_size": 768, "num_hidden_layers": 8, "num_attention_heads": 12, "num_key_value_heads": 4,
          "intermediate_size": 2048, "vocab_size": 32000}
_MIXTRAL = {"hidden_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4,
            "intermediate_size": 1024, "num_local_experts": 8, "num_experts_per_tok": 2, "vocab_size": 8000}
_WHISPER = {"d_model": 384, "encoder_layers": 4, "decoder_layers": 4, "encoder_attention_heads": 6,
            "decoder_attention_heads": 6, "encoder_ffn_dim": 1536, "decoder_ffn_dim": 1536}
_RESNET18 = {"layer_type": "basic", "depths": [2, 2, 2, 2], "hidden_sizes": [64, 128, 256, 512]}

REAL: dict[str, Real] = {
    "gpt2-small 1x128": Real(family="gpt2", model="GPT2LMHeadModel", config="GPT2Config", inputs=_ids(1, 128)),
    "gpt2-small 1x1": Real(family="gpt2", model="GPT2LMHeadModel", config="GPT2Config", inputs=_ids(1, 1)),
    "llama 8 layers 1x64": Real(family="llama", model="LlamaForCausalLM", config="LlamaConfig", options=_LLAMA,
                                inputs=_ids(1, 64)),
    "minilm 8x64": Real(family="bert", model="BertModel", config="BertConfig", options=_MINILM, inputs=_ids(8, 64),
                        trains=True),
    "distilbert 2x128": Real(family="distilbert", model="DistilBertModel", config="DistilBertConfig",
                             inputs=_ids(2, 128), trains=True),
    "vit-small 1x224": Real(family="vit", model="ViTModel", config="ViTConfig", options=_SMALL_VIT, inputs=_pixels(),
                            trains=True),
    "swin-tiny 1x224": Real(family="swin", model="SwinModel", config="SwinConfig", inputs=_pixels()),
    "resnet-18 1x224": Real(family="resnet", model="ResNetModel", config="ResNetConfig", options=_RESNET18,
                            inputs=_pixels(), trains=True),
    "resnet-50 1x224": Real(family="resnet", model="ResNetModel", config="ResNetConfig", inputs=_pixels()),
    "mobilenet-v2 1x224": Real(family="mobilenet_v2", model="MobileNetV2Model", config="MobileNetV2Config",
                               inputs=_pixels()),
    "convnext-tiny 1x224": Real(family="convnext", model="ConvNextModel", config="ConvNextConfig", inputs=_pixels()),
    "segformer-b0 1x224": Real(family="segformer", model="SegformerModel", config="SegformerConfig", inputs=_pixels()),
    "t5-small 1x64": Real(family="t5", model="T5ForConditionalGeneration", config="T5Config", inputs=_t5),
    "whisper-tiny": Real(family="whisper", model="WhisperForConditionalGeneration", config="WhisperConfig",
                         options=_WHISPER, inputs=_whisper),
    "mixtral 4 layers 1x64": Real(family="mixtral", model="MixtralForCausalLM", config="MixtralConfig",
                                  options=_MIXTRAL, inputs=_ids(1, 64)),
}


def tiny_graphs(names: list[str] | None = None) -> Iterator[Graph]:
    """Forward graphs of the architectures of tests/models."""
    from tests.models.architectures import ARCHITECTURES, build

    for name in names or ARCHITECTURES:
        model, inputs = build(name)
        with torch.no_grad():
            for number, (gm, values) in enumerate(capture(model, inputs)):
                yield Graph(f"{name} (tiny)" + (f" {number}" if number else ""), name, True, gm, values)


def real_graphs(names: list[str] | None = None) -> Iterator[Graph]:
    """Forward graphs, and for those that train also the forward and backward graphs of a step."""
    for name in names or REAL:
        real = REAL[name]
        model = _build(name, real)
        with torch.no_grad():
            for gm, values in capture(model.eval(), real.inputs()):
                yield Graph(name, real.family, False, gm, values)
        if real.trains:
            for phase, (gm, values) in zip(("forward", "backward"), capture(model, real.inputs()), strict=False):
                yield Graph(f"{name}, {phase} of a step", real.family, False, gm, values)


def _build(name: str, real: Real) -> nn.Module:
    import transformers

    torch.manual_seed(zlib.crc32(name.encode()))
    config = getattr(transformers, real.config)(**real.options)
    if hasattr(config, "use_cache"):
        config.use_cache = False
    model: nn.Module = getattr(transformers, real.model)(config)
    return model


def capture(model: nn.Module, inputs: Inputs) -> list[tuple[fx.GraphModule, list[Any]]]:
    """Every ATen graph of one call, and of its backward where gradients are on, as the backend of genie gets it."""
    from functorch.compile import default_partition
    from torch._dynamo.backends.common import aot_autograd

    from genie_dynamo.passes.pipeline import run_pipeline

    found: list[tuple[fx.GraphModule, list[Any]]] = []

    def compiler(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        def run(arguments: list[Any]) -> Any:
            values = list(arguments)
            arguments.clear()
            found.append((gm, [v.detach() if isinstance(v, torch.Tensor) else v for v in values]))
            with torch.no_grad():
                return gm(*values)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(gm: fx.GraphModule, examples: Any) -> Any:
        run_pipeline(gm, examples)
        return aot_autograd(fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler,
                            partition_fn=default_partition, keep_inference_input_mutations=True)(gm, examples)

    torch._dynamo.reset()
    out = torch.compile(model, backend=backend)(**inputs)
    first = next(value for value in out.values() if isinstance(value, torch.Tensor))
    if first.requires_grad:
        first.float().sin().sum().backward()
    torch._dynamo.reset()
    return found
