"""ATen graph -> plan: the graph's nodes as fragments, its mutations as values, its outputs as rules.

    placeholders -> [call_function ...] -> aten.copy_(placeholder, new)* -> output
                    `---- fragments ----'  `------ mutations ---------'
"""
from __future__ import annotations

import hashlib
import heapq
import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.plan import RNG_STATE, Fragment, GuardFacts, Output, Plan, rng_after, verify_plan
from genie_dynamo.passes.deltas import find_deltas
from genie_dynamo.passes.facts import GraphFacts, draws_random_numbers

Assign = Callable[[fx.Node], int]
"""Which worker of the plan runs a node."""


def plan_graph(gm: fx.GraphModule, facts: GraphFacts, guards: GuardFacts | None = None, *,
               assign: Assign | None = None, num_workers: int = 1, keep_state: bool = False,
               in_order: bool = False) -> Plan:
    """A verified plan of the graph.

    Args:    assign: node -> worker; None puts all on worker 0.
             keep_state: outputs and new contents of inputs may stay on their workers; what the caller can rebuild
             from fewer bytes does not come whole.
             in_order: each worker runs its nodes in the order of the graph, which bounds what it holds at a time;
             otherwise it stays at what it can run as long as it can.
    Raises:  UnsupportedGraphError where a mutation is not the epilogue AOTAutograd makes; PlanError on our own bugs.
    """
    placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
    index_of = {node: index for index, node in enumerate(placeholders)}
    epilogue = _epilogue(gm, index_of)
    body = [n for n in gm.graph.nodes if n.op in ("call_function", "get_attr") and n not in epilogue]
    outputs = _output_rules(gm, facts, index_of, epilogue)
    wanted = {o.name for o in outputs} | {source.name for _, source in epilogue.values()}
    views, groups = _shared_memory(gm, {o.name for o in outputs if o.kind == "value"})
    state = _state(outputs, epilogue, views, groups, body) if keep_state else ()
    mutated = {node: source.name for node, source in _mutated(placeholders, epilogue)}
    rebuilds = find_deltas(state, mutated)
    wanted.update(piece for recipe in rebuilds for piece in recipe.names("piece"))
    plan = Plan(
        graph_id=hashlib.sha256(gm.code.encode()).hexdigest(),
        inputs=tuple(node.name for node in placeholders),
        static_inputs=facts.static_inputs,
        outputs=outputs,
        mutations=tuple((index, source.name) for index, source in epilogue.values()),
        fragments=_fragments(body, wanted, assign or (lambda node: 0), in_order),
        num_workers=num_workers,
        aliases=tuple(group for group in groups.values() if len(group) > 1),
        input_views=views,
        state=tuple(node.name for node in state),
        rebuilds=rebuilds,
        guards=guards or GuardFacts(),
    )
    verify_plan(plan, {n.name: tuple(dict.fromkeys(i.name for i in n.all_input_nodes)) for n in body})
    return plan


def _epilogue(gm: fx.GraphModule, index_of: dict[fx.Node, int]) -> dict[fx.Node, tuple[int, fx.Node]]:
    """The trailing copies into inputs: node -> (input position, node of the new content)."""
    found: dict[fx.Node, tuple[int, fx.Node]] = {}
    written: dict[fx.Node, fx.Node] = {}
    for node in gm.graph.nodes:
        for argument in node.all_input_nodes:
            if argument in written and node.op != "output":
                raise UnsupportedGraphError(
                    f"{node.name} reads {argument.name} after the graph has written to it ({written[argument].name})")
        if node.op == "call_function" and node.target is torch.ops.aten.copy_.default and node.args[0] in index_of:
            source = node.args[1]
            if not isinstance(source, fx.Node):
                raise UnsupportedGraphError(f"{node.name} writes a constant into input {node.args[0]}")
            target = node.args[0]
            assert isinstance(target, fx.Node)
            found[node] = (index_of[target], source)
            written[target] = node
            written[node] = node
    return found


