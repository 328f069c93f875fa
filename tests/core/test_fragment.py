"""The schema: exact round trips, every limit and reference checked, hostile bytes refused."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import struct
import time
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genie_dynamo.core.errors import GenieError, MessageLimitError, ProtocolError
from genie_dynamo.core.fragment import (
    Constant,
    ConstantSpec,
    Device,
    GraphSpec,
    NodeSpec,
    Op,
    Subgraph,
    Value,
    content_id,
    decode,
    encode,
)
from genie_dynamo.core.limits import Limits
from genie_dynamo.core.tensors import DTYPES
from genie_dynamo.core.wire import pack, unpack
from tests.round_trip import assert_same_graph, exact

CPU = torch.device("cpu")

# -- any argument, any graph ----------------------------------------------------------------------------------

LEAVES = (
    st.none() | st.booleans() | st.integers(-(1 << 100), 1 << 100) | st.floats() | st.text(max_size=8)
    | st.complex_numbers() | st.sampled_from([*DTYPES, torch.quint8])
    | st.sampled_from([torch.strided, torch.sparse_coo])
    | st.sampled_from([torch.channels_last, torch.contiguous_format, torch.preserve_format])
    | st.sampled_from(list(Device)) | st.just(...) | st.just(Op("aten::add.Tensor"))
)


@functools.cache  # building a recursive strategy costs more than drawing from it
def arguments(num_values: int, num_constants: int, num_subgraphs: int) -> st.SearchStrategy[Any]:
    leaves = LEAVES
    for bound, kind in ((num_values, Value), (num_constants, Constant), (num_subgraphs, Subgraph)):
        if bound:
            leaves |= st.integers(0, bound - 1).map(kind)
    return st.recursive(
        leaves,
        lambda inner: st.lists(inner, max_size=3) | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.text(max_size=4), inner, max_size=2) | st.builds(slice, inner, inner, inner),
        max_leaves=6,
    )


@st.composite
def constants(draw: st.DrawFn) -> ConstantSpec:
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.bool, torch.complex64, torch.int8]))
    tensor = torch.zeros(shape, dtype=dtype)
    if draw(st.booleans()):
        tensor = tensor.permute(tuple(reversed(range(tensor.dim()))))
    return ConstantSpec.from_tensor(tensor)


@st.composite
def graphs(draw: st.DrawFn, depth: int = 0) -> GraphSpec:
    num_inputs = draw(st.integers(0, 3))
    built_constants = draw(st.lists(constants(), max_size=2))
    subgraphs = draw(st.lists(graphs(depth=depth + 1), max_size=2)) if depth < 2 else []
    targets = st.sampled_from(["aten::add.Tensor", "py::operator.getitem", "higher_order::cond", "my_lib::op.default"])
    nodes = []
    for j in range(draw(st.integers(0, 4))):
        args = arguments(num_inputs + j, len(built_constants), len(subgraphs))
        nodes.append(NodeSpec(
            draw(st.text(max_size=6)), draw(targets), tuple(draw(st.lists(args, max_size=3))),
            draw(st.dictionaries(st.text(max_size=4), args, max_size=2)),
        ))
    outputs = draw(st.lists(arguments(num_inputs + len(nodes), len(built_constants), len(subgraphs)), max_size=3))
    returns = draw(st.sampled_from(["tuple", "list", *(["value"] if len(outputs) == 1 else [])]))
    return GraphSpec(num_inputs, tuple(nodes), tuple(outputs), tuple(built_constants), tuple(subgraphs), returns)


@given(graphs())
@settings(max_examples=60, deadline=None)
def test_round_trip_of_random_graphs(spec: GraphSpec) -> None:
    data = encode(spec)
    back = decode(data)
    assert_same_graph(back, spec)
    assert back == spec and hash(back) == hash(spec)
    assert encode(back) == data


def one_argument(arg: Any) -> GraphSpec:
    return GraphSpec(1, (NodeSpec("n", "aten::f.default", (arg,)),), ())


@pytest.mark.parametrize(
    ("left", "right"),
    [(True, 1), (1, 1.0), (0.0, -0.0), ((1,), [1]), (None, False), ("1", 1), (1j, complex(-0.0, 1)), (2, Value(0)),
     (Device.META, Device.WORKER), ({"a": 1, "b": 2}, {"b": 2, "a": 1})],
)
def test_what_differs_stays_different(left: Any, right: Any) -> None:
    assert one_argument(left) != one_argument(right)
    assert exact(decode(encode(one_argument(left))).nodes[0].args) == exact((left,))


def test_every_float_keeps_its_bits() -> None:
    for bits in (0x7FF0000000000000, 0xFFF8000000000001, 0x7FF800000000BEEF, 0x8000000000000000, 1):
        value = struct.unpack("<d", struct.pack("<Q", bits))[0]
        (back,) = decode(encode(one_argument(value))).nodes[0].args
        assert struct.pack("<d", back) == struct.pack("<d", value)


@pytest.mark.parametrize("arg", [object(), {1: 2}, {1, 2}, torch.ones(1), b"raw", 1 << 1000, lambda: 0])
def test_other_arguments_do_not_travel(arg: Any) -> None:
    with pytest.raises(ProtocolError):
        encode(one_argument(arg))


def test_content_id_is_the_sha256() -> None:
    data = encode(one_argument(1))
    assert content_id(data) == hashlib.sha256(data).hexdigest()


# -- constants ------------------------------------------------------------------------------------------------


def raw_bits(tensor: torch.Tensor) -> bytes:
    flat = tensor.contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def any_bits(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """Every bit pattern a byte may have (nans too); a bool holds 0 or 1."""
    if dtype is torch.bool:
        return torch.randint(0, 2, shape).bool()
    count = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (count,), dtype=torch.uint8).view(dtype).reshape(shape)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 3), (2, 3, 4)], ids=str)
def test_constants_keep_every_bit(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = any_bits(dtype, *shape)
    spec = GraphSpec(0, (), (Constant(0),), (ConstantSpec.from_tensor(tensor),))
    (constant,) = decode(encode(spec)).constants
    back = constant.to_tensor(CPU)
    assert (back.dtype, back.shape, back.stride()) == (tensor.dtype, tensor.shape, tensor.stride())
    assert raw_bits(back) == raw_bits(tensor)


@pytest.mark.parametrize(
    "tensor",
    [
        torch.randn(2, 3).t(), torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last), torch.randn(6)[::2],
        torch.randn(3, 1).expand(3, 4), torch.randn(4, 4)[1:, 1:], torch.randn(2, 2).as_strided((3,), (0,)),
        torch.randn(3, dtype=torch.complex64).conj(), torch.randn(3, dtype=torch.complex64).conj().imag,
        torch.nn.Parameter(torch.randn(2)), torch.empty_strided((2, 0), (7, 3)),
    ],
    ids=["transposed", "channels_last", "stepped", "expanded", "sliced", "stride0", "conj", "neg",
        "parameter", "empty"],
)
def test_constants_keep_their_strides(tensor: torch.Tensor) -> None:
    (constant,) = decode(encode(GraphSpec(0, (), (), (ConstantSpec.from_tensor(tensor),)))).constants
    back = constant.to_tensor(CPU)
    assert torch.equal(back, tensor.resolve_conj().resolve_neg().detach())
    if tensor.numel():
        assert back.stride() == tensor.resolve_conj().resolve_neg().stride()


def constant_wire(**changes: Any) -> bytes:
    fields = {"code": 0, "shape": (2, 3), "stride": (3, 1), "data": b"\0" * 24, "gaps": False} | changes
    return pack(("genie-graph", 1, (), (0, (), (), (tuple(fields.values()),), (), 0)))


@pytest.mark.parametrize(
    "changes",
    [
        {"code": 99}, {"code": -1}, {"code": True}, {"shape": (2, -3)}, {"shape": (2, 3.0)}, {"shape": 6},
        {"stride": (3,)},
        {"stride": (3, -1)}, {"stride": (4, 1)}, {"stride": (1 << 50, 1), "gaps": True}, {"data": b"\0" * 23},
        {"data": "0" * 24}, {"data": None}, {"gaps": 1}, {"stride": (1 << 39, 1), "gaps": True},
        {"shape": (1 << 39, 0), "data": b"", "stride": (1 << 41, 1)}, {"shape": (1 << 30, 1 << 30), "stride": (0, 0)},
        {"shape": (1,) * 65, "stride": (1,) * 65, "data": b"\0" * 4},
    ],
    ids=str,
)
def test_constants_that_do_not_add_up_are_refused(changes: dict[str, Any]) -> None:
    assert decode(constant_wire()).constants[0].to_tensor(CPU).shape == (2, 3)
    with pytest.raises(ProtocolError):
        decode(constant_wire(**changes))


# -- limits and references ------------------------------------------------------------------------------------


def graph_wire(**changes: Any) -> bytes:
    fields: dict[str, Any] = {
        "magic": "genie-graph", "version": 1, "targets": ("aten::f.default",), "inputs": 1,
        "nodes": (("n", 0, ((0, 0),), ("k",), (1,)),), "outputs": ((0, 1),), "constants": (), "subgraphs": (),
        "returns": 0,
    }
    fields |= changes
    head = tuple(fields[key] for key in ("magic", "version", "targets"))
    return pack((*head, tuple(fields[key] for key in ("inputs", "nodes", "outputs", "constants", "subgraphs",
        "returns"))))


def node_with(arg: Any) -> dict[str, Any]:
    return {"nodes": (("n", 0, (arg,), (), ()),)}


@pytest.mark.parametrize(
    "changes",
    [
        {"magic": "other"}, {"version": 2}, {"version": "1"}, {"targets": ("no name",)}, {"targets": (1,)},
        {"targets": {}},
        {"targets": ("aten::" + "a" * 10 + "\n",)}, {"inputs": -1}, {"inputs": "1"}, {"inputs": True},
        {"inputs": 1 << 40},
        {"nodes": 5}, {"nodes": (5,)}, {"nodes": (("n", 0, (), ()),)}, {"nodes": ((1, 0, (), (), ()),)},
        {"nodes": (("n", 1, (), (), ()),)}, {"nodes": (("n", True, (), (), ()),)}, {"nodes": (("n", 0, 1, (), ()),)},
        {"nodes": (("n", 0, (), ("a",), ()),)}, {"nodes": (("n", 0, (), ("a", "a"), (1, 2)),)},
        {"nodes": (("n", 0, (), (1,), (1,)),)}, {"outputs": ((0, 2),)}, {"outputs": 7}, {"constants": 1},
        {"subgraphs": (1,)}, {"returns": 3}, {"returns": "tuple"}, {"returns": 2, "outputs": ()},
        {"returns": 2, "outputs": (1, 2)},
        node_with((0, 1)), node_with((0, -1)), node_with((0, True)), node_with((0,)),
        node_with((0, 0, 0)), node_with((99, 0)),
        node_with(()), node_with(("a", 1)), node_with({}), node_with(b"raw"), node_with((4, 0)), node_with((5, 0)),
        node_with((6, "not a name")), node_with((6, 7)), node_with((7, "float31")), node_with((7, "device")),
        node_with((7, ["float32"])), node_with((8, "float32")), node_with((9, "strided")), node_with((10, 2)),
        node_with((11, 1, 2)), node_with((12, 1)), node_with((13, 1, 2)), node_with((13, 1.0)), node_with((14, 5)),
        node_with((14, b"x" * 65)), node_with((3, ("a",), ())), node_with((3, ("a", "a"), (1, 1))),
        node_with((3, (1,), (1,))),
    ],
    ids=str,
)
def test_what_is_no_graph_is_refused(changes: dict[str, Any]) -> None:
    assert decode(graph_wire()) == GraphSpec(1, (NodeSpec("n", "aten::f.default", (Value(0),), {"k": 1}),), (Value(1),))
    with pytest.raises(ProtocolError):
        decode(graph_wire(**changes))


def test_each_limit_is_kept() -> None:
    def nested(depth: int) -> GraphSpec:
        return GraphSpec(0, (), (), (), (nested(depth - 1),) if depth else ())

    small = Limits(graph_nodes=3, subgraph_depth=2, list_items=10, string_bytes=20, header_bytes=400)
    three = GraphSpec(1, tuple(NodeSpec("n", "aten::f.default", (Value(0),)) for _ in range(3)), ())
    assert decode(encode(three), small) == three and decode(encode(nested(2)), small) == nested(2)
    four_in_all = GraphSpec(1, three.nodes[:2], (), (), (GraphSpec(1, three.nodes[:2], ()),))
    for spec in (
        four_in_all, nested(3), GraphSpec(11, (), ()), GraphSpec(1, (NodeSpec("n" * 21, "aten::f.default", ()),), ()),
        GraphSpec(1, (), (1,) * 11), GraphSpec(1, (), (), (ConstantSpec.from_tensor(torch.zeros(100)),)),
    ):
        with pytest.raises(MessageLimitError):
            decode(encode(spec), small)
        decode(encode(spec))


@given(st.binary(max_size=200))
@settings(max_examples=300, deadline=None)
def test_any_bytes_give_a_graph_or_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        decode(data)


@given(graphs(), st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_graphs_give_a_graph_or_a_protocol_error(spec: GraphSpec, data: st.DataObject) -> None:
    raw = bytearray(encode(spec))
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(ProtocolError):
        decode(bytes(raw))


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 20) | st.floats() | st.text(max_size=5) | st.binary(max_size=5),
    lambda inner: st.lists(inner, max_size=6).map(tuple), max_leaves=30,
)


@given(PLAIN, st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_well_formed_messages_of_other_content_are_refused(plain: Any, field: int) -> None:
    """Plain msgpack where one field of the graph is replaced by anything."""
    fields: list[Any] = [1, (("n", 0, ((0, 0),), (), ()),), ((0, 1),), (), (), 0]
    fields[field] = plain
    with contextlib.suppress(ProtocolError):
        decode(pack(("genie-graph", 1, ("aten::f.default",), tuple(fields))))


def test_a_deep_argument_is_refused_quickly() -> None:
    arg: Any = 1
    for _ in range(400):
        arg = (arg,)
    started = time.perf_counter()
    with pytest.raises(GenieError):
        decode(encode(one_argument(arg)))
    assert time.perf_counter() - started < 1


def test_the_message_is_plain_msgpack() -> None:
    magic, version, targets, _ = unpack(encode(one_argument(1)))
    assert (magic, version, targets) == ("genie-graph", 1, ("aten::f.default",))
