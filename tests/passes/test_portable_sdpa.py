"""The portable-SDPA pass: what it rewrites, what it leaves alone and why, and that nothing else changes."""
from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import Tensor, fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from genie_dynamo.core.portable_ops import sdpa
from genie_dynamo.passes.base import CaptureFacts, Match, NoMatch
from genie_dynamo.passes.pipeline import read_capture_facts
from genie_dynamo.passes.portable_sdpa import PortableSdpa

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Backend:
    """Dynamo -> the pass -> AOTAutograd; remembers graphs, outcomes and the ATen ops of attention."""

    def __init__(self, facts: CaptureFacts | None = None) -> None:
        self.facts = facts
        self.graphs: list[fx.GraphModule] = []
        self.outcomes: list[Any] = []
        self.ops: set[str] = set()

    def __call__(self, gm: fx.GraphModule, inputs: Any) -> Any:
        self.outcomes += PortableSdpa().run(gm, self.facts or read_capture_facts())
        self.graphs.append(gm)
        return aot_autograd(fw_compiler=self._keep, keep_inference_input_mutations=True)(gm, inputs)

    def _keep(self, graph: fx.GraphModule, inputs: Any) -> Any:
        for module in graph.modules():
            if isinstance(module, fx.GraphModule):
                self.ops |= {str(n.target) for n in module.graph.nodes if "sdpa" in str(n.target)
                             or "attention" in str(n.target)}
        return make_boxed_func(graph)

    @property
    def matches(self) -> list[Match]:
        return [outcome for outcome in self.outcomes if isinstance(outcome, Match)]

    @property
    def reasons(self) -> list[str]:
        return [outcome.reason for outcome in self.outcomes if isinstance(outcome, NoMatch)]


def run(function: Callable[..., Any], *inputs: Tensor, backend: Backend | None = None, **options: Any) -> tuple[
        Any, Backend]:
    backend = backend or Backend()
    return torch.compile(function, backend=backend, **options)(*inputs), backend


def qkv(*, requires_grad: bool = False, length: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, length, 4, 8).transpose(1, 2).requires_grad_(requires_grad) for _ in range(3))
    return q, k, v


def assert_equal(actual: Any, expected: Any) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    if isinstance(actual, Tensor):
        assert actual.stride() == expected.stride()


# ---------------------------------------------------------------- rewritten
CALLS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {
    "plain": lambda q, k, v: F.scaled_dot_product_attention(q, k, v),
    "by keyword": lambda q, k, v: F.scaled_dot_product_attention(value=v, key=k, query=q, is_causal=True),
    "by position": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, None, 0.0, True),
    "builtin": lambda q, k, v: torch._C._nn.scaled_dot_product_attention(q, k, v, scale=0.5),
    "mask": lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=torch.ones(5, 5).tril().bool()),
    "grouped": lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :2], v[:, :2], enable_gqa=True),
    "three dims": lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0], dropout_p=0),
    "autocast": lambda q, k, v: _autocast(q, k, v),
    "twice": lambda q, k, v: F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v),
}


def _autocast(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.scaled_dot_product_attention(q, k, v)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("train", [False, True])
def test_rewritten_calls_give_what_eager_gives(name: str, train: bool) -> None:
    call, inputs = CALLS[name], qkv(requires_grad=train)
    out, backend = run(call, *inputs, fullgraph=True)
    expected = call(*inputs)
    assert_equal(out, expected)
    assert not backend.reasons and len(backend.matches) == (2 if name == "twice" else 1)
    if train:
        grads, expected_grads = (torch.autograd.grad(x.float().square().sum(), inputs) for x in (out, expected))
        for grad, expected_grad in zip(grads, expected_grads, strict=True):
            torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)
    assert backend.ops == {"genie.sdpa.default"} | ({"genie.sdpa_bw.default"} if train else set())


def test_one_graph_for_all_lengths() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=q.shape[-1] ** -0.5)

    backend = Backend()
    compiled = torch.compile(attention, backend=backend, dynamic=True)
    for length in (3, 7, 64):
        inputs = qkv(length=length)
        assert_equal(compiled(*inputs), attention(*inputs))
    assert len(backend.graphs) == len(backend.matches) == 1


def test_all_meta_is_kept() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = Inner()

        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            out: Tensor = self.inner(q, k, v)
            return out

    class Inner(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v)

    seen: dict[str, Any] = {}

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        (call,) = [node for node in gm.graph.nodes if node.target is F.scaled_dot_product_attention]
        call.meta["custom"] = {"role": "attention"}
        seen["before"] = dict(call.meta)
        PortableSdpa().run(gm, CaptureFacts())
        gm.graph.lint()
        (seen["call"],) = [node for node in gm.graph.nodes if node.target is sdpa]
        (seen["out"],) = seen["call"].users
        return gm.forward

    torch.compile(Model(), backend=backend)(*qkv())
    call, out, before = seen["call"], seen["out"], seen["before"]
    assert out.target is operator.getitem and out.args == (call, 0)
    assert out.meta == before
    assert {key: value for key, value in call.meta.items() if key != "example_value"} == {
        key: value for key, value in before.items() if key != "example_value"}
    assert {"custom", "stack_trace", "nn_module_stack"} <= set(call.meta)
    assert "inner" in str(call.meta["nn_module_stack"])
    example_out, example_lse = call.meta["example_value"]
    assert example_out is before["example_value"]
    real_lse = sdpa(*qkv())[1]
    assert (example_lse.shape, example_lse.stride(), example_lse.dtype) == (
        real_lse.shape, real_lse.stride(), real_lse.dtype)


