"""Graphs over parts of their batch give what the whole graph gives; what mixes rows is refused, with the reason."""
from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.parts import rows_for_backward
from genie_dynamo.passes.facts import GraphFacts, read_facts
from genie_dynamo.passes.rows.flow import NotPipelined
from genie_dynamo.passes.rows.registry import known_ops
from genie_dynamo.passes.rows.split import EARLY, SplitGraph, split_batch
from tests.captured import capture, copies
from tests.passes.test_partition import capture as capture_graph

aten = torch.ops.aten


class Holder(nn.Module):
    """A function whose weights are parameters, as a model's are."""

    def __init__(self, fn: Callable[..., Any]) -> None:
        super().__init__()
        self.fn = fn
        self.w = nn.Parameter(W.clone(), requires_grad=False)
        self.table = nn.Parameter(TABLE.clone(), requires_grad=False)
        self.layers = nn.ParameterList(nn.Parameter(W.roll(k, 0), requires_grad=False) for k in range(3))

    def forward(self, *args: Any) -> Any:
        return self.fn(self, *args)


def captured(model: nn.Module, *args: Any) -> tuple[fx.GraphModule, GraphFacts, list[Any]]:
    """The inference graph of a call, what is known about it, and its inputs."""
    found: list[Any] = []

    def keep(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        facts = read_facts(gm, "inference")

        def run(inputs: list[Any]) -> Any:
            found.append((gm, facts, copies(inputs)))
            return gm.forward(*inputs)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    with torch.no_grad():
        torch.compile(model, backend=aot_autograd(fw_compiler=keep, keep_inference_input_mutations=True))(*args)
    graph: tuple[fx.GraphModule, GraphFacts, list[Any]]
    (graph,) = found
    return graph


def both(fn: Callable[..., Any], *args: Any, parts: int = 4) -> tuple[list[Any], list[Any], SplitGraph]:
    """Results of the whole graph, and of the graph over parts, with the inputs after it."""
    gm, facts, inputs = captured(Holder(fn), *args)
    expected, actual = copies(inputs), copies(inputs)
    split = split_batch(gm, facts, parts)
    with torch.no_grad():
        return [*gm(*expected), *expected], [*split.gm(*actual), *actual], split


def equal(fn: Callable[..., Any], *args: Any, parts: int = 4) -> SplitGraph:
    expected, actual, split = both(fn, *args, parts=parts)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    for mine, other in zip(actual, expected, strict=True):
        if isinstance(other, torch.Tensor) and other.is_contiguous():
            assert mine.stride() == other.stride()
    return split


def put(tensor: torch.Tensor, where: Any, new: torch.Tensor) -> torch.Tensor:
    written = tensor.clone()
    written[where] = new
    return written


W = torch.randn(16, 16, generator=torch.Generator().manual_seed(0)) / 4
TABLE = torch.randn(11, 16, generator=torch.Generator().manual_seed(1))


def x(*shape: int) -> torch.Tensor:
    return torch.randn(*(shape or (8, 16)), generator=torch.Generator().manual_seed(2))


X, IDS = (x(),), torch.arange(24).view(8, 3) % 11
OPS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "broadcast": (lambda m, a: (a @ m.w) * torch.arange(8.0)[:, None] + torch.ones(16), X),
    "view and permute": (
        lambda m, a: (a.view(24, 16) @ m.w).view(8, 3, 4, 4).permute(2, 0, 1, 3).contiguous().transpose(0, 1)
        .reshape(8, 48), (x(8, 3, 16),)),
    "rows not in front": (
        lambda m, a: (a @ m.w).transpose(0, 1).softmax(-1).transpose(0, 1).flatten(1), (x(8, 3, 16),)),
    "cat, split, stack, unbind": (
        lambda m, a: torch.stack(torch.cat([a @ m.w, a], 1).split(8, 1), 1).unbind(1)[0], X),
    "slice, select, pad, flip": (
        lambda m, a: F.pad((a @ m.w)[:, 2:9].flip(1), (1, 2)).select(1, 3) + (a @ m.w)[:8, 0], X),
    "expand, repeat, squeeze": (
        lambda m, a: (a @ m.w)[:, None].expand(8, 3, 16).repeat(1, 1, 2).unsqueeze(0).squeeze(), X),
    "reductions": (
        lambda m, a: ((a @ m.w).sum(1), (a @ m.w).amax(1, keepdim=True), (a @ m.w).std(1), (a @ m.w).argmax(1)), X),
    "over rows": (
        lambda m, a: ((a @ m.w).sum(0), (a @ m.w).mean(), (a @ m.w).amax(0), (a @ m.w > 2).any(), (a @ m.w).min()), X),
    "along": (lambda m, a: ((a @ m.w).log_softmax(1), (a @ m.w).cumsum(1), (a @ m.w).topk(3).values), X),
    "contraction over rows": (lambda m, a: (a @ m.w).t() @ a, X),
    "bmm": (lambda m, a: torch.bmm(a @ m.w, (a @ m.w).transpose(1, 2)), (x(8, 3, 16),)),
    "embedding": (lambda m, i: F.embedding(i, m.table) @ m.w, (IDS,)),
    "index by rows": (lambda m, i: (m.table[i] @ m.w).index_select(1, torch.tensor([2, 0])), (IDS,)),
    "gather": (lambda m, a, i: (a @ m.w).gather(1, i), (*X, IDS)),
    "one index among dims": (lambda m, a: (a @ m.w)[:, [1, 4, 4]], X),
    "attention with a mask": (
        lambda m, a, mask: F.scaled_dot_product_attention(a, a @ m.w, a, mask),
        (x(8, 2, 5, 16), torch.ones(8, 1, 5, 5, dtype=torch.bool).tril())),
    "written at places": (
        lambda m, a, c: (c.index_copy(1, torch.tensor([2, 0]), a[:, :2] @ m.w),
                         (a @ m.w).index_fill(1, torch.tensor([1]), 7.0),
                         (a @ m.w).index_add(2, torch.tensor([3, 3]), c[:, :3, :2])), (x(8, 3, 16), x(8, 5, 16))),
    "put at places": (
        lambda m, a, c: (put(c, (slice(None), torch.tensor([2, 0])), a[:, :2] @ m.w),
                         put(a @ m.w, (slice(None), torch.tensor([1]), torch.tensor([0, 5])), torch.tensor(3.0)),
                         put(c.transpose(0, 1), (torch.tensor([4]), slice(None), torch.tensor([1])),
                             (a @ m.w)[:, 0, :1].t())), (x(8, 3, 16), x(8, 5, 16))),
    "attention without heads": (lambda m, a: F.scaled_dot_product_attention(a, a @ m.w, a), (x(8, 5, 16),)),
    "pieces of the last dim": (lambda m, a: (a @ m.w).unsafe_split(8, 1)[1] + (a @ m.w).unsafe_chunk(2, 1)[0], X),
    "attention of all rows to expanded values": (      # kernels want the last dim's elements one after the other
        lambda m, a, mask: F.scaled_dot_product_attention(*[(a @ m.w).view(8, 1, 1, 16).expand(-1, -1, 8, -1)] * 3,
                                                          attn_mask=mask), (*X, x(8, 8))),
    "the same bytes in another dtype": (
        lambda m, a: (((a @ m.w).view(torch.int32) ^ 1 << 20).view(torch.float32),
                      (a @ m.w).view(torch.int16).view(torch.float32)), X),
    "norms": (lambda m, a: F.group_norm(F.layer_norm(a @ m.w, (16,)), 4), X),
    "convolution": (
        lambda m, a: F.avg_pool2d(F.max_pool2d(F.conv2d(a, torch.ones(4, 3, 3, 3)), 2), 2).mean((2, 3)),
        (x(8, 3, 20, 20),)),
    "losses": (
        lambda m, a, t: (F.cross_entropy(a @ m.w, t), F.mse_loss(a @ m.w, a),
                         F.cross_entropy(a @ m.w, t, torch.arange(16.0))),
        (*X, torch.tensor([1, -100, 3, 15, -100, -100, -100, -100]))),
    "what has no rows, too": (lambda m, a, p: (a @ m.w) + m.table[p], (x(8, 8, 16), torch.arange(8))),
    "scatter": (lambda m, a, i: (a @ m.w).scatter(1, i, a[:, :3]), (*X, IDS)),
    "a new constant": (lambda m, a: (a @ m.w) * (a @ m.w).new_ones(16) + torch.zeros_like(a), X),
}


