"""ATen graph -> GraphSpec: the nodes of one fragment as plain data (core/graph_spec.py).

Before: an AOTAutograd graph of call_function and get_attr nodes; tensors it owns are real, strided tensors.
After:  a spec without names of the client's program, in which get_attr tensors are constants, get_attr GraphModules
        subgraphs, and every device the client meant for real data is "the worker's device".
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.utils import _pytree as pytree

from genie_dynamo.core.allowlist import NAMESPACES, target_name
from genie_dynamo.core.errors import PlanError, UnsupportedGraphError
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
from genie_dynamo.core.limits import DEFAULT_LIMITS
from genie_dynamo.core.tensors import DTYPE_CODE

MAX_CONSTANT_BYTES = DEFAULT_LIMITS.header_bytes // 2
"""Constants travel inside the graph, which travels inside one message header."""

_TRAVELLING_DEVICES = ("cpu", "cuda")
_SCALARS = (int, float, complex, str, type(None), torch.SymInt, torch.SymFloat, torch.SymBool)
_LEAVES = (torch.dtype, torch.layout, torch.memory_format, type(None), type(Ellipsis), bool, complex, str)


def lower_fragment(
    gm: fx.GraphModule, *, node_names: Sequence[str], inputs: Sequence[str], outputs: Sequence[str | int | None]
) -> GraphSpec:
    """Lower the named nodes of a graph.

    Args:    node_names: call_function and get_attr nodes in topological order.
             inputs: names of the values (placeholders or other fragments' nodes) the fragment takes, in order.
             outputs: value names; an int or None passes literally.
    Raises:  UnsupportedGraphError where a node cannot be shipped, PlanError where a node reads what it does not have.
    """
    by_name = {node.name: node for node in gm.graph.nodes}
    lowering = _Lowering(gm, [by_name[name] for name in inputs])
    for name in node_names:
        lowering.add(by_name[name])
    built = tuple(lowering.arg(by_name[o]) if isinstance(o, str) else lowering.arg(o) for o in outputs)
    return lowering.finish(built, "tuple")


def lower_graph_module(gm: fx.GraphModule) -> GraphSpec:
    """Lower a whole graph, as subgraphs of higher-order ops are.

    Raises: UnsupportedGraphError where a node cannot be shipped.
    """
    nodes = list(gm.graph.nodes)
    lowering = _Lowering(gm, [node for node in nodes if node.op == "placeholder"])
    for node in nodes:
        if node.op not in ("placeholder", "output"):
            lowering.add(node)
    (result,) = nodes[-1].args
    kind: Literal["tuple", "list", "value"] = "value"
    if type(result) is tuple or isinstance(result, list):
        kind = "tuple" if isinstance(result, tuple) else "list"
        return lowering.finish(tuple(lowering.arg(item) for item in result), kind)
    return lowering.finish((lowering.arg(result),), kind)


class _Lowering:
    """One graph on its way."""

    def __init__(self, gm: fx.GraphModule, inputs: Sequence[fx.Node]) -> None:
        self._gm = gm
        self._num_inputs = len(inputs)
        self._values = {node: index for index, node in enumerate(inputs)}
        self._nodes: list[NodeSpec] = []
        self._constants: list[ConstantSpec] = []
        self._subgraphs: list[GraphSpec] = []
        self._attributes: dict[str, Constant | Subgraph] = {}

    def add(self, node: fx.Node) -> None:
        """Lower one node."""
        if node.op == "get_attr":
            self._attribute(node)
            return
        if node.op != "call_function":
            raise UnsupportedGraphError(f"node {node.name}: {node.op} {node.target} cannot be shipped", node=node.name)
        target, args, kwargs = _in_aten(node)
        try:
            spec = NodeSpec(
                node.name, target_name(target), tuple(self.arg(a) for a in args),
                {key: self.arg(value) for key, value in kwargs.items()},
            )
        except UnsupportedGraphError as exc:
            raise UnsupportedGraphError(f"node {node.name}: {exc}", **{**exc.facts, "node": node.name}) from exc
        self._values[node] = self._num_inputs + len(self._nodes)
        self._nodes.append(spec)

    def targets_of_last_node(self) -> list[str]:
        """The ops that the node lowered last calls itself or is given to call."""
        node = self._nodes[-1]
        return [node.target, *(a.target for a in (*node.args, *node.kwargs.values()) if isinstance(a, Op))]

    def skip(self, node: fx.Node) -> None:
        """Take a node that cannot be lowered as made, so that its users can be looked at."""
        self._values[node] = self._num_inputs

    def finish(self, outputs: tuple[Arg, ...], returns: Literal["tuple", "list", "value"]) -> GraphSpec:
        self.check_size()
        return GraphSpec(self._num_inputs, tuple(self._nodes), outputs, tuple(self._constants),
                         tuple(self._subgraphs), returns)

    def check_size(self) -> None:
        """Raises: UnsupportedGraphError where the constants are too many bytes for one message."""
        size_bytes = _constant_bytes(self._constants, self._subgraphs)
        if size_bytes > MAX_CONSTANT_BYTES:
            raise UnsupportedGraphError(
                f"the graph holds {size_bytes} bytes of constant tensors, at most {MAX_CONSTANT_BYTES} travel with a "
                f"graph; make them parameters or buffers of the module", size_bytes=size_bytes,
            )

    def arg(self, arg: Any) -> Arg:
        """One argument, recursively.

        Raises: UnsupportedGraphError for what is not plain data.
        """
        if isinstance(arg, fx.Node):
            return self._reference(arg)
        if isinstance(arg, _LEAVES):
            return arg if type(arg) is not complex else complex(arg)
        if isinstance(arg, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            return _constant_symbol(arg)
        if isinstance(arg, (int, float)):
            return int(arg) if isinstance(arg, int) else float(arg)
        if isinstance(arg, torch.device):
            return _device(arg)
        if isinstance(arg, slice):
            return slice(self.arg(arg.start), self.arg(arg.stop), self.arg(arg.step))
        if isinstance(arg, list):
            return [self.arg(item) for item in arg]
        if type(arg) in (tuple, torch.Size):
            return tuple(self.arg(item) for item in arg)
        if isinstance(arg, dict):
            return self._dict(arg)
        if isinstance(arg, OpOverload):
            return Op(target_name(arg))
        if isinstance(arg, torch.Tensor):
            return self._constant(arg, "a tensor argument")
        raise UnsupportedGraphError(f"an argument of type {_type_name(arg)} cannot be shipped")

    def _dict(self, arg: dict[Any, Any]) -> Arg:
        for key in arg:
            if type(key) is not str:
                raise UnsupportedGraphError(f"a dict with a key of type {_type_name(key)} cannot be shipped")
        return {key: self.arg(value) for key, value in arg.items()}

    def _reference(self, node: fx.Node) -> Arg:
        index = self._values.get(node)
        if index is not None:
            return Value(index)
        if node.op == "get_attr":
            return self._attribute(node)
        raise PlanError(f"the fragment reads {node.name}, which is neither among its inputs nor made before",
                        value=node.name)

    def _attribute(self, node: fx.Node) -> Constant | Subgraph:
        path = str(node.target)
        known = self._attributes.get(path)
        if known is None:
            value = attribute(self._gm, path)
            if isinstance(value, fx.GraphModule):
                self._subgraphs.append(lower_graph_module(value))
                known = Subgraph(len(self._subgraphs) - 1)
            elif isinstance(value, torch.Tensor):
                known = self._constant(value, f"constant {path}")
            else:
                raise UnsupportedGraphError(f"attribute {path} of type {_type_name(value)} cannot be shipped")
            self._attributes[path] = known
        return known

    def _constant(self, tensor: torch.Tensor, what: str) -> Constant:
        problem = constant_problem(tensor)
        if problem:
            raise UnsupportedGraphError(f"{what} {problem}")
        with unset_fake_temporarily():  # AOTAutograd calls its compilers under a fake mode
            self._constants.append(ConstantSpec.from_tensor(tensor))
        return Constant(len(self._constants) - 1)


def _in_aten(node: fx.Node) -> tuple[Any, tuple[Any, ...], dict[str, Any]]:
    """`(target, args, kwargs)` of a call; a cast of torch.prims, which is Python and takes 60 us, as ATen's own.

    Dynamo makes such casts of Python floats that it takes as inputs (dynamic=True): 50 in a Llama of 12 layers.
    """
    if node.target is torch.ops.prims.convert_element_type.default and len(node.args) == 2:
        return torch.ops.aten._to_copy.default, node.args[:1], {"dtype": node.args[1]}
    return node.target, node.args, dict(node.kwargs)


def _constant_bytes(constants: Sequence[ConstantSpec], subgraphs: Sequence[GraphSpec]) -> int:
    return sum(len(c.data) for c in constants) + sum(_constant_bytes(g.constants, g.subgraphs) for g in subgraphs)


def attribute(gm: torch.nn.Module, path: str) -> Any:
    """The attribute behind a get_attr target.

    Raises: UnsupportedGraphError where it does not exist.
    """
    value: Any = gm
    for part in path.split("."):
        try:
            value = getattr(value, part)
        except AttributeError as exc:
            raise UnsupportedGraphError(f"attribute {path} does not exist in the graph module") from exc
    return value


def constant_problem(tensor: torch.Tensor) -> str | None:
    """Why a tensor the graph owns cannot travel, or None."""
    if isinstance(tensor, FakeTensor):
        return "was captured as a fake tensor and has no values; make it a buffer of the module"
    problem = tensor_problem(tensor)
    if problem is None and tensor.device.type == "meta":
        return "is a meta tensor and has no values"
    return problem


def tensor_problem(tensor: torch.Tensor) -> str | None:
    """Why a tensor (real or fake) cannot be an argument or result on a worker, or None."""
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer, FakeTensor):
        return f"is a {_type_name(tensor)}; tensor subclasses cannot be shipped"
    if tensor.is_nested:
        return "is nested; only strided tensors travel"
    if tensor.layout is not torch.strided:
        return f"has layout {str(tensor.layout).removeprefix('torch.')}; only strided tensors travel"
    if tensor.device.type not in (*_TRAVELLING_DEVICES, "meta"):
        return f"is on device {tensor.device}; only cpu and cuda tensors travel"
    if tensor.dtype not in DTYPE_CODE:
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}, which does not travel"
    return None


def _device(device: torch.device) -> Device:
    if device.type == "meta":
        return Device.META
    if device.type in _TRAVELLING_DEVICES:
        return Device.WORKER
    raise UnsupportedGraphError(f"device {device} cannot be shipped; only cpu, cuda and meta can")


def _constant_symbol(symbol: torch.SymInt | torch.SymFloat | torch.SymBool) -> Arg:
    constant = symbol.node.maybe_as_int() if isinstance(symbol, torch.SymInt) else None
    if constant is None:
        raise UnsupportedGraphError(f"the symbol {symbol} stands in an argument without a node that computes it")
    return int(constant)


def _type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


# -- what cannot be lowered -----------------------------------------------------------------------------------


def unsupported_reasons(gm: fx.GraphModule, extra_namespaces: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Why the graph cannot be shipped, one line for each node that is in the way; empty where it can.

    Args: extra_namespaces: operator namespaces the workers were started with, beside the usual ones.
    """
    found = _Reasons(extra_namespaces)
    found.check(gm, "", epilogue_allowed=True)
    return tuple(dict.fromkeys(found.reasons))


class _Reasons:
    """Collects what is wrong in a graph and its subgraphs."""

    def __init__(self, extra_namespaces: frozenset[str]) -> None:
        self.reasons: list[str] = []
        self._namespaces = NAMESPACES | extra_namespaces | {"py", "higher_order"}

    def check(self, gm: fx.GraphModule, prefix: str, *, epilogue_allowed: bool) -> None:
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        lowering = _Lowering(gm, placeholders)
        for node in gm.graph.nodes:
            where = f"{prefix}{node.name}"
            self._check_values(node, where)
            if node.op in ("placeholder", "output"):
                continue
            if node.op == "get_attr":
                value = _attribute_or_none(gm, str(node.target))
                if isinstance(value, fx.GraphModule):
                    self.check(value, f"{where}/", epilogue_allowed=False)
                    continue
            self._try(lowering, node, where)
        self._check_output(gm, lowering, prefix)
        try:
            lowering.check_size()
        except UnsupportedGraphError as exc:
            self.reasons.append(f"{prefix}{exc}")
        self.reasons += _mutation_reasons(gm, prefix, epilogue_allowed)

    def _try(self, lowering: _Lowering, node: fx.Node, where: str) -> None:
        try:
            lowering.add(node)
        except UnsupportedGraphError as exc:
            lowering.skip(node)
            text = str(exc)
            self.reasons.append(text if text.startswith("node ") and "/" not in where else f"{where}: {text}")
            return
        for name in lowering.targets_of_last_node() if node.op == "call_function" else ():
            if name.partition("::")[0] not in self._namespaces:
                self.reasons.append(
                    f"node {where}: op {name} is of a namespace that workers do not serve; start them with "
                    f"--op-library <the module that registers it>")

    def _check_values(self, node: fx.Node, where: str) -> None:
        for leaf in pytree.tree_leaves(node.meta.get("val")):
            if isinstance(leaf, torch.Tensor):
                problem = tensor_problem(leaf)
            elif isinstance(leaf, _SCALARS):
                problem = None
            else:
                problem = f"is a {_type_name(leaf)}, which cannot be shipped"
            if problem:
                self.reasons.append(f"node {where}: its value {problem}")

    def _check_output(self, gm: fx.GraphModule, lowering: _Lowering, prefix: str) -> None:
        for item in pytree.tree_leaves(gm.graph.output_node().args):
            if not isinstance(item, fx.Node):
                try:
                    lowering.arg(item)
                except UnsupportedGraphError as exc:
                    self.reasons.append(f"{prefix}output: {exc}")


def _attribute_or_none(gm: fx.GraphModule, path: str) -> Any:
    try:
        return attribute(gm, path)
    except UnsupportedGraphError:
        return None


def _mutation_reasons(gm: fx.GraphModule, prefix: str, epilogue_allowed: bool) -> list[str]:
    """Writes to inputs or constants, other than copies into whole inputs that nothing reads afterwards."""
    nodes = list(gm.graph.nodes)
    owners = {
        storage: node
        for node in nodes if node.op in ("placeholder", "get_attr")
        for storage in _storages(_value_of(gm, node))
    }
    reasons = []
    for position, node in enumerate(nodes):
        for written in _written_nodes(node):
            owner = next((owners[s] for s in _storages(_value_of(gm, written)) if s in owners), None)
            if owner is None:
                continue
            if epilogue_allowed and _is_epilogue(gm, node, nodes[position + 1 :], owner):
                continue
            kind = "input" if owner.op == "placeholder" else "constant"
            through = "" if written is owner else f" through its view {written.name}"
            reasons.append(f"node {prefix}{node.name}: {node.target} writes into {kind} {owner.name}{through}")
    return reasons


def _is_epilogue(gm: fx.GraphModule, node: fx.Node, later: Sequence[fx.Node], owner: fx.Node) -> bool:
    if node.target is not torch.ops.aten.copy_.default or node.args[0] is not owner or owner.op != "placeholder":
        return False
    storages = _storages(_value_of(gm, owner))
    return not any(
        storages & _storages(_value_of(gm, read))
        for after in later if after.op != "output"
        for read in after.all_input_nodes
    )


def _written_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes whose memory an op writes, by its schema."""
    if not isinstance(node.target, OpOverload) or not node.target._schema.is_mutable:
        return []
    written: list[fx.Node] = []
    for position, argument in enumerate(node.target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.kwargs.get(argument.name, node.args[position] if position < len(node.args) else None)
        written += [item for item in pytree.tree_leaves(value) if isinstance(item, fx.Node)]
    return written


def _value_of(gm: fx.GraphModule, node: fx.Node) -> Any:
    if node.op == "get_attr" and "val" not in node.meta:
        return _attribute_or_none(gm, str(node.target))
    return node.meta.get("val")


def _storages(value: Any) -> frozenset[int]:
    """Identities of the storages behind a value; views of one tensor share theirs, fake or real."""
    found = set()
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided and not leaf.is_nested:
            found.add(leaf.untyped_storage()._cdata)
    return frozenset(found)
