"""The flat executor: the same bits as the graph itself, early freeing, waiting, time slices, streamed outputs."""
from __future__ import annotations

import threading
import time
import timeit
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.fragment import Constant, ConstantSpec, GraphSpec, NodeSpec, Subgraph, Value, decode, encode
from genie_dynamo.runtime.flat import MISSING, FlatPlan, RunStatus
from genie_dynamo.runtime.steps import check_device
from tests.captured import PROGRAMS, Captured, Lowered, assert_bit_equal, copies, lower_whole, program_names

CPU = torch.device("cpu")


def node(target: str, *args: Any, **kwargs: Any) -> NodeSpec:
    return NodeSpec(f"{target.split('::')[1].split('.')[0]}", target, args, kwargs)


def plan_of(num_inputs: int, nodes: list[NodeSpec], *outputs: Any, **fields: Any) -> FlatPlan:
    return FlatPlan(GraphSpec(num_inputs, tuple(nodes), outputs, **fields), device=CPU)


def assert_runs_equal(run: Callable[[list[Any]], list[Any]], graph: Captured, lowered: Lowered) -> None:
    torch.manual_seed(7)
    outputs, inputs_after = graph.expected()
    state = torch.get_rng_state()
    torch.manual_seed(7)
    values = run(copies(graph.inputs))
    assert torch.equal(torch.get_rng_state(), state)
    for actual, expected in zip(values[: lowered.num_outputs], outputs, strict=True):
        assert_bit_equal(actual, expected)
    for index, value in zip(lowered.mutated_inputs, values[lowered.num_outputs :], strict=True):
        assert torch.equal(value.expand_as(inputs_after[index]), inputs_after[index])


def run_in_slices(plan: FlatPlan) -> Callable[[list[Any]], list[Any]]:
    """Inputs come one by one, the time slice is always used up, outputs are taken from the stream."""

    def run(inputs: list[Any]) -> list[Any]:
        streamed: dict[int, Any] = {}
        flat = plan.start([MISSING] * len(inputs))
        while (status := flat.resume(time.monotonic(), streamed.__setitem__)) is not RunStatus.DONE:
            if status is RunStatus.WAITING:
                assert flat.waiting_for is not None
                flat.supply(flat.waiting_for, inputs[flat.waiting_for])
        assert flat.outputs is not None
        assert sorted(streamed) == list(range(len(flat.outputs)))
        for index, value in enumerate(flat.outputs):
            assert_bit_equal(streamed[index], value)
        return [streamed[index] for index in range(len(flat.outputs))]

    return run


@pytest.mark.parametrize("name", program_names())
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_captured_graph_runs_bit_equal(name: str) -> None:
    graphs = PROGRAMS[name].graphs()
    assert graphs
    for graph in graphs:
        lowered = lower_whole(graph.gm)
        spec = decode(encode(lowered.spec))
        assert spec == lowered.spec
        plan = FlatPlan(spec, device=CPU)
        assert_runs_equal(plan.run, graph, lowered)
        assert_runs_equal(run_in_slices(plan), graph, lowered)


def test_takes_the_inputs() -> None:
    plan = plan_of(1, [node("aten::neg.default", Value(0))], Value(1))
    inputs = [torch.ones(2)]
    assert plan.run(inputs)[0].tolist() == [-1, -1]
    assert inputs == []


def test_frees_values_after_their_last_use() -> None:
    """Both the input and the intermediate are gone when a later input is still missing."""
    plan = plan_of(
        2,
        [node("aten::neg.default", Value(0)), node("aten::exp.default", Value(2)), node("aten::sin.default", Value(3)),
         node("aten::add.Tensor", Value(4), Value(1))],
        Value(5),
    )
    first = torch.ones(3)
    gone = weakref.ref(first)
    run = plan.start([first, MISSING])
    del first
    assert run.resume() is RunStatus.WAITING
    assert gone() is None
    assert [type(value) for value in run._registers if isinstance(value, torch.Tensor)] == [torch.Tensor]


def test_frees_an_unused_input_at_once() -> None:
    plan = plan_of(2, [node("aten::neg.default", Value(0))], Value(2))
    unused = torch.ones(3)
    gone = weakref.ref(unused)
    run = plan.start([torch.ones(1), unused])
    del unused
    assert gone() is None
    assert run.resume() is RunStatus.DONE


