"""Recurrent blocks: one op (LSTM, GRU, RNN), or cells that are written out, step by step.

    x_t -> W --+
               +-> gates, activations -> h_t -> U (the same weight) -> ... of the next step
    h_t-1 -> U +

Written out, a recurrence is known by a weight that is read again further down its own results, with nothing but gates
between and something new joining at each step. All steps are one region. A single step is known by the state that it
takes and replaces.
"""
from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass

from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.ops import ACTIVATIONS, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern, ordered
from genie_dynamo.passes.semantics.patterns.search import FLOW, weight_of
from genie_dynamo.passes.semantics.view import GraphView, ViewNode, is_linear, operands

_STEP = FLOW | {"cat", "layer_norm", "stack"}
_GATES = FLOW | {"layer_norm"}
_STEP_LIMIT = 48
_FRESH = frozenset({"zeros", "new_zeros", "zeros_like", "full", "empty"})


def match_recurrent(view: GraphView, node: ViewNode) -> Outcome:
    if node.op in ("lstm", "gru", "rnn"):
        return _op(view, node)
    if node.static:
        return NoMatch("an activation of weights")
    unrolled = view.memo.get("recurrences")
    if unrolled is None:
        unrolled = view.memo["recurrences"] = _unrolled(view)
    block = unrolled.get(node.index)
    if block is not None:
        return _written_out(view, block, node)
    return _single_step(view, node) if node.op == "tanh" else NoMatch("no weight is read again below it")


# -- one op ---------------------------------------------------------------------------------------------------


def _op(view: GraphView, node: ViewNode) -> Outcome:
    """A layer's op; of cells, which do one step each, all that share their weights."""
    step = node.target.endswith("cell")
    cells = [n for n in view.by_op[node.op] if _weights(n) == _weights(node)] if step else [node]
    if cells[0] is not node:
        return NoMatch(f"a later step of the cell at {cells[0].name}")
    items = {cell: tuple(u for u in cell.users if u.op == "item") for cell in cells}
    facts = _state_of_cells(view, cells, items) if step else _state_of_op(view, node, items[node])
    return Match(kind="recurrent", core=ordered([*cells, *(i for own in items.values() for i in own)]),
                 confidence=0.98, reason=f"the op {node.target}", annotations={"variant": node.op, **facts})


def _weights(node: ViewNode) -> list[ViewNode]:
    return [p for p in node.inputs if p.op == "parameter"]


def _state_of_cells(view: GraphView, cells: list[ViewNode],
                    items: dict[ViewNode, tuple[ViewNode, ...]]) -> dict[str, Scalar]:
    states = {view.through_views(p) for p in cells[0].inputs[1:] if not p.weighted}
    given = {s for s in states if _given(s)}
    remember_states(view, given)
    last = items[cells[-1]] or (cells[-1],)
    made = {n for cell in cells for n in (cell, *items[cell])}
    kept = any(_leaves(view, n) if len(cells) == 1 else _state_leaves(view, n, made) for n in last)
    return {"past": bool(given), "kept": kept, "query_length": len(cells)}


def _state_of_op(view: GraphView, node: ViewNode, items: tuple[ViewNode, ...]) -> dict[str, Scalar]:
    """Whether the state comes in and goes out, and how many steps the call adds."""
    data = node.inputs[0]
    states = [p for p in node.inputs[1:] if p.is_float and not p.weighted and p.rank in (2, 3)]
    past = any(view.through_views(p).kind != "call" or not view.through_views(p).static for p in states)
    last = [item for item in items if item.args[1] != 0] if len(items) > 1 else []
    steps = data.shape[0 if _time_first(node, data) else 1] if data.shape is not None and data.rank == 3 else 1
    return {"past": past, "kept": any(_leaves(view, item) for item in last), "query_length": steps}


def _leaves(view: GraphView, node: ViewNode) -> bool:
    """Whether a state leaves the graph, alone or stacked with those of other layers."""
    return any(n.op == "output" for n in view.forward(node, VIEWS | {"stack", "cat"}, 12))


