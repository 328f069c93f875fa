"""The GPT-2-small forward with `worker_compiler` "flat", "inductor" and "auto", in the steady state.

Against local `torch.compile` with Inductor: what a user would do instead.
"""
from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.gpt2_forward import LENGTH, prepare_step
from bench.harness import Case, Settings, Side, Step, measure, ratio_target

LIMIT_OVER_LOCAL_INDUCTOR = 1.10
LIMIT_AUTO_OVER_BEST = 1.05
_SETTLE_CALLS = 12           # "auto" tries each way a few times before it keeps one
_QUIET_SHARE = 0.2
_QUIET_TIMEOUT_S = 600.0


def _wait_until_quiet(pid: int, call: Callable[[], Any]) -> None:
    """Call until the worker, with the compilers it started, rests between calls: its compilation is over."""
    from bench import procfs

    deadline = time.monotonic() + _QUIET_TIMEOUT_S
    quiet = 0
    while quiet < 3:
        if time.monotonic() > deadline:
            raise TimeoutError(f"the worker still computes {_QUIET_TIMEOUT_S:g} s after its first call")
        call()
        time.sleep(0.2)      # what follows a reply is over
        before = procfs.tree_cpu_s(pid)
        time.sleep(0.5)
        quiet = quiet + 1 if procfs.tree_cpu_s(pid) - before < 0.5 * _QUIET_SHARE else 0


def genie(params: Mapping[str, Any]) -> Step:
    import torch

    from bench import workloads

    torch.set_grad_enabled(False)
    remote = workloads.remote(params)
    options = {"worker_compiler": params["compiler"]}
    compiled = remote.compile(workloads.gpt2_forward(workloads.gpt2()), **options)
    step = prepare_step(compiled, facts=remote.counters, close=remote.close)
    assert step.call is not None
    _wait_until_quiet(remote.worker_pid, step.call)
    for _ in range(_SETTLE_CALLS):
        step.call()
    if refusals := remote.refusals():
        raise RuntimeError(f"Inductor was refused on the worker, this would measure the flat plan: {refusals}")
    return step


def local(params: Mapping[str, Any]) -> Step:
    import torch

    from bench import workloads

    torch.set_grad_enabled(False)
    return prepare_step(workloads.local(workloads.gpt2_forward(workloads.gpt2()), params["how"]))


SIDES = {"genie": genie, "local": local}


def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads:
        sides = [Side(module=__name__, factory="local", name=f"local {how}", process="local", params={"how": how})
                 for how in ("eager", "inductor")]
        sides += [Side(module=__name__, factory="genie", name=f"genie {compiler}", params={
            "backend": settings.backend, "threads": threads, "compiler": compiler})
            for compiler in ("flat", "inductor", "auto")]
        seen = measure(settings, sides, blocks=1 if settings.quick else 5, samples=2, settle=1, threads=threads,
                       tolerance=1e-3)
        over_local = seen.ratio("genie inductor", "local inductor")
        best = seen.fastest("genie flat", "genie inductor")
        auto = seen.ratio("genie auto", best)
        yield Case(
            bench="inductor_forward", title=f"GPT-2 small, {LENGTH} tokens, steady state", threads=threads,
            pinned=False, series=seen.series, per_call=seen.per_call,
            ratios=(over_local, auto, seen.ratio("genie flat", "local eager"),
                    seen.ratio("local inductor", "local eager")),
            targets=(ratio_target("forward with Inductor on the worker over local Inductor", over_local,
                                  LIMIT_OVER_LOCAL_INDUCTOR),
                     ratio_target('"auto" over the better of flat and inductor', auto, LIMIT_AUTO_OVER_BEST)))
