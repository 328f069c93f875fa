"""An MLP whose weights stay on the worker: 3 x 1024, batch 32, 128 KiB each way per call."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import BUSY_POLL_S, Case, Settings, Side, Step, measure, ratio_target

LIMIT_OVER_LOCAL = 1.45
LIMIT_OVER_SHARED_MEMORY = 1.12
POLLING = "genie ipc, busy polling"


def _step(run: Callable[[Any], Any], **more: Any) -> Step:
    import torch

    from bench import workloads

    x = workloads.mlp_input()
    torch.set_grad_enabled(False)
    for _ in range(3):
        run(x)
    return Step(call=lambda: run(x), prepare=lambda: x.mul_(-1),
                checksum=lambda: workloads.fingerprint(run(workloads.mlp_input())), **more)


def genie(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    remote = workloads.remote(params)
    return _step(remote.compile(workloads.mlp()), facts=remote.counters, close=remote.close)


def local(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    return _step(workloads.local(workloads.mlp(), params["how"]))


SIDES = {"genie": genie, "local": local}


def run(settings: Settings) -> Iterator[Case]:
    transports = ("ipc",) if settings.quick else ("ipc", "tcp")
    for threads, pinned in settings.placements():
        sides = [Side(module=__name__, factory="local", name=f"local {how}", process="local", params={"how": how})
                 for how in ("eager", "empty")]
        sides += [Side(module=__name__, factory="genie", name=f"genie {kind}", params={
            "backend": settings.backend, "threads": threads, "transport": kind}) for kind in transports]
        if not pinned:
            sides.append(Side(module=__name__, factory="genie", name=POLLING, params={
                "backend": settings.backend, "threads": threads, "busy_poll_s": BUSY_POLL_S}))
        seen = measure(settings, sides, blocks=1 if settings.quick else 4, samples=10 if settings.quick else 40,
                       settle=5, threads=threads, pinned=pinned)
        best = seen.fastest("local eager", "local empty")
        ratios = tuple(seen.ratio(f"genie {kind}", f"local {how}")
                       for kind in transports for how in ("eager", "empty"))
        targets = [ratio_target(f"resident MLP over local ({kind})", seen.ratio(f"genie {kind}", best),
                                LIMIT_OVER_LOCAL) for kind in transports]
        if not pinned:
            ratios += (seen.ratio(POLLING, best),)
            targets += [ratio_target(f"resident MLP over local, shared memory{how}", seen.ratio(name, best),
                                     LIMIT_OVER_SHARED_MEMORY)
                        for name, how in (("genie ipc", ""), (POLLING, ", the client polls"))]
        yield Case(bench="resident_mlp", title="3 x 1024, batch 32, no_grad", threads=threads, pinned=pinned,
                   series=seen.series, ratios=ratios, targets=tuple(targets), per_call=seen.per_call)
