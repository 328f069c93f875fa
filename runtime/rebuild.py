"""GraphSpec -> fx.GraphModule, for compilers that want one.

fx writes a module's forward as Python text. That text is made of this file's own names (a0, n0, c0, g0, ...), of
allow-listed targets and of literals; nothing a client chose becomes a name in it.
"""
from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from genie_dynamo.core.allowlist import resolve
from genie_dynamo.core.fragment import Arg, Constant, Device, GraphSpec, Op, Subgraph, Value
from genie_dynamo.runtime.steps import check_device


def to_graph_module(spec: GraphSpec, *, device: torch.device,
                    extra_namespaces: frozenset[str] = frozenset()) -> fx.GraphModule:
    """The graph as a module on `device`; its forward takes the inputs in order and returns the outputs.

    Raises: UnsupportedGraphError where an op may not or cannot run here.
    """
    return _Rebuild(spec, device, extra_namespaces).module()


class _Rebuild:
    """One graph on its way."""

    def __init__(self, spec: GraphSpec, device: torch.device, extra_namespaces: frozenset[str]) -> None:
        self._spec, self._device, self._namespaces = spec, device, extra_namespaces
        self._graph = fx.Graph()
        self._root = torch.nn.Module()
        self._values: list[fx.Node] = []

    def module(self) -> fx.GraphModule:
        """Build it."""
        spec = self._spec
        for k in range(spec.num_inputs):
            self._values.append(self._graph.placeholder(f"a{k}"))
        constants = {f"c{k}": constant.to_tensor(self._device) for k, constant in enumerate(spec.constants)}
        for name, tensor in constants.items():
            self._root.register_buffer(name, tensor)
        for k, subgraph in enumerate(spec.subgraphs):
            setattr(self._root, f"g{k}", _Rebuild(subgraph, self._device, self._namespaces).module())
        for j, node in enumerate(spec.nodes):
            target = self._resolve(node.target)
            args = tuple(self._arg(a) for a in node.args)
            kwargs = {key: self._arg(a) for key, a in node.kwargs.items()}
            self._values.append(self._graph.create_node("call_function", target, args, kwargs, name=f"n{j}"))
        outputs = [self._arg(output) for output in spec.outputs]
        if spec.returns == "value":
            self._graph.output(outputs[0])
        else:
            self._graph.output(tuple(outputs) if spec.returns == "tuple" else outputs)
        self._graph.lint()
        built = fx.GraphModule(self._root, self._graph, class_name="Fragment")
        for name, tensor in constants.items():
            # Constants, not state: as buffers of a subgraph, tracing would functionalise them one level too high.
            delattr(built, name)
            setattr(built, name, tensor)
        return built

    def _resolve(self, target: str) -> Any:
        function = resolve(target, self._namespaces)
        check_device(function, target, self._device)
        return function

    def _arg(self, arg: Arg) -> Any:
        if isinstance(arg, Value):
            return self._values[arg.index]
        if isinstance(arg, Constant):
            return self._graph.get_attr(f"c{arg.index}")
        if isinstance(arg, Subgraph):
            return self._graph.get_attr(f"g{arg.index}")
        if isinstance(arg, Device):
            return self._device if arg is Device.WORKER else torch.device("meta")
        if isinstance(arg, Op):
            op = self._resolve(arg.target)
            assert isinstance(op, OpOverload)
            return op
        if isinstance(arg, list):
            return [self._arg(item) for item in arg]
        if isinstance(arg, tuple):
            return tuple(self._arg(item) for item in arg)
        if isinstance(arg, dict):
            return {key: self._arg(item) for key, item in arg.items()}
        if isinstance(arg, slice):
            return slice(self._arg(arg.start), self._arg(arg.stop), self._arg(arg.step))
        return arg