def test_custom_meta_reaches_forward_and_backward() -> None:
    found: list[tuple[str, Any]] = []

    def keep(graph: fx.GraphModule, inputs: Any) -> Any:
        found.extend((str(node.target), node.meta.get("custom"))
                     for node in graph.graph.nodes if "sdpa" in str(node.target))
        return make_boxed_func(graph)

    def backend(gm: fx.GraphModule, inputs: Any) -> Any:
        for node in gm.graph.nodes:
            node.meta["custom"] = {"role": "attention"}
        PortableSdpa().run(gm, CaptureFacts())
        return aot_autograd(fw_compiler=keep)(gm, inputs)

    inputs = qkv(requires_grad=True)
    torch.compile(CALLS["plain"], backend=backend)(*inputs).sum().backward()
    assert found == [("genie.sdpa.default", {"role": "attention"}), ("genie.sdpa_bw.default", {"role": "attention"})]


def test_nested_graphs_are_rewritten_too() -> None:
    def attention(x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x, x, x)

    def branch(x: Tensor) -> Tensor:
        # Attention in both: torch.cond wants equal strides of both branches' gradients.
        out: Tensor = torch.cond(x.sum() > 0, attention, lambda x: attention(2 * x), (x,))
        return out

    x = qkv()[0].abs()
    for train in (False, True):
        inputs = x.clone().requires_grad_(train)
        out, backend = run(branch, inputs, fullgraph=True)
        assert_equal(out, attention(inputs))
        assert len(backend.matches) == 2 and "genie.sdpa.default" in backend.ops
        if train:
            torch.testing.assert_close(torch.autograd.grad(out.sum(), inputs),
                                       torch.autograd.grad(attention(inputs).sum(), inputs), rtol=0, atol=0)


def test_under_activation_checkpointing() -> None:
    def block(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q.sin(), k, v).cos()

    inputs = qkv(requires_grad=True)
    out, backend = run(lambda q, k, v: checkpoint(block, q, k, v, use_reentrant=False), *inputs, fullgraph=True)
    expected = block(*inputs)
    assert_equal(out, expected)
    for grad, expected_grad in zip(torch.autograd.grad(out.sum(), inputs), torch.autograd.grad(expected.sum(), inputs),
                                   strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)
    assert len(backend.matches) == 1


# ---------------------------------------------------------------- left alone
def _in_sdpa_kernel(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v)


REFUSED: dict[str, tuple[Callable[[Tensor, Tensor, Tensor], Any], str]] = {
    "dropout": (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, dropout_p=0.5), "dropout_p=0.5"),
    "kernels chosen": (_in_sdpa_kernel, "the graph chooses kernels itself"),
    "vmap": (lambda q, k, v: torch.func.vmap(F.scaled_dot_product_attention)(q, k, v), "under a functorch transform"),
    "grad": (lambda q, k, v: torch.func.grad(lambda q: F.scaled_dot_product_attention(q, k, v).sum())(q),
             "under a functorch transform"),
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("name", REFUSED)
def test_what_would_not_be_exact_is_left_alone(name: str) -> None:
    call, reason = REFUSED[name]
    torch.manual_seed(3)
    out, backend = run(call, *qkv(), fullgraph=True)
    assert not backend.matches and len(backend.reasons) == 1 and reason in backend.reasons[0]
    if name != "dropout":
        torch.testing.assert_close(out, call(*qkv()), rtol=1e-5, atol=1e-5)


def test_a_transform_elsewhere_in_the_graph_does_not_matter() -> None:
    def both(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = torch.func.vmap(lambda i: i >= torch.arange(5))(torch.arange(5))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    out, backend = run(both, *qkv(), fullgraph=True)
    assert_equal(out, both(*qkv()))
    assert len(backend.matches) == 1


def test_a_mask_that_wants_a_gradient_is_left_alone() -> None:
    def biased(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias * 2)

    bias = torch.randn(5, 5, requires_grad=True)
    out, backend = run(biased, *qkv(), bias, fullgraph=True)
    assert backend.reasons == ["attn_mask requires a gradient, and genie::sdpa gives it none"]
    expected = torch.autograd.grad(biased(*qkv(), bias).sum(), bias)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), bias), expected)


@pytest.fixture
def flash_off() -> Iterator[None]:
    torch.backends.cuda.enable_flash_sdp(False)
    yield
    torch.backends.cuda.enable_flash_sdp(True)


