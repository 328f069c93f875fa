"""Real graphs for tests: what AOTAutograd makes of small programs of every kind the project ships."""
from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from functorch.compile import default_partition
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree

from genie_dynamo.core.fragment import GraphSpec
from genie_dynamo.passes.lower import lower_fragment
from tests.round_trip import checked_encode


@dataclass(frozen=True)
class Captured:
    """A graph as a backend gets it, with the inputs of one call as they were before it."""

    gm: fx.GraphModule
    inputs: list[Any]

    def expected(self) -> tuple[list[Any], list[Any]]:
        """What the graph itself gives: `(outputs, inputs after)`, from fresh copies of the inputs."""
        inputs = copies(self.inputs)
        with torch.no_grad():
            outputs = list(self.gm(*inputs))
        return [detached(out) for out in outputs], inputs


@dataclass(frozen=True)
class Lowered:
    """A whole graph lowered: the spec's outputs are the graph's, then the new contents of mutated inputs."""

    spec: GraphSpec
    num_outputs: int
    mutated_inputs: tuple[int, ...]


def capture(fn: Callable[..., Any], *args: Any, dynamic: bool = False, fullgraph: bool = True) -> list[Captured]:
    """Compile and call `fn`; if an output requires grad, run backward too. Returns every graph with its inputs."""
    found: list[Captured] = []

    def compiler(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graph = copy.copy(gm)

        def run(inputs: list[Any]) -> Any:
            found.append(Captured(graph, copies(inputs)))
            arguments = list(inputs)
            inputs.clear()
            with torch.no_grad():
                return gm(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    backend = aot_autograd(
        fw_compiler=compiler, bw_compiler=compiler, inference_compiler=compiler, decompositions={},
        partition_fn=default_partition, keep_inference_input_mutations=True,
    )
    torch._dynamo.reset()
    compiled = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=fullgraph)
    torch.manual_seed(0)
    outputs = compiled(*args)
    roots = [x for x in pytree.tree_leaves(outputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    if roots:
        torch.autograd.backward([root.abs().sum() for root in roots])
    torch._dynamo.reset()
    return found


def lower_whole(gm: fx.GraphModule) -> Lowered:
    """One fragment of all nodes but the trailing copies into inputs."""
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    epilogue = {
        node: node.args for node in gm.graph.nodes
        if node.target is torch.ops.aten.copy_.default and node.args[0].op == "placeholder"
    }
    body = [n.name for n in gm.graph.nodes if n.op in ("call_function", "get_attr") and n not in epilogue]
    outputs = [
        (epilogue[item][0].name if item in epilogue else item.name) if isinstance(item, fx.Node) else item
        for item in gm.graph.output_node().args[0]
    ]
    new_contents = [source.name for _, source in epilogue.values()]
    spec = lower_fragment(gm, node_names=body, inputs=names, outputs=[*outputs, *new_contents])
    checked_encode(spec)
    return Lowered(spec, len(outputs), tuple(names.index(target.name) for target, _ in epilogue.values()))


def copies(values: list[Any]) -> list[Any]:
    """The values with tensors copied, strides kept."""
    return [detached(value) for value in values]


def detached(value: Any) -> Any:
    """A copy with the same bits and strides, without autograd; other values as they are."""
    if not isinstance(value, torch.Tensor):
        return value
    plain = value.detach().resolve_conj().resolve_neg()
    return torch.empty_strided(plain.shape, plain.stride(), dtype=plain.dtype).copy_(plain)


def assert_bit_equal(actual: Any, expected: Any) -> None:
    """Same type, dtype, shape, strides and bits."""
    assert type(actual) is type(expected) or isinstance(expected, torch.Tensor), (actual, expected)
    if not isinstance(expected, torch.Tensor):
        assert repr(actual) == repr(expected)
        return
    assert (actual.dtype, actual.shape) == (expected.dtype, expected.shape)
    assert significant_stride(actual) == significant_stride(expected)
    assert bits(actual) == bits(expected)


def significant_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of the dimensions that are stepped along."""
    if tensor.numel() == 0:
        return ()
    return tuple(step for step, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def bits(tensor: torch.Tensor) -> bytes:
    """The elements' bytes in row-major order."""
    plain = tensor.detach().resolve_conj().resolve_neg().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


# -- programs -------------------------------------------------------------------------------------------------


class GPT2(nn.Module):
    """A tiny GPT-2 of transformers."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        config = GPT2Config(n_layer=2, n_embd=32, n_head=2, vocab_size=100, n_positions=32, bos_token_id=0,
                            eos_token_id=0)
        self.model = GPT2LMHeadModel(config)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False).logits
        return logits


class Llama(nn.Module):
    """A tiny Llama of transformers."""

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        from transformers import LlamaConfig, LlamaForCausalLM

        self.model = LlamaForCausalLM(LlamaConfig(
            num_hidden_layers=num_layers, hidden_size=32, intermediate_size=64, num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=100,
        ))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.model(ids, use_cache=False).logits
        return logits


@dataclass(frozen=True)
class Program:
    """Something to capture."""

    make: Callable[[], tuple[Callable[..., Any], tuple[Any, ...]]]
    dynamic: bool = False
    fullgraph: bool = True

    def graphs(self) -> tuple[Captured, ...]:
        """Captured once in a process; the graphs and inputs are not to be changed."""
        return _graphs(self)


@functools.cache
def _graphs(program: Program) -> tuple[Captured, ...]:
    torch.manual_seed(1)
    fn, args = program.make()
    return tuple(capture(fn, *args, dynamic=program.dynamic, fullgraph=program.fullgraph))


def _mlp() -> Any:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 4))
    return model, (torch.randn(3, 8),)


def _conv_batch_norm() -> Any:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2))
    return (model.to(memory_format=torch.channels_last),
            (torch.randn(2, 3, 10, 10).to(memory_format=torch.channels_last),))


def _dropout() -> Any:
    return nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.Linear(8, 8), nn.Dropout(0.1)), (torch.randn(4, 8),)


def _dynamic() -> Any:
    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x.view(x.shape[0] * 2, -1) + x.shape[0] / 3).sin()[: x.shape[0] + 1]

    return fn, (torch.randn(5, 6, requires_grad=True),)


def _constants() -> Any:
    return lambda x: x * torch.tensor([1.0, -2.0, float("nan")]) + torch.tensor(3), (torch.randn(2, 3),)


def _complex() -> Any:
    return (lambda x: torch.fft.fft(x * (1 - 2j)).conj().abs(),
            (torch.randn(4, 6, dtype=torch.complex64, requires_grad=True),))


def _mutation() -> Any:
    def fn(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x[0].add_(1)
        y.mul_(2)
        return x.sum() + y

    return fn, (torch.randn(3, 2), torch.randn(2))


def _cond() -> Any:
    from torch._higher_order_ops import cond

    def fn(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos() * torch.tensor(2.0), (x,))
        return result

    return fn, (torch.randn(3, requires_grad=True),)


def _while_loop() -> Any:
    from torch._higher_order_ops import while_loop

    return (lambda x: while_loop(lambda i, x: i < 3, lambda i, x: (i + 1, x.sin()), (torch.tensor(0), x)),
            (torch.randn(3),))


def _scan() -> Any:
    from torch._higher_order_ops import scan

    return (lambda x: scan(lambda c, x: (c + x, c * x), torch.zeros(3), x), (torch.randn(5, 3, requires_grad=True),))


def _map() -> Any:
    from torch._higher_order_ops import map as higher_order_map

    return lambda x: higher_order_map(lambda row: row.sin(), x), (torch.randn(5, 3, requires_grad=True),)


def _flex_attention() -> Any:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    bias = torch.randn(2)
    mask = create_block_mask(lambda b, h, q, k: q >= k, 1, 2, 16, 16, device="cpu")

    def fn(q: torch.Tensor) -> torch.Tensor:
        score_mod = lambda s, b, h, i, j: s + bias[h]  # noqa: E731
        result: torch.Tensor = flex_attention(q, 2 * q, q + 1, score_mod=score_mod, block_mask=mask)
        return result

    return fn, (torch.randn(1, 2, 16, 8),)


def _views() -> Any:
    return lambda x: (x.t(), x[0], x, x.shape[0], None, x[:, :0]), (torch.randn(4, 6),)


def _low_precision() -> Any:
    def fn(x: torch.Tensor) -> Any:
        half = x.to(torch.bfloat16)
        return half @ half, half.to(torch.float8_e4m3fn), (x > 0), x.to(torch.int8)

    return fn, (torch.randn(4, 4),)


def _optimizer() -> Any:
    parameters = [torch.randn(3, 3), torch.randn(3)]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    optimizer = torch.optim.AdamW(parameters, lr=0.1, foreach=True)
    optimizer.step()

    def fn() -> None:
        optimizer.step()

    return fn, ()


PROGRAMS: dict[str, Program] = {
    "mlp": Program(_mlp), "conv_batch_norm": Program(_conv_batch_norm), "dropout": Program(_dropout),
    "dynamic": Program(_dynamic, dynamic=True), "constants": Program(_constants),
    "complex": Program(_complex), "mutation": Program(_mutation), "cond": Program(_cond),
    "while_loop": Program(_while_loop), "scan": Program(_scan), "map": Program(_map),
    "flex_attention": Program(_flex_attention), "views": Program(_views), "low_precision": Program(_low_precision),
    "optimizer": Program(_optimizer, fullgraph=False),
    "gpt2": Program(lambda: (GPT2(), (torch.randint(0, 100, (2, 8)),))),
    "llama": Program(lambda: (Llama(2), (torch.randint(0, 100, (2, 8)),))),
    "llama_dynamic": Program(lambda: (Llama(1), (torch.randint(0, 100, (2, 8)),)), dynamic=True),
}

_HEAVY = {"gpt2", "llama", "llama_dynamic"}


def program_names(*names: str) -> list[Any]:
    """Names of programs (all without arguments) for parametrize; those that take seconds to capture are marked."""
    return [pytest.param(n, marks=pytest.mark.heavy if n in _HEAVY else ()) for n in names or PROGRAMS]
