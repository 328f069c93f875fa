"""The bytes of a graph (core/graph_spec.py): msgpack arrays, tagged where a type would be lost.

    message   ("genie-graph", schema version, targets, graph)
    graph     (inputs, nodes, outputs, constants, subgraphs, returns)
    node      (name, index into targets, args, kwarg names, kwarg values)
    argument  None, bool, float, str, 64-bit int: themselves; everything else (tag, ...)

`encode` and `decode` are exact: bool, int and float stay apart; -0.0, inf and every nan keep their bits.
"""
from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from genie_dynamo.core.allowlist import TARGET_PATTERN
from genie_dynamo.core.errors import MessageLimitError, ProtocolError
from genie_dynamo.core.graph_spec import (
    Arg,
    Constant,
    ConstantSpec,
    Device,
    GraphSpec,
    NodeSpec,
    Op,
    Subgraph,
    Value,
)
from genie_dynamo.core.limits import DEFAULT_LIMITS, Limits
from genie_dynamo.core.wire import pack, unpack

__all__ = ["Arg", "Constant", "ConstantSpec", "Device", "GraphSpec", "NodeSpec", "Op", "Subgraph", "Value",
           "content_id", "decode", "encode"]

MAGIC = "genie-graph"
SCHEMA_VERSION = 1

(_VALUE, _LIST, _TUPLE, _DICT, _CONSTANT, _SUBGRAPH, _OP, _DTYPE, _LAYOUT, _MEMORY_FORMAT, _DEVICE, _SLICE, _ELLIPSIS,
 _COMPLEX, _BIG_INT) = range(15)

_RETURNS = ("tuple", "list", "value")
_MAX_BIG_INT_BYTES = 64


def _named(kind: type) -> dict[str, Any]:
    return {str(value).removeprefix("torch."): value for value in vars(torch).values() if isinstance(value, kind)}


_DTYPES: dict[str, torch.dtype] = _named(torch.dtype)
_LAYOUTS: dict[str, torch.layout] = _named(torch.layout)
_MEMORY_FORMATS: dict[str, torch.memory_format] = _named(torch.memory_format)


def content_id(spec_bytes: bytes) -> str:
    """sha256 of an encoded graph, in hex."""
    return hashlib.sha256(spec_bytes).hexdigest()


# -- writing --------------------------------------------------------------------------------------------------


def encode(spec: GraphSpec) -> bytes:
    """The graph's bytes.

    Raises: ProtocolError where an argument is none of those in core/graph_spec.py.
    """
    targets: dict[str, int] = {}
    graph = _graph_out(spec, targets)
    return pack((MAGIC, SCHEMA_VERSION, tuple(targets), graph))


def _graph_out(spec: GraphSpec, targets: dict[str, int]) -> tuple[Any, ...]:
    return (
        spec.num_inputs,
        tuple(_node_out(node, targets) for node in spec.nodes),
        tuple(_arg_out(output) for output in spec.outputs),
        tuple(constant.to_wire() for constant in spec.constants),
        tuple(_graph_out(subgraph, targets) for subgraph in spec.subgraphs),
        _RETURNS.index(spec.returns),
    )


def _node_out(node: NodeSpec, targets: dict[str, int]) -> tuple[Any, ...]:
    target = targets.setdefault(node.target, len(targets))
    return (node.name, target, tuple(map(_arg_out, node.args)), tuple(node.kwargs),
            tuple(map(_arg_out, node.kwargs.values())))


def _arg_out(arg: Arg) -> Any:
    writer = _WRITERS.get(type(arg))
    if writer is None:
        raise ProtocolError(f"an argument of type {type(arg).__name__} does not travel: {arg!r:.80}")
    return writer(arg)


def _itself(arg: Arg) -> Arg:
    return arg


def _int_out(arg: int) -> Any:
    if -(1 << 63) <= arg < 1 << 64:
        return arg
    size_bytes = (arg.bit_length() + 8) // 8
    if size_bytes > _MAX_BIG_INT_BYTES:
        raise ProtocolError(f"an integer of {size_bytes} bytes does not travel; at most {_MAX_BIG_INT_BYTES} do")
    return (_BIG_INT, arg.to_bytes(size_bytes, "big", signed=True))


def _dict_out(arg: dict[Any, Arg]) -> tuple[Any, ...]:
    for key in arg:
        if type(key) is not str:
            raise ProtocolError(f"dict keys must be str to travel, got {key!r:.80}")
    return (_DICT, tuple(arg), tuple(map(_arg_out, arg.values())))


