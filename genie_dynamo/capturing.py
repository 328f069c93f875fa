"""Eager code as graphs: `genie.capture()`, and what can be done with what it has recorded.

    with genie.capture():                  # factory calls without a device make tensors of remote_accelerator
        y = model(torch.randn(1, 3))       # ops on them are recorded, not run
    graph = genie.get_graph()
    print(genie.annotate(graph, model))    # what it means
    plan = graph.plan()
    genie.execute_local(plan, inputs)      # here, on the CPU
    genie.execute(plan, inputs)            # on a worker
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from genie_dynamo import device, sessions
from genie_dynamo.core.errors import ConfigError, GenieError
from genie_dynamo.core.fragment import encode
from genie_dynamo.core.placement import POLICIES
from genie_dynamo.core.plan import Plan
from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.lower import lower_fragment
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.passes.semantics.annotate import annotate as annotate_graph
from genie_dynamo.runtime.client.attempt import GraphInfo
from genie_dynamo.runtime.client.remote_graph import RemoteGraph

Tensor = torch.Tensor


@contextmanager
def capture() -> Iterator[None]:
    """Inside, factory calls of this thread without a device argument make tensors of remote_accelerator, and CPU
    tensors that recorded ops meet, such as the weights of a model built outside, go up as inputs.

    It may be nested. A read inside (`.item()`, `bool`, printing) runs what it needs, and recording goes on.
    Raises: ConfigError where the device cannot be had in this process.
    """
    _check_available()
    from genie_dynamo.device.foreign import admission

    admission.depth += 1
    try:
        with torch.device(device.NAME):
            yield
    finally:
        admission.depth -= 1


@dataclass(frozen=True, slots=True)
class RecordedGraph:
    """What was recorded and has not run: an fx graph of ATen ops whose outputs are the values that are still held.

    inputs  the content of its inputs, as CPU tensors, in the order of its placeholders
    """

    gm: fx.GraphModule
    inputs: tuple[Tensor, ...]
    nodes: tuple[Any, ...]                # of genie_dynamo.device, in the order of the inputs

    def plan(self) -> RecordedPlan:
        """The graph as one fragment, for any one worker. Raises: UnsupportedGraphError."""
        outputs = self.gm.graph.output_node().args[0]
        facts = GraphFacts(kind="inference", static_inputs=(), bumped=frozenset(), num_outputs=len(outputs))  # type: ignore[arg-type]
        return RecordedPlan(self.gm, plan_graph(self.gm, facts))

    def __str__(self) -> str:
        return str(self.gm.graph)


@dataclass(frozen=True, slots=True)
class RecordedPlan:
    """A recorded graph and the plan that runs it."""

    gm: fx.GraphModule
    plan: Plan

    def __str__(self) -> str:
        return str(self.plan)


def get_graph() -> RecordedGraph:
    """The graph of everything that is recorded, has not run, and whose result is still held.

    Raises: ConfigError where the device cannot be had; GenieError where nothing is recorded.
    """
    _check_available()
    from genie_dynamo.device.engine import current
    from genie_dynamo.device.structure import build

    with current.lock:
        recording = current.recorded()
        if not recording.nodes:
            raise GenieError("nothing is recorded: ops on tensors of remote_accelerator are, as long as somebody "
                             "holds their result and nobody has read it")
        inputs = tuple([current.value_of(leaf) for leaf in recording.leaves])
        return RecordedGraph(build(recording, described=True), inputs, recording.leaves)


def annotate(graph: RecordedGraph | fx.GraphModule, model: torch.nn.Module | None = None) -> SemanticGraph:
    """What a graph means: of recorded eager ops, or any other fx graph of ATen ops or of Dynamo.

    Args: model: whose parameters and buffers are among a recorded graph's inputs; without it all inputs are data.
    """
    if isinstance(graph, fx.GraphModule):
        return annotate_graph(graph)
    from genie_dynamo.device.foreign import admitted_node
    from genie_dynamo.device.memory import is_ours, node_of

    owned: dict[Any, str] = {}
    for role, tensors in (("parameter", model.parameters()), ("buffer", model.buffers())) if model is not None else ():
        for tensor in tensors:
            node = node_of(tensor) if is_ours(tensor) else admitted_node(tensor)
            if node is not None:
                owned[node] = role
    placeholders = [node for node in graph.gm.graph.nodes if node.op == "placeholder"]
    roles = {placeholder.name: owned.get(node, "input")
             for placeholder, node in zip(placeholders, graph.nodes, strict=True)}
    return annotate_graph(graph.gm, roles=roles)


def execute_local(plan: RecordedPlan | RecordedGraph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a recorded graph here, on the CPU.

    Args:    inputs: one for each input of the graph, as `RecordedGraph.inputs` has them.
    Returns: its outputs. Raises: GenieError for a wrong number of inputs; what the ops raise.
    """
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = plan.gm.forward(*_checked(plan, inputs))
    return outputs


def execute(plan: RecordedPlan | RecordedGraph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a recorded graph on a worker of the session. See execute_local; raises WorkerError beside."""
    planned = plan.plan() if isinstance(plan, RecordedGraph) else plan
    values = _checked(planned, inputs)
    graph = planned.gm
    specs = {f.fragment_id: encode(lower_fragment(graph, node_names=f.node_names, inputs=f.inputs, outputs=f.outputs))
             for f in planned.plan.fragments}
    remote = RemoteGraph(planned.plan, specs, GraphInfo(False, frozenset(), "recorded graph"),
                         sessions.default_config(), sessions.session, lambda args: graph.forward(*args))
    return remote(values)


def run(model: Callable[..., Any], input: Any, *, devices: Sequence[str] | int | None = None,
        policy: str | None = None) -> Any:
    """Run a model's eager code on the device, without changing the model or its input.

    Weights of the CPU go up once and are kept as long as they are unchanged and alive; data-dependent control flow
    runs as far as it needs.

    Args:    input: a tensor, or a tuple of arguments.
             devices, policy: for one worker every policy gives the same placement, and the device is one worker: the
             session's first, which `devices` may name.
    Returns: what the model returns, with CPU tensors.
    Raises:  ConfigError for other devices or an unknown policy; what the model raises; WorkerError.
    """
    if policy is not None and policy not in POLICIES:
        raise ConfigError(f"policy {policy!r} is unknown; it is one of {', '.join(map(repr, POLICIES))}")
    _check_devices(devices)
    args = input if isinstance(input, tuple) else (input,)
    with capture(), torch.no_grad():
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(device.NAME), args)
        return pytree.tree_map_only(Tensor, lambda t: t.cpu(), model(*moved))


def _check_devices(devices: Sequence[str] | int | None) -> None:
    if devices is None or devices == 1:
        return
    first = sessions.session().links[0].name
    if isinstance(devices, int) or list(devices) not in ([first], [device.NAME], [f"{device.NAME}:0"]):
        raise ConfigError(f"devices={devices!r}: eager code runs on one worker, {first!r}; torch.compile places graphs "
                          "on several")


def _checked(plan: RecordedPlan | RecordedGraph, inputs: Sequence[Tensor]) -> list[Tensor]:
    wanted = sum(node.op == "placeholder" for node in plan.gm.graph.nodes)
    if len(inputs) != wanted:
        raise GenieError(f"the graph takes {wanted} inputs, {len(inputs)} came")
    return [value.detach().cpu() for value in inputs]


def _check_available() -> None:
    device.register()
    if device.unavailable:
        raise ConfigError(f"remote_accelerator cannot be had: {device.unavailable}")
    device.activate()
