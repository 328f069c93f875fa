"""`torch.compile(backend="genie")` where the tensors are of `remote_accelerator`.

The graph's ops are recorded as eager ones would be, in the order and with the decisions that tracing has made: its
inputs are resident already, its outputs stay, and the graph runs as part of whatever is recorded around it.

What a call has recorded is remembered by the layouts of its inputs, and the next call with such inputs makes the same
nodes without running the ops' kernels again. Not for graphs that draw, read, or look at memory through conjugates.
"""
from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import fx

from genie_dynamo.device import NAME

MAX_REMEMBERED = 64
TRIES = 3


def is_on_device(gm: fx.GraphModule) -> bool:
    """Whether any value of a traced graph is of the device."""
    return any(isinstance(value := node.meta.get("val"), torch.Tensor) and value.device.type == NAME
               for node in gm.graph.nodes)


def recorded(gm: fx.GraphModule) -> Callable[[list[Any]], Any]:
    """The graph as a boxed callable that records it."""
    known: dict[Any, Template] = {}
    tries: dict[Any, int] = {}

    def run(args: list[Any]) -> Any:
        values = list(args)
        args.clear()
        with torch.no_grad():
            key = _key_of(values)
            template = known.get(key)
            if template is not None:
                return template.record(values)
            if key is None or tries.get(key, 0) >= TRIES:
                return gm.forward(*values)
            if len(known) + len(tries) > 2 * MAX_REMEMBERED:
                known.clear()
                tries.clear()
            tries[key] = tries.get(key, 0) + 1
            watch = _Watch(values)
            outputs = gm.forward(*values)
            with suppress(_NotRememberedError):
                known[key] = watch.template(outputs)
            return outputs

    run._boxed_call = True  # type: ignore[attr-defined]
    return run


def _key_of(values: Sequence[Any]) -> Any:
    """What a template depends on; None where none can be."""
    from genie_dynamo.device.memory import is_ours, lazy_bits, node_of

    if lazy_bits[0]:
        return None
    key: list[Any] = []
    for value in values:
        if isinstance(value, torch.Tensor):
            if not is_ours(value):
                return None
            node = node_of(value)
            key += (node.layout, node.exact)
        elif value is None or type(value) in (int, float, bool):
            key.append((type(value), value))
        else:
            return None
    return tuple(key)


class _NotRememberedError(Exception):
    """What was recorded cannot be made again by itself."""


class _Watch:
    """The state before a call, and what can be learnt of it after."""

    def __init__(self, values: Sequence[Any]) -> None:
        from genie_dynamo.device.engine import current
        from genie_dynamo.device.memory import node_of, storage_of, value_in

        self._engine = current
        self._tensors = [value for value in values if isinstance(value, torch.Tensor)]
        self._storages = [storage_of(tensor) for tensor in self._tensors]
        self._leaves = [node_of(tensor) for tensor in self._tensors]
        self._bases = [value_in(storage) for storage in self._storages]
        self._moment = self._now()

    def _now(self) -> tuple[Any, ...]:
        counters = self._engine.counters
        return counters["runs"], counters["cuts"], self._engine.random_tail

    def template(self, outputs: Any) -> Template:
        """Raises: _NotRememberedError."""
        from genie_dynamo.device.memory import value_in

        if self._now() != self._moment:
            raise _NotRememberedError
        self._place: dict[Any, int] = {}
        for node in (*self._leaves, *self._bases):
            self._place.setdefault(node, len(self._place))
        given = [(self._leaves.index(node), False) if node in self._leaves else (self._bases.index(node), True)
                 for node in self._place]
        self._steps: list[tuple[Any, ...]] = []
        writes = []
        for number, (storage, base) in enumerate(zip(self._storages, self._bases, strict=True)):
            now = value_in(storage)
            if now is not base:
                if sum(other._cdata == storage._cdata for other in self._storages) > 1 or \
                        now.layout is not self._leaves[number].layout:
                    raise _NotRememberedError
                writes.append((number, now))
        rules = [self._rule(output) for output in outputs]
        made = [(number, self._index(now)) for number, now in writes]
        return Template(given, self._steps, rules, made, type(outputs))

    def _rule(self, output: Any) -> tuple[Any, ...]:
        from genie_dynamo.device.memory import is_ours, storage_of, value_in
        from genie_dynamo.device.nodes import layout_of

        if not isinstance(output, torch.Tensor):
            return ("literal", output)
        if not is_ours(output) or output.is_conj() or output.is_neg():
            raise _NotRememberedError
        for number, tensor in enumerate(self._tensors):
            if output is tensor:
                return ("input", number)
        storage = storage_of(output)
        for number, other in enumerate(self._storages):
            if other._cdata == storage._cdata:
                return ("view of input", number, layout_of(output))
        return ("new", storage._cdata, self._index(value_in(storage)), layout_of(output))

    def _index(self, root: Any) -> int:
        """The place of a node, when those that it needs have theirs."""
        place, stack = self._place, [root]
        while stack:
            node = stack[-1]
            if node in place:
                stack.pop()
                continue
            if node.value is not None:
                if not isinstance(node.value, torch.Tensor):
                    raise _NotRememberedError        # it may be gone when it is wanted again
                place[node] = len(place)
                self._steps.append((None, (), (), node))
                continue
            missing = [source for source in node.inputs if source not in place]
            if missing:
                stack += missing
                continue
            place[node] = len(place)
            self._steps.append((node.call, tuple([place[source] for source in node.inputs]), node.scalars,
                                node.layout))
        return place[root]


