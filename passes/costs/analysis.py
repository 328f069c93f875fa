"""What each node of an ATen graph costs, as expressions over the graph's symbols.

    costs = analyze_costs(gm)
    costs.nodes["mm_3"].flops                    # 2048*s0, or a number
    costs.totals({"s0": 16}).flops               # by a function compiled once
    print(costs)                                 # by family, and which ops had no formula

Needs meta["val"] (fake tensors) on every node, as AOTAutograd leaves it. Reading sizes adds no guards.
"""
from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from genie_dynamo.core.errors import CostError
from genie_dynamo.passes.costs import formulas as _formulas  # noqa: F401 - registers them
from genie_dynamo.passes.costs.control_flow import control_flow
from genie_dynamo.passes.costs.formulas.elementwise import foreach, pointwise
from genie_dynamo.passes.costs.formulas.memory import NOTHING, VIEWS
from genie_dynamo.passes.costs.graph_costs import GraphCosts, NodeCost
from genie_dynamo.passes.costs.lifetimes import Lifetimes
from genie_dynamo.passes.costs.registry import Call, Work, bytes_of, find
from genie_dynamo.passes.costs.sizes import Size, size_bytes, tensors_in


def analyze_costs(gm: fx.GraphModule) -> GraphCosts:
    """Costs of all nodes that compute.

    Raises: CostError where a node has no meta["val"], or a formula does not fit an op's arguments.
    """
    lifetimes = Lifetimes(gm)
    nodes: list[NodeCost] = []
    origins: dict[str, tuple[str, int]] = {}
    input_bytes: Size = 0
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            _note_symbols(node, origins)
            input_bytes += sum(map(size_bytes, tensors_in(node.meta.get("val"))))
        elif node.op == "call_function":
            _note_symbols(node, origins)
            nodes.append(_node_cost(node, lifetimes.allocated_bytes(node)))
    return GraphCosts(tuple(nodes), input_bytes, origins, lifetimes.spans([cost.name for cost in nodes]))


def node_costs(gm: fx.GraphModule) -> Mapping[str, NodeCost]:
    """Costs by node name; see analyze_costs."""
    return analyze_costs(gm).nodes


def _node_cost(node: fx.Node, allocated: Size) -> NodeCost:
    call = call_of(node)
    family, work, known = _family_and_work(node, call)
    inputs, outputs = bytes_of(call.inputs), sum(size_bytes(out) for out in call.outputs)
    moves = family not in ("view", "empty", "scalar")
    return NodeCost(
        name=node.name, op=call.name, family=family, dtype=_dtype_name(call), flops=work.flops,
        bytes_read=work.bytes_read, bytes_written=work.bytes_written, output_bytes=outputs,
        allocated_bytes=allocated, workspace_bytes=work.workspace_bytes,
        memory_bytes=(inputs if moves else 0) + allocated + work.workspace_bytes,
        has_formula=known, assumption=work.assumption)


def call_of(node: fx.Node) -> Call:
    """A node's op with the values of its arguments.

    Raises: CostError where a value is missing.
    """
    name = _op_name(node.target)
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: _value(n, node))
    out = node.meta.get("val")
    returns = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.returns
    if "val" not in node.meta and name.startswith("aten::") and returns:
        raise CostError(f"node {node.name} ({name}) has no meta['val']: its sizes are unknown; pass the graph through "
                        "AOTAutograd or fake tensor propagation first", node=node.name)
    inputs = {id(t): t for t in tensors_in((args, kwargs))}
    outputs = {id(t): t for t in tensors_in(out)}
    return Call(name, node.target, tuple(args), kwargs, out, tuple(inputs.values()), tuple(outputs.values()))


def _value(source: fx.Node, user: fx.Node) -> Any:
    if source.op == "get_attr":
        return _attribute(source)
    if "val" not in source.meta:
        raise CostError(f"node {user.name} reads {source.name}, which has no meta['val']: its sizes are unknown",
                        node=source.name)
    return source.meta["val"]


def _attribute(node: fx.Node) -> Any:
    value: Any = node.meta.get("val")
    if value is None:
        value = node.graph.owning_module
        for part in str(node.target).split("."):
            value = getattr(value, part)
    return value


def _family_and_work(node: fx.Node, call: Call) -> tuple[str, Work, bool]:
    target = node.target
    if target is operator.getitem or not isinstance(target, torch._ops.OperatorBase):
        return "scalar", NOTHING, True
    if isinstance(target, torch._ops.OpOverload) and (target.is_view or call.name in VIEWS):
        return "view", NOTHING, True
    entry = find(call.name) or find(call.name.removesuffix("_"))
    if entry is not None:
        return entry.family, entry.formula(call), True
    if isinstance(target, torch._ops.HigherOrderOperator):
        inner = control_flow(call, analyze_costs)
        if inner is not None:
            return "control_flow", inner, True
    elif call.name.startswith("aten::_foreach_"):
        return *foreach(call), True
    elif torch.Tag.pointwise in getattr(target, "tags", ()):
        return *pointwise(call), True
    return "default", call.work(call.out_numel), False


def _op_name(target: Any) -> str:
    if isinstance(target, torch._ops.OpOverload):
        return str(target.overloadpacket._qualified_op_name)
    if isinstance(target, torch._ops.HigherOrderOperator):
        return f"higher_order::{target._name}"
    return f"python::{getattr(target, '__name__', str(target))}"


def _dtype_name(call: Call) -> str:
    """What an op computes in: the first floating dtype of its arguments, else of its results, else the first."""
    tensors = (*call.inputs, *call.outputs)
    floating = [t.dtype for t in tensors if t.dtype.is_floating_point or t.dtype.is_complex]
    dtypes = floating or [t.dtype for t in tensors]
    return str(dtypes[0]).removeprefix("torch.") if dtypes else ""


def _note_symbols(node: fx.Node, origins: dict[str, tuple[str, int]]) -> None:
    """Remember where each symbol is first seen, to name it when its value is missing."""
    value = node.meta.get("val")
    if isinstance(value, torch.SymInt):
        for symbol in getattr(value.node.expr, "free_symbols", ()):
            origins.setdefault(str(symbol), (node.name, -1))
    for tensor in tensors_in(value):
        sizes: tuple[Any, ...] = tuple(tensor.shape)
        for dim, size in enumerate(sizes):
            if not isinstance(size, int):
                for symbol in size.node.expr.free_symbols:
                    origins.setdefault(str(symbol), (node.name, dim))
