"""CPU share of a client process while its threads wait for a long remote call: they should sleep."""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from bench.harness import Case, Settings, Side, Step, Target, measure

LIMIT_SHARE = 0.02          # of one core
_REPEATS, _WIDTH = 24, 1024
_WAITERS = (1, 4)


def client(params: Mapping[str, Any]) -> Step:
    import torch

    from bench import workloads

    remote = workloads.remote(params)

    def long(x: torch.Tensor) -> torch.Tensor:
        for _ in range(_REPEATS):
            x = torch.tanh(x @ x)
        return x[0, :8].clone()

    compiled, x = remote.compile(long), torch.eye(_WIDTH)
    compiled(x)

    def measure_call() -> float:
        threads = [threading.Thread(target=compiled, args=(x,)) for _ in range(params["waiters"])]
        started, spent = time.perf_counter(), time.process_time()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return (time.process_time() - spent) / (time.perf_counter() - started)

    return Step(measure=measure_call, facts=remote.counters, close=remote.close)


SIDES = {"client": client}


def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads[:1]:
        sides = [Side(module=__name__, factory="client", name=f"{n} waiting", process="client", unit="share", params={
            "backend": settings.backend, "threads": threads, "waiters": n}) for n in _WAITERS]
        seen = measure(settings, sides, blocks=1, samples=1 if settings.quick else 3, settle=0, threads=threads)
        yield Case(
            bench="waiting_client_cpu", title="CPU share of a client that waits", threads=threads, pinned=False,
            series=seen.series, per_call=seen.per_call,
            targets=tuple(Target(name=f"CPU share of a client with {n} waiting", value=seen.median(f"{n} waiting"),
                                 limit=LIMIT_SHARE, unit="share", terms={"share": seen.median(f"{n} waiting")})
                          for n in _WAITERS))
