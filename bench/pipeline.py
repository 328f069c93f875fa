"""Two workers as a pipeline of micro-batches, against one worker, and against two processes that know nothing of it.

    independent   two processes, each with the whole model, each on its own batches: seconds per batch of both together
    one worker    a caller, whole batches, one worker
    pipeline      a caller, each batch in parts through two workers
    pipeline x2   two callers: the next batch enters while the last one leaves

The two processes have nothing to move and nothing to wait for; they set what two cores can do. The aim is 0.9 of their
throughput. Models are too small for their numbers to mean anything by themselves: it is the ratio that counts.
"""
from __future__ import annotations

import contextlib
import ctypes
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import ROOT, Case, Measurement, Settings, Side, Step, Target, measure

LIMIT_X = 1 / 0.9
PARTS = 4
_CALLS = 6             # of each caller in a sample


def build(name: str) -> tuple[Any, Any]:
    """A model and a batch, the same in every process."""
    import torch

    from tests.models.staged import LastState, convolutions

    torch.manual_seed(0)
    if name == "decoder":
        return LastState(6, 256, 8, 512).eval().requires_grad_(False), torch.arange(32 * 64).view(32, 64) % 512
    model = convolutions(6, 32, 100, halve=True).eval().requires_grad_(False)
    return model, torch.randn(32, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def _like_a_worker() -> None:
    """One thread, and freed memory is kept, as workers do: without it, eager spends half its time on page faults."""
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-3, 1 << 30), (-1, (1 << 31) - 1), (-2, 64 << 20)):
            mallopt(option, value)


def independent(params: Mapping[str, Any]) -> Step:
    """This process and one more, at the same time."""
    import torch

    from bench import workloads

    _like_a_worker()
    model, x = build(params["model"])
    other = subprocess.Popen([sys.executable, "-m", "bench.pipeline", params["model"]], cwd=ROOT,
                             stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1)
    assert other.stdin is not None and other.stdout is not None
    asks, answers = other.stdin, other.stdout
    answers.readline()

    def run() -> float:
        started = time.perf_counter()
        asks.write(f"{_CALLS}\n")
        with torch.no_grad():
            for _ in range(_CALLS):
                model(x)
        answers.readline()
        return (time.perf_counter() - started) / (2 * _CALLS)

    def close() -> None:
        asks.close()
        other.wait(20)

    with torch.no_grad():
        result = workloads.fingerprint(model(x))
    return Step(measure=run, checksum=lambda: result, close=close)


def genie(params: Mapping[str, Any]) -> Step:
    import torch

    import genie_dynamo as genie
    from bench import workloads
    from genie_dynamo import worker_facts

    session = genie.init(workers=params["workers"], num_threads=1)
    if params["workers"] > 1:
        worker_facts.facts_of(session, wait=True)
    model, x = build(params["model"])
    options = {"strict": True, "microbatches": params["parts"]}
    compiled: Callable[..., Any] = torch.compile(model, backend="genie", fullgraph=True, options=options)

    def calls() -> None:
        with torch.no_grad():
            for _ in range(_CALLS):
                compiled(x)

    def run() -> float:
        started = time.perf_counter()
        others = [threading.Thread(target=calls) for _ in range(params["callers"] - 1)]
        for thread in others:
            thread.start()
        calls()
        for thread in others:
            thread.join()
        return (time.perf_counter() - started) / (_CALLS * params["callers"])

    with torch.no_grad():
        for _ in range(3):
            result = workloads.fingerprint(compiled(x))

    def facts() -> dict[str, float]:
        stats = genie.get_stats()
        rows = {f"fragment_runs_{name}": float(row["fragment_runs"]) for name, row in stats["workers"].items()}
        return {**rows, "bytes_sent": float(stats["bytes_sent"]), "bytes_received": float(stats["bytes_received"])}

    return Step(measure=run, checksum=lambda: result, facts=facts, close=genie.shutdown)


SIDES = {"independent": independent, "genie": genie}


def run(settings: Settings) -> Iterator[Case]:
    for name in ("vision", "decoder"):
        sides = [Side(module=__name__, factory="independent", params={"model": name})]
        sides += [Side(module=__name__, factory="genie", name=label, params={
            "model": name, "workers": workers, "parts": parts, "callers": callers})
            for label, workers, parts, callers in (("one worker", 1, 1, 1), ("pipeline", 2, PARTS, 1),
                                                   ("pipeline x2", 2, PARTS, 2))]
        seen = measure(settings, sides, blocks=1 if settings.quick else 2, samples=1 if settings.quick else 3, settle=1,
                       threads=1, tolerance=1e-3)
        yield _case(seen, name)


def _case(seen: Measurement, name: str) -> Case:
    ratios = [seen.ratio(label, "independent") for label in ("one worker", "pipeline", "pipeline x2")]
    ratios.append(seen.ratio("pipeline x2", "one worker"))
    best = ratios[2]
    target = Target(name=f"{name}: seconds per batch of a pipeline over those of two processes", value=best.value,
                    limit=LIMIT_X, unit="x", terms={"pipeline x2": best.numerator, "independent": best.denominator})
    runs = seen.per_call["pipeline"]
    busy = {key: value for key, value in runs.items() if key.startswith("fragment_runs") and value}
    note = f"{len(busy)} of 2 workers took part; throughput {1 / best.value:.2f} of two processes'"
    return Case(bench="pipeline", title=f"{name}, batches of 32 in {PARTS} parts, 1 thread each", threads=1,
                pinned=False, series=seen.series, ratios=tuple(ratios), targets=(target,), per_call=seen.per_call,
                notes=(note,))


def _serve(name: str) -> None:
    """The second of the independent processes: runs as many calls as each line of its input says."""
    import torch

    _like_a_worker()
    model, x = build(name)
    with torch.no_grad(), contextlib.suppress(BrokenPipeError):
        model(x)
        print("ready", flush=True)
        for line in sys.stdin:
            for _ in range(int(line)):
                model(x)
            print(os.getpid(), flush=True)


if __name__ == "__main__":
    _serve(sys.argv[1])
