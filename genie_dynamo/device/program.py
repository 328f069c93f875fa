"""A structure's variant on a worker: planned, lowered and loaded there; and all that are known."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from genie_dynamo.core.fragment import encode
from genie_dynamo.core.plan import Output
from genie_dynamo.device.structure import Recording, Structure, Variant
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.lower import lower_fragment
from genie_dynamo.passes.planning import plan_graph
from genie_dynamo.runtime.client.binding import BoundProgram, bind
from genie_dynamo.runtime.client.resident import Resident
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.workers import WorkerLink


class Program:
    """A variant, planned and loaded on one worker."""

    def __init__(self, session: Session, link: WorkerLink, variant: Variant, recording: Recording) -> None:
        graph = variant.graph
        facts = GraphFacts(kind="inference", static_inputs=(), bumped=frozenset(),
                           num_outputs=len(recording.returned))
        plan = plan_graph(graph, facts)
        self.random = plan.final_rng is not None
        if plan.final_rng is not None:
            plan = replace(plan, outputs=(*plan.outputs, Output(kind="saved", name=plan.final_rng)))
        specs = {f.fragment_id: encode(lower_fragment(graph, node_names=f.node_names, inputs=f.inputs,
                                                      outputs=f.outputs)) for f in plan.fragments}
        self.plan = plan
        binding = bind(session, plan, specs, [link], session.config.worker_compiler, session.config.timeout_s)
        self.bound: BoundProgram = binding.first
        names = [o.name for o in plan.outputs]
        self.returned = tuple([self.bound.return_names.index(n) for n in names[: len(recording.returned)]])
        kept = names[len(recording.returned):]
        self._order = tuple([kept.index(name) for name in self.bound.keep_names])

    def in_order(self, keeps: Sequence[Resident]) -> list[Resident]:
        """What the program keeps, in its own order."""
        return [keeps[i] for i in self._order]


MAX_STRUCTURES = 512


class Programs:
    """The programs of recordings that came before, by structure and worker."""

    def __init__(self) -> None:
        self.num_made = 0
        self._structures: dict[tuple[Any, ...], Structure] = {}

    def __contains__(self, recording: Recording) -> bool:
        return recording.key in self._structures

    def clear(self) -> None:
        """Forget all of them."""
        self._structures.clear()

    def find(self, session: Session, link: WorkerLink, recording: Recording) -> tuple[list[Any], Program]:
        """The values of its number inputs, and the program itself. Raises: PlanError, WorkerError."""
        structure = self._structures.get(recording.key)
        if structure is None:
            if len(self._structures) >= MAX_STRUCTURES:
                self._structures.clear()
            structure = self._structures[recording.key] = Structure()
        variant, numbers = structure.variant(recording)
        program = variant.programs.get(link.key)
        if program is None:
            program = variant.programs[link.key] = Program(session, link, variant, recording)
            self.num_made += 1
        return numbers, program