def test_waits_for_the_input_it_needs_next() -> None:
    plan = plan_of(
        3, [node("aten::neg.default", Value(0)), node("aten::add.Tensor", Value(3), Value(2)),
            node("aten::add.Tensor", Value(4), Value(1))], Value(5),
    )
    run = plan.start([MISSING, MISSING, MISSING])
    order = []
    while run.resume() is RunStatus.WAITING:
        assert run.waiting_for is not None and run.is_missing(run.waiting_for)
        order.append(run.waiting_for)
        run.supply(run.waiting_for, torch.tensor(1.0 + run.waiting_for))
    assert order == [0, 2, 1]
    assert run.outputs is not None and run.outputs[0].item() == -1 + 3 + 2
    with pytest.raises(ValueError, match="input 0 is not missing"):
        run.supply(0, torch.ones(1))


def test_does_not_wait_for_an_input_nobody_reads() -> None:
    plan = plan_of(2, [node("aten::neg.default", Value(0))], Value(2))
    run = plan.start([torch.ones(1), MISSING])
    assert run.resume() is RunStatus.DONE


def test_waits_for_an_input_that_is_an_output() -> None:
    plan = plan_of(2, [node("aten::neg.default", Value(0))], Value(2), Value(1))
    run = plan.start([torch.ones(1), MISSING])
    seen: dict[int, Any] = {}
    assert run.resume(on_output=seen.__setitem__) is RunStatus.WAITING
    assert run.waiting_for == 1 and sorted(seen) == [0]
    run.supply(1, 5)
    assert run.resume(on_output=seen.__setitem__) is RunStatus.DONE
    assert seen[1] == 5 and run.outputs is not None and run.outputs[1] == 5


def test_streams_outputs_while_it_runs() -> None:
    """An output is reported as soon as its node has run, before later inputs have come; once for each index."""
    plan = plan_of(
        2, [node("aten::neg.default", Value(0)), node("aten::add.Tensor", Value(2), Value(1))],
        Value(2), Value(3), Value(2), None, 4,
    )
    run = plan.start([torch.ones(1), MISSING])
    seen: list[int] = []
    assert run.resume(on_output=lambda index, _: seen.append(index)) is RunStatus.WAITING
    assert sorted(seen) == [0, 2, 3, 4]
    run.supply(1, torch.ones(1))
    assert run.resume(on_output=lambda index, _: seen.append(index)) is RunStatus.DONE
    assert sorted(seen) == [0, 1, 2, 3, 4]


def test_an_in_place_op_delays_the_report_of_what_it_may_change() -> None:
    plan = plan_of(
        1, [node("aten::neg.default", Value(0)), node("aten::sin.default", Value(1)),
            node("aten::add_.Tensor", Value(1), 1.0)], Value(1),
    )
    seen: list[float] = []
    run = plan.start([torch.ones(1)])
    while run.resume(time.monotonic(), lambda _, value: seen.append(value.item())) is not RunStatus.DONE:
        pass
    assert seen == [0.0]


def test_yields_when_the_time_slice_is_used_up() -> None:
    nodes = [node("aten::neg.default", Value(k)) for k in range(40)]
    plan = plan_of(1, nodes, Value(40))
    run = plan.start([torch.ones(1)])
    yields = 0
    while run.resume(time.monotonic()) is RunStatus.YIELDED:
        yields += 1
    assert 5 <= yields <= 40
    assert run.busy_s > 0
    assert run.resume() is RunStatus.DONE


def test_an_error_names_the_node_and_its_arguments() -> None:
    plan = plan_of(2, [NodeSpec("scores", "aten::mm.default", (Value(0), Value(1)))], Value(2))
    for attempt in (lambda i: plan.run(i), lambda i: plan.start(i).resume()):
        with pytest.raises(RuntimeError) as caught:
            attempt([torch.ones(2, 3), torch.ones(2, 3, dtype=torch.float32)])
        assert caught.value.__notes__ == ["in node scores = aten::mm.default(float32[2, 3], float32[2, 3])"]


