"""A graph that is placed by cost: on one worker until there are several and they are known, then where it is fastest.

The plan is made between two calls, never within one: when facts about the workers have come, and when a worker has
joined or left. A forward graph says where each of its values is made; the backward graph follows.
"""
from __future__ import annotations

import contextlib
import logging
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from genie_dynamo import observing, worker_facts
from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import CostError, PlacementError, PlanError, UnsupportedGraphError, WorkerLostError
from genie_dynamo.core.hardware import LinkFacts
from genie_dynamo.parts import Parts, rows_for_backward
from genie_dynamo.passes.costs.symbols import SymbolBinding
from genie_dynamo.passes.crossing import crossed
from genie_dynamo.passes.drift import Drift, Membership
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.following import Homes, follow
from genie_dynamo.passes.held import Held, held_inputs
from genie_dynamo.passes.partition import Partition, WorkerFacts, check_prices, partition, price
from genie_dynamo.passes.pipelining import pipeline_partition
from genie_dynamo.passes.placement.interfaces import Limits
from genie_dynamo.passes.planning import Assign
from genie_dynamo.passes.rows.split import SplitGraph
from genie_dynamo.passes.semantics.carry import marked
from genie_dynamo.placing import no_long_pauses, planner
from genie_dynamo.runtime.client.remote_graph import RemoteGraph
from genie_dynamo.runtime.client.saved import beside, keep_beside
from genie_dynamo.runtime.client.session import Session

log = logging.getLogger(__name__)

TIME_LIMIT_S: float | None = 0.5
"""What planning one graph may take of the call that it happens before."""

Build = Callable[[fx.GraphModule, Assign, Sequence[str], SplitGraph | None], RemoteGraph]
"""`build(graph, node -> worker, names of workers, parts of the batch that the graph is over)`."""


