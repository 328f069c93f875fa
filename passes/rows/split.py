"""A graph and what is known of its rows -> the same graph over k parts of the batch.

    before   x -> a -> b -> out
    after    x -> cut 0 -> a_0 -> b_0 -+
             x -> cut 1 -> a_1 -> b_1 -+-> cat -> out

Contract: same inputs, same outputs in the same order, `graph.lint()`, true `meta["val"]`. What is the same for every
part runs once; sums over rows are added up part by part. Nodes stand part after part: what the last worker of a
pipeline runs in this order does the backward of a part before the forward of the next. `meta["origin"]` names the node
that a new one came of.
"""
from __future__ import annotations

import heapq
import itertools
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from genie_dynamo.passes.facts import GraphFacts, draws_random_numbers
from genie_dynamo.passes.rows.call import Together
from genie_dynamo.passes.rows.flow import VALUE_FREE, Flow, NotPipelined, batched_inputs, find_flow
from genie_dynamo.passes.rows.losses import separate_losses

aten = torch.ops.aten

_FOLD: dict[Together, Any] = {
    "sum": aten.add.Tensor, "mean": aten.add.Tensor, "max": aten.maximum.default, "min": aten.minimum.default,
    "any": aten.logical_or.default, "all": aten.logical_and.default}

EARLY = -1
"""The part of a node that needs no part."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SplitGraph:
    """A graph over parts of its batch.

    origin        node -> the node of the whole graph that it does a part of
    part          node -> which part, EARLY for what needs none, num_parts for what needs all
    output_dims   rows of each output of the whole graph, by name of the value
    in_order      whether each worker is to run its nodes in the order of the graph (interleaving.py)
    """

    gm: fx.GraphModule
    num_parts: int
    origin: Mapping[str, str]
    part: Mapping[str, int]
    output_dims: Mapping[str, int]
    result_dims: tuple[int | None, ...]
    in_order: bool = False


def split_batch(gm: fx.GraphModule, facts: GraphFacts, num_parts: int,
                inputs: Mapping[str, int] | None = None) -> SplitGraph:
    """Cut a graph's batch into equal parts.

    Args:    inputs: which placeholders have rows, along which dim; None: guessed, and then proven.
    Raises:  NotPipelined with the reason.
    """
    work = fx.GraphModule(gm, _copied(gm))
    separate_losses(work)
    if inputs is not None:
        return _Builder(work, find_flow(work, inputs, num_parts)).build()
    try:
        guesses = list(batched_inputs(work, facts.static_inputs, num_parts))
    except NotPipelined:
        # Of a batch in one part every size will do: where that is refused too, another size would not help.
        _best_flow(work, list(batched_inputs(work, facts.static_inputs, 1)), 1)
        raise
    return _Builder(work, _best_flow(work, guesses, num_parts)).build()


def _best_flow(work: fx.GraphModule, guesses: Sequence[Mapping[str, int]], num_parts: int) -> Flow:
    """Raises: NotPipelined, with the reason against the first guess, where none holds."""
    best: Flow | None = None
    first: NotPipelined | None = None
    for guess in guesses:
        try:
            flow = find_flow(work, guess, num_parts)
        except NotPipelined as reason:
            first = first or reason
            continue
        if best is None or flow.num_heavy > best.num_heavy:
            best = flow
    if best is None:
        assert first is not None
        raise first
    return best


def _copied(gm: fx.GraphModule) -> fx.Graph:
    graph = fx.Graph(gm)
    made: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        made[node] = graph.node_copy(node, made.__getitem__)
        made[node].name = node.name
    return graph


class _Builder:
    """`_whole` and `_parts` hold the new nodes of an old one's value; cuts and cats are made when first wanted."""

    def __init__(self, gm: fx.GraphModule, flow: Flow) -> None:
        self._gm, self._flow, self._k = gm, flow, flow.num_parts
        self._graph = fx.Graph(gm)
        self._whole: dict[fx.Node, fx.Node] = {}
        self._parts: dict[fx.Node, list[fx.Node]] = {}
        self._cuts: dict[tuple[fx.Node, int], list[fx.Node]] = {}
        self._part: dict[fx.Node, int] = {}
        self._position: dict[fx.Node, int] = {}
        self._now = 0
        self._shared = shared_outputs(gm)
        self._mode = next(n.meta["val"].fake_mode for n in flow.dims)

    def build(self) -> SplitGraph:
        old = list(self._gm.graph.nodes)
        for self._now, node in enumerate(old):
            if node.op == "output":
                outputs = fx.map_arg(node.args[0], self._take_whole)
                self._graph.output(outputs)
            elif node in self._flow.per_part:
                self._per_part(node)
            else:
                self._once(node)
        ordered = self._in_order()
        split = fx.GraphModule(self._gm, ordered)
        split.graph.lint()
        (raw,) = self._gm.graph.output_node().args
        listed: Sequence[Any] = raw if isinstance(raw, list | tuple) else (raw,)
        return SplitGraph(
            gm=split, num_parts=self._k,
            origin={n.name: n.meta["origin"] for n in split.graph.nodes if "origin" in n.meta},
            part={n.name: n.meta["part"] for n in split.graph.nodes if "part" in n.meta},
            output_dims={n.name: dim for n, dim in self._flow.dims.items()},
            result_dims=tuple(self._flow.dims.get(n) if isinstance(n, fx.Node) else None for n in listed))

    # -- values -----------------------------------------------------------------------------------------------

    def _take_whole(self, node: fx.Node) -> fx.Node:
        found = self._whole.get(node)
        if found is None and node in self._shared and _is_view(node):
            # Outputs that share memory are views of one value, as they were.
            found = self._whole[node] = self._graph.node_copy(node, self._take_whole)
            found.name, found.meta["origin"] = node.name, _origin(node)
            self._place(found, self._k)
        elif found is None:
            found = self._joined(node, self._flow.dims[node])
            self._check(found, node)
            self._whole[node] = found
        return found

    def _joined(self, node: fx.Node, dim: int) -> fx.Node:
        """The parts in one tensor, whose dims lie in memory in the order of the whole value: views rely on it."""
        value = node.meta["val"]
        strides = value.stride()
        # Expanded dims and those of one element lie nowhere: they say nothing of the order, and never end innermost
        # of what had its elements one after the other. Kernels (attention on CPUs) read past rows that have not.
        lying = [d for d, step in enumerate(strides) if step and value.shape[d] > 1]
        order = sorted(range(len(strides)), key=lambda d: (d in lying, -strides[d]))
        if lying == sorted(lying, key=lambda d: -strides[d]):
            return self._add(aten.cat.default, (self._parts[node], dim), {}, node, self._k, name=node.name)
        turned = [self._add(aten.permute.default, (part, order), {}, node, number)
                  for number, part in enumerate(self._parts[node])]
        joined = self._add(aten.cat.default, (turned, order.index(dim)), {}, node, self._k)
        back = [order.index(d) for d in range(len(order))]
        return self._add(aten.permute.default, (joined, back), {}, node, self._k, name=node.name)

    def _take_part(self, node: fx.Node, dim: int, number: int, user: fx.Node) -> fx.Node:
        if node in self._parts:
            return self._parts[node][number]
        cuts = self._cuts.get((node, dim))
        if cuts is None:
            whole = self._take_whole(node)
            rows = int(node.meta["val"].shape[dim]) // self._k
            # A cut of an input is made where it is read: the input goes there alone.
            origin = user if node.op in ("placeholder", "get_attr") else node
            cuts = self._cuts[node, dim] = [
                self._add(aten.slice.Tensor, (whole, dim, j * rows, (j + 1) * rows), {}, origin, j)
                for j in range(self._k)]
        return cuts[number]

    # -- nodes ------------------------------------------------------------------------------------------------

    def _once(self, node: fx.Node) -> None:
        filled = self._filled(node)
        if filled is not None:
            self._whole[node] = filled
            return
        new = self._graph.node_copy(node, self._take_whole)
        new.name = node.name
        if node.op == "call_function":
            new.meta["origin"] = _origin(node)
        late = any(self._part.get(source, EARLY) > EARLY for source in new.all_input_nodes)
        self._place(new, self._k if late else EARLY)
        self._whole[node] = new

    def _filled(self, node: fx.Node) -> fx.Node | None:
        """Ones like a value made of all parts do not have to wait for it."""
        target = node.target
        if not (isinstance(target, torch._ops.OpOverload)
                and target.overloadpacket._qualified_op_name in VALUE_FREE and node.all_input_nodes):
            return None
        source = self._take_whole(node.all_input_nodes[0])
        if self._part.get(source, EARLY) == EARLY:
            return None
        name = str(target.overloadpacket._qualified_op_name)
        fill = node.args[-1] if name in ("aten::full_like", "aten::new_full") else float("ones" in name)
        value = node.meta["val"]
        return self._add(aten.full.default, ([int(s) for s in value.shape], fill),
                         {"dtype": value.dtype, "device": value.device}, node, EARLY, name=node.name)

    def _per_part(self, node: fx.Node) -> None:
        how = self._flow.per_part[node]
        made = []
        for number in range(self._k):
            new = self._run_part(node, number)
            if how.parts.divide:
                new = self._add(aten.div.Tensor, (new, self._k), {}, node, number)
            made.append(new)
        if isinstance(node.meta.get("val"), list | tuple):
            self._parts[node] = made          # its elements are what travels
            return
        state = how.parts.outputs[0]
        if isinstance(state, int):
            self._parts[node] = made
            part, whole = made[0].meta["val"], node.meta["val"]
            rows = [s // self._k if d == state else s for d, s in enumerate(whole.shape)]
            if list(part.shape) != rows or part.dtype != whole.dtype:
                raise NotPipelined(f"a part of {node.name} came out as {tuple(part.shape)} {part.dtype}, expected was "
                                   f"{tuple(rows)} {whole.dtype}; this is a bug in the rule of {node.target}")
            return
        self._whole[node] = made[0] if state == "same" else self._together(node, made, state)
        self._check(self._whole[node], node)

    def _run_part(self, node: fx.Node, number: int) -> fx.Node:
        how = self._flow.per_part[node]
        needs = iter(how.needs)

        def source(argument: fx.Node) -> fx.Node:
            if argument in self._parts and isinstance(argument.meta.get("val"), list | tuple):
                return self._parts[argument][number]
            if not isinstance(argument.meta.get("val"), torch.Tensor):
                return self._take_whole(argument)
            need = next(needs)
            return self._take_whole(argument) if need is None else self._take_part(argument, need, number, node)

        args, kwargs = list(fx.map_arg(node.args, source)), dict(fx.map_arg(node.kwargs, source))
        for name, value in how.parts.change.items():
            _set(node, args, kwargs, name, value)
        assert callable(node.target)
        return self._add(node.target, tuple(args), kwargs, node, number)

    def _together(self, node: fx.Node, made: Sequence[fx.Node], state: Any) -> fx.Node:
        so_far = made[0]
        for number, new in enumerate(made[1:], 1):
            so_far = self._add(_FOLD[state], (so_far, new), {}, node, number)
        if state == "mean":
            so_far = self._add(aten.div.Tensor, (so_far, self._k), {}, node, self._k - 1)
        self._part[so_far] = so_far.meta["part"] = self._k if state != "same" else 0
        return so_far

    def _add(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], origin: fx.Node,
             part: int, name: str | None = None) -> fx.Node:
        try:
            value = self._value(target, args, kwargs)
        except RuntimeError as error:
            if target is not aten.view.default:
                raise NotPipelined(f"{origin.name} does not run on a part of the batch: {error}") from error
            # A block of rows is not always contiguous where the whole is.
            args = (self._add(aten.clone.default, args[:1], {"memory_format": torch.contiguous_format}, origin, part),
                    *args[1:])
            value = self._value(target, args, kwargs)
        new = self._graph.create_node("call_function", target, args, kwargs, name=name or f"{origin.name}_p{part}")
        new.meta = {**{key: held for key, held in origin.meta.items() if key != "val"}, "val": value,
                    "origin": _origin(origin)}
        self._place(new, part)
        return new

    def _value(self, target: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = fx.map_arg((args, kwargs), self._held)
        with self._mode:
            return target(*given[0], **given[1])

    def _held(self, node: fx.Node) -> Any:
        if node.op == "get_attr" and "val" not in node.meta:
            value: Any = self._gm
            for name in str(node.target).split("."):
                value = getattr(value, name)
            return self._mode.from_tensor(value) if isinstance(value, torch.Tensor) else value
        return node.meta["val"]

    def _place(self, node: fx.Node, part: int) -> None:
        self._part[node] = part
        self._position[node] = self._now
        if node.op == "call_function":
            node.meta["part"] = part

    def _check(self, new: fx.Node, old: fx.Node) -> None:
        made, wanted = new.meta["val"], old.meta["val"]
        if made.shape != wanted.shape or made.dtype != wanted.dtype:
            raise NotPipelined(f"{old.name} came out as {tuple(made.shape)} {made.dtype}, expected was "
                               f"{tuple(wanted.shape)} {wanted.dtype}; this is a bug in the rule of {old.target}")

    # -- order ------------------------------------------------------------------------------------------------

    def _in_order(self) -> fx.Graph:
        """Part after part, as far as what a node reads allows; random ops as they stood, copies into inputs last."""
        nodes = list(self._graph.nodes)
        key = {}
        wanted: dict[fx.Node, int] = {}
        for index, node in reversed(list(enumerate(nodes))):
            if node.op == "placeholder":
                rank = EARLY - 1
            elif node.op == "output":
                rank = self._k + 2
            elif node.target is aten.copy_.default:
                rank = self._k + 1
            else:
                # What a part needs of later ones (the weight of all targets) is made for it.
                rank = min([self._part[node], *(wanted[user] for user in node.users)])
            wanted[node] = rank
            key[node] = (rank, self._position.get(node, 0), index)
        waits = {node: len(node.all_input_nodes) for node in nodes}
        after = {node: list(node.users) for node in nodes}
        for earlier, later in itertools.pairwise([n for n in nodes if draws_random_numbers(n)]):
            after[earlier].append(later)
            waits[later] += 1
        ready = [(key[node], node) for node in nodes if not waits[node]]
        heapq.heapify(ready)
        graph = fx.Graph(self._gm)
        made: dict[fx.Node, fx.Node] = {}
        while ready:
            _, node = heapq.heappop(ready)
            made[node] = graph.node_copy(node, made.__getitem__)
            made[node].name = node.name
            for user in after[node]:
                waits[user] -= 1
                if not waits[user]:
                    heapq.heappush(ready, (key[user], user))
        return graph


def shared_outputs(gm: fx.GraphModule) -> frozenset[fx.Node]:
    """Nodes whose memory is that of more than one output, or of an output and an input."""
    groups: dict[int, list[fx.Node]] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        for tensor in value if isinstance(value, list | tuple) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.layout is torch.strided:
                groups.setdefault(int(tensor.untyped_storage()._cdata), []).append(node)
    (raw,) = gm.graph.output_node().args
    outputs = {item for item in (raw if isinstance(raw, list | tuple) else (raw,)) if isinstance(item, fx.Node)}
    return frozenset(node for group in groups.values() for node in group
                     if outputs & set(group) and sum(n in outputs or n.op == "placeholder" for n in group) > 1)


def _origin(node: fx.Node) -> str:
    return str(node.meta.get("origin", node.name))


def _is_view(node: fx.Node) -> bool:
    if node.target is operator.getitem:
        return isinstance(node.args[0], fx.Node) and _is_view(node.args[0])
    return isinstance(node.target, torch._ops.OpOverload) and node.target.is_view


def _set(node: fx.Node, args: list[Any], kwargs: dict[str, Any], name: str, value: Any) -> None:
    names = [argument.name for argument in node.target._schema.arguments]  # type: ignore[union-attr]
    position = names.index(name)
    if name in kwargs or position >= len(args):
        kwargs[name] = value
    else:
        args[position] = value
