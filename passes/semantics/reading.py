"""The border to torch.fx: a GraphModule of any of the three captures becomes a GraphView."""
from __future__ import annotations

import operator
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

from genie_dynamo.passes.semantics.ops import canonical_op
from genie_dynamo.passes.semantics.view import Dim, GraphView, ViewNode

_TUPLES = (tuple, list)
_VIEWS_OF_VIEWS = 8
_ROOT = re.compile(r"^L\.\w+\.?")
_ALIASING = frozenset({"view", "transpose", "expand", "unsqueeze", "squeeze", "slice", "select", "getitem"})


def read_graph(gm: fx.GraphModule, *, roles: Mapping[str, str] | None = None, names: bool = True) -> GraphView:
    """The view of a graph.

    Args:    roles: of inputs by placeholder name ("parameter", "buffer", "input") where the caller knows better than
             the graph.  names: False leaves out module paths, class names and the names of inputs, so that only
             structure is left.
    """
    seen: dict[fx.Node, ViewNode] = {}
    nodes = []
    for index, node in enumerate(gm.graph.nodes):
        seen[node] = view = _read(gm, node, index, seen, roles or {}, names)
        nodes.append(view)
        if view.inplace and node.all_input_nodes:
            _rename(node, view, seen)
    return GraphView(nodes)


def _rename(node: fx.Node, written: ViewNode, seen: dict[fx.Node, ViewNode]) -> None:
    """Who reads the tensor after a write in place, or the tensor that it is a view of, reads what was written."""
    target: Any = node.args[0] if node.args else None
    if isinstance(target, _TUPLES):
        seen.update((item, written) for item in target if isinstance(item, fx.Node))     # _foreach_add_ and its kin
        return
    for _ in range(_VIEWS_OF_VIEWS):
        if not isinstance(target, fx.Node) or target.op == "output":
            return
        seen[target] = written
        if target.op not in ("call_function", "call_method") or canonical_op(_op_name(target)) not in _ALIASING:
            return
        target = target.args[0] if target.args else None


def read_roles(gm: fx.GraphModule) -> dict[str, str]:
    """Roles of the inputs of a graph as Dynamo gives it: what belongs to a module, and whether it learns."""
    return {node.name: _dynamo_role(node) for node in gm.graph.nodes if node.op == "placeholder"}


def _read(gm: fx.GraphModule, node: fx.Node, index: int, seen: Mapping[fx.Node, ViewNode], roles: Mapping[str, str],
          names: bool) -> ViewNode:
    path, class_name = _module_of(node) if names else ("", "")
    value = node.meta.get("val", node.meta.get("example_value"))
    if value is None and node.target is operator.setitem and isinstance(node.args[0], fx.Node):
        value = _value(node.args[0])           # it returns nothing: who reads it reads what was written into
    shape, hint, dtype = _facts(value)
    common: dict[str, Any] = {"index": index, "name": node.name, "shape": shape, "hint": hint, "dtype": dtype,
                              "path": path, "class_name": class_name}
    if node.op == "placeholder":
        role = roles.get(node.name) or _dynamo_role(node)
        return ViewNode(kind="input", op=role, target="", source=_source(node) if names else "", **common)
    if node.op == "get_attr":
        role, fallback = _constant(gm, str(node.target))
        if shape is None and fallback is not None:
            common["shape"], common["hint"], common["dtype"] = _facts(fallback)
        return ViewNode(kind="constant", op=role, target=str(node.target), **common)
    args = _plain(node.args, seen)
    if node.op == "output":
        return ViewNode(kind="output", op="output", target="output", args=args, **common)
    name = _op_name(node)
    op = canonical_op(name)
    inplace = name.endswith("_") and not name.endswith("__") and (
        not name.startswith("_") or name.startswith(("_foreach_", "_fused_")))
    if op == "getitem":
        op = _getitem(node)
    elif op == "getattr":
        op = canonical_op(str(node.args[1]))
    return ViewNode(kind="call", op=op, target=name, args=args, kwargs=_plain(node.kwargs, seen),
                    inplace=inplace or name == "setitem", **common)


