"""Lowering: what becomes of nodes, attributes and devices, and what is refused with which reason."""
from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from genie_dynamo.core.errors import PlanError, UnsupportedGraphError
from genie_dynamo.core.fragment import Constant, Device, GraphSpec, Op, Subgraph, Value, decode, encode
from genie_dynamo.passes.lower import MAX_CONSTANT_BYTES, lower_fragment, lower_graph_module, unsupported_reasons
from genie_dynamo.runtime.flat import FlatPlan
from tests.captured import PROGRAMS, Captured, assert_bit_equal, copies, lower_whole, program_names

aten = torch.ops.aten
CPU = torch.device("cpu")


def graph_of(build: Callable[[fx.Graph], Any], num_inputs: int = 1, **attributes: Any) -> fx.GraphModule:
    """A graph whose placeholders a0.. have fake values; `build` adds nodes and returns the output."""
    graph = fx.Graph()
    mode = FakeTensorMode()
    for k in range(num_inputs):
        graph.placeholder(f"a{k}").meta["val"] = mode.from_tensor(torch.empty(4, 4))
    root = torch.nn.Module()
    for name, value in attributes.items():
        setattr(root, name, value)
    output = build(graph)
    graph.output(output if isinstance(output, tuple) else (output,))
    gm = fx.GraphModule(root, graph)
    for node in graph.nodes:
        known = all("val" in read.meta or read.op == "get_attr" for read in node.all_input_nodes)
        if isinstance(node.target, torch._ops.OpOverload) and known and "pin_memory" not in str(node.target):
            args, kwargs = fx.map_arg((node.args, node.kwargs), lambda n: n.meta.get("val", 1.0))
            with mode:
                node.meta["val"] = args[0] if node.target is aten.add_.Tensor else node.target(*args, **kwargs)
    return gm


def placeholder(graph: fx.Graph, index: int = 0) -> fx.Node:
    return [node for node in graph.nodes if node.op == "placeholder"][index]


def lower_all(gm: fx.GraphModule) -> GraphSpec:
    return lower_whole(gm).spec


@pytest.mark.parametrize("name", program_names())
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_captured_graphs_can_be_shipped(name: str) -> None:
    for graph in PROGRAMS[name].graphs():
        assert unsupported_reasons(graph.gm) == ()
        lower_all(graph.gm)        # compares with what its bytes decode to


def cut(graph: Captured, position: int) -> list[Any]:
    """Run the graph as two fragments cut after `position` body nodes."""
    gm = graph.gm
    names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    body = [node for node in gm.graph.nodes if node.op == "call_function"]
    outputs = [item.name if isinstance(item, fx.Node) else item for item in gm.graph.output_node().args[0]]
    values = dict(zip(names, copies(graph.inputs), strict=True))
    for part in (body[:position], body[position:]):
        inside = {node.name for node in part}
        reads = dict.fromkeys(i.name for n in part for i in n.all_input_nodes if i.op != "get_attr")
        inputs = [name for name in reads if name not in inside]
        spec = lower_fragment(gm, node_names=[n.name for n in part], inputs=inputs, outputs=[n.name for n in part])
        values |= zip((n.name for n in part), FlatPlan(spec, device=CPU).run([values[i] for i in inputs]), strict=True)
    return [values[o] if isinstance(o, str) else o for o in outputs]