@pytest.mark.parametrize("name", OPS)
def test_ops_give_what_the_whole_batch_gives(name: str, fresh_dynamo: None) -> None:
    fn, args = OPS[name]
    split = equal(fn, *args)
    assert sum(part >= 0 for part in split.part.values()) > 4


def conv_net() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
                         nn.Linear(32, 4))


def refusal(model: nn.Module, *args: torch.Tensor, kind: str = "forward", parts: int = 4) -> str:
    with pytest.raises(NotPipelined) as found:
        split_batch(*capture_graph(model, *args, kind=kind), parts)
    return str(found.value)


def test_batch_norm_in_training_is_refused_and_in_evaluation_it_is_not(fresh_dynamo: None) -> None:
    assert "BatchNorm in training" in refusal(conv_net().train(), x(8, 3, 9, 9))
    split_batch(*capture_graph(conv_net().eval(), x(8, 3, 9, 9)), 4)


def test_dropout_after_heavy_work_is_refused(fresh_dynamo: None) -> None:
    net = nn.Sequential(nn.Linear(16, 16), nn.Dropout(0.5), nn.Linear(16, 16)).train()
    assert "random numbers" in refusal(net, x())


def test_what_mixes_rows_before_heavy_work_runs_on_all_of_them_first(fresh_dynamo: None) -> None:
    def fn(m: Any, a: torch.Tensor) -> torch.Tensor:
        normal: torch.Tensor = (a - a.mean(0)) / a.std(0)
        return F.relu(normal @ m.w) @ m.w

    split = equal(fn, x())
    assert any(part == EARLY for part in split.part.values())