_WRITERS: dict[type, Callable[[Any], Any]] = {
    type(None): _itself,
    bool: _itself,
    float: _itself,
    str: _itself,
    int: _int_out,
    list: lambda a: (_LIST, *map(_arg_out, a)),
    tuple: lambda a: (_TUPLE, *map(_arg_out, a)),
    dict: _dict_out,
    complex: lambda a: (_COMPLEX, a.real, a.imag),
    torch.dtype: lambda a: (_DTYPE, str(a).removeprefix("torch.")),
    torch.layout: lambda a: (_LAYOUT, str(a).removeprefix("torch.")),
    torch.memory_format: lambda a: (_MEMORY_FORMAT, str(a).removeprefix("torch.")),
    slice: lambda a: (_SLICE, _arg_out(a.start), _arg_out(a.stop), _arg_out(a.step)),
    type(Ellipsis): lambda a: (_ELLIPSIS,),
    Value: lambda a: (_VALUE, a.index),
    Constant: lambda a: (_CONSTANT, a.index),
    Subgraph: lambda a: (_SUBGRAPH, a.index),
    Op: lambda a: (_OP, a.target),
    Device: lambda a: (_DEVICE, a.value),
}


# -- reading --------------------------------------------------------------------------------------------------


def decode(data: bytes, limits: Limits = DEFAULT_LIMITS) -> GraphSpec:
    """The graph behind bytes from a peer, with every length, reference and name checked.

    Raises: MessageLimitError beyond a limit, ProtocolError for anything else that is not a graph.
    """
    message = unpack(data, limits, "graph")
    if type(message) is not tuple or len(message) != 4 or message[0] != MAGIC:
        raise ProtocolError(f"not a graph: {message!r:.80}")
    _, version, targets, graph = message
    if version != SCHEMA_VERSION:
        raise ProtocolError(f"a graph of schema version {version!r:.20}; this side reads {SCHEMA_VERSION}")
    return _Reader(_targets(targets), limits).graph(graph, 0)


def _targets(targets: Any) -> tuple[str, ...]:
    for target in _array(targets, "targets"):
        if type(target) is not str or not TARGET_PATTERN.fullmatch(target):
            raise ProtocolError(f"{target!r:.80} is not the name of an op")
    return tuple(targets)


def _array(value: Any, what: str) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise ProtocolError(f"{what} must be an array, got {value!r:.80}")
    return value


def _index(value: Any, bound: int, what: str) -> int:
    if type(value) is not int or not 0 <= value < bound:
        raise ProtocolError(f"{what} {value!r:.40} is not one of the {bound} there are")
    return value


class _Reader:
    """Reads one message; counts nodes over all its graphs."""

    def __init__(self, targets: tuple[str, ...], limits: Limits) -> None:
        self._targets, self._limits = targets, limits
        self._num_nodes = 0

    def graph(self, wire: Any, depth: int) -> GraphSpec:
        if depth > self._limits.subgraph_depth:
            raise MessageLimitError(f"subgraphs nest deeper than {self._limits.subgraph_depth} levels")
        fields = _array(wire, "a graph")
        if len(fields) != 6:
            raise ProtocolError(f"a graph has 6 fields, got {len(fields)}")
        num_inputs, nodes, outputs, constants, subgraphs, returns = fields
        if type(num_inputs) is not int or not 0 <= num_inputs <= self._limits.list_items:
            raise MessageLimitError(f"a graph has 0..{self._limits.list_items} inputs, got {num_inputs!r:.40}")
        self._num_nodes += len(_array(nodes, "nodes"))
        if self._num_nodes > self._limits.graph_nodes:
            raise MessageLimitError(f"a graph of more than {self._limits.graph_nodes} nodes")
        built_constants = tuple(ConstantSpec.from_wire(c, self._limits) for c in _array(constants, "constants"))
        built_subgraphs = tuple(self.graph(g, depth + 1) for g in _array(subgraphs, "subgraphs"))
        args = _ArgReader(len(built_constants), len(built_subgraphs))
        built_nodes = tuple(self._node(node, num_inputs + j, args) for j, node in enumerate(nodes))
        num_values = num_inputs + len(nodes)
        built_outputs = tuple(args.read(output, num_values) for output in _array(outputs, "outputs"))
        kind = _RETURNS[_index(returns, len(_RETURNS), "returns")]
        if kind == "value" and len(built_outputs) != 1:
            raise ProtocolError(f"a graph that returns one value has {len(built_outputs)} outputs")
        return GraphSpec(num_inputs, built_nodes, built_outputs, built_constants, built_subgraphs,
                         kind)  # type: ignore[arg-type]

    def _node(self, wire: Any, num_values: int, read: _ArgReader) -> NodeSpec:
        fields = _array(wire, "a node")
        if len(fields) != 5:
            raise ProtocolError(f"a node has 5 fields, got {len(fields)}")
        name, target, args, keys, values = fields
        if type(name) is not str:
            raise ProtocolError(f"a node's name must be str, got {name!r:.80}")
        return NodeSpec(
            name, self._targets[_index(target, len(self._targets), "target")],
            tuple(read.read(arg, num_values) for arg in _array(args, "args")), read.mapping(keys, values, num_values),
        )


