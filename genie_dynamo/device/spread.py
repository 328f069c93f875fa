"""Recordings that run over several workers: what `genie.run(devices=..., policy=...)` asks for.

    recording -> graph -> passes -> cost graph -> placement -> plan -> RemoteGraph

The device itself is one worker. Here a recording goes the way of a compiled graph instead: it is annotated, priced and
placed by the policy, weights stay on the workers that use them, and what is read or still held comes back.
"""
from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from genie_dynamo import worker_facts
from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import CostError, SessionError
from genie_dynamo.core.fragment import encode
from genie_dynamo.core.plan import Plan
from genie_dynamo.device.nodes import Node, layout_of
from genie_dynamo.device.structure import Recording, build
from genie_dynamo.passes.base import CaptureFacts
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.lower import lower_fragment
from genie_dynamo.passes.partition import partition
from genie_dynamo.passes.placement.interfaces import Limits
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.passes.semantics.carry import AnnotateSemantics
from genie_dynamo.placing import no_long_pauses, planner
from genie_dynamo.runtime.client.attempt import GraphInfo
from genie_dynamo.runtime.client.remote_graph import RemoteGraph
from genie_dynamo.runtime.client.session import Session

log = logging.getLogger(__name__)

TIME_LIMIT_S = 0.5
MAX_GRAPHS = 64

_graphs: weakref.WeakKeyDictionary[Session, dict[Any, RemoteGraph]] = weakref.WeakKeyDictionary()


@dataclass(slots=True)
class Spread:
    """The workers and the policy of one `genie.run`, while it records.

    config  has the policy
    """

    session: Session
    workers: tuple[str, ...]
    config: Config
    _weights: dict[int, tuple[torch.Tensor, Node]] = field(default_factory=dict)

    def leaf(self, tensor: torch.Tensor) -> Node:
        """The node of a CPU tensor that the model was built with: the tensor itself, which workers keep."""
        found = self._weights.get(id(tensor))
        if found is None or found[1].layout is not layout_of(tensor):
            node = Node(None, (), (), layout_of(tensor))
            node.value = tensor
            found = self._weights[id(tensor)] = (tensor, node)
        return found[1]

    def run(self, recording: Recording, value_of: Callable[[Node], torch.Tensor]) -> list[torch.Tensor]:
        """What the recording returns and keeps, here. Raises: WorkerError, PlacementError, SessionError."""
        weights = {node for _, node in self._weights.values()}
        static = tuple([i for i, leaf in enumerate(recording.leaves) if leaf in weights])
        graphs = _graphs.setdefault(self.session, {})
        key = (recording.key, recording.numbers, static, self.workers, self.config,
               worker_facts.incarnations(self.session))
        graph = graphs.get(key)
        if graph is None:
            if len(graphs) >= MAX_GRAPHS:
                graphs.clear()
            graph = graphs[key] = self._planned(recording, static)
        values = [leaf.value if leaf in weights else value_of(leaf) for leaf in recording.leaves]
        return list(graph(values))

    def _planned(self, recording: Recording, static: tuple[int, ...]) -> RemoteGraph:
        gm = build(recording, described=True)
        facts = GraphFacts(kind="inference", static_inputs=static, bumped=frozenset(),
                           num_outputs=len(recording.returned) + len(recording.kept))
        plan, workers = plan_over(gm, facts, self.session, self.workers, self.config)
        specs = {f.fragment_id: encode(lower_fragment(gm, node_names=f.node_names, inputs=f.inputs, outputs=f.outputs))
                 for f in plan.fragments}
        session = weakref.ref(self.session)
        return RemoteGraph(plan, specs, GraphInfo(False, frozenset(), "recorded graph"), self.config,
                           lambda: _alive(session), lambda args: gm.forward(*args), workers)


def plan_over(gm: fx.GraphModule, facts: GraphFacts, session: Session, workers: tuple[str, ...],
              config: Config) -> tuple[Plan, tuple[str, ...]]:
    """The plan of a recorded graph under a policy, and the names of the workers that it numbers.

    Args:   workers: those that may take part. With one, nothing is priced.
    Raises: PlacementError; SessionError where workers cannot be measured; UnsupportedGraphError.
    """
    AnnotateSemantics().run(gm, CaptureFacts())
    chosen, assign = _placed(gm, facts, session, workers, config) if len(workers) > 1 else (workers, {})
    return plan_graph(gm, facts, assign=lambda node: assign.get(node.name, 0), num_workers=len(chosen)), chosen


def _placed(gm: fx.GraphModule, facts: GraphFacts, session: Session, names: tuple[str, ...],
            config: Config) -> tuple[tuple[str, ...], Mapping[str, int]]:
    known = worker_facts.facts_of(session, wait=True)
    if known is None:
        raise SessionError("the workers of this session could not be measured (see the log), so nothing can be placed "
                           "on them; genie.run(model, input) needs no measurement")
    workers = [worker for worker in known.workers if worker.name in names]
    limits = Limits(time_limit_s=TIME_LIMIT_S, latency_bound_s=config.latency_bound_s)
    try:
        with no_long_pauses(TIME_LIMIT_S):
            found = partition(gm, facts, workers, known.lanes, config.policy, planner(), limits,
                              aware=config.awareness == "full")
    except CostError as error:
        log.info("a recorded graph cannot be priced, and stays on one worker: %s", error)
        return names[:1], {}
    return found.workers, found.assign


def _alive(reference: weakref.ref[Session]) -> Session:
    session = reference()
    if session is None:
        raise SessionError("the session of this graph is gone")
    return session