class Template:
    """What a call records: nodes made of those that its inputs hold, and what becomes of them.

    given   (position among the input tensors, whether its storage's whole value is meant), in the order of places
    steps   (call, places of its inputs, scalars, layout); or, with no call, a constant's node in place of the layout
    rules   how to make each output
    writes  (position of an input tensor, place of its new content)
    """

    def __init__(self, given: Sequence[tuple[int, bool]], steps: Sequence[tuple[Any, ...]],
                 rules: Sequence[tuple[Any, ...]], writes: Sequence[tuple[int, int]], kind: type) -> None:
        self._given, self._steps, self._rules, self._writes, self._kind = given, steps, rules, writes, kind
        self._last = next((call for call, *_ in reversed(steps) if call is not None), None)

    def record(self, values: Sequence[Any]) -> Any:
        """Record the call, with other inputs of the same layouts. Returns: its outputs."""
        from genie_dynamo.device import memory
        from genie_dynamo.device.engine import current
        from genie_dynamo.device.nodes import Node

        if self._last is not None and len(memory.fresh) > current.next_cut:
            current.maybe_cut(self._last)
        tensors = [value for value in values if isinstance(value, torch.Tensor)]
        nodes = [memory.value_in(memory.storage_of(tensors[number])) if whole else memory.node_of(tensors[number])
                 for number, whole in self._given]
        for call, sources, scalars, out in self._steps:
            nodes.append(out if call is None else Node(call, tuple([nodes[i] for i in sources]), scalars, out))
        memory.fresh.extend([_NOBODY] * len(self._steps))      # so that a long recording is seen to be long
        current.counters["replays"] += 1
        outputs = self._outputs(tensors, nodes)
        for number, place in self._writes:
            memory.write(tensors[number], nodes[place])
            torch.autograd.graph.increment_version(tensors[number])
        return outputs

    def _outputs(self, tensors: Sequence[torch.Tensor], nodes: Sequence[Any]) -> Any:
        from genie_dynamo.device.memory import alias_of, memory_of, new_tensor

        made: dict[int, torch.Tensor] = {}
        outputs: list[Any] = []
        for kind, *rule in self._rules:
            if kind == "literal":
                outputs.append(rule[0])
            elif kind == "input":
                outputs.append(tensors[rule[0]])
            else:
                out = rule[-1]
                if kind == "view of input":
                    base = tensors[rule[0]]
                else:
                    base = made.get(rule[0])
                    if base is None:
                        base = made[rule[0]] = new_tensor(nodes[rule[1]])
                        if nodes[rule[1]].layout is out:
                            outputs.append(base)
                            continue
                memory = memory_of(base)
                assert memory is not None
                memory.plain = False
                outputs.append(alias_of(base, out.shape, out.stride, out.offset, out.dtype))
        return tuple(outputs) if self._kind is tuple else outputs


class _Gone:
    """Something to be a weak reference to, which is gone at once."""


_NOBODY: weakref.ref[Any] = weakref.ref(_Gone())