@pytest.mark.parametrize("name", program_names("mlp", "gpt2", "cond", "dynamic"))
def test_a_graph_cut_in_two_gives_the_same(name: str) -> None:
    for graph in PROGRAMS[name].graphs():
        num_nodes = sum(node.op == "call_function" for node in graph.gm.graph.nodes)
        for position in (1, num_nodes // 2, num_nodes - 1):
            torch.manual_seed(3)
            outputs = graph.expected()[0]
            torch.manual_seed(3)
            for actual, expected in zip(cut(graph, position), outputs, strict=True):
                assert_bit_equal(actual, expected)


def test_literal_outputs_and_inputs_pass() -> None:
    gm = graph_of(lambda g: g.call_function(aten.neg.default, (placeholder(g),)))
    spec = lower_fragment(gm, node_names=["neg_default"], inputs=["a0"], outputs=["neg_default", None, 7, "a0"])
    assert spec.outputs == (Value(1), None, 7, Value(0))


def test_constants_and_subgraphs_are_taken_along_once() -> None:
    inner = graph_of(lambda g: (g.call_function(aten.add.Tensor, (placeholder(g), g.get_attr("shift"))),),
                     shift=torch.tensor(2.0))
    holder = torch.nn.Module()
    holder.weight = torch.ones(4, 4)

    def build(g: fx.Graph) -> fx.Node:
        branch, weight = g.get_attr("branch"), g.get_attr("holder.weight")
        first = g.call_function(aten.mul.Tensor, (placeholder(g), weight))
        second = g.call_function(aten.mul.Tensor, (first, g.get_attr("holder.weight")))
        result = g.call_function(torch.ops.higher_order.cond, (True, branch, branch, (second,)))
        return g.call_function(operator.getitem, (result, 0))

    spec = lower_all(graph_of(build, branch=inner, holder=holder))
    assert [n.args for n in spec.nodes[:3]] == [
        (Value(0), Constant(0)), (Value(1), Constant(0)), (True, Subgraph(0), Subgraph(0), (Value(2),)),
    ]
    assert len(spec.constants) == 1 and len(spec.subgraphs) == 1 and len(spec.subgraphs[0].constants) == 1
    (out,) = FlatPlan(decode(encode(spec)), device=CPU).run([torch.ones(4, 4)])
    assert torch.equal(out, torch.full((4, 4), 3.0))


def test_how_a_subgraph_returns_is_kept() -> None:
    for wrap, returns in ((lambda x: (x,), "tuple"), (lambda x: [x], "list"), (lambda x: x, "value")):
        graph = fx.Graph()
        graph.output(wrap(graph.call_function(aten.neg.default, (graph.placeholder("x"),))))
        assert lower_graph_module(fx.GraphModule({}, graph)).returns == returns


def test_devices_stand_for_the_workers_device() -> None:
    def build(g: fx.Graph) -> tuple[fx.Node, ...]:
        return tuple(
            g.call_function(aten.zeros.default, ([2],), {"device": torch.device(d)}) for d in ("cpu", "cuda:1", "meta")
        )

    graph = fx.Graph()
    graph.output(build(graph))
    spec = lower_graph_module(fx.GraphModule({}, graph))
    assert [n.kwargs["device"] for n in spec.nodes] == [Device.WORKER, Device.WORKER, Device.META]
    plan = FlatPlan(GraphSpec(0, (spec.nodes[0], spec.nodes[2]), (Value(0), Value(1))), device=CPU)
    assert [out.device.type for out in plan.run([])] == ["cpu", "meta"]


def test_a_cast_of_prims_runs_as_atens() -> None:
    gm = graph_of(lambda g: g.call_function(torch.ops.prims.convert_element_type.default,
                                            (placeholder(g), torch.float64)))
    spec = lower_all(gm)
    assert spec.nodes[0].target == "aten::_to_copy.default"
    x = torch.randn(4, 4).t()
    (out,) = FlatPlan(spec, device=CPU).run([x])
    expected = torch.ops.prims.convert_element_type.default(x, torch.float64)
    assert torch.equal(out, expected) and out.dtype == torch.float64 and out.stride() == expected.stride()


def test_an_op_as_an_argument() -> None:
    gm = graph_of(lambda g: g.call_function(
        torch.ops.higher_order.out_dtype, (aten.mm.default, torch.int32, placeholder(g), placeholder(g))))
    assert lower_all(gm).nodes[0].args[0] == Op("aten::mm.default")


def test_reading_what_the_fragment_lacks_is_our_own_mistake() -> None:
    def build(g: fx.Graph) -> fx.Node:
        return g.call_function(aten.neg.default, (g.call_function(aten.sin.default, (placeholder(g),)),))

    gm = graph_of(build)
    with pytest.raises(PlanError, match="reads sin_default, which is neither among its inputs"):
        lower_fragment(gm, node_names=["neg_default"], inputs=["a0"], outputs=["neg_default"])


# -- what cannot be shipped -----------------------------------------------------------------------------------


def fake_constant() -> torch.Tensor:
    return FakeTensorMode().from_tensor(torch.ones(2))


class Wrapped(torch.Tensor):
    """A tensor subclass of a user."""


def reads(attribute: str) -> Callable[[fx.Graph], fx.Node]:
    return lambda g: g.call_function(aten.mul.Tensor, (placeholder(g), g.get_attr(attribute)))


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (fake_constant, "captured as a fake tensor"), (lambda: torch.ones(2).to_sparse(), "layout sparse_coo"),
        (lambda: torch.ones(2, device="meta"), "meta tensor"),
        (lambda: torch.ones(2).as_subclass(Wrapped), "Wrapped; tensor subclasses"),
        (lambda: torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.quint8), "quint8"),
        (lambda: torch.nested.nested_tensor([torch.ones(2)]), "nested"), (torch.Generator, "torch._C.Generator"),
        (lambda: print, "builtin"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_attributes_that_cannot_travel(make: Callable[[], Any], why: str) -> None:
    value = make()
    gm = graph_of(lambda g: g.call_function(aten.neg.default, (placeholder(g),)))
    with gm.graph.inserting_before(gm.graph.find_nodes(op="call_function", target=aten.neg.default)[0]):
        attribute = gm.graph.get_attr("thing")
    gm.graph.find_nodes(op="call_function", target=aten.neg.default)[0].args = (attribute,)
    gm.thing = value
    with pytest.raises(UnsupportedGraphError, match=why):
        lower_all(gm)
    (reason,) = set(unsupported_reasons(gm))
    assert "thing" in reason


@pytest.mark.parametrize(
    ("args", "why"),
    [
        ((torch.Generator(),), "Generator"), ((torch.device("xpu"),), "device xpu"), (({1: 2},), "key of type"),
        (({"a": [b"raw"]},), "bytes"), ((lambda: 0,), "function"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_arguments_that_cannot_travel(args: tuple[Any, ...], why: str) -> None:
    gm = graph_of(lambda g: placeholder(g))
    with gm.graph.inserting_after(placeholder(gm.graph)):
        node = gm.graph.call_function(aten.neg.default, args)
    with pytest.raises(UnsupportedGraphError, match=f"node {node.name}.*{why}"):
        lower_fragment(gm, node_names=[node.name], inputs=["a0"], outputs=[])
    (reason,) = unsupported_reasons(gm)
    assert why in reason and node.name in reason


def test_ops_that_cannot_travel_are_all_listed() -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = placeholder(g)
        first = g.call_function(aten.neg.default, (x,))
        second = g.call_function(print, (first,))
        third = g.call_function(aten.pin_memory.default, (second,))
        fourth = g.call_method("relu", (third,))
        for node in (second, third, fourth):
            node.meta["val"] = x.meta["val"]
        return g.call_function(aten.sin.default, (fourth,))

    reasons = unsupported_reasons(graph_of(build))
    assert len(reasons) == 3
    for reason, (name, why) in zip(
        reasons,
        [("print", "builtins.print"), ("pin_memory_default", "aten::pin_memory.default"), ("relu", "call_method")],
        strict=True,
    ):
        assert name in reason and why in reason


def test_other_namespaces_are_refused_unless_the_workers_serve_them() -> None:
    with torch.library._scoped_library("lowertest", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
        gm = graph_of(lambda g: g.call_function(torch.ops.lowertest.double.default, (placeholder(g),)))
        (reason,) = unsupported_reasons(gm)
        assert "lowertest::double.default" in reason and "--op-library" in reason
        assert unsupported_reasons(gm, frozenset({"lowertest"})) == ()


def test_a_problem_in_a_subgraph_names_the_way_to_it() -> None:
    inner = graph_of(lambda g: g.call_function(aten.pin_memory.default, (placeholder(g),)))
    gm = graph_of(lambda g: g.call_function(
        torch.ops.higher_order.cond, (True, g.get_attr("branch"), g.get_attr("branch"),
            (placeholder(g),))), branch=inner)
    reasons = unsupported_reasons(gm)
    assert any(reason.startswith("branch/pin_memory_default: ") and "pin_memory" in reason for reason in reasons)


def test_values_of_other_layouts_are_listed() -> None:
    gm = graph_of(lambda g: g.call_function(aten.neg.default, (placeholder(g),)))
    placeholder(gm.graph).meta["val"] = torch.ones(2, 2).to_sparse()
    assert any("a0" in reason and "sparse_coo" in reason for reason in unsupported_reasons(gm))
    placeholder(gm.graph).meta["val"] = torch.ones(2).as_subclass(Wrapped)
    assert any("Wrapped" in reason for reason in unsupported_reasons(gm))


def test_large_constants_are_refused_with_their_size() -> None:
    gm = graph_of(reads("big"), big=torch.zeros(MAX_CONSTANT_BYTES // 4 + 1))
    with pytest.raises(UnsupportedGraphError, match=f"{MAX_CONSTANT_BYTES + 4} bytes of constant tensors"):
        lower_all(gm)
    assert any("bytes of constant tensors" in reason for reason in unsupported_reasons(gm))


# -- writes ---------------------------------------------------------------------------------------------------


def test_a_trailing_copy_into_an_input_is_no_obstacle() -> None:
    def build(g: fx.Graph) -> fx.Node:
        new = g.call_function(aten.neg.default, (placeholder(g),))
        g.call_function(aten.copy_.default, (placeholder(g), new))
        return new

    assert unsupported_reasons(graph_of(build)) == ()


def test_a_copy_that_is_read_later_is_listed() -> None:
    def build(g: fx.Graph) -> fx.Node:
        g.call_function(aten.copy_.default, (placeholder(g), g.call_function(aten.neg.default, (placeholder(g),))))
        return g.call_function(aten.sin.default, (placeholder(g),))

    (reason,) = unsupported_reasons(graph_of(build))
    assert "copy_" in reason and "input a0" in reason


@pytest.mark.parametrize(
    ("target", "through", "shown"),
    [(aten.add_.Tensor, None, "into input a0"), (aten.add_.Tensor, aten.t.default, "through its view t_default"),
     (aten.copy_.default, aten.t.default, "through its view t_default")],
)
def test_other_writes_into_inputs_are_listed(target: Any, through: Any, shown: str) -> None:
    def build(g: fx.Graph) -> fx.Node:
        x = placeholder(g)
        written = x if through is None else g.call_function(through, (x,))
        other = g.call_function(aten.neg.default, (x,))
        return g.call_function(target, (written, other))

    reasons = unsupported_reasons(graph_of(build))
    assert len(reasons) == 1 and shown in reasons[0]


def test_writes_into_constants_are_listed() -> None:
    gm = graph_of(lambda g: g.call_function(aten.add_.Tensor, (g.get_attr("c"), placeholder(g))), c=torch.ones(4, 4))
    (reason,) = unsupported_reasons(gm)
    assert "into constant c" in reason


def test_writes_into_intermediates_are_fine() -> None:
    def build(g: fx.Graph) -> fx.Node:
        return g.call_function(aten.add_.Tensor, (g.call_function(aten.neg.default, (placeholder(g),)), placeholder(g)))

    assert unsupported_reasons(graph_of(build)) == ()


def test_a_write_inside_a_subgraph_is_listed() -> None:
    def build(g: fx.Graph) -> fx.Node:
        return g.call_function(aten.copy_.default, (placeholder(g), g.call_function(aten.neg.default,
            (placeholder(g),))))

    gm = graph_of(lambda g: g.call_function(
        torch.ops.higher_order.cond, (True, g.get_attr("b"), g.get_attr("b"), (placeholder(g),))), b=graph_of(build))
    assert any("b/copy__default" in reason and "input a0" in reason for reason in unsupported_reasons(gm))
