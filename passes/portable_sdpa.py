"""Attention under one name: F.scaled_dot_product_attention becomes genie::sdpa.

    q, k, v, attn_mask                       q, k, v, attn_mask
            |                                        |
    scaled_dot_product_attention      ->      genie::sdpa
            |                                        |
           out                                 getitem 0: out

AOTAutograd turns the left side into an op of the client's device (on the CPU
`_scaled_dot_product_flash_attention_for_cpu`), which another device's worker cannot run. The right side stays
visible through AOTAutograd, forward and backward, and runs everywhere; see core/portable_ops.py.

Before: a graph as Dynamo gives it, nodes with meta["example_value"].
After:  the same values, bit for bit on the CPU, with the same strides; all meta of the call is on both new nodes.
        A call where that would not hold is left alone, with the reason.
"""
from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from genie_dynamo.core.portable_ops import sdpa
from genie_dynamo.passes.base import CaptureFacts, Match, NoMatch, Outcome

_TARGETS = frozenset({F.scaled_dot_product_attention, torch._C._nn.scaled_dot_product_attention})
_PARAMETERS = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_DEFAULTS: dict[str, Any] = {
    "attn_mask": None, "dropout_p": 0.0, "is_causal": False, "scale": None, "enable_gqa": False}
_PLAIN_TYPES = (torch.Tensor, torch.nn.Parameter, FakeTensor)


class _Refused(Exception):
    """Why a call stays as it is."""


class _Call(NamedTuple):
    """The arguments of a call, by their places in genie::sdpa."""

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None
    is_causal: bool
    scale: Any
    enable_gqa: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class PortableSdpa:
    """Rewrite every call for which genie::sdpa is exact, in the graph and in the graphs nested in it."""

    device_type: str = "cpu"     # whose eager results genie::sdpa reproduces

    @property
    def name(self) -> str:
        return "portable_sdpa"

    def run(self, gm: fx.GraphModule, facts: CaptureFacts) -> tuple[Outcome, ...]:
        graphs = [module for module in gm.modules() if isinstance(module, fx.GraphModule)]
        nodes = [(module, node) for module in graphs for node in module.graph.nodes if node.target in _TARGETS]
        if not nodes:
            return ()
        refused = _refused_by_context(gm, graphs, facts)
        outcomes = [NoMatch(node=node.name, reason=refused[node]) if node in refused else self._visit(node)
                    for _, node in nodes]
        for module in dict.fromkeys(module for module, _ in nodes):
            module.graph.lint()
            module.recompile()
        return tuple(outcomes)

    def _visit(self, node: fx.Node) -> Outcome:
        try:
            call = self._match(node)
        except _Refused as refusal:
            return NoMatch(node=node.name, reason=str(refusal))
        name = node.name
        _rewrite(node, call)
        return Match(node=name, detail="genie::sdpa")

    def _match(self, node: fx.Node) -> _Call:
        values = _arguments(node)
        if isinstance(values["dropout_p"], fx.Node) or values["dropout_p"] != 0:
            raise _Refused(f"dropout_p={values['dropout_p']}: the kernels of each device draw their own random bits")
        for name in ("is_causal", "enable_gqa"):
            if not isinstance(values[name], bool):
                raise _Refused(f"{name}={values[name]} is computed in the graph")
        tensors = {name: values[name] for name in ("query", "key", "value", "attn_mask")}
        for name, argument in tensors.items():
            if name != "attn_mask" or argument is not None:
                self._check_tensor(name, argument)
        mask = tensors["attn_mask"]
        if mask is not None and mask.meta["example_value"].requires_grad:
            raise _Refused("attn_mask requires a gradient, and genie::sdpa gives it none")
        del values["dropout_p"]
        return _Call(**values)

    def _check_tensor(self, name: str, argument: Any) -> None:
        value = argument.meta.get("example_value") if isinstance(argument, fx.Node) else None
        if not isinstance(value, torch.Tensor):
            raise _Refused(f"{name} has no example_value that is a tensor")
        if type(value) not in _PLAIN_TYPES or value.layout != torch.strided or value.is_nested:
            raise _Refused(f"{name} is a {type(value).__name__} of layout {value.layout}, not a plain strided tensor")
        if value.device.type != self.device_type:
            raise _Refused(f"{name} is on {value.device}; genie::sdpa has the results of {self.device_type}")
        if not (value.is_floating_point() or (name == "attn_mask" and value.dtype == torch.bool)):
            raise _Refused(f"{name} is {value.dtype}, not floating point")


