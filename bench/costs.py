"""Estimated against measured seconds of whole graphs, and counted against torch's counted flops.

    measured     the flat plan a worker runs, in this process: the median of its runs
    roofline     from this machine's calibration alone
    fit          corrected from ops observed in all models but those of the same architecture (tiny or not)
    shipped      corrected by the fit that comes with the package: what a first session plans with. It was observed in
                 an earlier run, of the same architectures
    refined      the shipped fit after the ops of this very graph were timed: what the next plan is made with. It has
                 seen what it is compared with, and is judged by nothing
"""
from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from bench.cost_models import Graph, real_graphs, tiny_graphs
from bench.harness import ROOT, Case, Series, Settings, Target

_QUICK_TINY, _QUICK_REAL = ["bert", "llama", "resnet"], ["minilm 8x64"]
_LEAST_S, _MAX_RUNS, _MIN_RUNS = 0.1, 50, 5
_WARM_UP_RUNS = 2
_ESTIMATES = ("roofline", "fit", "shipped", "refined")
_TARGET = 0.20
OBSERVATIONS = ROOT / "build" / "observed_costs.parquet"


@dataclass(frozen=True, slots=True)
class Seen:
    """One graph, measured."""

    graph: Graph
    costs: Any                       # GraphCosts
    seconds: float
    observations: tuple[Any, ...]    # core.observations.Observation


def run(settings: Settings) -> Iterator[Case]:
    from genie_dynamo.runtime.worker.main import _keep_freed_memory

    _keep_freed_memory()             # as in a worker's process
    threads_before = torch.get_num_threads()
    graphs = [*tiny_graphs(_QUICK_TINY if settings.quick else None),
              *real_graphs(_QUICK_REAL if settings.quick else None)]
    yield flop_case(graphs)
    for threads in settings.threads:
        torch.set_num_threads(threads)
        try:
            yield time_case(graphs, threads)
        finally:
            torch.set_num_threads(threads_before)
    yield speed_case(graphs)


# ---------------------------------------------------------------- flops
def flop_case(graphs: list[Graph]) -> Case:
    """Matrix flops against torch.utils.flop_counter, over all graphs."""
    from genie_dynamo.passes.costs import analyze_costs, bind_symbols
    from tests.passes.costs.tracing import counted_flops

    shares, notes = [], []
    for graph in graphs:
        costs = analyze_costs(graph.gm)
        ours = costs.totals(bind_symbols(graph.gm, graph.inputs)).matrix_flops
        with torch.no_grad():
            theirs = counted_flops(graph.gm, *_copies(graph.inputs))
        shares.append(abs(ours - theirs) / max(theirs, 1))
        if ours != theirs:
            ops = sorted({c.op for c in costs if c.op.startswith("transformers::") or c.family == "conv_backward"})
            notes.append(f"{graph.name}: {ours:.6g} here, {theirs:.6g} there (has {', '.join(ops)})")
        notes += [f"{graph.name}: no formula for {op} ({count})" for op, count in costs.without_formula.items()]
    return Case(bench="costs", title=f"matrix flops of {len(graphs)} graphs, difference to torch's counter", threads=1,
                pinned=False, series={"relative difference": Series(unit="share", rounds=(tuple(shares),))},
                notes=(*notes, "torch's counter has no formula for transformers::grouped_mm, and counts grouped "
                               "convolutions' weight gradients once per group"))


# ---------------------------------------------------------------- seconds
def time_case(graphs: list[Graph], threads: int) -> Case:
    """Errors of the estimates over all graphs, with a row for each graph."""
    from genie_dynamo.runtime import calibration

    hardware = calibration.finish(calibration.measure(torch.device("cpu"), threads))
    seen = [look(graph, hardware, threads) for graph in graphs]
    errors: dict[str, list[float]] = defaultdict(list)
    columns = "".join(f" {name:>11} {'error':>7}" for name in _ESTIMATES)
    notes = [f"{'graph':36} {'nodes':>6} {'measured':>11}{columns}"]
    for one in seen:
        row = f"{one.graph.name:36.36} {len(one.costs):6} {one.seconds * 1e3:8.2f} ms"
        size = "tiny" if one.graph.is_tiny else "in use"
        for kind, estimate_s in zip(_ESTIMATES, estimates(one, seen, hardware), strict=True):
            miss = abs(estimate_s - one.seconds) / one.seconds
            errors[f"{kind}, {size}"].append(miss)
            errors[kind].append(miss)
            row += f" {estimate_s * 1e3:8.2f} ms {miss:7.1%}"
        notes.append(row)
    series = {f"error of {name}": Series(unit="share", rounds=(tuple(values),)) for name, values in errors.items()}
    terms = {name: statistics.median(errors[name]) for name in _ESTIMATES}
    targets = (
        Target(name="median error of the fitted estimate, the model's architecture left out", value=terms["fit"],
               limit=_TARGET, unit="share", terms=terms),
        Target(name="median error with the fit that comes with the package", value=terms["shipped"], limit=_TARGET,
               unit="share", terms=terms))
    kept = keep(seen, OBSERVATIONS)
    return Case(bench="costs", title=f"seconds of {len(seen)} graphs, estimated against measured", threads=threads,
                pinned=False, series=series, targets=targets,
                notes=(hardware.source, kept, *notes))


