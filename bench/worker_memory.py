"""What a worker's process holds beyond a process that has only imported torch."""
from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench.harness import Case, Settings, Side, Step, Target, measure

LIMIT_BYTES = 256e6
_BARE = "import sys, torch; torch.ones(256) + 1; print('ready', flush=True); sys.stdin.read()"


def worker(params: Mapping[str, Any]) -> Step:
    """A worker that has answered calls of a small model."""
    import torch

    from bench import procfs, workloads

    remote = workloads.remote(params)
    run = remote.compile(workloads.tiny)
    for value in range(100):
        run(torch.full((256,), float(value)))
    return Step(measure=lambda: procfs.memory_bytes(remote.worker_pid, params["kind"]), close=remote.close)


def bare(params: Mapping[str, Any]) -> Step:
    from bench import procfs

    process = subprocess.Popen([sys.executable, "-P", "-c", _BARE], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert process.stdin is not None and process.stdout is not None
    process.stdout.readline()

    def close() -> None:
        process.communicate()

    return Step(measure=lambda: procfs.memory_bytes(process.pid, params["kind"]), close=close)


SIDES = {"worker": worker, "bare": bare}


def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads[:1]:
        sides = [Side(module=__name__, factory=factory, name=f"{factory} {kind}", process=f"{factory} {kind}",
                      unit="bytes", params={"backend": settings.backend, "threads": threads, "kind": kind})
                 for kind in ("Rss", "Pss") for factory in ("worker", "bare")]
        seen = measure(settings, sides, blocks=1, samples=2, settle=0, threads=threads)
        pss = seen.difference("worker Pss", "bare Pss")
        yield Case(
            bench="worker_memory", title="a worker beside `import torch`", threads=threads, pinned=False,
            series=seen.series,
            ratios=tuple(seen.ratio(f"worker {kind}", f"bare {kind}") for kind in ("Rss", "Pss")),
            targets=(Target(name="a worker's memory over bare torch (RSS)", unit="bytes", limit=LIMIT_BYTES,
                            value=seen.difference("worker Rss", "bare Rss"),
                            terms={label: seen.median(label) for label in seen.series}),),
            notes=(f"PSS (shared pages divided by their users): {pss / 1e6:.0f} MB over bare torch",))