def _time_first(node: ViewNode, data: ViewNode) -> bool:
    """The ops' last flag is batch_first; the kernel that they become on a CPU has time first."""
    if node.target.startswith("mkldnn"):
        return True
    flags = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, bool)]
    return not (flags and flags[-1])


# -- written out ----------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    """All steps of one recurrence. layers: those that read the state, in order."""

    layers: tuple[ViewNode, ...]
    nodes: tuple[ViewNode, ...]
    steps: int


def _unrolled(view: GraphView) -> dict[int, _Block]:
    """Index of each activation in a recurrence that is written out -> the recurrence."""
    uses: dict[ViewNode, list[ViewNode]] = {}
    for node in view.by_op.get("matmul", ()):
        if is_linear(node):
            uses.setdefault(weight_of(node, view), []).append(node)
    repeated = {linear for linears in uses.values() if len(linears) > 1 for linear in linears}
    steps: dict[ViewNode, list[set[ViewNode]]] = {}      # weight that reads its own results -> what it saw, per step
    for weight, linears in uses.items():
        found = [_one_step(view, *pair, repeated) for pair in itertools.pairwise(linears)]
        if found and all(found):
            steps[weight] = [seen for seen in found if seen is not None]
    reads = {weight: {weight_of(n, view) for seen in found for n in seen if n in repeated}
             for weight, found in steps.items()}
    blocks: dict[int, _Block] = {}
    done: set[ViewNode] = set()
    for weight in steps:
        if weight not in done:
            # Layers whose results reach each other are gates of one cell; those of a layer above only read this one.
            own = {weight} | {w for w in reads[weight] if weight in reads.get(w, ())}
            done |= own
            block = _block(view, own, uses, steps)
            blocks.update((n.index, block) for n in block.nodes if n.op in ACTIVATIONS)
    return blocks