def look(graph: Graph, hardware: Any, threads: int) -> Seen:
    """Run a graph as a worker would, whole and node by node."""
    from genie_dynamo.passes.costs import analyze_costs, bind_symbols
    from genie_dynamo.passes.costs.observe import observations

    costs = analyze_costs(graph.gm)
    plan = _plan(graph)
    times: list[float] = []
    nodes: list[dict[str, float]] = []
    for number in range(_WARM_UP_RUNS + _MAX_RUNS):
        inputs = _copies(graph.inputs)
        started_s = time.perf_counter()
        plan.run(inputs)
        taken_s = time.perf_counter() - started_s
        if number < _WARM_UP_RUNS:
            continue
        times.append(taken_s)
        nodes.append(plan.run_timed(_copies(graph.inputs)))
        if len(times) >= _MIN_RUNS and sum(times) > _LEAST_S:
            break
    medians = {name: statistics.median(run[name] for run in nodes) for name in nodes[0]}
    rows = observations(costs, bind_symbols(graph.gm, graph.inputs), medians, model=graph.family, hardware=hardware)
    return Seen(graph, costs, statistics.median(times), rows)


def estimates(one: Seen, seen: list[Seen], hardware: Any) -> tuple[float, ...]:
    """Seconds of one graph, in the order of _ESTIMATES."""
    from genie_dynamo.passes.costs import bind_symbols, fit_costs, node_seconds, refine
    from genie_dynamo.passes.costs.shipped import shipped_fit

    values = bind_symbols(one.graph.gm, one.graph.inputs)
    others = [row for other in seen if other.graph.family != one.graph.family for row in other.observations]
    shipped = shipped_fit("cpu")
    fits = (None, fit_costs(others, hardware), shipped, refine(shipped, one.observations, hardware))
    return tuple(sum(node_seconds(one.costs, hardware, values, fit=fit).values()) for fit in fits)


def keep(seen: list[Seen], path: Path) -> str:
    """Add what was observed to the rows in a Parquet file; says how many there are now."""
    from genie_dynamo.core.observations import merge, read_parquet, write_parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    old = read_parquet(path) if path.exists() else ()
    rows = merge(old, [row for one in seen for row in one.observations])
    write_parquet(path, rows)
    return f"{len(rows)} observations are kept in {path.relative_to(ROOT)}"


def _plan(graph: Graph) -> Any:
    from genie_dynamo.runtime.flat import FlatPlan
    from tests.captured import lower_whole

    namespaces = frozenset(c.op.split("::")[0] for c in _analyze(graph)) - {"aten", "python", "higher_order", "genie"}
    return FlatPlan(lower_whole(graph.gm).spec, device=torch.device("cpu"), extra_namespaces=namespaces)


def _analyze(graph: Graph) -> Any:
    from genie_dynamo.passes.costs import analyze_costs

    return analyze_costs(graph.gm)


def _copies(inputs: list[Any]) -> list[Any]:
    return [x.clone() if isinstance(x, torch.Tensor) and x.numel() < 100_000 else x for x in inputs]


# ---------------------------------------------------------------- the estimate's own speed
def speed_case(graphs: list[Graph]) -> Case:
    """What it takes to analyse a graph once, and to evaluate its costs for a call."""
    from genie_dynamo.passes.costs import SymbolBinding, analyze_costs

    graph = next((g for g in graphs if g.name.startswith("gpt2-small")), graphs[-1])
    samples: dict[str, list[float]] = defaultdict(list)
    for _ in range(10):
        started_s = time.perf_counter()
        costs = analyze_costs(graph.gm)
        samples["analyse once"].append(time.perf_counter() - started_s)
        binding = SymbolBinding(graph.gm)
        costs.totals(binding(graph.inputs))
        costs.values(binding(graph.inputs))
        for name, call in (("totals of a call", costs.totals), ("all nodes of a call", costs.values)):
            started_s = time.perf_counter()
            call(binding(graph.inputs))
            samples[name].append(time.perf_counter() - started_s)
    series = {name: Series(unit="s", rounds=(tuple(values),)) for name, values in samples.items()}
    value = series["totals of a call"].median
    target = Target(name="totals of a call", value=value, limit=100e-6, unit="s", terms={"totals": value})
    return Case(bench="costs", title=f"costs of {graph.name}, {len(costs)} nodes", threads=1, pinned=False,
                series=series, targets=(target,))
