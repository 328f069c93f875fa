"""ATen graph -> which of its values have rows, and how each op runs on a part of them.

    inputs with rows -> [rule of each op] -> values with rows, values made of all parts, values that are the same

What mixes rows runs once on the whole batch. That is right wherever it stands; but where parts would have to wait for
it after heavy work, nothing is left to pipeline, and the graph is refused with the reason.
"""
from __future__ import annotations

import importlib
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from genie_dynamo.passes.costs.registry import MATRIX_FAMILIES, find
from genie_dynamo.passes.rows.call import Call, MixesRows, Parts, State
from genie_dynamo.passes.rows.registry import parts_of

for _module in ("elementwise", "views", "matrix", "reductions", "layers", "gathers"):
    importlib.import_module(f"{__package__}.{_module}")

VALUE_FREE = frozenset({"aten::ones_like", "aten::zeros_like", "aten::full_like", "aten::empty_like", "aten::new_zeros",
                        "aten::new_ones", "aten::new_full", "aten::new_empty"})
"""Ops whose result depends on what a tensor is like, not on its values."""


class NotPipelined(Exception):
    """The batch of this graph is not cut into parts that run one after the other; the text is why.

    `small`: nothing in the graph is worth it; nobody has to be told.
    """

    def __init__(self, reason: str, *, small: bool = False) -> None:
        super().__init__(reason)
        self.small = small


