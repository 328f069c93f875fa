"""A graph that is cut over workers, rewritten so that less moves between them.

    w0: m = cheap(x);  a = f(m)              w0: m = cheap(x);  a = f(m)
    w1: b = g(m)          m is sent    ->    w1: m' = cheap(x); b = g(m')

What is cheaper computed again than received is computed again (costs/recompute.py decides). And what is kept for the
backward, but read by another worker alone, is kept where it is read: the backward's reader is there too.
"""
from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from genie_dynamo.core.hardware import LinkFacts
from genie_dynamo.passes.costs.recompute import duplicates
from genie_dynamo.passes.facts import GraphFacts

Link = Callable[[int, int], LinkFacts]


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class Rewritten:
    """The graph that runs in place of another.

    assign    node -> worker, of the new graph's nodes
    origin    node that was added -> node of the other graph that it repeats
    again     worker -> nodes of the other graph that it runs too
    kept      saved value -> worker that keeps it, where that is not the one that makes it
    """

    gm: fx.GraphModule
    assign: Mapping[str, int]
    origin: Mapping[str, str]
    again: Mapping[int, tuple[str, ...]]
    kept: Mapping[str, int]


def rewritten(gm: fx.GraphModule, facts: GraphFacts, assign: Mapping[str, int],
              seconds: Mapping[int, Mapping[str, float]], link: Link | None, *, input_link: LinkFacts | None = None,
              symbol_values: Mapping[str, int] | None = None) -> Rewritten | None:
    """The graph with ops applied on both sides, and activations kept where they are read; None where nothing is gained.

    Args:    assign: node -> worker.  seconds: worker -> node -> seconds there; a node that is missing cannot run there.
             link, input_link: as for `duplicates`; link None: nothing is computed twice.
    """
    placeholders = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
    again = {} if link is None else duplicates(
        gm, assign, seconds, link, input_link=input_link, symbol_values=symbol_values,
        stays=frozenset(placeholders[i] for i in facts.static_inputs))
    kept = _kept_where_read(gm, facts, assign)
    if not again and not kept:
        return None
    return _rewrite(gm, facts, assign, again, kept)


def _kept_where_read(gm: fx.GraphModule, facts: GraphFacts, assign: Mapping[str, int]) -> dict[str, int]:
    """Values saved for the backward that one other worker reads, and nobody where they are made."""
    if facts.kind != "forward":
        return {}
    (outputs,) = gm.graph.output_node().args
    found: dict[str, int] = {}
    for node in outputs[facts.num_outputs:]:        # type: ignore[index,union-attr]
        if not (isinstance(node, fx.Node) and node.name in assign and isinstance(node.meta.get("val"), torch.Tensor)):
            continue
        readers = {assign[user.name] for user in node.users if user.name in assign}
        if len(readers) == 1 and assign[node.name] not in readers:
            found[node.name] = readers.pop()
    return found


def _rewrite(gm: fx.GraphModule, facts: GraphFacts, assign: Mapping[str, int], again: Mapping[int, tuple[str, ...]],
             kept: Mapping[str, int]) -> Rewritten:
    graph, main = fx.Graph(gm), dict[fx.Node, fx.Node]()
    there: dict[int, dict[fx.Node, fx.Node]] = {worker: {} for worker in again}
    new_assign, origin = dict(assign), dict[str, str]()
    wanted = {worker: frozenset(names) for worker, names in again.items()}
    for node in gm.graph.nodes:
        if node.op == "output":
            _outputs(graph, node, facts, main, there, kept, new_assign, origin)
            continue
        own = there.get(assign.get(node.name, -1), {})
        # The name is kept: plans, estimates and the backward graph speak of nodes by it.
        main[node] = _copy(graph, node, node.name, own, main)
        main[node].name = node.name
        for worker, names in wanted.items():
            if node.name in names:
                repeated = _copy(graph, node, f"{node.name}_on_{worker}", there[worker], main)
                there[worker][node] = repeated
                new_assign[repeated.name], origin[repeated.name] = worker, node.name
    repeated_names = {name for names in again.values() for name in names}
    for node in reversed(list(graph.nodes)):
        if node.name in repeated_names and not node.users:
            graph.erase_node(node)        # only others read it, and they have their own now
            del new_assign[node.name]
    made = fx.GraphModule(gm, graph)
    made.meta.update(gm.meta)
    return Rewritten(gm=made, assign=new_assign, origin=origin,
                     again=dict(again), kept=dict(kept))


def _copy(graph: fx.Graph, node: fx.Node, name: str, own: Mapping[fx.Node, fx.Node],
          main: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node with arguments of its own worker where it has some."""
    def new_of(argument: fx.Node) -> fx.Node:
        return own[argument] if argument in own else main[argument]

    made = graph.create_node(node.op, node.target, fx.map_arg(node.args, new_of), fx.map_arg(node.kwargs, new_of),
                             name=name, type_expr=node.type)
    made.meta = dict(node.meta)
    return made


def _outputs(graph: fx.Graph, output: fx.Node, facts: GraphFacts, main: Mapping[fx.Node, fx.Node],
             there: Mapping[int, Mapping[fx.Node, fx.Node]], kept: Mapping[str, int], assign: dict[str, int],
             origin: dict[str, str]) -> None:
    """The graph's outputs, with values that are kept elsewhere as aliases made there."""
    (values,) = output.args
    found: list[Any] = []
    for position, value in enumerate(values):       # type: ignore[arg-type]
        new = main[value] if isinstance(value, fx.Node) else value
        if isinstance(value, fx.Node) and value.name in kept and position >= facts.num_outputs:
            keeper = kept[value.name]
            held = there.get(keeper, {}).get(value, main[value])
            new = graph.create_node("call_function", torch.ops.aten.alias.default, (held,), name=f"{value.name}_kept")
            new.meta = dict(value.meta)
            assign[new.name], origin[new.name] = keeper, value.name
        found.append(new)
    made = graph.output(tuple(found))
    made.meta = dict(output.meta)
