"""Outputs made in memory that is lent: the same bits and strides, nowhere else, and only where nobody else has them."""
from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from genie_dynamo.core.fragment import GraphSpec, NodeSpec, Value
from genie_dynamo.runtime import births
from genie_dynamo.runtime.births import Birth, out_overload
from genie_dynamo.runtime.flat import FlatPlan

CPU = torch.device("cpu")
X, Y = Value(0), Value(1)


class Lender:
    """Lends ordinary memory and remembers it."""

    def __init__(self) -> None:
        self.lent: dict[int, tuple[int, bytearray]] = {}      # address -> (output index, memory)

    def __call__(self, index: int, size_bytes: int) -> bytearray:
        memory = bytearray(b"\xa5") * size_bytes
        self.lent[torch.frombuffer(memory, dtype=torch.uint8).data_ptr()] = index, memory
        return memory

    def index_of(self, tensor: torch.Tensor) -> int | None:
        """The output that the tensor's memory was lent for."""
        found = self.lent.get(tensor.untyped_storage().data_ptr())
        return None if found is None else found[0]


@pytest.fixture(autouse=True)
def small_outputs_count(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(births, "MIN_BYTES", 64)
    with torch.no_grad():
        yield


def plan_of(num_inputs: int, nodes: list[NodeSpec], *outputs: Any, travels: set[int] | None = None) -> FlatPlan:
    return FlatPlan(GraphSpec(num_inputs, tuple(nodes), outputs), device=CPU,
                    travels=frozenset(range(len(outputs)) if travels is None else travels))


def node(target: str, *args: Any, **kwargs: Any) -> NodeSpec:
    return NodeSpec(target.split("::")[1].split(".")[0], target, args, kwargs)


OPS = {
    "mm": node("aten::mm.default", X, Y),
    "addmm": node("aten::addmm.default", X, X, Y, beta=2),
    "add": node("aten::add.Tensor", X, Y, alpha=2),
    "mul by a number": node("aten::mul.Tensor", X, 3.0),
    "softmax": node("aten::_softmax.default", X, -1, False),
    "sum": node("aten::sum.dim_IntList", X, [0], True),
    "cat": node("aten::cat.default", [X, Y], 1),
    "silu": node("aten::silu.default", X),
    "where": node("aten::gt.Tensor", X, Y),
}


@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
@pytest.mark.parametrize("name", OPS)
def test_the_result_is_the_same_and_lies_in_lent_memory(name: str, layout: str) -> None:
    lender, plan, plain = Lender(), plan_of(2, [OPS[name]], Value(2)), plan_of(2, [OPS[name]], Value(2), travels=set())
    for size in (16, 16, 24, 24, 16):
        x, y = torch.randn(size, size), torch.randn(size, size)
        if layout == "transposed":
            x, y = x.t(), y.t()
        (expected,), (made,) = plain.run([x, y]), plan.run([x, y], lender)
        assert made.dtype == expected.dtype and made.stride() == expected.stride()
        assert torch.equal(made, expected)
    assert lender.index_of(made) == 0
    assert len(lender.lent) == 4               # not the first one, which told how large it is


@pytest.mark.parametrize("op", ["relu.default", "clone.default", "rand_like.default", "nonzero.default", "add_.Tensor",
                                "native_layer_norm.default", "view.default", "unbind.int"])
def test_ops_without_a_kernel_that_writes_the_same_elsewhere(op: str) -> None:
    packet, _, overload = op.partition(".")
    assert out_overload(getattr(getattr(torch.ops.aten, packet), overload)) is None


def test_another_look_at_all_of_the_memory_travels_too() -> None:
    nodes = [node("aten::mm.default", X, X), node("aten::view.default", Value(1), [4, 64]),
             node("aten::t.default", Value(2))]
    plan, lender = plan_of(1, nodes, Value(3)), Lender()
    x = torch.randn(16, 16)
    for _ in range(3):
        (made,) = plan.run([x], lender)
    assert lender.index_of(made) == 0 and torch.equal(made, (x @ x).view(4, 64).t())


@pytest.mark.parametrize("second", [
    [],                                                                   # the same value
    [node("aten::slice.Tensor", Value(1), 0, 0, 2)],
    [node("aten::unsqueeze.default", Value(1), 0), node("aten::reshape.default", Value(2), [256])],
    [node("aten::split.Tensor", Value(1), 4), NodeSpec("getitem", "py::operator.getitem", (Value(2), 0), {})],
])
def test_memory_that_two_outputs_share_is_lent_for_none(second: list[NodeSpec]) -> None:
    plan = plan_of(1, [node("aten::mm.default", X, X), *second], Value(1), Value(1 + len(second)), travels={0})
    assert not plan.births


def test_what_follows_by_computing_does_not_share() -> None:
    nodes = [node("aten::mm.default", X, X), node("aten::mul.Tensor", Value(1), 2.0)]
    plan, lender, x = plan_of(1, nodes, Value(1), Value(2)), Lender(), torch.randn(16, 16)
    for _ in range(3):
        made = plan.run([x], lender)
    assert [lender.index_of(t) for t in made] == [0, 1]
    assert torch.equal(made[1], (x @ x) * 2)


def test_nothing_is_borrowed_for_small_results_or_without_a_lender(monkeypatch: pytest.MonkeyPatch) -> None:
    plan, lender, x = plan_of(1, [node("aten::mm.default", X, X)], Value(1)), Lender(), torch.randn(16, 16)
    monkeypatch.setattr(births, "MIN_BYTES", 1 << 20)
    for _ in range(3):
        plan.run([x], lender)
    assert not lender.lent
    (made,) = plan.run([x])
    assert torch.equal(made, x @ x)


def test_where_nothing_is_lent_the_op_makes_its_own() -> None:
    plan, asked = plan_of(1, [node("aten::mm.default", X, X)], Value(1)), []
    x = torch.randn(16, 16)
    for _ in range(3):
        (made,) = plan.run([x], lambda index, size: asked.append((index, size)))
        assert torch.equal(made, x @ x)
    assert asked == [(0, 1024), (0, 1024)]


def _plus(x: torch.Tensor) -> torch.Tensor:
    return x + 1


def _wrong_bits(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    return torch.add(x, 1.001, out=out)


def _raises(x: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    raise RuntimeError("no")


@pytest.mark.parametrize("out", [_wrong_bits, _raises])
def test_a_kernel_that_does_something_else_is_found_out(out: Any) -> None:
    birth, lender, x = Birth(0, _plus, out, "plus"), Lender(), torch.ones(64)
    birth.met(_plus(x))
    assert birth.wanted
    made = birth.make(lender, [x], {})
    assert torch.equal(made, _plus(x)) and lender.index_of(made) is None
    birth.met(made)
    assert not birth.wanted


def test_an_error_of_the_op_is_the_ops() -> None:
    plan, lender = plan_of(2, [node("aten::mm.default", X, Y)], Value(2)), Lender()
    for _ in range(2):
        plan.run([torch.randn(16, 16), torch.randn(16, 16)], lender)
    with pytest.raises(RuntimeError, match="mat1 and mat2") as caught:
        plan.run([torch.randn(16, 16), torch.randn(15, 16)], lender)
    assert "in node mm" in caught.value.__notes__[0]
