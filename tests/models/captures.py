"""The three captures of one call: as Dynamo gives it, after AOTAutograd, and recorded from eager ops.

    for capture in captures(fn, inputs): capture.gm, capture.kind, capture.roles

`fn` takes keyword arguments. Module paths are on the nodes of all three, so that ground truth can be made from them;
what is analysed may leave them out. Nothing is computed by the first two.
"""
from __future__ import annotations

import contextlib
import itertools
import linecache
import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from functorch.compile import default_partition
from torch import fx, nn
from torch._dynamo.backends.common import aot_autograd
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from genie_dynamo.core import portable_ops as _portable_ops  # noqa: F401 - registers genie::sdpa
from genie_dynamo.passes.pipeline import run_pipeline
from genie_dynamo.passes.semantics.reading import clean_path, read_roles

KINDS = ("dynamo", "aot", "recorded")


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """One graph, and what is known about its inputs by placeholder name."""

    kind: str                      # "dynamo" | "aot" | "recorded"
    gm: fx.GraphModule
    part: str = "forward"          # "forward" | "backward" | "inference"
    roles: Mapping[str, str] = field(default_factory=dict)


def compiled_captures(fn: Callable[..., Any], inputs: Mapping[str, Any], *, training: bool = False,
                      dynamic: bool | None = False, fullgraph: bool = True) -> list[Capture]:
    """The graphs as Dynamo gives them, and those of AOTAutograd; with `training`, the backward too."""
    found: list[Capture] = []

    def backend(gm: fx.GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        roles = read_roles(gm)
        plain = fx.GraphModule(gm, _copied(gm.graph))
        found.append(Capture(kind="dynamo", gm=plain, roles=roles, part="forward"))
        run_pipeline(gm, example_inputs)
        # AOTAutograd makes inputs of the module's own tensors, before the others.
        lifted = [*("parameter" for _ in gm.named_parameters()), *("buffer" for _ in gm.named_buffers())]

        def compiler(part: str) -> Callable[..., Any]:
            def keep(graph: fx.GraphModule, _: Any) -> Callable[..., Any]:
                names = [n.name for n in graph.graph.nodes if n.op == "placeholder"]
                known = dict(zip(names, [*lifted, *roles.values()], strict=False)) if part != "backward" else {}
                found.append(Capture(kind="aot", gm=graph, part=part, roles=known))
                return graph.forward
            return keep

        return aot_autograd(  # type: ignore[no-any-return]
            fw_compiler=compiler("forward"), bw_compiler=compiler("backward"),
            inference_compiler=compiler("inference"), partition_fn=default_partition,
            keep_inference_input_mutations=True)(gm, example_inputs)

    torch._dynamo.reset()
    try:
        with contextlib.nullcontext() if training else torch.no_grad(), torch._dynamo.config.patch(allow_rnn=True):
            out = torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=fullgraph)(**inputs)
            if training:
                leaves = [x for x in pytree.tree_leaves(out) if isinstance(x, torch.Tensor) and x.requires_grad]
                torch.autograd.backward([leaf.sum() for leaf in leaves])
    finally:
        torch._dynamo.reset()
    return found


def _copied(graph: fx.Graph) -> fx.Graph:
    """A copy whose meta dictionaries are its own."""
    copied = fx.Graph()
    values: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        values[node] = new = copied.node_copy(node, lambda n: values[n])
        new.meta = dict(node.meta)
    return copied


def recorded_capture(fn: Callable[..., Any], inputs: Mapping[str, Any], modules: Mapping[str, nn.Module]) -> Capture:
    """The ATen ops that eager executes, in order. `modules` by name: their paths are noted on the nodes."""
    with torch.no_grad(), _noting_modules(modules) as stack:
        recorder = _Recorder(stack)
        for name, value in _named_tensors(inputs):
            recorder.add_input(name, value)
        with recorder:
            out = fn(**inputs)
        kept = [value for root in modules.values() for module in root.modules() for value in vars(module).values()
                if isinstance(value, torch.Tensor)]
    return Capture(kind="recorded", gm=recorder.finish(out, kept), part="inference", roles=recorder.roles)


