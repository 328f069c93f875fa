"""`genie.analyze`: what a model or function means, without running it on a worker."""
from __future__ import annotations

import logging
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.costs import analyze_costs
from genie_dynamo.passes.facts import read_guards
from genie_dynamo.passes.semantics.annotate import annotate
from genie_dynamo.passes.semantics.carry import mark, region_id_of

_LOCK = threading.Lock()
log = logging.getLogger(__name__)


class _Captured(BaseException):
    """Leaves the user's frame before anything of its graph runs. Not an Exception: user code may catch those."""


def analyze(model_or_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> SemanticGraph:
    """The meaning of one call: workload, phase, modalities, regions, guards.

    Nothing is computed, and caches or buffers that the call would change stay as they are: the graph is captured as
    torch.compile would, and dropped. Symbolic sizes stay symbolic where Dynamo finds them so (a second call with
    another length), and `.phase_at` answers for other sizes.

    Args:    model_or_fn: an nn.Module or a function.  args, kwargs: of the call.
    Raises:  UnsupportedGraphError where the call cannot be one graph; the message says where it breaks.
    """
    found: list[SemanticGraph] = []

    def backend(gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        graph = annotate(gm, guards=read_guards(gm))
        mark(gm, graph)
        found.append(with_costs(graph, _region_costs(gm, inputs)))

        def leave(*_: Any) -> Any:
            raise _Captured

        return leave

    with _LOCK:
        target = _uncompiled(model_or_fn)
        try:
            with torch._dynamo.config.patch(allow_rnn=True):
                torch.compile(_fresh(target), backend=backend, fullgraph=True)(*args, **kwargs)
        except _Captured:
            pass
        except torch._dynamo.exc.Unsupported as exc:
            raise UnsupportedGraphError(
                f"{_name(target)} cannot be captured as one graph: {str(exc).strip().splitlines()[0]}{_where(exc)}; "
                "check the arguments, analyze a submodule, or find the break with torch._dynamo.explain",
                reasons=(str(exc),)) from exc
    if not found:
        return SemanticGraph(reason="the call computes nothing on tensors",
                             warnings=("the call computes nothing on tensors",))
    return found[-1]


def _region_costs(gm: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, tuple[float, float]]:
    """FLOPs and bytes moved by region: of the ATen ops that AOTAutograd derives, forward only; or nothing."""
    sums: dict[str, tuple[float, float]] = {}

    def keep(aten: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        sums.update(sums_by_region(aten))
        return aten.forward

    try:
        # With symbolic sizes the backward is compiled at once too, and is no part of the call.
        aot_autograd(fw_compiler=keep, bw_compiler=lambda aten, _: aten.forward, inference_compiler=keep,
                     keep_inference_input_mutations=True)(gm, inputs)
    except Exception as error:     # what is understood is worth having without its costs
        log.info("regions have no costs: %s", error)
    return sums


def sums_by_region(aten: fx.GraphModule) -> dict[str, tuple[float, float]]:
    """Region id -> (FLOPs, bytes moved) of a graph of ATen ops whose nodes are marked with their regions.

    Raises: CostError.
    """
    sums: dict[str, tuple[float, float]] = {}
    costs = analyze_costs(aten)
    columns = costs.values(_hints(aten))
    moved = columns["bytes_read"] + columns["bytes_written"]
    region_of = {node.name: region_id for node in aten.graph.nodes if (region_id := region_id_of(node))}
    for name, flops, size in zip(costs.nodes, columns["flops"].tolist(), moved.tolist(), strict=True):
        if name in region_of:
            before = sums.get(region_of[name], (0.0, 0.0))
            sums[region_of[name]] = (before[0] + flops, before[1] + size)
    return sums


def _hints(gm: fx.GraphModule) -> dict[str, int]:
    """The sizes of the captured call, by symbol."""
    sizes = [size for node in gm.graph.nodes if node.op == "placeholder"
             for value in (node.meta.get("val"),)
             for size in (value.shape if isinstance(value, torch.Tensor) else (value,))]
    return {str(size.node.expr): int(size.node.hint) for size in sizes
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None}


def with_costs(graph: SemanticGraph, sums: Mapping[str, tuple[float, float]]) -> SemanticGraph:
    """The graph with what its regions cost. Containers have the sums of what they hold."""
    held: dict[str, tuple[float, float]] = dict(sums)
    for region in graph.regions:
        if region.parent and region.region_id in sums:
            before = held.get(region.parent, (0.0, 0.0))
            held[region.parent] = (before[0] + sums[region.region_id][0], before[1] + sums[region.region_id][1])
    return replace(graph, regions=tuple(
        replace(region, flops=held[region.region_id][0], bytes_moved=held[region.region_id][1])
        if region.region_id in held else region for region in graph.regions))


def _where(exc: BaseException) -> str:
    """The line of the caller's code that Dynamo names, if it does."""
    lines = re.findall(r'File "([^"]+)", line (\d+), in (\w+)', str(exc))
    return " at {}:{} in {}".format(*lines[-1]) if lines else ""


def _fresh(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, so that code compiled elsewhere for this module is neither used nor kept."""
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return call


def _uncompiled(target: Any) -> Callable[..., Any]:
    original = getattr(target, "_orig_mod", None)
    return original if isinstance(original, torch.nn.Module) else target


def _name(target: Any) -> str:
    return getattr(target, "__name__", type(target).__name__)
