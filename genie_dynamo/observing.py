"""What nodes of placed graphs take on their workers: timed now and then, kept, and read by the next estimates.

    placed graph --watch--> asked to time its next runs --later--> rows --> Parquet per kind of machine
                                                                    `-----> the worker's fit, from the next plan on

All of it happens in a thread of its own. A call is not touched: the worker puts timed steps in a plan's place for five
runs (runtime/step_times.py), and this thread fetches what they took. A graph is timed once on each worker, and again
where it was placed anew. Inductor's code has no ops to time: there the fragments of a worker are timed as a whole, and
correct the estimates of their own graph alone.
"""
from __future__ import annotations

import logging
import statistics
import threading
import time
import weakref
from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from genie_dynamo import worker_facts
from genie_dynamo.core.errors import CostError, GenieError
from genie_dynamo.observed import keep
from genie_dynamo.passes.costs.analysis import analyze_costs
from genie_dynamo.passes.costs.observe import observations
from genie_dynamo.runtime.client.remote_graph import RemoteGraph
from genie_dynamo.runtime.client.session import Session

if TYPE_CHECKING:
    from torch import fx

log = logging.getLogger(__name__)

WAITS_S = (2.0, 2.0, 4.0, 8.0, 15.0, 30.0, 60.0)
"""Pauses between two looks at a graph that has not run since; after the last one it is given up."""

LOOKS = 3
"""Looks whose median counts, where fragments are timed as a whole."""

MAX_NODES = 50_000
"""Larger graphs are not timed: what is asked of a worker has to be quick to say."""


class Observed(Protocol):
    """What is needed of a placed graph (placed.PlacedGraph)."""

    @property
    def current(self) -> RemoteGraph: ...

    @property
    def over(self) -> fx.GraphModule: ...

    @property
    def as_a_whole(self) -> bool: ...

    def sizes(self) -> dict[str, int] | None: ...

    def learn(self, seconds: Mapping[str, float], facts: worker_facts.Facts) -> None: ...


class _Watch:
    """The graphs of one session that are still to be timed, and the thread that does it while there are some."""

    def __init__(self, session: Session) -> None:
        self.graphs: weakref.WeakKeyDictionary[RemoteGraph, weakref.ref[Observed]] = weakref.WeakKeyDictionary()
        self.thread: threading.Thread | None = None
        self.session = weakref.ref(session)


_watches: weakref.WeakKeyDictionary[Session, _Watch] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def watch(session: Session, graph: Observed) -> None:
    """Time the nodes of a graph where it runs now, when there is time for it."""
    if not session.config.observe or len(graph.over.graph.nodes) > MAX_NODES:
        return
    with _lock:
        watch = _watches.setdefault(session, _Watch(session))
        watch.graphs[graph.current] = weakref.ref(graph)
        if watch.thread is None:
            watch.thread = threading.Thread(target=_follow, args=(watch,), name="genie-observe", daemon=True)
            watch.thread.start()


def _follow(watch: _Watch) -> None:
    looks = 0
    while True:
        time.sleep(WAITS_S[min(looks, len(WAITS_S) - 1)])
        session = watch.session()
        with _lock:
            graphs = [(current, ref()) for current, ref in watch.graphs.items()]
            if session is None or session.closed or not graphs or looks >= len(WAITS_S):
                watch.thread = None
                watch.graphs.clear()
                return
        done = False
        for current, graph in graphs:
            if graph is None or graph.current is not current or look(session, graph):
                with _lock:
                    watch.graphs.pop(current, None)
                done = True
        looks = 0 if done else looks + 1
        del session, graphs


_whole_seconds: weakref.WeakKeyDictionary[RemoteGraph, list[dict[str, float]]] = weakref.WeakKeyDictionary()


def _look_at_whole(session: Session, graph: Observed, facts: worker_facts.Facts) -> bool:
    """Note what the last call took on each worker; after LOOKS looks the medians correct the graph's estimates."""
    found = graph.current.measured_s(session)
    seen = _whole_seconds.setdefault(graph.current, [])
    if found and found not in seen:              # it has run since the last look
        seen.append(found)
    if len(seen) <= LOOKS:
        return False
    del seen[0]                                  # the first call may have waited for the compiler
    workers = {name for each in seen for name in each}
    try:
        graph.learn({name: statistics.median(each[name] for each in seen if name in each) for name in workers}, facts)
    except CostError as error:
        log.info("whole fragments cannot be compared with estimates: %s", error)
        return True
    session.telemetry.event("fragments timed")
    return True


def look(session: Session, graph: Observed) -> bool:
    """Fetch what a graph's nodes took since the last look, and have the next runs timed.

    Returns: whether the graph is done with: its times are kept, or it cannot be timed.
    """
    facts = worker_facts.facts_of(session)
    sizes = graph.sizes()
    if graph.as_a_whole:
        return facts is not None and sizes is not None and _look_at_whole(session, graph, facts)
    try:
        asked = graph.current.node_seconds(session)
    except GenieError as error:
        log.info("nodes of a graph could not be timed: %s", error)
        return True
    seconds = {worker: times for worker, times in asked.items() if times}
    if facts is None or sizes is None or not seconds:
        return False
    costs = analyze_costs(graph.over)
    for worker in facts.workers:
        if worker.name in seconds:
            try:
                rows = observations(costs, sizes, seconds[worker.name], model=graph.current.plan.graph_id[:12],
                                    hardware=worker.hardware)
            except CostError as error:
                log.info("observed times cannot be used: %s", error)
                return True
            worker_facts.observed(session, worker.name, rows)
            keep(worker.hardware, rows)
            session.telemetry.event("nodes timed")
    # A cut graph runs on all of its workers; one that any worker may run, on the one that was free.
    return len(seconds) == len(asked) or graph.current.plan.num_workers == 1