def test_switched_off_kernels_stop_the_pass(flash_off: None) -> None:
    out, backend = run(CALLS["plain"], *qkv())
    assert "switched off" in backend.reasons[0] and not backend.matches
    assert_equal(out, CALLS["plain"](*qkv()))


def test_forward_mode_differentiation_stops_the_pass() -> None:
    _, backend = run(CALLS["plain"], *qkv(), backend=Backend(CaptureFacts(forward_ad=True)))
    assert "forward-mode" in backend.reasons[0] and not backend.matches


def _graph_with(*, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None,
                **values: Any) -> tuple[fx.GraphModule, fx.Node]:
    """A graph of one call by hand; `values` replaces the example values of query, key, value."""
    graph = fx.Graph()
    inputs = []
    for name in ("query", "key", "value"):
        node = graph.placeholder(name)
        value = values.get(name, torch.randn(2, 4, 5, 8))
        if value is not None:
            node.meta["example_value"] = value
        inputs.append(node)
    call = graph.call_function(F.scaled_dot_product_attention, (*inputs, *args), kwargs or {})
    call.meta["example_value"] = torch.randn(2, 4, 5, 8)
    graph.output(call)
    return fx.GraphModule(nn.Module(), graph), call


class Subclass(torch.Tensor):
    """A tensor that is not a plain one."""


@pytest.mark.parametrize(("options", "reason"), [
    ({"query": None}, "query has no example_value"),
    ({"key": 3}, "key has no example_value"),
    ({"value": torch.randn(4, 8).to_sparse()}, "value is a Tensor of layout torch.sparse_coo"),
    ({"query": torch.randn(2, 4, 5, 8).as_subclass(Subclass)}, "query is a Subclass"),
    ({"query": torch.empty(2, 4, 5, 8, device="meta")}, "query is on meta"),
    ({"query": torch.ones(2, 4, 5, 8, dtype=torch.int64)}, "query is torch.int64"),
    ({"kwargs": {"mood": "good"}}, "does not know: ['mood']"),
    ({"args": (None, 0.0, 1)}, "is_causal=1 is computed in the graph"),
    ({"args": (None, 0.0, False, None, False, 1, 2)}, "does not know"),
])
def test_each_refusal_says_why(options: dict[str, Any], reason: str) -> None:
    gm, call = _graph_with(**options)
    (outcome,) = PortableSdpa().run(gm, CaptureFacts())
    assert isinstance(outcome, NoMatch) and reason in outcome.reason and outcome.node == call.name
    assert call in gm.graph.nodes and not [node for node in gm.graph.nodes if node.target is sdpa]


def test_a_nested_tensor_is_left_alone() -> None:
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(4, 8)], layout=torch.jagged)
    gm, _ = _graph_with(query=nested)
    (outcome,) = PortableSdpa().run(gm, CaptureFacts())
    assert isinstance(outcome, NoMatch) and "not a plain strided tensor" in outcome.reason


def test_a_graph_without_attention_is_not_touched() -> None:
    out, backend = run(lambda q, k, v: q + k + v, *qkv())
    assert backend.outcomes == []
    assert_equal(out, sum(qkv()))


# ---------------------------------------------------------------- real architectures, tiny
def _tiny(name: str) -> nn.Module:
    import transformers as T

    torch.manual_seed(0)
    if name == "gpt2":
        return T.GPT2LMHeadModel(T.GPT2Config(
            n_layer=2, n_head=4, n_embd=32, vocab_size=97, n_positions=64, attn_pdrop=0.0, resid_pdrop=0.0,
            embd_pdrop=0.0, bos_token_id=1, eos_token_id=2))
    if name == "llama":
        return T.LlamaForCausalLM(T.LlamaConfig(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, hidden_size=32, intermediate_size=64,
            vocab_size=97))
    return T.BertForMaskedLM(T.BertConfig(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=64, vocab_size=97,
        attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0))


@pytest.mark.heavy
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ["gpt2", "llama", "bert"])
def test_transformers_models_are_equal_to_the_bit(name: str, train: bool) -> None:
    model = _tiny(name).train(train)
    ids = torch.randint(0, 97, (2, 11))
    padding = torch.ones_like(ids)
    padding[1, 7:] = 0

    def outputs(run_model: Any) -> tuple[Tensor, list[Tensor | None]]:
        model.zero_grad()
        with torch.set_grad_enabled(train):
            logits = run_model(input_ids=ids, attention_mask=padding).logits
        if train:
            logits.square().mean().backward()
        return logits.detach(), [p.grad.clone() if p.grad is not None else None for p in model.parameters()]

    backend = Backend()
    (logits, grads), (expected, expected_grads) = outputs(torch.compile(model, backend=backend)), outputs(model)
    assert_equal(logits, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)
    assert len(backend.matches) == 2 and not backend.reasons
    assert backend.ops == {"genie.sdpa.default"} | ({"genie.sdpa_bw.default"} if train else set())