def _output_rules(gm: fx.GraphModule, facts: GraphFacts, index_of: dict[fx.Node, int],
                  epilogue: dict[fx.Node, tuple[int, fx.Node]]) -> tuple[Output, ...]:
    (raw,) = gm.graph.output_node().args
    listed: Sequence[Any] = raw if isinstance(raw, list | tuple) else (raw,)
    static = set(facts.static_inputs)
    rules = []
    for position, item in enumerate(listed):
        saved = position >= facts.num_outputs
        if not isinstance(item, fx.Node):
            rules.append(Output(kind="literal", literal=item))
        elif item in epilogue:
            rules.append(Output(kind="input", index=epilogue[item][0]))
        elif item in index_of:
            index = index_of[item]
            if saved and index not in static and _is_tensor(item):
                rules.append(Output(kind="saved", name=item.name))
            else:
                rules.append(Output(kind="input", index=index))
        else:
            rules.append(Output(kind="saved" if saved and _is_tensor(item) else "value", name=item.name))
    return tuple(rules)


def _shared_memory(gm: fx.GraphModule,
                   returned: set[str]) -> tuple[tuple[tuple[str, str], ...], dict[int, tuple[str, ...]]]:
    """`((value, input it is a view of), ...)`, and the other returned values by the memory they are in.

    AOTAutograd rebuilds most views itself, but leaves it to the compiler to keep those among outputs where no grad is
    needed, and those of ops with several outputs (chunk, split, unbind).
    """
    inputs: dict[int, str] = {}
    views: list[tuple[str, str]] = []
    groups: dict[int, tuple[str, ...]] = {}
    for node in gm.graph.nodes:
        if not _is_tensor(node) or node.meta["val"].layout is not torch.strided:
            continue
        memory = node.meta["val"].untyped_storage()._cdata
        if node.op == "placeholder":
            inputs.setdefault(memory, node.name)
        elif node.name in returned and memory in inputs:
            views.append((node.name, inputs[memory]))
        elif node.name in returned:
            groups[memory] = (*groups.get(memory, ()), node.name)
    return tuple(views), groups


def _mutated(placeholders: Sequence[fx.Node],
             epilogue: dict[fx.Node, tuple[int, fx.Node]]) -> list[tuple[fx.Node, fx.Node]]:
    """(input, node of its new content), for the inputs that are written to."""
    return [(placeholders[index], source) for index, source in epilogue.values()]


def _state(outputs: Sequence[Output], epilogue: dict[fx.Node, tuple[int, fx.Node]],
           views: Sequence[tuple[str, str]], groups: dict[int, tuple[str, ...]],
           body: Sequence[fx.Node]) -> tuple[fx.Node, ...]:
    """The tensors that the caller gets in memory of their own: each of them may be state that comes back."""
    shared = {name for name, _ in views} | {name for group in groups.values() if len(group) > 1 for name in group}
    names = {o.name for o in outputs if o.kind == "value"} | {source.name for _, source in epilogue.values()}
    return tuple(node for node in body
                 if node.name in names - shared and _is_tensor(node) and node.meta["val"].layout is torch.strided)


def _is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def _is_subgraph(node: fx.Node) -> bool:
    if node.op != "get_attr" or node.graph.owning_module is None:
        return False
    value: Any = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return isinstance(value, torch.nn.Module)


