"""Eager code as graphs: `genie.capture()`, and what can be done with what it has recorded.

    x = torch.randn(1, 3, device="remote_accelerator")
    with torch.no_grad(), genie.capture():
        y = model(x)                       # ops are recorded, not run; the model may lie on the CPU
    graph = genie.get_graph()
    print(genie.annotate(graph, model))    # what it means
    plan = graph.plan()
    genie.execute_local(plan, inputs)      # here, on the CPU
    genie.execute(plan, inputs)            # on a worker
"""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from genie_dynamo import device, sessions
from genie_dynamo.analysis import sums_by_region, with_costs
from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import ConfigError, CostError, GenieError
from genie_dynamo.core.fragment import encode
from genie_dynamo.core.placement import POLICIES
from genie_dynamo.core.plan import Plan
from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.lower import lower_fragment
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.passes.semantics.annotate import annotate as annotate_graph
from genie_dynamo.passes.semantics.carry import mark
from genie_dynamo.runtime.client.attempt import GraphInfo
from genie_dynamo.runtime.client.remote_graph import RemoteGraph
from genie_dynamo.runtime.client.session import Session

Tensor = torch.Tensor
log = logging.getLogger(__name__)


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

    def plan(self, *, devices: Sequence[str] | int | None = None, policy: str | None = None) -> RecordedPlan:
        """The graph as a plan: one fragment for any one worker, or, see `run`, placed over those that are named.

        Raises: UnsupportedGraphError, and what `run` raises.
        """
        outputs: Any = self.gm.graph.output_node().args[0]
        facts = GraphFacts(kind="inference", static_inputs=(), bumped=frozenset(), num_outputs=len(outputs))
        if devices is None and policy is None:
            return RecordedPlan(self.gm, plan_graph(self.gm, facts))
        from genie_dynamo.device.spread import plan_over

        session, workers, config = _meant(devices, policy)
        return RecordedPlan(self.gm, *plan_over(self.gm, facts, session, workers, config))

    def __str__(self) -> str:
        return str(self.gm.graph)


@dataclass(frozen=True, slots=True)
class RecordedPlan:
    """A recorded graph and the plan that runs it; `workers` are the names that the plan numbers, or any will do."""

    gm: fx.GraphModule
    plan: Plan
    workers: tuple[str, ...] = ()

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
    found = annotate_graph(graph.gm, roles=roles)
    mark(graph.gm, found)
    try:
        return with_costs(found, sums_by_region(graph.gm))
    except CostError as error:         # what is understood is worth having without its costs
        log.info("regions have no costs: %s", error)
        return found


def execute_local(plan: RecordedPlan | RecordedGraph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a recorded graph here, on the CPU.

    Args:    inputs: one for each input of the graph, as `RecordedGraph.inputs` has them.
    Returns: its outputs. Raises: GenieError for a wrong number of inputs; what the ops raise.
    """
    with torch.no_grad():
        outputs: tuple[Tensor, ...] = plan.gm.forward(*_checked(plan, inputs))
    return outputs


def execute(plan: RecordedPlan | RecordedGraph, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Run a recorded graph on a worker of the session, or on those that it was planned for.

    See execute_local; raises WorkerError beside.
    """
    planned = plan.plan() if isinstance(plan, RecordedGraph) else plan
    values = _checked(planned, inputs)
    graph = planned.gm
    specs = {f.fragment_id: encode(lower_fragment(graph, node_names=f.node_names, inputs=f.inputs, outputs=f.outputs))
             for f in planned.plan.fragments}
    info = GraphInfo(False, frozenset(), "recorded graph")
    remote = RemoteGraph(planned.plan, specs, info, sessions.default_config(), sessions.session,
                         lambda args: graph.forward(*args), planned.workers)
    return remote(values)


def run(model: Callable[..., Any], input: Any, *, devices: Sequence[str] | int | None = None,
        policy: str | None = None) -> Any:
    """Run a model's eager code on the device, without changing the model or its input.

    Weights of the CPU go up once and are kept as long as they are unchanged and alive; data-dependent control flow
    runs as far as it needs.

    Args:    input: a tensor, or a tuple of arguments.
             devices: the workers that may take part, by name, or how many of the session's; policy: what they are
             chosen for. With more than one, what is recorded is placed by cost as compiled graphs are, and weights stay
             where they are used. With neither, everything runs on the device: the session's first worker.
    Returns: what the model returns, with CPU tensors.
    Raises:  ConfigError for unknown workers or an unknown policy; PlacementError; what the model raises; WorkerError.
    """
    _check_available()
    args = input if isinstance(input, tuple) else (input,)
    with _spread_over(devices, policy), capture(), torch.no_grad():
        moved = pytree.tree_map_only(Tensor, lambda t: t.to(device.NAME), args)
        return pytree.tree_map_only(Tensor, lambda t: t.cpu(), model(*moved))


@contextmanager
def _spread_over(devices: Sequence[str] | int | None, policy: str | None) -> Iterator[None]:
    """Inside, recordings of this thread run over the named workers, where these are not the device's own one alone."""
    from genie_dynamo.device.engine import current
    from genie_dynamo.device.foreign import admission
    from genie_dynamo.device.spread import Spread

    session, workers, config = _meant(devices, policy)
    if workers == (session.links[0].name,):
        yield
        return
    current.run(())            # what was recorded before belongs to the device
    before, admission.spread = admission.spread, Spread(session, workers, config)
    try:
        yield
    finally:
        admission.spread = before


def _meant(devices: Sequence[str] | int | None, policy: str | None) -> tuple[Session, tuple[str, ...], Config]:
    """The session, its workers that are meant, and the configuration with the policy. Raises: ConfigError."""
    if policy is not None and policy not in POLICIES:
        raise ConfigError(f"policy {policy!r} is unknown; it is one of {', '.join(map(repr, POLICIES))}")
    session = sessions.session()
    workers = _chosen(devices, policy, [link.name for link in session.links])
    return session, workers, sessions.default_config().for_compile({} if policy is None else {"policy": policy})


def _chosen(devices: Sequence[str] | int | None, policy: str | None, names: Sequence[str]) -> tuple[str, ...]:
    """The workers that are meant, in the session's order. Raises: ConfigError for those that there are not."""
    if devices is None:
        return tuple(names) if policy is not None else tuple(names[:1])
    if isinstance(devices, int):
        if not 1 <= devices <= len(names):
            raise ConfigError(f"devices={devices}: this session has {len(names)} workers: {', '.join(names)}")
        return tuple(names[:devices])
    wanted = {names[0] if name in (device.NAME, f"{device.NAME}:0") else name for name in devices}
    unknown = sorted(wanted - set(names))
    if unknown or not wanted:
        raise ConfigError(f"devices={devices!r}: this session's workers are {', '.join(names)}"
                          + (f", and not {', '.join(unknown)}" if unknown else ""))
    return tuple([name for name in names if name in wanted])


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
