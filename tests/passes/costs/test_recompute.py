"""What is computed again: the best of all choices, exact gradients, random numbers drawn once."""
from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import default_partition, make_boxed_func
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.core.hardware import HardwareFacts, LinkFacts
from genie_dynamo.passes.costs.recompute import NEVER, CostPartition, duplicates, may_run_again, values_to_recompute
from tests.passes.costs.tracing import call_node, trace

BOX = HardwareFacts(
    name="box", kind="cpu", source="a test", num_threads=1, matmul_flops_per_s=(("float32", 1e10),),
    elementwise_ops_per_s=(("float32", 1e9),), memory_bytes_per_s=((1, 1e10),), op_overhead_s=1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_the_cut_is_the_best_of_all_choices(seed: int) -> None:
    rng = random.Random(seed)
    graph = fx.Graph()
    nodes = [graph.placeholder("x")]
    for _ in range(6):
        arguments = tuple(rng.sample(nodes, min(len(nodes), rng.randint(1, 2))))
        nodes.append(graph.call_function(torch.add, arguments))
    bring = {node: rng.choice([1.0, 2.0, 5.0, NEVER]) for node in nodes} | {nodes[0]: 0.0}
    again = {node: rng.choice([0.5, 1.5, 4.0]) for node in nodes} | {nodes[0]: NEVER}
    needed = rng.sample(nodes[1:], 3)

    def price(chosen: frozenset[fx.Node]) -> float:
        there = {*needed, *(a for node in chosen for a in node.all_input_nodes)}
        return sum(again[n] for n in chosen) + sum(bring[n] for n in there if n not in chosen)

    best = min(price(frozenset(c)) for k in range(len(nodes) + 1) for c in itertools.combinations(nodes, k))
    chosen = values_to_recompute(nodes, needed, bring.__getitem__, again.__getitem__)
    assert price(chosen) == pytest.approx(best)


def step(model: Callable[..., Any], args: tuple[Any, ...], partition: Any) -> tuple[list[Any], float, list[fx.Node]]:
    """Results and gradients of one step, bytes saved that are not inputs, and the backward's nodes."""
    seen: dict[str, fx.GraphModule] = {}

    def compiler(kind: str) -> Callable[..., Any]:
        def compile_graph(gm: fx.GraphModule, _: Any) -> Any:
            seen[kind] = gm
            return make_boxed_func(gm.forward)
        return compile_graph

    backend = aot_autograd(fw_compiler=compiler("forward"), bw_compiler=compiler("backward"), partition_fn=partition,
                           keep_inference_input_mutations=True)
    torch._dynamo.reset()
    torch.manual_seed(0)
    leaves = [a.detach().clone().requires_grad_() if a.is_floating_point() else a for a in args]
    parameters = list(model.parameters()) if isinstance(model, nn.Module) else []
    out = torch.compile(model, backend=backend, fullgraph=True)(*leaves)
    grads = torch.autograd.grad(out.square().sum(), [*(x for x in leaves if x.requires_grad), *parameters])
    outputs = seen["forward"].graph.output_node().args[0]
    saved = sum(n.meta["val"].nbytes for n in outputs[1:] if isinstance(n, fx.Node) and n.op != "placeholder"
                and isinstance(n.meta["val"], torch.Tensor))
    torch._dynamo.reset()
    return [out.detach(), *grads], saved, list(seen["backward"].graph.nodes)


def block(x: torch.Tensor) -> torch.Tensor:
    y = F.gelu(x * 2 + 1)
    return F.dropout(y.softmax(-1).exp().sin(), 0.5, training=True) * y.tanh()


@pytest.mark.parametrize("make", [
    lambda: (block, (torch.randn(8, 16),)),
    lambda: (nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Dropout(0.2), nn.LayerNorm(32), nn.Linear(32, 4),
                           nn.SiLU()), (torch.randn(8, 16),)),
    lambda: (nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2), nn.Hardtanh()),
             (torch.randn(2, 3, 8, 8),)),
])
@pytest.mark.parametrize("price", [0.0, 1e-9, 1.0])
def test_gradients_are_the_same_bits(make: Callable[[], Any], price: float) -> None:
    torch.manual_seed(3)
    model, args = make()
    expected, saved_before, _ = step(model, args, default_partition)
    actual, saved, backward = step(model, args, CostPartition(hardware=BOX, keep_s_per_byte=price))
    assert all(torch.equal(a, e) for a, e in zip(actual, expected, strict=True))
    assert saved == saved_before if price == 0 else saved <= saved_before
    assert not any("dropout.default" in str(n.target) or "bernoulli" in str(n.target) for n in backward)


