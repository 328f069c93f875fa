"""Inductor's code for fragments: equal to the flat plan, dynamic shapes, refusals, and the generators left alone."""
from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.fragment import Constant, ConstantSpec, GraphSpec, NodeSpec, Op, Subgraph, Value
from genie_dynamo.runtime import inductor
from genie_dynamo.runtime.flat import FlatPlan
from genie_dynamo.runtime.inductor import InductorCode, compile_with_inductor
from genie_dynamo.runtime.rebuild import to_graph_module
from genie_dynamo.runtime.shape_guards import ExpectedShapes, form_of, symbolic_inputs, varying_slots
from tests.captured import PROGRAMS, assert_bit_equal, copies, lower_whole, program_names, significant_stride
from tests.tolerances import tolerance_for

CPU = torch.device("cpu")
COMPILE_TIMEOUT_S = 120.0

pytestmark = pytest.mark.filterwarnings("ignore")  # Inductor's own imports and hints; nothing of ours runs in them


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def node(target: str, *args: Any, **kwargs: Any) -> NodeSpec:
    return NodeSpec("node", target, args, kwargs)


def assert_close(actual: list[Any], expected: list[Any]) -> None:
    for got, want in zip(actual, expected, strict=True):
        if not isinstance(want, torch.Tensor):
            assert got == want
            continue
        assert (got.dtype, got.shape, significant_stride(got)) == (want.dtype, want.shape, significant_stride(want))
        tolerance = tolerance_for(want.dtype)
        torch.testing.assert_close(got, want, rtol=tolerance.rtol, atol=tolerance.atol, equal_nan=True)


def dynamic_spec() -> GraphSpec:
    """(n, x[n, 8], w[8]) -> sin(view(cat(x, x), [2n, 8]) * w), 2n."""
    return GraphSpec(
        3,
        (node("py::operator.mul", Value(0), 2), node("aten::cat.default", [Value(1), Value(1)]),
         node("aten::view.default", Value(4), [Value(3), 8]), node("aten::mul.Tensor", Value(5), Value(2)),
         node("aten::sin.default", Value(6))),
        (Value(7), Value(3)),
    )


def dynamic_inputs(size: int) -> list[Any]:
    return [size, torch.randn(size, 8), torch.randn(8)]


# -- rebuilding -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", program_names("mlp", "dynamic", "constants", "cond", "scan", "views", "low_precision"))
def test_a_rebuilt_module_gives_the_same_bits(name: str) -> None:
    for graph in PROGRAMS[name].graphs():
        lowered = lower_whole(graph.gm)
        gm = to_graph_module(lowered.spec, device=CPU)
        with torch.no_grad():
            outputs = gm(*copies(graph.inputs))
        for actual, expected in zip(outputs[: lowered.num_outputs], graph.expected()[0], strict=True):
            assert_bit_equal(actual, expected)


def test_a_rebuilt_module_holds_no_name_of_the_client() -> None:
    spec = GraphSpec(
        1, (NodeSpec("__import__('os').system('true')", "aten::neg.default", (Value(0),)),
            NodeSpec("x", "aten::div.Tensor_mode", (Value(1), Value(0)), {"rounding_mode": "floor'); evil('"})),
        (Value(2),),
    )
    gm = to_graph_module(spec, device=CPU)
    assert [n.name for n in gm.graph.nodes] == ["a0", "n0", "n1", "output"]
    assert "import" not in gm.code and 'rounding_mode = "floor\'); evil(\'"' in gm.code


def test_a_rebuilt_module_checks_its_ops() -> None:
    for bad in (node("aten::from_file.default", "x"), node("higher_order::out_dtype", Op("aten::pin_memory.default"))):
        with pytest.raises(UnsupportedGraphError):
            to_graph_module(GraphSpec(1, (bad,), ()), device=CPU)