def _op_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target
    if isinstance(target, torch._ops.OpOverload):
        return str(target._schema.name.rsplit("::", 1)[-1])
    if isinstance(target, torch._ops.HigherOrderOperator):
        return str(target._name)
    return str(getattr(target, "__name__", type(target).__name__))


def _getitem(node: fx.Node) -> str:
    """Which of the three things that x[...] does: take from a tuple, slice, or index by a tensor."""
    source, key = node.args[0], node.args[1]
    value = source.meta.get("val", source.meta.get("example_value")) if isinstance(source, fx.Node) else None
    if not isinstance(value, torch.Tensor):
        return "item"
    parts = key if isinstance(key, _TUPLES) else (key,)
    if any(isinstance(part, fx.Node) and isinstance(_value(part), torch.Tensor) for part in parts):
        return "index"
    return "select" if any(isinstance(part, int) for part in parts) else "slice"


def _value(node: fx.Node) -> Any:
    return node.meta.get("val", node.meta.get("example_value"))


def _plain(value: Any, seen: Mapping[fx.Node, ViewNode]) -> Any:
    if isinstance(value, fx.Node):
        return seen[value]
    if isinstance(value, _TUPLES):
        return tuple(_plain(item, seen) for item in value)
    if isinstance(value, dict):
        return {key: _plain(item, seen) for key, item in value.items()}
    if isinstance(value, slice):
        return ("slice", *(_plain(part, seen) for part in (value.start, value.stop, value.step)))
    if value is None or isinstance(value, int | float | bool | str):
        return value
    return "..." if value is Ellipsis else str(value)


def _facts(value: Any) -> tuple[tuple[Dim, ...] | None, tuple[int, ...] | None, str]:
    if isinstance(value, _TUPLES):
        value = next((item for item in value if isinstance(item, torch.Tensor)), None)
    if not isinstance(value, torch.Tensor):
        return None, None, ""
    dtype = str(value.dtype).removeprefix("torch.")
    sizes = value.shape
    if all(type(size) is int for size in sizes):
        return tuple(sizes), tuple(sizes), dtype
    shape = tuple(size if type(size) is int else str(size) for size in sizes)
    hints = tuple(size if type(size) is int else _hint(size) for size in sizes)
    return shape, None if None in hints else hints, dtype  # type: ignore[return-value]


def _hint(size: Any) -> int | None:
    node = getattr(size, "node", None)
    return node.hint if node is not None and node.has_hint() else None


def _module_of(node: fx.Node) -> tuple[str, str]:
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack")
    if not stack:
        return "", ""
    path, kind = list(stack.values())[-1]
    name = kind if isinstance(kind, str) else kind.__name__
    return clean_path(str(path)), name.rsplit(".", 1)[-1]


def clean_path(path: str) -> str:
    """`L['self'].model.layers.0` and `L['target'].model.layers.0` -> `model.layers.0`."""
    return _ROOT.sub("", path.replace("._modules['", ".").replace("']", "").replace("L['", "L.")).strip(".")


def _source(node: fx.Node) -> str:
    grapharg = node.meta.get("grapharg")
    source = getattr(grapharg, "source", None)
    return str(source.name) if source is not None else str(node.target)


def _dynamo_role(node: fx.Node) -> str:
    """From the fake value and the source alone: the real tensor may be gone."""
    if isinstance(_value(node), torch.nn.Parameter):
        return "parameter"
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = str(getattr(source, "name", ""))
    if "._parameters[" in name:
        return "parameter"
    # A tensor that is a plain attribute of a module is no argument of the call either.
    return "buffer" if "._buffers[" in name or _of_a_module(source) else "input"


def _of_a_module(source: Any) -> bool:
    kind = getattr(source, "guard_source", None)
    kind = kind() if callable(kind) else kind
    return kind is not None and bool(kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module())


def _constant(gm: fx.GraphModule, target: str) -> tuple[str, torch.Tensor | None]:
    try:
        value: Any = operator.attrgetter(target)(gm)
    except AttributeError:
        return "constant", None
    if isinstance(value, torch.nn.Parameter):
        return "parameter", value
    if isinstance(value, torch.Tensor):
        return "buffer", value
    return "subgraph", None