def test_an_error_in_a_subgraph_names_both_nodes() -> None:
    inner = GraphSpec(1, (NodeSpec("inside", "aten::mm.default", (Value(0), Value(0))),), (Value(1),))
    plan = plan_of(
        1, [NodeSpec("branch", "higher_order::cond", (True, Subgraph(0), Subgraph(0), (Value(0),)))], Value(1),
        subgraphs=(inner,),
    )
    with pytest.raises(RuntimeError) as caught:
        plan.run([torch.ones(2, 3)])
    assert [note.split(" = ")[0] for note in caught.value.__notes__] == ["in node inside", "in node branch"]


def test_refuses_another_number_of_inputs() -> None:
    with pytest.raises(ValueError, match="takes 2 inputs, got 1"):
        plan_of(2, [], Value(0)).run([torch.ones(1)])


def test_leaves_grad_mode_as_it_was() -> None:
    plan = plan_of(1, [node("aten::neg.default", Value(0))], Value(1))
    weight = torch.ones(2, requires_grad=True)
    assert torch.is_grad_enabled()
    assert not plan.run([weight])[0].requires_grad
    assert torch.is_grad_enabled()


def test_constants_are_not_changed_by_runs() -> None:
    plan = plan_of(
        0, [node("aten::lift_fresh_copy.default", Constant(0)), node("aten::add_.Tensor", Value(0), 1)], Value(1),
        constants=(ConstantSpec.from_tensor(torch.zeros(2)),),
    )
    assert [plan.run([])[0].tolist() for _ in range(2)] == [[1, 1], [1, 1]]


def test_a_constant_that_is_an_output_is_a_copy() -> None:
    plan = plan_of(0, [], Constant(0), constants=(ConstantSpec.from_tensor(torch.zeros(2)),))
    plan.run([])[0].add_(1)
    assert plan.run([])[0].tolist() == [0, 0]


def test_refuses_an_op_without_a_kernel_for_the_device() -> None:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
    with pytest.raises(UnsupportedGraphError, match="has no kernel for cuda"):
        check_device(flash, "aten::_scaled_dot_product_flash_attention_for_cpu.default", torch.device("cuda"))
    check_device(torch.ops.aten.matmul.default, "aten::matmul.default", torch.device("cuda"))


def test_one_plan_runs_in_several_threads() -> None:
    plan = plan_of(1, [node("aten::add.Tensor", Value(0), Value(k)) for k in range(20)], Value(20))
    results: list[bool] = []

    def work(seed: int) -> None:
        for step in range(50):
            value = torch.full((4,), float(seed + step))
            results.append(torch.equal(plan.run([value])[0], plan_of_reference(value)))

    def plan_of_reference(value: torch.Tensor) -> torch.Tensor:
        values = [value]
        for k in range(20):
            values.append(value + values[k])
        return values[-1]

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 200


BINARY = ("aten::add.Tensor", "aten::mul.Tensor", "aten::maximum.default")
UNARY = ("aten::neg.default", "aten::sin.default", "aten::t.default")


@st.composite
def random_graphs(draw: st.DrawFn) -> GraphSpec:
    """Any DAG of a few ops, any of its values as outputs, also several times."""
    num_inputs = draw(st.integers(1, 4))
    nodes = []
    for j in range(draw(st.integers(0, 25))):
        earlier = st.integers(0, num_inputs + j - 1).map(Value)
        kind = draw(st.integers(0, 3))
        if kind == 0:
            nodes.append(node(draw(st.sampled_from(UNARY)), draw(earlier)))
        elif kind == 1:
            nodes.append(node(draw(st.sampled_from(BINARY)), draw(earlier), draw(earlier)))
        elif kind == 2:
            nodes.append(node("aten::add.Tensor", draw(earlier), draw(earlier), alpha=draw(st.integers(-2, 2))))
        else:
            parts = draw(st.lists(earlier, min_size=1, max_size=3))
            nodes.append(node("aten::stack.default", parts, 0))
            nodes.append(node("aten::sum.dim_IntList", Value(num_inputs + len(nodes) - 1), [0]))
    values = st.integers(0, num_inputs + len(nodes) - 1).map(Value)
    nodes = _renumbered(nodes, num_inputs)
    outputs = draw(st.lists(values, max_size=5))
    return GraphSpec(num_inputs, tuple(nodes), tuple(outputs))