# -- compiling ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", program_names("mlp", "conv_batch_norm", "dropout", "cond", "flex_attention", "views"))
def test_compiled_graphs_are_equal(name: str) -> None:
    for graph in PROGRAMS[name].graphs():
        spec = lower_whole(graph.gm).spec
        code = compile_with_inductor(spec, copies(graph.inputs), device=CPU)
        torch.manual_seed(5)
        expected = FlatPlan(spec, device=CPU).run(copies(graph.inputs))
        for _ in range(2):
            torch.manual_seed(5)
            inputs = copies(graph.inputs)
            assert_close(code(inputs), expected)
            assert inputs == []


def test_one_code_serves_all_sizes_of_a_dynamic_graph() -> None:
    code = InductorCode(dynamic_spec(), CPU)
    code.compile_for(dynamic_inputs(5))
    flat = FlatPlan(dynamic_spec(), device=CPU)
    for size in (5, 6, 8, 64, 2):
        inputs = dynamic_inputs(size)
        assert code._choose(code._key(inputs), inputs) == 0
        assert_close(code(list(inputs)), flat.run(list(inputs)))
    assert len(code._variants) == 1


def test_other_sizes_run_flat_until_code_for_them_is_there() -> None:
    """A fixed size changes: the call is right at once, and later served by code with a symbol for it."""
    spec = GraphSpec(1, (node("aten::exp.default", Value(0)), node("aten::neg.default", Value(1))), (Value(2),))
    code = InductorCode(spec, CPU)
    code.compile_for([torch.randn(4, 3)])
    flat = FlatPlan(spec, device=CPU)
    x = torch.randn(7, 3)
    assert_close(code([x]), flat.run([x]))
    assert code.wait(COMPILE_TIMEOUT_S) and len(code._variants) == 2
    for size in (7, 9, 30):
        y = torch.randn(size, 3)
        assert code._choose(code._key([y]), [y]) == 1
        assert_close(code([y]), flat.run([y]))
    for other in (torch.randn(3, 7).t(), torch.randn(7, 3).double(), torch.randn(7)):
        assert_close(code([other]), flat.run([other]))
    code.wait(COMPILE_TIMEOUT_S)


def test_the_number_of_codes_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[int] = []
    monkeypatch.setattr(inductor, "_standalone_compile", lambda gm, examples, mode: compiled.append(1) or gm)
    code = InductorCode(GraphSpec(1, (node("aten::exp.default", Value(0)),), (Value(1),)), CPU)
    code.compile_for([torch.randn(2)])
    for dim in range(2, 12):
        x = torch.randn([2] * dim)
        assert torch.equal(code([x])[0], x.exp())
        assert code.wait(COMPILE_TIMEOUT_S)
    assert len(compiled) == inductor._MAX_VARIANTS


def test_a_graph_that_inductor_refuses_is_an_unsupported_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> Any:
        raise RuntimeError("no lowering\nfor this")

    monkeypatch.setattr(inductor, "_standalone_compile", refuse)
    with pytest.raises(UnsupportedGraphError, match=r"Inductor refuses the fragment: RuntimeError: no lowering$"):
        compile_with_inductor(dynamic_spec(), dynamic_inputs(5), device=CPU)


def test_wrong_number_of_inputs_is_refused() -> None:
    with pytest.raises(ValueError, match="takes 3 inputs, got 1"):
        InductorCode(dynamic_spec(), CPU)([torch.ones(1)])


def test_compiling_in_a_thread_leaves_the_generator_alone() -> None:
    """The compiler restores the generator it found; draws made meanwhile must not be taken back."""
    torch.manual_seed(11)
    expected = torch.cat([torch.randn(1) for _ in range(200)])
    torch.manual_seed(11)
    started, done, drawn = threading.Event(), threading.Event(), []

    def compile_now() -> None:
        with inductor._generators_left_alone():
            before = torch.random.get_rng_state()
            started.set()
            done.wait(10)
            torch.random.set_rng_state(before)

    thread = threading.Thread(target=compile_now)
    thread.start()
    assert started.wait(10)
    drawn += [torch.randn(1) for _ in range(100)]
    done.set()
    thread.join()
    drawn += [torch.randn(1) for _ in range(100)]
    assert torch.equal(torch.cat(drawn), expected)
    original = torch.random.get_rng_state()
    torch.manual_seed(12)
    torch.random.set_rng_state(original)
    assert torch.equal(torch.random.get_rng_state(), original)