def _one_step(view: GraphView, earlier: ViewNode, later: ViewNode,
              repeated: set[ViewNode]) -> set[ViewNode] | None:
    """What the second use of a weight reads, up to the layers of its step; None where that is not what was made of the
    first use and of something new."""
    pair = operands(later)
    assert pair is not None
    seen, queue, joined = {pair[0]}, [pair[0]], False
    while queue:
        node = queue.pop()
        if node is earlier:
            continue
        if node.static or node.is_int or node.kind != "call" or node.index < earlier.index or is_linear(node):
            joined |= not node.static and not node.is_int and node.op not in _FRESH
            continue
        if node.op not in _STEP or len(seen) > _STEP_LIMIT:
            return None
        fresh = [p for p in dict.fromkeys(node.inputs) if p not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    if earlier not in seen:
        return None
    return seen if joined else None


def _block(view: GraphView, own: set[ViewNode], uses: dict[ViewNode, list[ViewNode]],
           steps: dict[ViewNode, list[set[ViewNode]]]) -> _Block:
    """The region of the cells whose layers have these weights: their gates, and what puts inputs beside the state."""
    layers = ordered(n for weight in own for n in uses[weight])
    seen = {n for weight in own for found in steps[weight] for n in found}
    for weight in own:                                  # the first step may start from nothing but its input
        seen |= {n for n in view.backward(uses[weight][0], _STEP - {"cat", "stack"}, _STEP_LIMIT) if not n.static}
    inputs = {m for n in seen if is_linear(n) and n not in layers and weight_of(n, view) not in steps
              for m in uses[weight_of(n, view)] if len(uses[weight_of(n, view)]) > 1}
    live = {*layers, *inputs}
    for node in ordered(seen):
        if node.kind == "call" and not is_linear(node) and any(p in live for p in node.inputs):
            live.add(node)
    last = layers[-len(own):]
    queue = list(last)
    while queue:                                        # the gates of the last step feed no later one
        for user in queue.pop().users:
            if user not in live and user.op in _STEP - {"cat", "stack"} and user.index < last[0].index + _STEP_LIMIT:
                live.add(user)
                queue.append(user)
    return _Block(layers, ordered(live), max(len(uses[weight]) for weight in own))


def _written_out(view: GraphView, block: _Block, node: ViewNode) -> Outcome:
    activations = [n for n in block.nodes if n.op in ACTIVATIONS]
    if node is not activations[0]:
        return NoMatch(f"a later step of the recurrence that starts at {activations[0].name}")
    inside = set(block.nodes)
    # A state is read by the first step alone; what conditions each step is read by all.
    second = next(n for n in block.layers if weight_of(n, view) is weight_of(block.layers[0], view)
                  and n is not block.layers[0])
    states = {p for n in block.nodes[:_STEP_LIMIT] for p in (*n.inputs, *_sources(view, n)) if _given(p)
              and all(u.index < second.index for u in p.users if u in inside or u.op == "cat")}
    remember_states(view, states)
    kept = any(_state_leaves(view, n, inside) for n in block.nodes[-_STEP_LIMIT:] if not is_linear(n))
    annotations: dict[str, Scalar] = {"variant": "cell", "past": bool(states), "kept": kept,
                                      "query_length": block.steps}
    return Match(kind="recurrent", core=ordered([*activations, *block.layers]), nodes=block.nodes, confidence=0.93,
                 annotations=annotations, reason=f"one weight is read {block.steps} times down its own results, with "
                                                 "gates between: a recurrence that is written out")


def _state_leaves(view: GraphView, node: ViewNode, inside: set[ViewNode]) -> bool:
    """Whether a state leaves the graph, alone or beside those of other layers; the joined results of all steps do not
    count."""
    for below in view.forward(node, VIEWS, 12):
        if below.op == "output" or (below.op in ("stack", "cat") and sum(p in inside for p in below.inputs) <= 2
                                    and _leaves(view, below)):
            return True
    return False


def _sources(view: GraphView, layer: ViewNode) -> list[ViewNode]:
    """What a layer reads, also behind a concatenation or a gate."""
    pair = operands(layer)
    if pair is None:
        return []
    source = view.through_views(pair[0])
    parts = [view.through_views(p) for p in source.inputs] if source.op == "cat" else [source]
    return [view.through_views(q) for p in parts for q in ((p, *p.inputs) if p.op == "mul" else (p,))]


def _given(node: ViewNode) -> bool:
    """A state of an earlier call: an input of rank 2 (batch, features)."""
    return node.kind == "input" and node.op == "input" and node.is_float and node.rank == 2


def remember_states(view: GraphView, states: Iterable[ViewNode]) -> None:
    """Note inputs that hold what an earlier call left: they carry no modality of their own."""
    view.memo.setdefault("states", set()).update(states)


# -- one step -------------------------------------------------------------------------------------------------


def _single_step(view: GraphView, node: ViewNode) -> Outcome:
    """The candidate of one cell, whose layers read the input and a state that the call was given or starts with."""
    linears = [n for n in view.backward(node, _GATES, 24) if is_linear(n)]
    sources = {s for n in linears for s in _sources(view, n)}
    if len(sources) < 2:
        return NoMatch("not what layers make of an input and a state together")
    after = list(view.forward(node, FLOW, 24))
    leaving = {n.hint for n in (node, *after) if _leaves(view, n)}
    if not leaving:
        return NoMatch("no new state leaves the graph")
    hidden = {s for s in sources if (s.op in _FRESH or _given(s)) and s.hint in leaving}
    if not hidden:
        return NoMatch("none of the layers reads a state of the step before")
    gates = [n for n in view.backward(node, _GATES, 24) if n.op in FLOW and n.kind == "call" and not n.static]
    inner = [n for n in after if n.op in FLOW]
    given = {p for n in (*gates, *inner, node) for p in n.inputs if _given(p)} | set(filter(_given, hidden))
    remember_states(view, given)
    annotations: dict[str, Scalar] = {"variant": "cell", "past": bool(given), "kept": True, "query_length": 1}
    return Match(kind="recurrent", core=ordered([node, *linears]), confidence=0.9, annotations=annotations,
                 nodes=ordered([*gates, *inner]),
                 reason="one step of a recurrence: tanh of an input and a state, and a new state leaves")


RECURRENT = Pattern(name="recurrent", matcher=match_recurrent, kinds=("recurrent",), priority=36,
                    anchors=("lstm", "gru", "rnn", "tanh", "sigmoid", "relu"))