def _renumbered(nodes: list[NodeSpec], num_inputs: int) -> list[NodeSpec]:
    """References stay earlier than their users, and stacks (three dimensions) are read by their sums only."""
    stacks = {num_inputs + j for j, n in enumerate(nodes) if n.target == "aten::stack.default"}

    def fixed(arg: Any, j: int, reads_stack: bool) -> Any:
        if isinstance(arg, list):
            return [fixed(item, j, reads_stack) for item in arg]
        if isinstance(arg, Value) and not reads_stack and (arg.index in stacks or arg.index >= num_inputs + j):
            return Value(0)
        return arg

    return [
        NodeSpec(n.name, n.target, tuple(fixed(a, j, n.target == "aten::sum.dim_IntList") for a in n.args), n.kwargs)
        for j, n in enumerate(nodes)
    ]


def reference(spec: GraphSpec, inputs: list[Any]) -> list[Any]:
    """The graph's meaning, by plain evaluation that never forgets a value."""
    from genie_dynamo.core.allowlist import resolve

    values = list(inputs)

    def read(arg: Any) -> Any:
        if isinstance(arg, list):
            return [read(item) for item in arg]
        return values[arg.index] if isinstance(arg, Value) else arg

    for spec_node in spec.nodes:
        arguments = [read(arg) for arg in spec_node.args]
        values.append(resolve(spec_node.target)(*arguments, **spec_node.kwargs))
    return [read(output) for output in spec.outputs]


@given(random_graphs(), st.randoms(use_true_random=False))
@settings(max_examples=150, deadline=None)
def test_random_graphs_run_bit_equal(spec: GraphSpec, random: Any) -> None:
    generator = torch.Generator().manual_seed(random.randrange(1000))
    inputs = [torch.randn(2, 2, generator=generator) for _ in range(spec.num_inputs)]
    expected = reference(spec, inputs)
    plan = FlatPlan(spec, device=CPU)
    for actual in (plan.run(list(inputs)), run_in_slices(plan)(list(inputs))):
        for got, want in zip(actual, expected, strict=True):
            assert_bit_equal(got, want)


def test_python_overhead_of_a_small_mlp() -> None:
    """Under 20 us per run over what calling its ops costs."""
    nodes: list[NodeSpec] = []
    value = Value(0)
    for layer in range(3):
        nodes.append(node("aten::t.default", Value(1 + 2 * layer)))
        nodes.append(node("aten::addmm.default", Value(2 + 2 * layer), value, Value(6 + len(nodes))))
        value = Value(6 + len(nodes))
        if layer < 2:
            nodes.append(node("aten::relu.default", value))
            value = Value(6 + len(nodes))
    plan = plan_of(7, nodes, value)
    inputs = [torch.randn(2, 2)] + [t for _ in range(3) for t in (torch.randn(2, 2), torch.randn(2))]
    transpose, addmm, relu = (getattr(torch.ops.aten, n).default._op for n in ("t", "addmm", "relu"))

    def bare() -> torch.Tensor:
        hidden = inputs[0]
        with torch._C._AutoDispatchBelowAutograd():
            for layer in range(3):
                hidden = addmm(inputs[2 + 2 * layer], hidden, transpose(inputs[1 + 2 * layer]))
                hidden = relu(hidden) if layer < 2 else hidden
        return hidden

    assert torch.equal(plan.run(inputs.copy())[0], bare())
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        runs = 2000
        ours = min(timeit.repeat(lambda: plan.run(inputs.copy()), number=runs, repeat=7)) / runs
        ops = min(timeit.repeat(bare, number=runs, repeat=7)) / runs
    finally:
        torch.set_num_threads(threads)
    assert ours - ops < 20e-6, f"{1e6 * ours:.1f} us a run, {1e6 * ops:.1f} us of it the ops themselves"


def test_a_timed_run_gives_the_seconds_of_each_node() -> None:
    """By a clock that ticks once per reading: a node takes its own step, and one where its arguments are freed."""
    captured = PROGRAMS["mlp"].graphs()[0]
    plan = FlatPlan(lower_whole(captured.gm).spec, device=torch.device("cpu"))
    ticks = iter(range(10_000))
    seconds = plan.run_timed(copies(captured.inputs), clock=lambda: float(next(ticks)))
    assert list(seconds) == [node.name for node in plan.spec.nodes]
    assert min(seconds.values()) >= 1 and sum(seconds.values()) == next(ticks) - 1
