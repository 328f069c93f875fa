"""What is known about an ATen graph besides its nodes: which inputs are parameters, what is saved, what was guarded."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._guards import TracingContext

from genie_dynamo.core.plan import GuardFacts


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphFacts:
    """Facts that AOTAutograd knows at compile time.

    num_outputs is the number of leading outputs that go to the caller; what follows is saved for the backward.
    """

    kind: str                          # "forward" | "backward" | "inference"
    static_inputs: tuple[int, ...]     # positions of parameters and buffers
    bumped: frozenset[int]             # positions whose version AOTAutograd raises before each call
    num_outputs: int


def read_facts(gm: fx.GraphModule, kind: str) -> GraphFacts:
    """Facts of the graph that is being compiled now. Call it inside the compiler callback."""
    context = TracingContext.try_get()
    metadata: Any = context.fw_metadata if context is not None else None
    num_outputs = len(_outputs(gm))
    if metadata is None or kind == "backward":
        return GraphFacts(kind=kind, static_inputs=(), bumped=frozenset(), num_outputs=num_outputs)
    num_inputs = sum(node.op == "placeholder" for node in gm.graph.nodes)
    # Effect tokens (ops that check or print) come before the graph's own inputs and outputs.
    tokens = len(metadata.tokens)
    static = tuple(i + tokens for i in metadata.static_input_indices or () if i + tokens < num_inputs)
    bumped = frozenset(i + tokens for i in metadata.mutated_graph_handled_indices_seen_by_autograd)
    if kind == "forward":
        num_outputs = metadata.num_forward + tokens
    return GraphFacts(kind=kind, static_inputs=static, bumped=bumped, num_outputs=num_outputs)


def _outputs(gm: fx.GraphModule) -> tuple[Any, ...]:
    (outputs,) = gm.graph.output_node().args
    return tuple(outputs) if isinstance(outputs, list | tuple) else (outputs,)


def read_guards(gm: fx.GraphModule) -> GuardFacts:
    """Guards, sources and shape ranges as Dynamo knows them now. Call it inside the backend."""
    context = TracingContext.try_get()
    if context is None:
        return GuardFacts()
    rows = []
    for guard in context.guards_context.dynamo_guards.inner:
        code = "; ".join(str(c) for c in guard.code_list or ())
        rows.append((str(guard.name), str(guard.create_fn_name()), code))
    ranges: list[tuple[str, str, str]] = []
    expression = ""
    fake_mode = context.fake_mode
    shape_env = fake_mode.shape_env if fake_mode is not None else None
    if shape_env is not None:
        for symbol, bounds in shape_env.var_to_range.items():
            sources = shape_env.var_to_sources.get(symbol, ())
            ranges.append((str(symbol), sources[0].name if sources else "", f"[{bounds.lower}, {bounds.upper}]"))
        expression = " and ".join(str(guard.expr) for guard in shape_env.guards)
    return GuardFacts(guards=tuple(sorted(rows)), ranges=tuple(ranges), expression=expression)


def draws_random_numbers(node: fx.Node) -> bool:
    """Whether a node advances the default generator, itself or in one of its subgraphs."""
    target = node.target
    if isinstance(target, torch._ops.OpOverload):
        return torch.Tag.nondeterministic_seeded in target.tags
    if isinstance(target, torch._ops.HigherOrderOperator):
        if "rng" in target._name:
            return True
        root = node.graph.owning_module
        for argument in node.all_input_nodes:
            if argument.op == "get_attr" and root is not None:
                inner = getattr(root, str(argument.target), None)
                if isinstance(inner, fx.GraphModule) and any(map(draws_random_numbers, inner.graph.nodes)):
                    return True
    return False