class _ArgReader:
    """Reads the arguments of one graph."""

    def __init__(self, num_constants: int, num_subgraphs: int) -> None:
        self._num_constants, self._num_subgraphs = num_constants, num_subgraphs

    def read(self, wire: Any, num_values: int) -> Arg:
        """One argument; `num_values` values exist before its user."""
        if type(wire) is not tuple:
            if type(wire) in (int, float, str, bool, type(None)):
                return wire
            raise ProtocolError(f"an argument cannot be {type(wire).__name__}")
        if not wire or type(wire[0]) is not int or not 0 <= wire[0] <= _BIG_INT:
            raise ProtocolError(f"unknown argument {wire!r:.80}")
        tag, fields = wire[0], wire[1:]
        if tag == _LIST:
            return [self.read(item, num_values) for item in fields]
        if tag == _TUPLE:
            return tuple([self.read(item, num_values) for item in fields])
        if len(fields) != _ARITY[tag]:
            raise ProtocolError(f"argument of tag {tag} has {_ARITY[tag]} fields, got {len(fields)}")
        if tag == _VALUE:
            return Value(_index(fields[0], num_values, "value"))
        if tag == _DICT:
            return self.mapping(fields[0], fields[1], num_values)
        if tag == _SLICE:
            return slice(*(self.read(field, num_values) for field in fields))
        if tag == _CONSTANT:
            return Constant(_index(fields[0], self._num_constants, "constant"))
        if tag == _SUBGRAPH:
            return Subgraph(_index(fields[0], self._num_subgraphs, "subgraph"))
        return _leaf(tag, fields)

    def mapping(self, keys: Any, values: Any, num_values: int) -> dict[str, Arg]:
        if len(_array(keys, "keys")) != len(_array(values, "values")):
            raise ProtocolError(f"{len(keys)} keys for {len(values)} values")
        built: dict[str, Arg] = {}
        for key, value in zip(keys, values, strict=True):
            if type(key) is not str or key in built:
                raise ProtocolError(f"a key must be str and new, got {key!r:.80}")
            built[key] = self.read(value, num_values)
        return built


def _leaf(tag: int, fields: tuple[Any, ...]) -> Arg:
    """An argument without references."""
    if tag == _ELLIPSIS:
        return ...
    if tag == _COMPLEX:
        if not all(type(part) is float for part in fields):
            raise ProtocolError(f"a complex number is two floats, got {fields!r:.80}")
        return complex(*fields)
    value = fields[0]
    if tag == _BIG_INT:
        if type(value) is not bytes or len(value) > _MAX_BIG_INT_BYTES:
            raise ProtocolError(f"a big integer is at most {_MAX_BIG_INT_BYTES} bytes, got {value!r:.80}")
        return int.from_bytes(value, "big", signed=True)
    if tag == _DEVICE:
        return tuple(Device)[_index(value, len(Device), "device")]
    if tag == _OP:
        if type(value) is not str or not TARGET_PATTERN.fullmatch(value):
            raise ProtocolError(f"{value!r:.80} is not the name of an op")
        return Op(value)
    table = _TABLES[tag]
    if type(value) is not str or value not in table:
        raise ProtocolError(f"{value!r:.80} is not a {_TABLE_NAMES[tag]} of torch {torch.__version__}")
    return table[value]


_ARITY = {_VALUE: 1, _DICT: 2, _CONSTANT: 1, _SUBGRAPH: 1, _OP: 1, _DTYPE: 1, _LAYOUT: 1, _MEMORY_FORMAT: 1,
          _DEVICE: 1, _SLICE: 3, _ELLIPSIS: 0, _COMPLEX: 2, _BIG_INT: 1}
_TABLES: dict[int, dict[str, Any]] = {_DTYPE: _DTYPES, _LAYOUT: _LAYOUTS, _MEMORY_FORMAT: _MEMORY_FORMATS}
_TABLE_NAMES = {_DTYPE: "dtype", _LAYOUT: "layout", _MEMORY_FORMAT: "memory format"}