def test_dear_bytes_are_recomputed_and_dear_ops_are_kept() -> None:
    def fn(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        return ((x @ w).sin().cos().exp() @ w).sin()

    args = (torch.randn(64, 64), torch.randn(64, 64))
    _, all_kept, _ = step(fn, args, default_partition)
    slow_products = replace(BOX, matmul_flops_per_s=(("float32", 1e9),))
    # To keep 16 KB costs 164 us; a product takes 525 us, a sine 45.
    _, few_kept, backward = step(fn, args, CostPartition(hardware=slow_products, keep_s_per_byte=1e-8))
    assert few_kept < all_kept
    targets = [str(n.target) for n in backward]
    assert "aten.sin.default" in targets
    assert targets.count("aten.mm.default") == 4       # the gradients' own products, no more


def test_a_budget_is_kept_where_it_can_be() -> None:
    args = (torch.randn(128, 64),)

    def chain(x: torch.Tensor) -> torch.Tensor:
        for _ in range(8):
            x = (x * 1.5).sin()
        return x

    _, unbounded, _ = step(chain, args, CostPartition(hardware=BOX))
    budget = int(unbounded // 2)
    _, bounded, _ = step(chain, args, CostPartition(hardware=BOX, budget_bytes=budget))
    assert bounded <= budget < unbounded


def test_an_input_that_the_backward_does_not_read_is_not_brought() -> None:
    """Eager lets a caller overwrite it between forward and backward."""
    def fn(x: torch.Tensor) -> torch.Tensor:
        return (x + 1).sin()

    _, saved, backward = step(fn, (torch.randn(4, 4),), CostPartition(hardware=BOX, keep_s_per_byte=1.0))
    assert saved == 64
    assert not any(n.op == "placeholder" and "primals" in n.name for n in backward)


# ---------------------------------------------------------------- forward graphs
def lane(start: int, end: int) -> LinkFacts:
    return LinkFacts(start=str(start), end=str(end), latency_s=1e-4, bytes_per_s=1e8, source="a test")


def test_a_cheap_op_is_applied_on_both_sides() -> None:
    """A mask is made of little, is large, and both workers use it."""
    def fn(x: torch.Tensor, lengths: torch.Tensor) -> Any:
        mask = (torch.arange(512) < lengths[:, None]).float()
        return x * mask, (x + 1) * mask

    gm = trace(fn, torch.randn(64, 512), torch.randint(1, 512, (64,)))
    names = [n.name for n in gm.graph.nodes if n.op == "call_function"]
    worker_of = {name: int(name in names[-2:]) for name in names}                # the sum and the second product
    mask = [name for name in names if worker_of[name] == 0 and "mul" not in name]
    # As small as the lengths themselves: sent, and an op less is run. The same holds of a slice that does nothing.
    mask = [name for name in mask if "unsqueeze" not in name and "slice" not in name]
    assert len(mask) == 3
    cheap, dear = ({worker: dict.fromkeys(names, each) for worker in (0, 1)} for each in (1e-5, 1.0))
    assert duplicates(gm, worker_of, cheap, lane, input_link=lane(-1, 1)) == {1: tuple(mask)}
    assert duplicates(gm, worker_of, dear, lane, input_link=lane(-1, 1)) == {}
    assert duplicates(gm, worker_of, cheap, lane) == {1: tuple(mask)}             # sent by the other worker


def test_a_random_op_is_never_applied_twice() -> None:
    gm = trace(lambda x: torch.rand_like(x) * x, torch.randn(1000, 1000))
    rand, mul = (call_node(gm, op).name for op in ("rand_like", "aten.mul"))
    seconds = {worker: {rand: 0.0, mul: 0.0} for worker in (0, 1)}
    assert duplicates(gm, {rand: 0, mul: 1}, seconds, lane) == {}


def test_ops_of_other_people_never_run_twice() -> None:
    """They may draw random numbers, or count, and their schema need not say so."""
    library = torch.library.Library("somebodys", "DEF")
    library.define("noise(Tensor x) -> Tensor")
    graph = fx.Graph()
    x = graph.placeholder("x")
    known = graph.call_function(torch.ops.aten.exp.default, (x,))
    theirs = graph.call_function(torch.ops.somebodys.noise.default, (x,))
    for node in (x, known, theirs):
        node.meta["val"] = torch.empty(2, device="meta")
    assert may_run_again(known) and not may_run_again(theirs)
    library._destroy()
