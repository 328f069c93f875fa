"""`torch.compile(backend="genie")` where the tensors are of `remote_accelerator`.

The graph's ops are recorded as eager ones would be, in the order and with the decisions that tracing has made: its
inputs are resident already, its outputs stay, and the graph runs as part of whatever is recorded around it.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from genie_dynamo.device import NAME


def is_on_device(gm: fx.GraphModule) -> bool:
    """Whether any value of a traced graph is of the device."""
    return any(isinstance(value := node.meta.get("val"), torch.Tensor) and value.device.type == NAME
               for node in gm.graph.nodes)


def recorded(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """The graph as a boxed callable that records it."""

    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        with torch.no_grad():
            return gm.forward(*values)

    run._boxed_call = True  # type: ignore[attr-defined]
    return run
