"""Small graphs for tests of costs: traced with fixed or symbolic sizes, with fake tensors on every node."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.utils.flop_counter as flop_counter
from torch import fx
from torch.fx.experimental.proxy_tensor import make_fx

from genie_dynamo.core import portable_ops

_CPU_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_CPU_FLASH_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


def _forward(q: Any, k: Any, v: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return flop_counter.sdpa_flop_count(q.shape, k.shape, v.shape)


def _backward(grad: Any, q: Any, k: Any, v: Any, *rest: Any, out_val: Any = None, **options: Any) -> int:
    return flop_counter.sdpa_backward_flop_count(grad.shape, q.shape, k.shape, v.shape)


_forward._get_raw = _backward._get_raw = True  # type: ignore[attr-defined]
ATTENTION = {
    _CPU_FLASH: _forward, _CPU_FLASH_BACKWARD: _backward,
    portable_ops.sdpa.overloadpacket: _forward, portable_ops.sdpa_bw.overloadpacket: _backward,
}
"""Torch's own formulas, for the ops of attention that its table leaves out."""


def trace(fn: Callable[..., Any], *args: Any, symbolic: bool = False) -> fx.GraphModule:
    """The ATen graph of one call, with meta["val"]."""
    gm: fx.GraphModule = make_fx(fn, tracing_mode="symbolic" if symbolic else "fake")(*args)
    return gm


def counted_flops(fn: Callable[..., Any], *args: Any) -> int:
    """What torch's counter says of one call."""
    with flop_counter.FlopCounterMode(display=False, custom_mapping=ATTENTION) as counter:
        fn(*args)
    return counter.get_total_flops()


def call_node(gm: fx.GraphModule, op: str) -> fx.Node:
    """The only node whose target's name has `op` in it."""
    (node,) = [n for n in gm.graph.nodes if n.op == "call_function" and op in str(n.target)]
    return node
