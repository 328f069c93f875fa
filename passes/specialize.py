"""A graph with symbolic sizes -> the same graph for one set of sizes.

    before   s0, x[s0, 8] -> view(x, [s0 * 2, 4]) -> ...
    after    s0, x[6, 8]  -> view(x, [12, 4])     -> ...

Contract: same inputs in the same order (those that are sizes are read by nobody), same outputs, names of nodes kept,
`graph.lint()`, `meta["val"]` without symbols. No guard is added: the symbolic graph and its shape environment are not
asked anything.
"""
from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

from genie_dynamo.core.errors import UnsupportedGraphError

_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)


def symbolic_batch(gm: fx.GraphModule, static_inputs: tuple[int, ...]) -> bool:
    """Whether the first dim of an input that is no parameter is a symbol."""
    inputs = [node.meta.get("val") for node in gm.graph.nodes if node.op == "placeholder"]
    return any(isinstance(value, torch.Tensor) and value.dim() and isinstance(value.shape[0], torch.SymInt)
               for index, value in enumerate(inputs) if index not in static_inputs)


def specialize(gm: fx.GraphModule, symbol_values: Mapping[str, int]) -> fx.GraphModule:
    """The graph for these sizes.

    Raises: UnsupportedGraphError where a node cannot be worked out for them.
    """
    return _Specializing(gm, symbol_values).run()


class _Specializing:
    """One pass over the nodes; what is a number becomes a literal where it is used."""

    def __init__(self, gm: fx.GraphModule, symbol_values: Mapping[str, int]) -> None:
        self._gm, self._values = gm, symbol_values
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)
        self._graph = fx.Graph(gm)
        self._made: dict[fx.Node, fx.Node] = {}
        self._held: dict[fx.Node, Any] = {}            # value of each old node, fake or a number

    def run(self) -> fx.GraphModule:
        for node in self._gm.graph.nodes:
            if node.op == "placeholder":
                self._copy(node, self._sized(node.meta.get("val")))
            elif node.op == "get_attr":
                self._copy(node, self._constant(node))
            elif node.op == "output":
                # A size that is an input stays one; others are literals from now on.
                self._graph.output(fx.map_arg(node.args[0], lambda n: self._made[n] if n.op == "placeholder"
                                              else self._argument(n)))
            else:
                self._call(node)
        made = fx.GraphModule(self._gm, self._graph)
        made.meta = dict(self._gm.meta)
        made.graph.lint()
        return made

    def _call(self, node: fx.Node) -> None:
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._held.__getitem__)
        try:
            with self._mode:
                value = node.target(*args, **kwargs)
        except Exception as error:
            raise UnsupportedGraphError(f"{node.name} cannot be worked out for sizes "
                                        f"{dict(self._values)}: {type(error).__name__}: {error}") from error
        if isinstance(value, int | float | bool) or value is None:
            self._held[node] = value                   # a size, or a check of one: nothing is left to run
            return
        self._copy(node, value)

    def _copy(self, node: fx.Node, value: Any) -> None:
        new = self._made[node] = self._graph.node_copy(node, self._argument)
        new.name = node.name
        new.meta = {**node.meta, "val": value}
        self._held[node] = value

    def _argument(self, node: fx.Node) -> Any:
        value = self._held.get(node)
        return value if isinstance(value, int | float | bool) or node not in self._made else self._made[node]

    def _sized(self, value: Any) -> Any:
        """An input of these sizes."""
        if isinstance(value, _SYMBOLIC):
            return self._number(value)
        if not isinstance(value, torch.Tensor):
            return value
        sizes, strides = ([self._number(n) for n in numbers] for numbers in (value.shape, value.stride()))
        with self._mode:
            made = torch.empty_strided(sizes, strides, dtype=value.dtype, device=value.device)
        return made.requires_grad_(value.requires_grad) if value.requires_grad else made

    def _number(self, value: Any) -> Any:
        if not isinstance(value, _SYMBOLIC):
            return value
        found = value.node.expr.xreplace({s: sympy.Integer(self._values[str(s)]) for s in value.node.expr.free_symbols
                                          if str(s) in self._values})
        if not found.is_number:
            raise UnsupportedGraphError(f"the size {found} does not follow from the inputs' own")
        return int(found) if found.is_integer else float(found)

    def _constant(self, node: fx.Node) -> Any:
        value: Any = self._gm
        for name in str(node.target).split("."):
            value = getattr(value, name)
        if isinstance(value, torch.Tensor) and not isinstance(value, FakeTensor):
            return self._mode.from_tensor(value, static_shapes=True)
        return value
