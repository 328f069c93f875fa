"""A GPT-2-small-sized forward: 12 layers, width 768, one sequence of 128 tokens, to the last hidden state."""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import Case, Settings, Side, Step, measure, ratio_target

LIMIT_OVER_LOCAL = 1.05
LENGTH = 128


def prepare_step(compiled: Callable[[Any], Any], **more: Any) -> Step:
    """A step that feeds other tokens at each call. Shared with inductor_forward."""
    from bench import workloads

    ids, other = workloads.tokens(1, LENGTH), workloads.tokens(1, LENGTH, seed=1)

    def prepare() -> None:
        nonlocal other
        previous = ids.clone()
        ids.copy_(other)
        other = previous

    for _ in range(2):
        compiled(ids)
    return Step(call=lambda: compiled(ids), prepare=prepare,
                checksum=lambda: workloads.fingerprint(compiled(workloads.tokens(1, LENGTH))), **more)


def genie(params: Mapping[str, Any]) -> Step:
    import torch

    from bench import workloads

    torch.set_grad_enabled(False)
    remote = workloads.remote(params)
    compiled = remote.compile(workloads.gpt2_forward(workloads.gpt2()))
    return prepare_step(compiled, facts=remote.counters, close=remote.close)


def local(params: Mapping[str, Any]) -> Step:
    import torch

    from bench import workloads

    torch.set_grad_enabled(False)
    return prepare_step(workloads.local(workloads.gpt2_forward(workloads.gpt2()), params["how"]))


SIDES = {"genie": genie, "local": local}


def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads:
        sides = [Side(module=__name__, factory="local", name=f"local {how}", process="local", params={"how": how})
                 for how in ("eager", "empty")]
        sides.append(Side(module=__name__, factory="genie", params={
            "backend": settings.backend, "threads": threads}))
        seen = measure(settings, sides, blocks=1 if settings.quick else 5, samples=2, settle=1, threads=threads)
        best = seen.fastest("local eager", "local empty")
        yield Case(
            bench="gpt2_forward", title=f"12 layers, 768, {LENGTH} tokens, no_grad, no cache", threads=threads,
            pinned=False, series=seen.series, per_call=seen.per_call,
            ratios=tuple(seen.ratio("genie", f"local {how}") for how in ("eager", "empty")),
            targets=(ratio_target("GPT-2-small forward over local", seen.ratio("genie", best), LIMIT_OVER_LOCAL),))
