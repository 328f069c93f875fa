"""What depends on torch.set_default_dtype is said in the graph: a worker has a default of its own.

    sigmoid(int64)  -> float64                 sigmoid(_to_copy(int64, dtype=float64))
    ones([3])       -> float64          ->     ones([3], dtype=float64)

Torch computes floating point numbers out of integers alone in the default dtype of the process. A graph records what
that was as the dtype of the result; a worker's default is float32.

Before: an AOTAutograd graph, nodes with meta["val"].
After:  the same values, bit for bit, in a process whose default dtype is float32.
"""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from genie_dynamo.core.errors import UnsupportedGraphError

WORKERS_DEFAULT = torch.float32


def make_default_dtype_explicit(gm: fx.GraphModule) -> None:
    """Raises: UnsupportedGraphError for an op that takes neither a dtype nor converted integers."""
    changed = False
    for node in list(gm.graph.nodes):
        dtype = default_dtype_of(node)
        if dtype is not None:
            _say(gm, node, dtype)
            changed = True
    if changed:
        gm.recompile()


def default_dtype_of(node: fx.Node) -> torch.dtype | None:
    """The dtype that a node's result has by the client's default alone, where a worker's would be another."""
    if node.op != "call_function" or not isinstance(node.target, OpOverload):
        return None
    read = [a.meta.get("val") for a in node.all_input_nodes]
    if any(value is None for value in read):
        return None
    made = [v.dtype for v in pytree.tree_leaves(node.meta.get("val")) if isinstance(v, torch.Tensor)]
    return dependent_dtype(node.target, pytree.tree_leaves((node.args, node.kwargs)), made,
                           [v.dtype for v in read if isinstance(v, torch.Tensor)])


def dependent_dtype(target: OpOverload, arguments: Iterable[Any], made: Iterable[torch.dtype],
                    given: Iterable[torch.dtype]) -> torch.dtype | None:
    """The floating dtype among results that came from nowhere but a default other than float32.

    Args: arguments: of the call, one that names a dtype among them or not.  made, given: of results and inputs.
    """
    if target.namespace != "aten" or any(isinstance(value, torch.dtype) for value in arguments) \
            or any(dtype.is_floating_point or dtype.is_complex for dtype in given):
        return None
    return next((d for d in made if d.is_floating_point and d != WORKERS_DEFAULT), None)


def _say(gm: fx.GraphModule, node: fx.Node, dtype: torch.dtype) -> None:
    target: Any = node.target
    tensors = [a for a in node.all_input_nodes if isinstance(a.meta.get("val"), torch.Tensor)]
    if not tensors and any(a.name == "dtype" for a in target._schema.arguments):
        node.update_kwarg("dtype", dtype)
        return
    if not tensors or torch.Tag.pointwise not in target.tags or "where" in target._schema.name:
        raise UnsupportedGraphError(f"{target} gives {dtype} by torch.set_default_dtype, which workers do not have: "
                                    "convert its integers first, or name a dtype")
    for tensor in tensors:
        with gm.graph.inserting_before(node):
            converted = gm.graph.call_function(torch.ops.aten._to_copy.default, (tensor,), {"dtype": dtype})
        converted.meta = {**node.meta, "val": tensor.meta["val"].to(dtype)}
        node.replace_input_with(tensor, converted)
