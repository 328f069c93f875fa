"""CPU time of a worker per request: all its threads, over tiny calls, so that nearly all of it is control path."""
from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from bench.harness import Case, Settings, Side, Step, Target, measure

LIMIT_S = 2e-3


def worker(params: Mapping[str, Any]) -> Step:
    from bench import procfs, workloads

    remote = workloads.remote(params)
    run, x, pid = remote.compile(workloads.tiny), workloads.tiny_input(), remote.worker_pid
    for _ in range(20):
        run(x)
    spent = procfs.cpu_s(pid)

    def measure_call() -> float:
        """What one call added; what the worker does after its reply counts for the next."""
        nonlocal spent
        run(x)
        before, spent = spent, procfs.cpu_s(pid)
        return max(0.0, spent - before)

    return Step(measure=measure_call, facts=remote.counters, close=remote.close)


SIDES = {"worker": worker}


def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads[:1]:
        sides = [Side(module=__name__, factory="worker", params={"backend": settings.backend, "threads": threads})]
        seen = measure(settings, sides, blocks=1, samples=100 if settings.quick else 1000, settle=20,
                       threads=threads)
        p95_s = seen.series["worker"].percentile(95)
        yield Case(bench="control_cpu", title="worker's CPU time per tiny request", threads=threads, pinned=False,
                   series=seen.series, per_call=seen.per_call,
                   targets=(Target(name="CPU time of the worker's control path per request, p95", value=p95_s,
                                   limit=LIMIT_S, unit="s",
                                   terms={"p95": p95_s, "median": seen.median("worker")}),))
