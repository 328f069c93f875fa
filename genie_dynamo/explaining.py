"""`genie.explain`: run a call, and say where its graphs run and why."""
from __future__ import annotations

import contextlib
import itertools
import runpy
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

from genie_dynamo import backend, sessions, worker_facts
from genie_dynamo.core.errors import CostError, PlacementError, SessionError
from genie_dynamo.core.placement import Placement
from genie_dynamo.core.plan import Fragment, Plan
from genie_dynamo.explanation import CrossingRow, Explanation, FragmentRow, GraphPlan, Span
from genie_dynamo.passes.costs.sizes import hinted_bytes
from genie_dynamo.passes.partition import Partition
from genie_dynamo.passes.semantics.carry import marked
from genie_dynamo.placed import PlacedGraph
from genie_dynamo.runtime.client.session import Session

RUNS = 3
"""The first run loads and uploads, and a cut may come with the second; the last is what is reported as measured."""

_lock = threading.Lock()


def explain(model_or_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Where the graphs of one call run, what else was considered, and estimated against measured time.

    The call really runs, three times, on the workers of the default session: buffers and arguments that it changes are
    changed. The generator's state is put back.

    Args:    model_or_fn: a module or function, compiled or not.  args, kwargs: of the call.
    Raises:  what the call raises; SessionError where the workers cannot be measured.
    """
    session = sessions.session()
    worker_facts.facts_of(session, wait=True)
    with _lock, torch.random.fork_rng(devices=[]), Watch(session) as watch:
        compiled = torch.compile(_fresh(getattr(model_or_fn, "_orig_mod", model_or_fn)), backend="genie")
        for _ in range(RUNS):
            compiled(*args, **kwargs)
    return watch.explanation()


class Watch:
    """Keeps every graph that is compiled while it is open; afterwards says where they run.

    Args: session: whose workers count; None: the default session at the end.
    """

    def __init__(self, session: Session | None = None) -> None:
        self._session = session
        self._graphs: list[PlacedGraph] = []
        self._fallbacks: dict[str, int] = {}

    def __enter__(self) -> Watch:
        if self._session is not None:
            self._fallbacks = dict(self._session.telemetry.snapshot()["fallbacks"])
        backend.observers.append(self._add)
        return self

    def __exit__(self, *_: object) -> None:
        backend.observers.remove(self._add)

    def _add(self, graph: PlacedGraph) -> None:
        graph.observed = True
        self._graphs.append(graph)

    @property
    def has_graphs(self) -> bool:
        return bool(self._graphs)

    def explanation(self) -> Explanation:
        """The graphs that have run. Raises: SessionError where the workers cannot be measured."""
        session = self._session or sessions.session()
        facts = worker_facts.facts_of(session, wait=True)
        if facts is None:
            raise SessionError("the workers of this session could not be measured (see the log), so nothing can be "
                               "priced")
        after = session.telemetry.snapshot()["fallbacks"]
        return Explanation(
            graphs=tuple(_explain(graph, facts, session) for graph in self._graphs
                         if graph.current.measured_s(session)),
            workers=tuple(worker.name for worker in facts.workers), policy=sessions.default_config().policy,
            fallbacks=tuple(r for r, count in after.items() if count > self._fallbacks.get(r, 0)))


def explain_script(path: str, arguments: Sequence[str], *, quiet: bool = False) -> Explanation:
    """Run a script as `python path arguments...` would, and explain the graphs that it compiled for genie.

    Args:    quiet: what it prints goes to stderr.
    Raises:  what the script raises.
    """
    argv, sys.argv = sys.argv, [path, *arguments]
    sys.path.insert(0, str(Path(path).resolve().parent))
    try:
        with Watch() as watch, contextlib.redirect_stdout(sys.stderr) if quiet else contextlib.nullcontext():
            try:
                runpy.run_path(path, run_name="__main__")
            except SystemExit as leaving:
                if leaving.code not in (None, 0):
                    raise
            if not watch.has_graphs:
                return Explanation(graphs=(), workers=(), policy="")
            return watch.explanation()
    finally:
        sys.argv = argv
        sys.path.pop(0)


def _fresh(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own: what is compiled for it is neither taken from elsewhere nor left to others."""
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return call


def _explain(graph: PlacedGraph, facts: worker_facts.Facts, session: Session) -> GraphPlan:
    plan, measured = graph.current.plan, graph.current.measured_s(session)
    semantics = marked(graph.gm)
    partition: Partition | None = None
    unpriced = ""
    try:
        partition = graph.found or graph.price(facts)
    except (CostError, PlacementError) as error:
        unpriced = str(error)
    names = _worker_names(plan, graph.workers, measured)
    estimates = partition.seconds if partition is not None else {}
    region_of = {name: node_id for region in (semantics.regions if semantics else ())
                 for name in region.nodes for node_id in (region.region_id,)}
    by_worker: dict[int, float] = {}
    for fragment in plan.fragments:
        by_worker[fragment.worker] = by_worker.get(fragment.worker, 0.0) + _sum(estimates, fragment.node_names)
    if partition is not None:
        region_of.update((name, region_of[origin]) for name, origin in partition.origin.items() if origin in region_of)
    rows = tuple(_row(graph.over, plan, fragment, names, estimates, partition, region_of,
                      _share(measured.get(names[fragment.worker]), _sum(estimates, fragment.node_names),
                             by_worker[fragment.worker])) for fragment in plan.fragments)
    return GraphPlan(
        label=graph.label, kind=graph.facts.kind, workload=semantics.workload if semantics else "unknown",
        phase=semantics.phase if semantics else graph.facts.kind, est_s=partition.est_s if partition else 0.0,
        measured_s=max(measured.values(), default=None), fragments=rows,
        alternatives=partition.alternatives if partition else (), timeline=_timeline(plan, names, estimates, partition),
        crossings=_crossings(partition), unpriced=unpriced)


def _crossings(partition: Partition | None) -> tuple[CrossingRow, ...]:
    if partition is None or partition.crossings is None:
        return ()
    return tuple(CrossingRow(value=d.name, worker=partition.workers[d.worker], how=d.how, size_bytes=d.size_bytes,
                             move_s=d.move_s, again_s=d.again_s) for d in partition.crossings.decisions)


def _worker_names(plan: Plan, workers: Sequence[str], measured: Mapping[str, float]) -> list[str]:
    if len(workers) == plan.num_workers > 1:
        return list(workers)
    return [*measured, *(f"worker {n}" for n in range(len(measured), plan.num_workers))]


def _row(gm: fx.GraphModule, plan: Plan, fragment: Fragment, names: Sequence[str], estimates: Mapping[str, float],
         partition: Partition | None, region_of: Mapping[str, str], measured_s: float | None) -> FragmentRow:
    sizes = {node.name: _bytes(node) for node in gm.graph.nodes}
    static = {plan.inputs[index] for index in plan.static_inputs}
    maker = {name: other.worker for other in plan.fragments for name in other.outputs}
    coming = [name for name in fragment.inputs if name not in static and maker.get(name) != fragment.worker]
    kept = {name for other in plan.fragments if other.worker == fragment.worker for name in other.inputs}
    elsewhere = {name for other in plan.fragments if other.worker != fragment.worker for name in other.inputs}
    returned = {*plan.returned_values(), *plan.saved_values()}
    leaving = [name for name in fragment.outputs if name in elsewhere or name in returned or name not in kept]
    return FragmentRow(
        fragment=fragment.fragment_id, worker=names[fragment.worker],
        regions=tuple(dict.fromkeys(region_of[name] for name in fragment.node_names if name in region_of)),
        num_nodes=len(fragment.node_names), est_s=_sum(estimates, fragment.node_names), measured_s=measured_s,
        bytes_in=sum(sizes.get(name, 0) for name in coming),
        bytes_out=sum(sizes.get(name, 0) for name in leaving),
        memory_bytes=sum(sizes.get(name, 0) for name in fragment.inputs if name in static),
        why=_why(plan, fragment, names, [(maker[n], sizes.get(n, 0)) for n in coming if n in maker], partition))


def _why(plan: Plan, fragment: Fragment, names: Sequence[str], moved: Sequence[tuple[int, int]],
         partition: Partition | None) -> str:
    if plan.num_workers == 1:
        return "the graph stays whole" + ("" if partition is None or len(partition.alternatives) < 3 else
                                          ": no cut is worth what it moves")
    if not moved:
        return "needs nothing from other workers, so it runs beside them"
    sources = ", ".join(sorted({names[worker] for worker, _ in moved}))
    return f"{sum(size for _, size in moved) / 1e6:.3g} MB come from {sources}; the rest of what it reads is here"


def _timeline(plan: Plan, names: Sequence[str], estimates: Mapping[str, float],
              partition: Partition | None) -> tuple[Span, ...]:
    """The placer's schedule where there is one; else fragments one after the other."""
    if partition is not None and partition.placement is not None and partition.placement.start_s:
        starts = partition.placement.start_s
        if partition.split is not None:
            return (*_part_spans(plan, names, estimates, starts, partition.split.part),
                    *_transfer_spans(partition.placement))
        spans = []
        for fragment in plan.fragments:
            inside = [name for name in fragment.node_names if name in starts]
            if inside:
                spans.append(Span(lane=names[fragment.worker], label=f"fragment {fragment.fragment_id}",
                                  start_s=min(starts[n] for n in inside),
                                  end_s=max(starts[n] + estimates.get(n, 0.0) for n in inside)))
        return (*spans, *_transfer_spans(partition.placement))
    spans, at = [], 0.0
    for fragment in plan.fragments:
        length = _sum(estimates, fragment.node_names)
        spans.append(Span(lane=names[fragment.worker], label=f"fragment {fragment.fragment_id}", start_s=at,
                          end_s=at + length))
        at += length
    return tuple(spans)


def _transfer_spans(placement: Placement) -> list[Span]:
    return [Span(lane=f"{t.src} to {t.dst}", label=t.node, start_s=t.start_s, end_s=t.end_s)
            for t in placement.transfers]


def _part_spans(plan: Plan, names: Sequence[str], estimates: Mapping[str, float], starts: Mapping[str, float],
                part: Mapping[str, int]) -> list[Span]:
    """A span for as long as a worker stays with one part of the batch."""
    spans: list[Span] = []
    for number, worker in enumerate(names):
        inside = sorted((starts[n], n) for f in plan.fragments if f.worker == number for n in f.node_names
                        if n in starts and estimates.get(n))
        for count, each in itertools.groupby(inside, key=lambda pair: part.get(pair[1], -1)):
            run = list(each)
            label = f"part {count}" if 0 <= count < max(part.values()) else "all parts"
            spans.append(Span(lane=worker, label=label, start_s=run[0][0],
                              end_s=run[-1][0] + estimates.get(run[-1][1], 0.0)))
    return spans


def _sum(estimates: Mapping[str, float], names: Sequence[str]) -> float:
    return sum(estimates.get(name, 0.0) for name in names)


def _share(measured_s: float | None, part: float, whole: float) -> float | None:
    return None if measured_s is None else measured_s * (part / whole if whole else 1.0)


def _bytes(node: fx.Node) -> int:
    value = node.meta.get("val")
    return hinted_bytes(value) if isinstance(value, torch.Tensor) else 8
