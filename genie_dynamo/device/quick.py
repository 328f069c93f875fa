"""What recording does with a call that is like one that came before, where the native extension is there to do it.

A general kernel (kernels.py) takes any call: it makes a key of the arguments, finds or makes the key's Call, and
records a node. In steady state only the look-up and the node are left, and Python needs most of its time for the
steps between them. The extension's kernels (native/recording/) do just this much: they stand before a general kernel,
read the same tables, make the same objects, and hand every call that they do not find to it. So there is one
definition of what is recorded, in Python, and the device works the same where the extension was not built.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch

from genie_dynamo.device import memory, moves, nodes
from genie_dynamo.passes.default_dtype import WORKERS_DEFAULT
from genie_dynamo.runtime.lanes import native

if TYPE_CHECKING:
    from genie_dynamo.device.record import Op

Kernel = Callable[..., Any]


class Recorder(Protocol):
    """Makes kernels that stand before general ones."""

    enabled: bool
    """False sends every call to its general kernel."""

    def functional(self, general: Kernel, op: Op) -> Kernel:
        """Of an op that makes new tensors; `op.calls` are the known ones."""

    def view(self, general: Kernel, op: Op) -> Kernel:
        """Of a view op, whose first argument is what is viewed."""

    def in_place(self, general: Kernel, op: Op, calls: dict[Any, nodes.Call]) -> Kernel:
        """Of an op that gives its first argument, a tensor or a list, new content: calls by the key of `op`."""

    def copy(self, general: Kernel) -> Kernel:
        """Of aten.copy_."""


class General:
    """Without the extension: the general kernels themselves."""

    enabled = False

    def functional(self, general: Kernel, op: Op) -> Kernel:
        return general

    def view(self, general: Kernel, op: Op) -> Kernel:
        return general

    def in_place(self, general: Kernel, op: Op, calls: dict[Any, nodes.Call]) -> Kernel:
        return general

    def copy(self, general: Kernel) -> Kernel:
        return general


def make_recorder(engine: Any) -> Recorder:
    """The extension's recorder, where it was built. Args: engine: whose `next_cut` says when a recording is long."""
    made = getattr(native.module(), "Recorder", None)
    if made is None:
        return General()
    recorder: Recorder = made({
        "tensor_type": torch.Tensor, "storage_of": memory.storage_of, "shifted": memory.shifted,
        "node_type": nodes.Node, "call_type": nodes.Call, "layout_type": nodes.Layout, "memory_type": memory.Memory,
        "memory_module": vars(memory), "layouts": nodes.layouts, "layout_of": nodes.layout_of,
        "scatter_calls": moves.calls, "item_calls": nodes.getitem_calls, "make_item": nodes.item_of,
        "fresh": memory.fresh, "lazy_bits": memory.lazy_bits, "read": memory.read, "write": memory.write,
        "engine": engine, "default_dtype": torch.get_default_dtype, "usual_dtype": WORKERS_DEFAULT})
    return recorder