class PlacedGraph:
    """Boxed callable: the graph on whatever workers it is placed on now.

    Args:
        anywhere: the graph as it runs on any one worker.
        parts: the graph over parts of its batch, where that is wanted and possible.
        build: makes a graph (this one, or that over parts) for an assignment of its nodes to named workers.
    """

    def __init__(self, gm: fx.GraphModule, facts: GraphFacts, config: Config, label: str, homes: Homes,
                 get_session: Callable[[], Session], anywhere: RemoteGraph, parts: Parts, build: Build) -> None:
        self._boxed_call = True
        self.gm, self.facts, self.label = gm, facts, label
        self.observed = False                             # symbol_values are those of the last call
        self.symbol_values: Mapping[str, int] = {}
        self._config, self._homes = config, homes
        self._lock = threading.Lock()
        self._workers: tuple[str, ...] = ()               # that `current` needs; empty: any will do
        self._get_session, self._build = get_session, build
        self.parts = parts
        self._anywhere = self._current = anywhere
        self._key: Any = None
        self._symbols = SymbolBinding(gm)
        self._drift, self._membership = Drift(time.monotonic), Membership(time.monotonic)
        self._found: Partition | None = None
        self._priced_with: worker_facts.Facts | None = None
        self._unpriced = config.policy == "min_cost"      # whether prices are still to be looked for
        self._unwatched = config.observe and not self._symbols.names     # with one worker; placing watches with several
        self._held: Held | None = None                    # where the state of the call lay that was priced
        self._sizes_seen: set[tuple[tuple[str, int], ...]] = set()
        self._over = gm                                   # what `current` runs
        self._num_results = len(anywhere.plan.outputs)
        self._learnt = False                              # what whole fragments take, since it was planned
        # Of a backward: the graph, and the forward whose copies it takes. One value: other threads call meanwhile.
        self._following: tuple[RemoteGraph, object] = (anywhere, None)
        self._asked_backward: fx.GraphModule | None = None            # of a forward: the backward it was planned for
        if facts.kind == "backward":
            homes.backward = gm

    @property
    def found(self) -> Partition | None:
        """What `current` goes by; None where the graph was not placed."""
        return self._found

    @property
    def over(self) -> fx.GraphModule:
        """The graph that `current` runs: this one, or what runs in its place."""
        return self._over

    @property
    def workers(self) -> tuple[str, ...]:
        """Names of those that `current` needs; none where any one will do."""
        return self._workers

    def sizes(self) -> dict[str, int] | None:
        """Values of the symbols in all calls since this was last asked; None where they differed, or are unknown."""
        if not self._symbols.names:
            return {}
        self.observed = True
        seen, self._sizes_seen = self._sizes_seen, set()
        return dict(next(iter(seen))) if len(seen) == 1 else None

    @property
    def as_a_whole(self) -> bool:
        """Whether workers run fragments as one piece of code, whose ops cannot be timed."""
        return self._config.worker_compiler == "inductor"

    def learn(self, seconds: Mapping[str, float], facts: worker_facts.Facts) -> None:
        """What the fragments of each worker take as a whole: estimates of this graph there are corrected by it.

        Raises: CostError.
        """
        costs, _ = price(self._over, self.facts, facts.workers, facts.lanes, self.symbol_values)
        est_s = {node.id: node.seconds for node in costs.nodes}
        plan = self._current.plan
        ratios: dict[str, float] = {}
        for name, measured_s in seconds.items():
            mine = [f for f in plan.fragments if plan.num_workers == 1 or self.workers[f.worker] == name]
            whole_s = sum(est_s[n].get(name) or 0.0 for f in mine for n in f.node_names if n in est_s)
            if whole_s > 0:
                ratios[name] = measured_s / whole_s
        for worker in facts.workers if ratios else ():
            # What the compiler wins it wins elsewhere too: a worker that has not run it is no slower for that.
            self._drift.learn(worker.name, ratios.get(worker.name, statistics.median(ratios.values())))
        self._learnt = bool(ratios)

    @property
    def current(self) -> RemoteGraph:
        """The graph as it is placed now."""
        return self._current

    def __call__(self, args: list[Any]) -> tuple[Any, ...]:
        session = self._get_session()
        if self.parts.refusal:
            self.refused(self.parts.refusal)
        if (len(session.links) > 1 or self._unpriced) and self._lock.acquire(blocking=False):
            try:
                self._place(session, args)
            finally:
                self._lock.release()
        elif self._unwatched:
            self._unwatched = False
            observing.watch(session, self)
        if self.observed:
            self.symbol_values = self._symbols(args)
            if len(self._sizes_seen) < 2:
                self._sizes_seen.add(tuple(self.symbol_values.items()))
        if self.facts.kind == "backward":
            return self._run_backward(args)
        if self._found is None or self.symbol_values:
            # What a call of other sizes takes says nothing of the estimate.
            current = self._current
            return self._results(current, current(args))
        current = self._current
        values = list(args) if current is not self._anywhere else []
        try:
            outputs = current(args)
            self._drift.observe(current.measured_s(session))
            return self._results(current, outputs)
        except WorkerLostError as error:
            # One worker of the cut is gone and was not replaced: the others can run the graph whole.
            if self._config.on_worker_loss == "error" or current is self._anywhere:
                raise
            log.warning("%s was cut over %s and runs whole now: %s", self.label, ", ".join(self._workers), error)
            self._make_whole()
            return self._current(values)

    def _results(self, current: RemoteGraph, outputs: tuple[Any, ...]) -> tuple[Any, ...]:
        """What the caller gets. Copies of activations, which come after it, live as long as the activations."""
        if len(outputs) > self._num_results:
            keep_beside(outputs[:self._num_results], current, outputs[self._num_results:])
            return outputs[:self._num_results]
        return outputs

    def _run_backward(self, args: list[Any]) -> tuple[Any, ...]:
        current, follows = self._following
        if follows is None:
            return current(args)
        copies = beside(args, follows)
        if copies is None:
            # Of a forward under another plan, or one whose activations came here: it reads them where they are.
            return self._anywhere(args)
        args.extend(copies)
        return current(args)

    def refused(self, reason: str) -> None:
        """Count a call whose batch was to be cut and was not."""
        self._get_session().telemetry.event(f"microbatches not used: {reason}")

    def _settle_backward(self) -> None:
        """The backward was compiled after the forward was cut: what it reads elsewhere is decided now."""
        facts, found = self._priced_with, self._found
        assert facts is not None and found is not None
        try:
            found = self._crossed(found, self._corrected(facts), facts.lanes)
            if found.crossings is not None:
                self._settle(found)
                self._found = found
        except (CostError, PlanError, UnsupportedGraphError) as error:
            log.info("%s: what its backward reads on another worker comes through the client: %s", self.label, error)

    def _make_whole(self) -> None:
        self._found = None
        self._current, self._workers, self._over = self._anywhere, (), self.gm
        self._homes.clear()

    def price(self, facts: worker_facts.Facts) -> Partition:
        """What placement says of this graph for the sizes of the last observed call.

        Raises: PlacementError, CostError.
        """
        if self._priced_with is not None and facts.workers != self._priced_with.workers:
            # What was measured against older estimates says nothing of the present ones.
            self._drift.slowness.clear()
        self._priced_with = facts
        limits = Limits(time_limit_s=TIME_LIMIT_S, latency_bound_s=self._config.latency_bound_s)
        workers = self._corrected(facts)
        with no_long_pauses(TIME_LIMIT_S):
            if self.parts.split is not None:
                return pipeline_partition(self.gm, self.facts, self.parts.split, workers, facts.lanes,
                                          self._config.policy, planner(), limits,
                                          aware=self._config.awareness == "full")
            found = partition(self.gm, self.facts, workers, facts.lanes, self._config.policy,
                              planner(), limits, aware=self._config.awareness == "full",
                              symbol_values=self.symbol_values, held=self._held)
            return self._crossed(found, workers, facts.lanes)

    def _corrected(self, facts: worker_facts.Facts) -> list[WorkerFacts]:
        """The workers with what was measured of this graph."""
        return [replace(w, slowness=self._drift.slowness.get(w.name, 1.0)) for w in facts.workers]

    def _crossed(self, found: Partition, workers: Sequence[WorkerFacts], lanes: Sequence[LinkFacts]) -> Partition:
        """The placement with what the backward reads elsewhere brought there, where the backward is known."""
        backward = self._asked_backward = self._homes.backward
        if (self.facts.kind != "forward" or backward is None or len(found.workers) < 2 or found.split is not None
                or self._config.awareness != "full"):
            return found
        return crossed(found, self.gm, self.facts, backward, workers, lanes, self.symbol_values)

    def _place(self, session: Session, args: Sequence[Any]) -> None:
        if self._unpriced:
            # Also with one worker, where nothing is chosen: what was asked for cannot be known to hold.
            check_prices({link.name: session.prices.get(link.name) for link in session.links if not link.lost})
            self._unpriced = False
            if len(session.links) == 1:
                return
        if self.facts.kind == "backward":
            if self._key is not self._homes.of_value:
                self._key = self._homes.of_value
                try:
                    self._follow()
                except (PlanError, UnsupportedGraphError) as error:
                    log.info("%s runs whole on one worker: %s", self.label, error)
                    self._current, self._over, self._workers = self._anywhere, self.gm, ()
                    self._following = self._anywhere, None
                observing.watch(session, self)
            return
        key = worker_facts.incarnations(session)
        again = key == self._key
        if again and self._found is not None and self._homes.backward is not self._asked_backward:
            self._settle_backward()
        learnt, self._learnt = self._learnt, False
        if again and not (self._found is not None and (learnt or self._drift.due())):
            return
        if not set(self._workers) <= {link.name for link in session.links if not link.lost}:
            self._make_whole()
        if not again and not self._membership.settled(key):
            return                  # the present plan goes on: a new incarnation takes its part over
        facts = worker_facts.facts_of(session)
        if facts is None:
            return
        self._key = key
        self.symbol_values = self._symbols(args)
        self._held = self._where_state_is(session, args) if self._config.awareness == "full" else None
        try:
            found = self.price(facts)
            if again:
                self._plan_again(session, found)
            else:
                self._settle(found)
                self._note(found, changed=True)
            observing.watch(session, self)
        except (CostError, PlanError, UnsupportedGraphError) as error:
            log.info("%s cannot be priced or cut, and stays on one worker: %s", self.label, error)
            self._make_whole()
        except PlacementError as error:
            log.warning("%s has no placement under %s by estimate, and runs whole on one worker: %s", self.label,
                        self._config.policy, error)
            self._make_whole()

    def _where_state_is(self, session: Session, args: Sequence[Any]) -> Held | None:
        """Caches and other state among the arguments that workers hold; parameters go to where they are read."""
        names = {link.key: link.name for link in session.links if not link.lost}
        static = set(self.facts.static_inputs)
        worker_of: dict[str, str] = {}
        placeholders = [node for node in self.gm.graph.nodes if node.op == "placeholder"]
        for index, (node, value) in enumerate(zip(placeholders, args, strict=True)):
            entry = session.residency.find(value) if index not in static and isinstance(value, torch.Tensor) else None
            if entry is not None and not entry.barred:
                worker_of.update((node.name, names[key]) for key in list(entry.acked)[:1] if key in names)
        if not worker_of:
            return None
        semantics = marked(self.gm)
        phase = semantics.phase if semantics is not None else ""
        if semantics is not None and semantics.phase_rule is not None:
            with contextlib.suppress(KeyError):          # a size that is none of this graph's symbols
                phase = semantics.phase_at(self.symbol_values)
        return held_inputs(self.gm, worker_of, phase)

    def _plan_again(self, session: Session, found: Partition) -> None:
        """The same workers, and measured times that say otherwise than the estimates did."""
        before = self._found
        assert before is not None
        same = found.workers == before.workers and found.assign == before.assign and found.pinned == before.pinned
        changed = not same and self._drift.better(found.est_s, self._drift.present_s(before.est_s))
        if changed:
            log.info("%s is placed anew: estimated were %s, measured %s times that; now %.3g ms on %s", self.label,
                     f"{before.est_s * 1e3:.3g} ms", max(self._drift.ratios().values(), default=1.0),
                     found.est_s * 1e3, ", ".join(found.workers))
            session.telemetry.event("plan made anew: measured costs differ from estimates")
            self._settle(found)
        self._note(found if changed or same else replace(before, est_s=self._drift.present_s(before.est_s)),
                   changed=changed)

    def _note(self, found: Partition, *, changed: bool) -> None:
        """Remember what the plan is estimated to take on each worker."""
        self._found = found
        seconds: dict[str, float] = {}
        if len(found.workers) > 1:
            inside = self._current.plan
            for fragment in inside.fragments:
                worker = found.workers[fragment.worker]
                seconds[worker] = seconds.get(worker, 0.0) + sum(found.seconds.get(n, 0.0) for n in fragment.node_names)
        else:
            seconds = {a.name: a.est_s for a in found.alternatives if a.est_s is not None}
        self._drift.planned(seconds, changed=changed)

    def _settle(self, found: Partition) -> None:
        """Go by a partition from now on."""
        if len(found.workers) > 1:
            cut = self._build(found.over(self.gm), lambda node: found.assign.get(node.name, 0), found.workers,
                              found.split)
            log.info("%s is cut over %s: %.3g ms estimated", self.label, ", ".join(found.workers), found.est_s * 1e3)
            self._current, self._workers, self._over = cut, found.workers, found.over(self.gm)
            self._homes.forward = cut            # before the rest: a backward that sees the rest follows this one
            self._homes.settle(found, self.gm, aware=self._config.awareness == "full")
            if found.split is not None:
                self._homes.rows = rows_for_backward(found.split, self.facts)
            return
        self._make_whole()
        if found.pinned:
            self._current, self._workers = self._build(self.gm, lambda node: 0, found.workers, None), found.workers

    def _follow(self) -> None:
        """A backward graph runs where the activations are that it reads. Raises: PlanError."""
        workers, found = self._homes.workers, self._homes.found
        current, over, follows = self._anywhere, self.gm, None
        if len(workers) > 1 and found is not None and found.crossings is not None:
            crossing: Mapping[str, int] = found.crossings.assign
            follows, over = self._homes.forward, found.crossings.backward
            current = self._build(over, lambda node: crossing[node.name], workers, None)
        elif len(workers) > 1:
            assign = follow(self.gm, self._homes)
            split = self.parts.of_backward(self.gm, self.facts, self._homes.rows, self._config.microbatches)
            if split is None:
                current = self._build(self.gm, lambda node: assign[node.name], workers, None)
            else:
                origin, over = split.origin, split.gm
                current = self._build(over, lambda node: assign[origin[node.name]], workers, split)
        self._current, self._over, self._workers = current, over, workers
        self._following = current, follows
