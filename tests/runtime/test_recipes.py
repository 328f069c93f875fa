"""Recipes: what the caller makes of its own tensors and the pieces has the bits and strides of the graph's value."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from genie_dynamo.core.plan import Plan, verify_plan
from genie_dynamo.core.rebuild import Rebuild, Step
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.runtime.client.recipes import Recipe
from tests.captured import Captured, capture

CACHE, WINDOW = torch.randn(2, 3, 8, 4), torch.randn(2, 3, 7, 4)
X, AT = torch.randn(2, 3, 1, 4), torch.tensor([5])


def append(cache: Tensor, x: Tensor) -> Tensor:
    return torch.cat([cache, x * 2], -2)


def append_in_front(cache: Tensor, x: Tensor) -> Tensor:
    return torch.cat([x * 2, cache], 2)


def append_twice(cache: Tensor, x: Tensor) -> Tensor:
    return torch.cat([torch.cat([cache, x * 2], 2), x * 3], 2)


def append_and_crop(window: Tensor, x: Tensor) -> Tensor:
    return torch.cat([window, x * 2], -2)[:, :, -7:]


def append_transposed(cache: Tensor, x: Tensor) -> Tensor:
    return torch.cat([cache.transpose(1, 2), (x * 2).transpose(1, 2)], 1).transpose(1, 2).clone()


def write_by_index(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    cache.index_copy_(2, at, x * 2)
    return cache.sum()


def write_by_brackets(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    cache[:, :, at] = x * 2
    return cache.sum()


def write_by_part_of_an_index(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    return cache.index_copy(2, at[:1], x * 2)


def write_a_slice(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, :, 3:4] = x * 2
    return cache.sum()


def write_a_row(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, :, 3] = (x * 2).squeeze(2)
    return cache.sum()


def shift_window(window: Tensor, x: Tensor) -> Tensor:
    window.copy_(torch.cat([window[:, :, 1:], x * 2], 2))
    return window.sum()


def roll_and_write(window: Tensor, x: Tensor) -> Tensor:
    window.copy_(window.roll(-1, 2))
    window[:, :, -1:] = x * 2
    return window.sum()


def shift_by_a_view_of_itself(cache: Tensor, x: Tensor) -> Tensor:
    cache[:, :, :7] = cache[:, :, 1:].clone()
    cache[:, :, 7:] = x * 2
    return cache.sum()


def planned(fn: Callable[..., Any], *args: Tensor) -> tuple[Captured, Plan]:
    (graph,) = capture(fn, *args)
    (outputs,) = graph.gm.graph.output_node().args
    facts = GraphFacts(kind="inference", static_inputs=(), bumped=frozenset(), num_outputs=len(outputs))
    return graph, plan_graph(graph.gm, facts, keep_state=True)


def values_of(graph: Captured, names: set[str]) -> dict[str, Any]:
    """What nodes of the graph make of the captured inputs."""
    found: dict[str, Any] = {}

    class Watch(torch.fx.Interpreter):
        def run_node(self, n: torch.fx.Node) -> Any:
            value = super().run_node(n)
            if n.name in names:
                found[n.name] = value.clone() if isinstance(value, Tensor) and n.op == "placeholder" else value
            return value

    with torch.no_grad():
        Watch(graph.gm).run(*[i.clone() if isinstance(i, Tensor) else i for i in graph.inputs])
    return found


@pytest.mark.parametrize(("fn", "args"), [
    (append, (CACHE, X)), (append_in_front, (CACHE, X)), (append_twice, (CACHE, X)), (append_and_crop, (WINDOW, X)),
    (append_transposed, (CACHE, X)), (write_by_index, (CACHE, X, AT)), (write_by_brackets, (CACHE, X, AT)),
    (write_by_part_of_an_index, (CACHE, X, torch.tensor([5, 5]))), (write_a_slice, (CACHE, X)),
    (write_a_row, (CACHE, X)), (shift_window, (WINDOW, X)), (roll_and_write, (WINDOW, X)),
    (shift_by_a_view_of_itself, (CACHE, X)),
    (append, (CACHE.to(memory_format=torch.channels_last), X.to(memory_format=torch.channels_last))),
    (append, (CACHE.bfloat16(), X.double())),
])
def test_a_rebuilt_value_is_that_of_the_graph(fn: Callable[..., Any], args: tuple[Tensor, ...]) -> None:
    graph, plan = planned(fn, *args)
    verify_plan(plan)
    assert Plan.from_json(plan.to_json()) == plan
    (rebuild,) = plan.rebuilds
    values = values_of(graph, {rebuild.value, *rebuild.names("piece")})
    expected = values.pop(rebuild.value)
    assert sum(v.nbytes for v in values.values() if isinstance(v, Tensor)) < expected.nbytes
    pieces = {name: value.clone() if isinstance(value, Tensor) else value for name, value in values.items()}
    targets = [index for index, name in plan.mutations if name == rebuild.value]
    recipe = Recipe(rebuild, plan, targets[0] if targets else None)
    inputs = [i.clone() if isinstance(i, Tensor) else i for i in graph.inputs]
    assert recipe.applies(inputs, pieces)
    if targets:
        recipe.write(inputs[targets[0]], inputs, pieces)
        made = inputs[targets[0]]
    else:
        made = recipe.make(inputs, pieces)
        assert not made._is_view()
    assert torch.equal(made, expected) and made.stride() == expected.stride() and made.dtype == expected.dtype


@torch.no_grad()
def test_an_append_is_begun_before_its_rows_come() -> None:
    graph, plan = planned(append, CACHE, X)
    (rebuild,) = plan.rebuilds
    recipe, inputs = Recipe(rebuild, plan, None), graph.inputs
    (piece,) = rebuild.names("piece")
    assert recipe.begin(inputs) is None, "nothing tells yet how many rows a call brings"
    rows = torch.randn_like(X)
    recipe.make(inputs, {piece: rows})
    begun = recipe.begin(inputs)
    assert begun is not None
    made = recipe.make(inputs, {piece: rows}, begun)
    assert made is begun and torch.equal(made, torch.cat([CACHE, rows], -2)) and not made._is_view()
    other = recipe.begin(inputs)
    many = torch.randn(2, 3, 5, 4)
    made = recipe.make(inputs, {piece: many}, other)
    assert made is not other and torch.equal(made, torch.cat([CACHE, many], -2)), "another number of rows came"
    begun = recipe.begin(inputs)
    assert begun is not None and begun.shape[2] == 13
    wide = recipe.make(inputs, {piece: many.double()}, begun)
    assert wide.dtype == torch.float64, "the rows decide the type, as in eager"


def adds_to_the_cache(cache: Tensor, x: Tensor) -> Tensor:
    return torch.cat([cache + 1, x * 2], 2)


def accumulates(cache: Tensor, x: Tensor, at: Tensor) -> Tensor:
    cache.index_put_((torch.arange(2), torch.arange(2), at.expand(2)), x.sum(), accumulate=True)
    return cache.sum()


def reads_what_it_overwrites(cache: Tensor, x: Tensor) -> Tensor:
    out = torch.cat([cache, x * 2], 2)
    cache.mul_(2)
    return out


def crops_to_nothing_but_new(cache: Tensor, x: Tensor) -> Tensor:
    return torch.cat([cache, (x * 2).expand(2, 3, 64, 4)], 2)[:, :, 0:0].clone()


@pytest.mark.parametrize(("fn", "args"), [
    (adds_to_the_cache, (CACHE, X)), (accumulates, (CACHE, X, AT)), (reads_what_it_overwrites, (CACHE, X)),
    (crops_to_nothing_but_new, (CACHE, X))])
def test_what_is_more_than_moving_or_saves_nothing_comes_whole(fn: Callable[..., Any],
                                                               args: tuple[Tensor, ...]) -> None:
    _, plan = planned(fn, *args)
    assert not plan.rebuilds and plan.state


def test_an_index_that_occurs_twice_is_refused() -> None:
    _, plan = planned(write_by_index, CACHE, torch.randn(2, 3, 2, 4), torch.tensor([5, 6]))
    (rebuild,) = plan.rebuilds
    recipe = Recipe(rebuild, plan, 0)
    (index,) = [i for i, name in enumerate(plan.inputs) if i == 2]
    assert recipe.applies([CACHE, X, torch.tensor([5, 6])], {})
    args: list[Any] = [CACHE, X, torch.tensor([5, 5])]
    assert index == 2 and not recipe.applies(args, {})


def test_the_last_row_under_two_names_is_refused() -> None:
    _, plan = planned(write_by_brackets, CACHE, torch.randn(2, 3, 2, 4), torch.tensor([5, 6]))
    recipe = Recipe(plan.rebuilds[0], plan, 0)
    assert recipe.applies([CACHE, X, torch.tensor([-1, -2])], {})
    assert not recipe.applies([CACHE, X, torch.tensor([-1, 7])], {})


@pytest.mark.parametrize(("step", "said"), [
    (Step(op="aten.add.Tensor", args=(("input", "a"), 1)), "more than move"),
    (Step(op="aten.clone.default", args=(("step", 0),)), "reads step 0"),
    (Step(op="aten.clone.default", args=("a",)), "not plain data"),
    (Step(op="aten.clone.default", args=(("piece", "nobody"),)), "which no fragment makes"),
    (Step(op="aten.clone.default", args=(("input", "nobody"),)), "which is no input"),
])
def test_a_recipe_that_breaks_a_rule_is_found(step: Step, said: str) -> None:
    import dataclasses

    from genie_dynamo.core.errors import PlanError

    _, plan = planned(append, CACHE, X)
    bad = dataclasses.replace(plan, rebuilds=(Rebuild(value=plan.rebuilds[0].value, steps=(step,)),))
    with pytest.raises(PlanError, match=said):
        verify_plan(bad)