def test_the_compiler_itself_leaves_the_generator_alone() -> None:
    """While a graph compiles in a thread, this thread's draws are those of the seed."""
    never_seen_before = random.random()  # else the compiler's cache has it, and it does nothing to the generator
    spec = GraphSpec(1, (node("aten::mul.Tensor", Value(0), never_seen_before),), (Value(1),))
    code, example = InductorCode(spec, CPU), torch.randn(5)
    torch.manual_seed(13)
    thread = threading.Thread(target=code.compile_for, args=([example],))
    thread.start()
    drawn = [torch.randn(1)]
    while thread.is_alive():
        drawn.append(torch.randn(1))
        thread.join(0.005)
    drawn += [torch.randn(1) for _ in range(10)]
    torch.manual_seed(13)
    assert torch.equal(torch.cat(drawn), torch.cat([torch.randn(1) for _ in drawn]))
    assert len(code._variants) == 1


# -- shapes ---------------------------------------------------------------------------------------------------


def expected_shapes(seen: list[list[Any]]) -> ExpectedShapes:
    forms = [tuple(map(form_of, inputs)) for inputs in seen]
    return symbolic_inputs(seen[-1], varying_slots(forms)).expected()


def fits(expected: ExpectedShapes, inputs: list[Any]) -> bool:
    return expected.fit(tuple(map(form_of, inputs)))


def test_sizes_equal_to_a_number_share_its_symbol() -> None:
    expected = expected_shapes([[5, torch.randn(5, 8)]])
    assert fits(expected, [9, torch.randn(9, 8)])
    assert not fits(expected, [9, torch.randn(8, 8)])
    assert not fits(expected, [9, torch.randn(9, 9)])
    assert not fits(expected, [9.0, torch.randn(9, 8)])
    assert not fits(expected, [9, torch.randn(9, 8).double()])
    assert not fits(expected, [9, torch.randn(8, 9).t()])
    assert not fits(expected, [1, torch.randn(1, 8)])


def test_strides_follow_the_sizes() -> None:
    expected = expected_shapes([[torch.randn(2, 3, 4)], [torch.randn(2, 5, 4)]])
    assert fits(expected, [torch.randn(2, 7, 4)])
    assert not fits(expected, [torch.randn(2, 8, 4)[:, :7]])


def test_other_values_must_be_the_same() -> None:
    expected = expected_shapes([[torch.randn(2), 0.5, True, None]])
    assert fits(expected, [torch.randn(2), 0.5, True, None])
    for other in ([0.25, True, None], [0.5, 1, None], [0.5, False, None], [0.5, True, 0]):
        assert not fits(expected, [torch.randn(2), *other])


def test_guards_of_the_compilation_count() -> None:
    seen = [[6, torch.randn(6)]]
    forms = [tuple(map(form_of, inputs)) for inputs in seen]
    symbols = symbolic_inputs(seen[0], varying_slots(forms))
    assert symbols.examples[0] % 3 == 0
    assert symbols.examples[0] < 20
    expected = symbols.expected()
    assert [n for n in range(2, 30) if fits(expected, [n, torch.randn(n)])] == [3, 6, 9, 12, 15, 18]


def test_constants_in_a_subgraph_compile() -> None:
    inner = GraphSpec(
        1, (node("aten::lift_fresh_copy.default", Constant(0)), node("aten::mul.Tensor", Value(0), Value(1))),
            (Value(2),),
        (ConstantSpec.from_tensor(torch.tensor(2.0)),),
    )
    spec = GraphSpec(
        2, (node("higher_order::cond", Value(0), Subgraph(0), Subgraph(0), (Value(1),)),
            node("py::operator.getitem", Value(2), 0)), (Value(3),), (), (inner,),
    )
    inputs = [torch.tensor(True), torch.randn(3)]
    code = compile_with_inductor(spec, list(inputs), device=CPU)
    assert_close(code(list(inputs)), [inputs[1] * 2])