def _refused_by_context(
    gm: fx.GraphModule, graphs: list[fx.GraphModule], facts: CaptureFacts
) -> dict[fx.Node, str]:
    """The nodes that may not be rewritten for what surrounds them, and why."""
    reason = ""
    if facts.sdp_backends_limited:
        reason = "kernels of scaled_dot_product_attention are switched off here, which a worker would not know"
    elif facts.forward_ad:
        reason = "forward-mode differentiation has no rule for genie::sdpa"
    else:
        chooser = next((node for module in graphs for node in module.graph.nodes if _chooses_kernels(node)), None)
        if chooser is not None:
            reason = f"the graph chooses kernels itself ({chooser.name}: torch.nn.attention.sdpa_kernel)"
    if reason:
        return {node: reason for module in graphs for node in module.graph.nodes}
    return _under_functorch(gm, graphs)


def _chooses_kernels(node: fx.Node) -> bool:
    origin = str(getattr(node.target, "__module__", "") or "")
    return origin.startswith("torch.nn.attention") and "sdpa" in getattr(node.target, "__name__", "")


def _under_functorch(gm: fx.GraphModule, graphs: list[fx.GraphModule]) -> dict[fx.Node, str]:
    """Nodes between the beginning and the end of a transform (vmap, grad, jvp), which nest like brackets.

    A graph nested in one with transforms may be called inside of them: all its nodes count.
    """
    found: dict[fx.Node, str] = {}
    transforms: list[str] = []
    for module in graphs:
        open_transforms: list[str] = []
        for node in module.graph.nodes:
            name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
            if name.endswith("_increment_nesting"):
                open_transforms.append(node.name)
                transforms.append(node.name)
            elif name.endswith("_decrement_nesting") and open_transforms:
                open_transforms.pop()
            elif open_transforms:
                found[node] = f"it is under a functorch transform ({open_transforms[-1]}); genie::sdpa has no rule"
    if transforms:
        for module in graphs:
            if module is not gm:
                reason = f"it may be called under a functorch transform ({transforms[0]})"
                found |= {node: reason for node in module.graph.nodes if node not in found}
    return found


def _arguments(node: fx.Node) -> dict[str, Any]:
    values = _DEFAULTS | dict(zip(_PARAMETERS, node.args, strict=False)) | dict(node.kwargs)
    unknown = sorted(set(values) - set(_PARAMETERS))
    missing = [name for name in _PARAMETERS if name not in values]
    if unknown or missing or len(node.args) > len(_PARAMETERS):
        raise _Refused(f"called with arguments that this release does not know: {unknown or missing or node.args}")
    return values


def _rewrite(node: fx.Node, call: _Call) -> None:
    graph = node.graph
    with graph.inserting_before(node):
        both = graph.call_function(sdpa, tuple(call))
        out = graph.call_function(operator.getitem, (both, 0))
    both.meta = dict(node.meta)
    out.meta = dict(node.meta)
    if "example_value" in node.meta:
        both.meta["example_value"] = (node.meta["example_value"], _example_lse(call))
    node.replace_all_uses_with(out)
    graph.erase_node(node)


def _example_lse(call: _Call) -> torch.Tensor:
    """genie::sdpa's second output, made of the shapes of the first argument."""
    query = call.query.meta["example_value"]
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    context = query.fake_mode if isinstance(query, FakeTensor) else torch.no_grad()
    with context:
        if query.dim() != 4:
            return torch.empty(query.shape[:-1], dtype=dtype, device=query.device)
        batch, heads, length, _ = query.shape
        return torch.empty((batch, length, heads), dtype=dtype, device=query.device).transpose(1, 2)