def _named_tensors(inputs: Mapping[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    for name, value in inputs.items():
        for number, leaf in enumerate(pytree.tree_leaves(value)):
            if isinstance(leaf, torch.Tensor):
                yield f"{name}_{number}", leaf


class _Recorder(TorchDispatchMode):
    """Executes each op and writes it into a graph. A tensor that nobody made is a constant of the graph."""

    def __init__(self, stack: list[tuple[str, type]]) -> None:
        super().__init__()
        self.graph, self.root, self.roles = fx.Graph(), nn.Module(), dict[str, str]()
        self._stack, self._nodes, self._alive = stack, dict[int, fx.Node](), list[torch.Tensor]()

    def add_input(self, name: str, value: torch.Tensor) -> None:
        node = self.graph.placeholder(name)
        self.roles[node.name] = "input"
        self._bind(value, node)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "profiler":
            return func(*args, **(kwargs or {}))       # notes for a profiler: no part of the computation
        given, named = pytree.tree_map_only(torch.Tensor, self._node, (args, kwargs or {}))
        out = func(*args, **(kwargs or {}))
        node = self.graph.call_function(func, given, named)
        if self._stack:
            node.meta["nn_module_stack"] = {path: (path, kind) for path, kind in self._stack}
        node.meta["frames"] = _frames()
        node.meta["val"] = pytree.tree_map_only(torch.Tensor, _shape_of, out)
        if isinstance(out, torch.Tensor):
            self._bind(out, node)
        elif isinstance(out, tuple | list):
            for index, item in enumerate(out):
                if isinstance(item, torch.Tensor):
                    element = self.graph.call_function(operator.getitem, (node, index))
                    element.meta = {**node.meta, "val": _shape_of(item)}
                    self._bind(item, element)
        return out

    def finish(self, out: Any, kept: Sequence[torch.Tensor] = ()) -> fx.GraphModule:
        """The graph. `kept`: tensors that outlive the call without being returned; those made in it are outputs."""
        leaves = [leaf for leaf in pytree.tree_leaves(tuple(_outputs(out))) if isinstance(leaf, torch.Tensor)]
        leaves += [value for value in kept if (node := self._nodes.get(id(value))) and node.op == "call_function"]
        self.graph.output(tuple(self._node(leaf) for leaf in leaves))
        return fx.GraphModule(self.root, self.graph)

    def _node(self, value: torch.Tensor) -> fx.Node:
        node = self._nodes.get(id(value))
        if node is None:
            name = f"constant_{len(self._nodes)}"
            self.root.register_parameter(name, value) if isinstance(value, nn.Parameter) \
                else self.root.register_buffer(name, value)
            node = self.graph.get_attr(name)
            self._bind(value, node)
        return node

    def _bind(self, value: torch.Tensor, node: fx.Node) -> None:
        node.meta.setdefault("val", _shape_of(value))
        self._nodes[id(value)] = node
        self._alive.append(value)      # an id is only good while its object lives


def _shape_of(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _outputs(out: Any) -> Iterator[Any]:
    """The tensors of a model's output, with those of a cache that it returns."""
    for value in out.values() if isinstance(out, dict) else [out]:
        if isinstance(value, dict):
            yield from _outputs(value)
            continue
        parts = (getattr(value, "self_attention_cache", value), getattr(value, "cross_attention_cache", None))
        layers = [layer for part in parts for layer in getattr(part, "layers", ())]
        yield [v for layer in layers for v in vars(layer).values()] if layers else value


@contextlib.contextmanager
def _noting_modules(modules: Mapping[str, nn.Module]) -> Iterator[list[tuple[str, type]]]:
    stack: list[tuple[str, type]] = []
    handles = []
    for name, root in modules.items():
        for path, module in root.named_modules(prefix=name):
            def enter(m: nn.Module, _: Any, where: tuple[str, type] = (path, type(module))) -> None:
                stack.append(where)

            def leave(m: nn.Module, _: Any, __: Any) -> None:
                stack.pop()

            handles += [module.register_forward_pre_hook(enter),
                        module.register_forward_hook(leave, always_call=True)]
    try:
        yield stack
    finally:
        for handle in handles:
            handle.remove()


def _frames() -> tuple[tuple[str, str], ...]:
    """(function, source line) of model code on the Python stack, innermost last."""
    frame, found = sys._getframe(2), []
    while frame is not None:
        where = frame.f_code.co_filename
        if "transformers" in where or "/tests/models/" in where:
            found.append((frame.f_code.co_name, linecache.getline(where, frame.f_lineno).strip()))
        frame = frame.f_back  # type: ignore[assignment]
    return tuple(reversed(found))


def frames_of(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """(function, source line) of the model code that made a node, innermost last."""
    if "frames" in node.meta:
        return tuple(node.meta["frames"])
    lines = (node.meta.get("stack_trace") or "").splitlines()
    pairs = itertools.pairwise(lines)
    return tuple((line.rsplit(" in ", 1)[1], code.strip()) for line, code in pairs if line.startswith("  File "))


def modules_of(node: fx.Node) -> tuple[tuple[str, str], ...]:
    """(path, class name) of the modules that a node was made in, outermost first."""
    stack = node.meta.get("nn_module_stack") or node.meta.get("fwd_nn_module_stack") or {}
    return tuple((clean_path(str(path)), (kind if isinstance(kind, str) else kind.__name__).rsplit(".", 1)[-1])
                 for path, kind in stack.values())