@dataclass(frozen=True, slots=True, kw_only=True)
class NodeParts:
    """How a node runs on parts. `needs`: for each tensor argument in order, the dim to cut along, or None."""

    parts: Parts
    needs: tuple[int | None, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Flow:
    """What was found about a graph.

    dims      value with rows -> dim along which they lie
    per_part  node that runs once for each part -> how
    """

    num_parts: int
    dims: Mapping[fx.Node, int]
    per_part: Mapping[fx.Node, NodeParts]

    @property
    def num_heavy(self) -> int:
        """How many matrix products, convolutions and attentions run on parts."""
        return sum(map(_is_heavy, self.per_part))


def find_flow(gm: fx.GraphModule, inputs: Mapping[str, int], num_parts: int) -> Flow:
    """Follow rows from the inputs that have them.

    Args:    inputs: placeholder name -> dim.
    Raises:  NotPipelined.
    """
    return _Search(gm, inputs, num_parts).run()


def batched_inputs(gm: fx.GraphModule, static_inputs: Sequence[int], num_parts: int) -> Iterator[dict[str, int]]:
    """Guesses which inputs have rows in dim 0: all of one length, all but one of them, one of them.

    A wrong guess is found out by `find_flow`, which proves what it is told. An input that is left out is cut all the
    same where it meets rows.
    Raises: NotPipelined where no input can be cut.
    """
    static = set(static_inputs)
    by_size: dict[int, list[str]] = {}
    for index, node in enumerate(n for n in gm.graph.nodes if n.op == "placeholder"):
        value = node.meta.get("val")
        if index in static or not isinstance(value, torch.Tensor) or not value.dim():
            continue
        if not isinstance(value.shape[0], int):
            raise NotPipelined(f"the size of {node.name} is not fixed at compile time; compile with dynamic=False")
        if value.shape[0] > 1:
            by_size.setdefault(value.shape[0], []).append(node.name)
    if not by_size:
        raise NotPipelined("no input has a batch of more than one row")
    possible = {size: names for size, names in by_size.items() if size % num_parts == 0}
    if not possible:
        raise NotPipelined(f"a batch of {next(iter(by_size))} rows cannot be cut into {num_parts} equal parts; make it "
                           f"a multiple of {num_parts}, or change microbatches")
    for names in possible.values():
        yield dict.fromkeys(names, 0)
    for names in possible.values():
        if len(names) > 1:
            yield from ({name: 0 for name in names if name != left_out} for left_out in names[:_MAX_GUESSES])
            yield from ({name: 0} for name in names[:_MAX_GUESSES])


_MAX_GUESSES = 8


class _Search:
    def __init__(self, gm: fx.GraphModule, inputs: Mapping[str, int], num_parts: int) -> None:
        self._gm, self._inputs, self._num_parts = gm, inputs, num_parts
        self._dims: dict[fx.Node, int] = {}
        self._several: dict[fx.Node, tuple[State, ...]] = {}     # nodes with several results
        self._per_part: dict[fx.Node, NodeParts] = {}
        self._whole_because: dict[fx.Node, str] = {}             # made of all parts, after heavy work
        self._mixed: set[fx.Node] = set()                        # of these, what no rule puts together
        self._like: dict[fx.Node, fx.Node] = {}                  # several results made of all rows -> what had them
        self._reasons: list[str] = []
        self._heavy: set[fx.Node] = set()                        # reading it means having done heavy work on rows

    def run(self) -> Flow:
        for node in self._gm.graph.nodes:
            if node.op == "placeholder" and node.name in self._inputs:
                dim = self._inputs[node.name]
                size = node.meta["val"].shape[dim]
                if size % self._num_parts:
                    raise NotPipelined(f"{size} rows of {node.name} cannot be cut into {self._num_parts} equal parts")
                self._dims[node] = dim
            elif node.op == "call_function":
                self._visit(node)
        self._check()
        return Flow(num_parts=self._num_parts, dims=self._dims, per_part=self._per_part)

    def _visit(self, node: fx.Node) -> None:
        if node.target is operator.getitem and node.args[0] in self._several:
            self._element(node)
            return
        if node.target is operator.getitem and (source := node.all_input_nodes[0]) in self._like:
            self._declare(node, [self._like[source]])
            return
        sources = node.all_input_nodes
        rows = [source for source in sources if source in self._dims]
        if any(source in self._heavy for source in sources) or (rows and _is_heavy(node)):
            self._heavy.add(node)
        if not rows:
            self._inherit(node)
            return
        try:
            if not isinstance(node.target, torch._ops.OpOverload):
                raise MixesRows(f"nothing is known about rows in {node.name} ({node.target})")
            call = Call(node, self._dims, self._num_parts)
            parts = parts_of(call)
        except MixesRows as reason:
            self._reasons.append(str(reason))
            self._made_of_all(node, str(reason), mixes=True)
            if node not in self._heavy:
                self._declare(node, rows)
            return
        needs = tuple(leaf.need for leaf in call.leaves)
        for leaf in call.leaves:
            if leaf.dim is None and leaf.node in self._whole_because and call.name not in VALUE_FREE:
                raise NotPipelined(f"rows of the batch depend on each other: {self._whole_because[leaf.node]}; "
                                   f"{node.name} needs the result for every part")
        self._per_part[node] = NodeParts(parts=parts, needs=needs)
        if isinstance(node.meta.get("val"), list | tuple):
            self._several[node] = parts.outputs
        else:
            self._note(node, parts.outputs[0])

    def _declare(self, node: fx.Node, rows: Sequence[fx.Node]) -> None:
        """What was made of all rows early, and is as long as they are, is cut again for what reads it.

        That is always right: a value that is there as a whole may be cut anywhere.
        """
        value = node.meta.get("val")
        if isinstance(value, list | tuple):
            self._like[node] = rows[0]
            return
        for source in rows:
            dim, shape = self._dims[source], source.meta["val"].shape
            if isinstance(value, torch.Tensor) and value.dim() == len(shape) and value.shape[dim] == shape[dim]:
                self._dims[node] = dim
                return

    def _element(self, node: fx.Node) -> None:
        source, index = node.args
        assert isinstance(source, fx.Node) and isinstance(index, int)
        if source in self._heavy:
            self._heavy.add(node)
        self._per_part[node] = NodeParts(parts=Parts((self._several[source][index],)), needs=())
        self._note(node, self._several[source][index])

    def _note(self, node: fx.Node, state: State) -> None:
        if isinstance(state, int):
            self._dims[node] = state
        elif state == "same":
            self._heavy.discard(node)
        else:
            self._made_of_all(node, f"{node.name} is the {state} over all rows")

    def _made_of_all(self, node: fx.Node, reason: str, *, mixes: bool = False) -> None:
        if node in self._heavy:
            self._whole_because[node] = reason
            if mixes:
                self._mixed.add(node)

    def _inherit(self, node: fx.Node) -> None:
        if _op_name(node) in VALUE_FREE:
            self._heavy.discard(node)
            return
        for source in node.all_input_nodes:
            if source in self._whole_because:
                self._whole_because[node] = self._whole_because[source]
            if source in self._mixed:
                # What follows would run on the whole batch, after all parts: that is no pipeline.
                if _is_heavy(node):
                    routed = "; tokens of all rows are sorted by expert together" if "grouped_mm" in node.name else ""
                    raise NotPipelined(f"rows of the batch depend on each other: {self._whole_because[source]}; "
                                       f"{node.name} comes after it{routed}")
                self._mixed.add(node)

    def _check(self) -> None:
        if not any(_is_heavy(node) for node in self._per_part):
            any_heavy = any(_is_heavy(node) for node in self._gm.graph.nodes)
            raise NotPipelined(self._reasons[0] if self._reasons and any_heavy else "no matrix product, convolution or "
                               "attention works on rows of the batch: there is nothing to gain", small=not any_heavy)


def _op_name(node: fx.Node) -> str:
    return str(node.target.overloadpacket._qualified_op_name) if isinstance(node.target, torch._ops.OpOverload) else ""


def _is_heavy(node: fx.Node) -> bool:
    entry = find(_op_name(node))
    return entry is not None and entry.family in MATRIX_FAMILIES