@pytest.mark.parametrize("fn, reason", [
    (lambda m, a: (a @ m.w).cumsum(0) @ m.w, "along rows"),
    (lambda m, a: (a @ m.w).std(0) * (a @ m.w), "cannot be put together"),
    (lambda m, a: ((a @ m.w) / (a @ m.w).sum()) @ m.w, "sum over all rows"),
    (lambda m, a: (a @ m.w).flip(0) @ m.w, "moves rows"),
    (lambda m, a: (a @ m.w) @ (a @ m.w).t() @ a, "multiplies rows"),
    (lambda m, a: (a @ m.w).index_copy(0, torch.arange(8).flip(0), a @ m.w) @ m.w, "other rows"),
    (lambda m, a: (a @ m.w).index_put((torch.arange(8),), a @ m.w) @ m.w, "other rows"),
    (lambda m, a: (a @ m.w)[1:5] @ m.w, "some of the rows"),
    (lambda m, a: (a @ m.w).view(2, 64) @ torch.ones(64, 2), "equal parts"),
])
def test_dependent_rows_are_refused_with_the_reason(fn: Any, reason: str, fresh_dynamo: None) -> None:
    with pytest.raises(NotPipelined, match=reason):
        both(fn, x())


def test_a_batch_that_is_not_divisible_is_refused_with_the_numbers(fresh_dynamo: None) -> None:
    assert refusal(nn.Linear(16, 16), x(6, 16)).startswith("a batch of 6 rows cannot be cut into 4 equal parts")


def test_a_size_is_not_blamed_for_what_no_size_would_mend(fresh_dynamo: None) -> None:
    assert "BatchNorm in training" in refusal(conv_net().train(), x(6, 3, 9, 9))


def test_nothing_to_gain_is_no_refusal(fresh_dynamo: None) -> None:
    with pytest.raises(NotPipelined) as found:
        split_batch(*capture_graph(nn.ReLU(), x()), 4)
    assert found.value.small


def test_a_step_with_loss_and_backward_in_one_graph_runs_part_after_part(fresh_dynamo: None) -> None:
    """What a part's backward needs of its loss is known before the other parts have run."""
    def step(m: Any, a: torch.Tensor, target: torch.Tensor) -> Any:
        def loss(params: list[torch.Tensor]) -> torch.Tensor:
            h = a
            for weight in params:
                h = torch.tanh(h @ weight)
            return F.cross_entropy(h, target)

        return torch.func.grad_and_value(loss)(list(m.layers))

    split = equal(step, x(), torch.tensor([1, -100, 3, 15, 0, 0, 7, -100]))
    products = [(split.part[n.name], n.name) for n in split.gm.graph.nodes if n.target is aten.mm.default]
    parts = [part for part, _ in products]
    assert parts == sorted(parts), "the backward of a part comes before the forward of the next"
    assert len(parts) >= 4 * (3 + 3 + 2)


def test_outputs_that_share_memory_still_do(fresh_dynamo: None) -> None:
    def fn(m: Any, a: torch.Tensor) -> Any:
        out = a @ m.w
        return out, out.t(), out[:, 0]

    _, actual, _ = both(fn, x())
    assert len({t.untyped_storage().data_ptr() for t in actual[:3]}) == 1


def test_random_ops_keep_their_order(fresh_dynamo: None) -> None:
    def fn(m: Any, a: torch.Tensor) -> torch.Tensor:
        return F.dropout(a, 0.5) @ m.w + torch.rand(16) + F.dropout(torch.ones(8, 16), 0.3)

    gm, facts, inputs = captured(Holder(fn), x())
    split = split_batch(gm, facts, 4)
    torch.manual_seed(3)
    (expected,) = gm(*copies(inputs))
    torch.manual_seed(3)
    (actual,) = split.gm(*copies(inputs))
    torch.testing.assert_close(actual, expected)


def test_every_rule_is_of_an_op_that_exists() -> None:
    for name in known_ops():
        namespace, op = name.split("::")
        assert hasattr(getattr(torch.ops, namespace), op) or name in OPTIONAL, name


OPTIONAL = {f"aten::{name}" for name in (
    "_batch_norm_with_update_functional", "_scaled_dot_product_attention_math_for_cpu", "logical_or")}


def test_parts_of_training_graphs_fit_each_other(fresh_dynamo: None) -> None:
    """Forward over parts, then the backward over parts of what it saved: eager's gradients."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 16))
    gm, facts = capture_graph(net, x(), kind="forward")
    split = split_batch(gm, facts, 4)
    rows = rows_for_backward(split, facts)
    assert rows["tangents_1"] == 0
    graphs = capture(net, x())
    known = {n.name: rows[n.name] for n in graphs[1].gm.graph.nodes if n.op == "placeholder" and n.name in rows}
    backward = split_batch(
        graphs[1].gm, GraphFacts(kind="backward", static_inputs=(), bumped=frozenset(), num_outputs=5), 4, known)
    with torch.no_grad():
        expected, actual = (g(*copies(graphs[1].inputs)) for g in (graphs[1].gm, backward.gm))
    for mine, other in zip(itertools.chain(actual), expected, strict=True):
        torch.testing.assert_close(mine, other)