def _fragments(body: Sequence[fx.Node], wanted: set[str], assign: Assign, in_order: bool) -> tuple[Fragment, ...]:
    """Runs of nodes on one worker, as long as their dependencies allow; their union is every node, once."""
    # A subgraph is not a value: it goes with the node that uses it.
    subgraphs = {n for n in body if _is_subgraph(n)}
    nodes = [n for n in body if n not in subgraphs]
    placed: dict[fx.Node, int] = {}
    for node in nodes:
        # A tuple does not travel: its elements are taken where it was made.
        taken_from = node.args[0] if node.target is operator.getitem else None
        placed[node] = placed[taken_from] if isinstance(taken_from, fx.Node) else assign(node)
    runs = _runs_in_order(nodes, placed) if in_order else _runs(nodes, placed)
    groups = [(worker, _with_subgraphs(run, subgraphs)) for worker, run in runs]
    home = {node: number for number, (_, members) in enumerate(groups) for node in members}
    fragments = []
    rng = RNG_STATE
    for number, (worker, members) in enumerate(groups):
        inside = set(members)
        inputs = dict.fromkeys(i.name for n in members for i in n.all_input_nodes if i not in inside)
        outputs = [n.name for n in members
                   if n.name in wanted or any(u in home and home[u] != number for u in n.users)]
        random = any(map(draws_random_numbers, members))
        fragments.append(Fragment(
            fragment_id=number, worker=worker, node_names=tuple(n.name for n in members), inputs=tuple(inputs),
            outputs=tuple(dict.fromkeys(outputs)), rng_in=rng if random else None))
        if random:
            rng = rng_after(number)
    return tuple(fragments)


def _with_subgraphs(run: Sequence[fx.Node], subgraphs: set[fx.Node]) -> list[fx.Node]:
    members: dict[fx.Node, None] = {}
    for node in run:
        members.update(dict.fromkeys(n for n in node.all_input_nodes if n in subgraphs))
        members[node] = None
    return list(members)


def _runs(nodes: Sequence[fx.Node], placed: dict[fx.Node, int]) -> list[tuple[int, list[fx.Node]]]:
    """Nodes in an order that stays on a worker while it can. Random and writing nodes keep their order."""
    before = _orders(nodes)
    waits = {node: len(before[node]) for node in nodes}
    after: dict[fx.Node, list[fx.Node]] = {node: [] for node in nodes}
    for node, sources in before.items():
        for source in sources:
            after[source].append(node)
    position = {node: index for index, node in enumerate(nodes)}
    ready: dict[int, list[int]] = {}
    for node in nodes:
        if not waits[node]:
            heapq.heappush(ready.setdefault(placed[node], []), position[node])
    runs: list[tuple[int, list[fx.Node]]] = []
    for _ in nodes:
        worker = runs[-1][0] if runs else -1
        if not ready.get(worker):
            worker = min((w for w, heap in ready.items() if heap), key=lambda w: ready[w][0])
            runs.append((worker, []))
        node = nodes[heapq.heappop(ready[worker])]
        runs[-1][1].append(node)
        for user in after[node]:
            waits[user] -= 1
            if not waits[user]:
                heapq.heappush(ready.setdefault(placed[user], []), position[user])
    return runs


def _runs_in_order(nodes: Sequence[fx.Node], placed: dict[fx.Node, int]) -> list[tuple[int, list[fx.Node]]]:
    """Nodes in the graph's order on each worker. A run ends where the next node waits for a run that began after it.

    So runs only read from runs before them, and a worker that waits in one of them does not go on to its next.
    """
    runs: list[tuple[int, list[fx.Node]]] = []
    run_of: dict[fx.Node, int] = {}
    latest: dict[int, int] = {}
    for node in nodes:
        worker = placed[node]
        needs = max((run_of[source] for source in node.all_input_nodes if source in run_of), default=-1)
        if worker not in latest or needs > latest[worker]:
            latest[worker] = len(runs)
            runs.append((worker, []))
        run_of[node] = latest[worker]
        runs[latest[worker]][1].append(node)
    return runs


def _orders(nodes: Sequence[fx.Node]) -> dict[fx.Node, set[fx.Node]]:
    """What must have run before each node: what it reads, and what has an effect before it."""
    inside = set(nodes)
    before = {node: {i for i in node.all_input_nodes if i in inside} for node in nodes}
    if any(map(_writes, nodes)):
        for earlier, later in itertools.pairwise(nodes):
            before[later].add(earlier)
        return before
    random = [node for node in nodes if draws_random_numbers(node)]
    for earlier, later in itertools.pairwise(random):
        before[later].add(earlier)
    return before


def _writes(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
