"""Plans: who runs what, what moves when, what stays. Frozen values, printable, verifiable.

A plan speaks of one ATen graph by node names. Values are named by the node that makes them; the generator state
of random ops is a value too, named RNG_STATE at entry and `rng@<fragment id>` after each fragment that draws from it.
"""
from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from genie_dynamo.core.errors import PlanError
from genie_dynamo.core.rebuild import Rebuild, Step, recipe_problems

RNG_STATE = "rng@entry"


def rng_after(fragment_id: int) -> str:
    """The name of the generator state that a fragment leaves behind."""
    return f"rng@{fragment_id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fragment:
    """Nodes that run as one unit on one worker."""

    fragment_id: int
    worker: int                      # index into the workers the plan is bound to
    node_names: tuple[str, ...]      # topological order
    inputs: tuple[str, ...]          # value names it takes from outside, in order
    outputs: tuple[str, ...]         # value names others need
    rng_in: str | None = None        # the generator state it starts from, where it draws random numbers


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """Where one output of the graph comes from.

    value    computed by a fragment, returned to the caller
    saved    computed by a fragment, stays on its worker; the caller gets a placeholder (training)
    input    is the graph's own input `index`
    literal  None or a number fixed at compile time
    """

    kind: Literal["value", "saved", "input", "literal"]
    name: str = ""
    index: int = -1
    literal: int | float | bool | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardFacts:
    """What Dynamo and the shape environment promised when the graph was captured."""

    guards: tuple[tuple[str, str, str], ...] = ()      # (source, kind, code)
    ranges: tuple[tuple[str, str, str], ...] = ()      # (symbol, source, range)
    expression: str = ""

    def __str__(self) -> str:
        rows = [f"{kind:<24} {source}" for source, kind, _ in self.guards]
        rows += [f"{symbol} = {source} in {bounds}" for symbol, source, bounds in self.ranges]
        return "\n".join([*rows, self.expression] if self.expression else rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A graph's fragments, and how values reach them."""

    graph_id: str
    inputs: tuple[str, ...]                       # placeholder names, in order
    static_inputs: tuple[int, ...]                # positions of parameters and buffers
    outputs: tuple[Output, ...]
    mutations: tuple[tuple[int, str], ...]        # (input position, value that it becomes)
    fragments: tuple[Fragment, ...]
    num_workers: int
    aliases: tuple[tuple[str, ...], ...] = ()     # groups of returned values that share memory
    input_views: tuple[tuple[str, str], ...] = () # (returned value, input whose memory it is a view of)
    state: tuple[str, ...] = ()                   # outputs and new contents of inputs that may stay under a handle too
    rebuilds: tuple[Rebuild, ...] = ()            # those of them that the caller makes itself, from rows that travel
    stays: tuple[int, ...] = ()                   # mutated inputs whose new content stays on its worker alone
    guards: GuardFacts = field(default_factory=GuardFacts)

    def producer(self, value: str) -> Fragment | None:
        """The fragment that makes a value; None for inputs and the entry state of the generator."""
        for fragment in self.fragments:
            if value in fragment.outputs or (fragment.rng_in and value == rng_after(fragment.fragment_id)):
                return fragment
        return None

    @property
    def final_rng(self) -> str | None:
        """The last generator state of the plan, or None where nothing is drawn."""
        last = [f for f in self.fragments if f.rng_in]
        return rng_after(last[-1].fragment_id) if last else None

    def returned_values(self) -> tuple[str, ...]:
        """Value names that come back to the caller, each once: outputs, new contents of mutated inputs, the rng.

        Of a value that the caller rebuilds only the pieces come back. A generator state that is among the saved values
        stays on its worker.
        """
        names = [o.name for o in self.outputs if o.kind == "value"]
        names += [name for index, name in self.mutations if index not in self.stays]
        rebuilt = {recipe.value for recipe in self.rebuilds}
        names = [name for name in names if name not in rebuilt]
        names += [piece for recipe in self.rebuilds for piece in recipe.names("piece")]
        if self.final_rng and self.final_rng not in self.saved_values():
            names.append(self.final_rng)
        return tuple(dict.fromkeys(names))

    def saved_values(self) -> tuple[str, ...]:
        """Value names that stay on their workers, each once."""
        return tuple(dict.fromkeys(o.name for o in self.outputs if o.kind == "saved"))

    def to_json(self) -> str:
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan behind `to_json`.

        Raises: PlanError where fields are missing or unknown.
        """
        try:
            data: dict[str, Any] = json.loads(text)
            data["fragments"] = tuple(Fragment(**_tuples(f)) for f in data["fragments"])
            data["outputs"] = tuple(Output(**o) for o in data["outputs"])
            data["guards"] = GuardFacts(**_tuples(data["guards"]))
            data["rebuilds"] = tuple(
                Rebuild(value=r["value"], steps=tuple(Step(**_tuples(step)) for step in r["steps"]))
                for r in data["rebuilds"])
            for name in ("inputs", "static_inputs", "mutations", "aliases", "input_views", "state", "stays"):
                data[name] = _tuple(data[name])
            return cls(**data)
        except (TypeError, KeyError, ValueError) as exc:
            raise PlanError(f"not a plan: {exc}") from exc

    def __str__(self) -> str:
        broken = {problem.fragment_id: problem.message for problem in find_problems(self)}
        lines = [f"plan {self.graph_id[:12]}: {len(self.fragments)} fragment(s) on {self.num_workers} worker(s)"]
        lines.append(f"{'fragment':>8} {'worker':>6} {'nodes':>6} {'in':>4} {'out':>4}")
        for f in self.fragments:
            note = f"  <- {broken[f.fragment_id]}" if f.fragment_id in broken else ""
            lines.append(
                f"{f.fragment_id:>8} {f.worker:>6} {len(f.node_names):>6} {len(f.inputs):>4} {len(f.outputs):>4}{note}"
            )
        lines += [f"{recipe.value} is rebuilt by the caller: {recipe}" for recipe in self.rebuilds]
        lines += [f"plan: {p.message}" for p in find_problems(self) if p.fragment_id is None]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class Problem:
    """One broken rule; `fragment_id` None where it is the plan's as a whole."""

    fragment_id: int | None
    message: str


def find_problems(plan: Plan, node_inputs: dict[str, tuple[str, ...]] | None = None) -> list[Problem]:
    """Every rule the plan breaks. With `node_inputs` (node -> names it reads) coverage and flow are checked."""
    problems: list[Problem] = []
    available = {*plan.inputs, RNG_STATE}
    seen_nodes: set[str] = set()
    ids = [f.fragment_id for f in plan.fragments]
    if len(set(ids)) != len(ids):
        problems.append(Problem(None, f"fragment ids repeat: {ids}"))
    for f in plan.fragments:
        if not 0 <= f.worker < plan.num_workers:
            problems.append(Problem(f.fragment_id, f"worker {f.worker} of {plan.num_workers} does not exist"))
        problems += [Problem(f.fragment_id, f"input {v} is made later or never")
                     for v in f.inputs if v not in available]
        if f.rng_in and f.rng_in not in available:
            problems.append(Problem(f.fragment_id, f"generator state {f.rng_in} is made later or never"))
        inside = set(f.node_names)
        problems += [Problem(f.fragment_id, f"node {n} is in two fragments") for n in inside & seen_nodes]
        problems += [Problem(f.fragment_id, f"output {v} is none of its nodes") for v in f.outputs if v not in inside]
        if node_inputs is not None:
            problems += _flow_problems(f, node_inputs)
        seen_nodes |= inside
        available |= set(f.outputs)
        if f.rng_in:
            available.add(rng_after(f.fragment_id))
    problems += [Problem(None, f"output {o.name} is made by no fragment")
                 for o in plan.outputs if o.kind in ("value", "saved") and o.name not in available]
    for group in plan.aliases:
        homes = {f.worker for f in plan.fragments if set(group) & set(f.outputs)}
        if len(homes) > 1:
            problems.append(Problem(None, f"outputs {', '.join(group)} share memory but are made on workers "
                                          f"{sorted(homes)}; put them on one"))
    problems += [Problem(None, f"output {o} names no input") for o in plan.outputs
                 if o.kind == "input" and not 0 <= o.index < len(plan.inputs)]
    problems += [Problem(None, f"mutation of input {i} takes {v}, which no fragment makes")
                 for i, v in plan.mutations if v not in available or not 0 <= i < len(plan.inputs)]
    problems += [Problem(None, message) for message in _state_problems(plan)]
    kept = {i for i, _ in plan.mutations} & {*plan.static_inputs}
    problems += [Problem(None, f"input {i} is to stay on a worker, but is no parameter that the graph changes")
                 for i in plan.stays if i not in kept]
    if node_inputs is not None:
        problems += [Problem(None, f"node {n} is in no fragment") for n in node_inputs if n not in seen_nodes]
    return problems


def _state_problems(plan: Plan) -> Iterator[str]:
    """What is wrong with the values that stay under handles, and with the recipes for some of them."""
    made = {v for f in plan.fragments for v in f.outputs}
    becomes = dict(plan.mutations)
    comes_back = {o.name for o in plan.outputs if o.kind == "value"} | set(becomes.values())
    shared = {v for group in plan.aliases if len(group) > 1 for v in group} | {v for v, _ in plan.input_views}
    for name in plan.state:
        if name not in made or name not in comes_back:
            yield f"{name} is to stay under a handle, but is no output of a fragment that the caller gets"
    for recipe in plan.rebuilds:
        yield from recipe_problems(recipe)
        if recipe.value not in plan.state:
            yield f"{recipe.value} is rebuilt by the caller, but does not stay under a handle"
        if recipe.value in shared:
            yield f"{recipe.value} is rebuilt by the caller, but shares memory with another value"
        for name in recipe.names("piece"):
            if name not in made:
                yield f"{recipe.value} is rebuilt from {name}, which no fragment makes"
        for name in recipe.names("input"):
            if name not in plan.inputs:
                yield f"{recipe.value} is rebuilt from {name}, which is no input"
            elif becomes.get(plan.inputs.index(name), recipe.value) != recipe.value:
                yield f"{recipe.value} is rebuilt from {name}, which the call overwrites with another value"


def _flow_problems(fragment: Fragment, node_inputs: dict[str, tuple[str, ...]]) -> list[Problem]:
    have = set(fragment.inputs)
    found: list[Problem] = []
    for name in fragment.node_names:
        if name not in node_inputs:
            found.append(Problem(fragment.fragment_id, f"node {name} is not in the graph"))
            continue
        found += [Problem(fragment.fragment_id, f"node {name} reads {v}, which it does not have")
                  for v in node_inputs[name] if v not in have]
        have.add(name)
    return found


def verify_plan(plan: Plan, node_inputs: dict[str, tuple[str, ...]] | None = None) -> None:
    """Check every rule; see find_problems.

    Raises: PlanError that lists each broken rule.
    """
    problems = find_problems(plan, node_inputs)
    if problems:
        rows = "; ".join(f"fragment {p.fragment_id}: {p.message}" if p.fragment_id is not None else p.message
                         for p in problems[:10])
        raise PlanError(f"plan {plan.graph_id[:12]} breaks {len(problems)} rule(s): {rows}", problems=problems)


def _tuple(value: Any) -> Any:
    return tuple(_tuple(v) for v in value) if isinstance(value, list) else value


def _tuples(data: dict[str, Any]) -> dict[str, Any]:
    return {key: _tuple(value) for key, value in data.items()}
