"""A plan bound to the workers of a session: each worker's program, loaded, and how arguments map to it."""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import LaneUnavailableError
from genie_dynamo.core.plan import RNG_STATE, Output, Plan
from genie_dynamo.core.program import WorkerProgram, static_updates, value_ids, worker_programs
from genie_dynamo.core.stencil import Streak
from genie_dynamo.runtime.client.connection import Connection
from genie_dynamo.runtime.client.prepared import Prepared
from genie_dynamo.runtime.client.residency import Seen
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.workers import WorkerLink

RNG_ARGUMENT = -1
SETTLED_CALLS = 8
"""Calls in a row that must have found the parameters unchanged before one is begun without looking first."""


class Template:
    """References to the resident parameters of a program, and the look at them for which they hold.

    Once a call with `number` has succeeded (`known`), the worker remembers them and only the others are sent. `held`
    counts the calls since then that found them unchanged.
    """

    __slots__ = ("has_references", "held", "known", "number", "others", "prepared", "references", "seen", "streak")

    def __init__(self, seen: Seen | None, references: list[Any], arguments: Sequence[int], number: int) -> None:
        self.seen = seen
        self.references = references
        self.others = tuple((slot, index) for slot, index in enumerate(arguments) if references[slot] is None)
        self.has_references = len(self.others) < len(references)
        self.number = number
        self.known = False
        self.held = 0
        self.prepared: Prepared | None = None      # once calls look alike
        self.streak = Streak()

    def forget_prepared(self) -> None:
        """A call did not look like those before it."""
        self.prepared = None
        self.streak.ended()


class BoundProgram:
    """One worker's program of a bound plan."""

    def __init__(self, plan: Plan, link: WorkerLink, program: WorkerProgram, names: dict[int, str]) -> None:
        index_of = {name: index for index, name in enumerate(plan.inputs)}
        self.link = link
        self.program = program
        self.arguments = tuple(
            RNG_ARGUMENT if names[v] == RNG_STATE else index_of[names[v]] for v in program.inputs)
        self.return_names = tuple(names[v] for v in program.returns)
        self.view_sources = {program.returns.index(v): index_of[names[source]] for v, source in program.input_views}
        """Index of a returned value -> position of the input that it may be a view of."""
        self.keep_names = tuple(names[v] for v in program.keeps)
        updates = [position for position, _ in static_updates(plan, {*self.keep_names})]
        self.num_saved = len(self.keep_names) - len(updates)
        self.keep_updates = dict(enumerate(updates, self.num_saved))
        """Index of a kept value -> position of the parameter or buffer that it becomes. The others are activations."""
        self.state_names = tuple(names[v] for v in program.state)
        """Values that stay on the worker where a call wants it."""
        self.num_fragments = len(program.fragments)
        self.last_compute_s: float | None = None       # what the worker reported of its last run
        self.outputs = tuple(self._output(output) for output in plan.outputs)
        """What each output is, as steady calls want it: a value by name, an argument by position, or a literal."""
        self.plain = (len(plan.fragments) == len(program.fragments) and RNG_ARGUMENT not in self.arguments
                      and not (self.keep_names or program.aliases or program.input_views))
        """Nothing but arguments goes up, and nothing but separate tensors and numbers comes down."""
        self.template = Template(None, [None] * len(self.arguments), self.arguments, 0)


    def _output(self, output: Output) -> tuple[str, Any]:
        if output.kind == "value":
            return "value", output.name
        return output.kind, output.index if output.kind == "input" else output.literal


class Binding:
    """The bound programs, by worker index of the plan."""

    def __init__(self, programs: dict[int, BoundProgram], program_id: int) -> None:
        self.programs = programs
        self.program_id = program_id
        self.links = tuple(bound.link for bound in programs.values())
        self.first = next(iter(programs.values()))

    def steady_template(self, seen: Seen | None) -> Template | None:
        """The only program's template, where it holds for what was seen and nothing else about a call is special."""
        template = self.first.template
        ready = self.first.plain and template.seen is seen and (
            template.known or not (template.number or template.has_references))
        return template if ready else None

    def settled_template(self) -> Template | None:
        """The only program's template, where it has held so often that a call may begin before the parameters are
        looked at."""
        template = self.first.template
        return template if self.first.plain and template.known and template.held >= SETTLED_CALLS else None

    @property
    def usable(self) -> bool:
        return not any([link.lost for link in self.links])


def bind(session: Session, plan: Plan, specs: dict[int, bytes], links: Sequence[WorkerLink], compiler: str,
         timeout_s: float, require_lane: str | None = None) -> Binding:
    """Number the plan's programs and load each on its worker.

    Raises: LaneUnavailableError, what a worker reports when it refuses a fragment, or WorkerError.
    """
    program_id = session.next_id()
    peers = tuple((link.address, _text(link.server_key), link.offers) for link in links)
    programs = worker_programs(plan, specs, program_id=program_id, peers=peers, compiler=compiler)
    names = {number: name for name, number in value_ids(plan).items()}
    bound: dict[int, BoundProgram] = {}
    for worker, program in programs.items():
        link = links[worker]
        if require_lane is not None and link.lane.name != require_lane:
            raise LaneUnavailableError(f"require_lane={require_lane!r}, and payload to worker {link.name} takes "
                                       f"{link.lane}", lane=require_lane, worker=link.name)
        with link.connection() as connection:
            _load(session, connection, link, program, timeout_s)
        bound[worker] = BoundProgram(plan, link, program, names)
    return Binding(bound, program_id)


def _load(session: Session, connection: Connection, link: WorkerLink, program: WorkerProgram, timeout_s: float) -> None:
    message = m.Load(connection.next_request(), program.to_wire())
    connection.ask(message, time.monotonic() + timeout_s)
    session.telemetry.moved(link.name, sent={"control": sum(len(f.spec) for f in program.fragments)})


def _text(key: bytes | None) -> str:
    return key.decode() if key is not None else ""
