"""What a call pays to find 150 parameters unchanged.

The same function of a module with 150 small parameters and of one with 2; per call, the difference. It holds the
check, the longer argument list in the message, and what even an empty backend pays for 148 more tensors (guards,
the wrapper of AOTAutograd, the op itself), so the empty backend's difference is measured beside it and taken off.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import Case, Settings, Side, Step, Target, measure

MANY, FEW = 150, 2
LIMIT_S = 30e-6


def _module(count: int) -> Any:
    import torch

    class Many(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.small = torch.nn.ParameterList(torch.full((4,), float(i)) for i in range(count))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.cat(list(self.small))[:4]      # one op that takes them all, and little work

    return Many()


def _step(compile_with: Callable[..., Any], count: int, **more: Any) -> Step:
    import torch

    torch.set_grad_enabled(False)
    compiled, x = compile_with(_module(count)), torch.zeros(4)
    for _ in range(3):
        compiled(x)
    return Step(call=lambda: compiled(x), checksum=lambda: compiled(x).tolist(), **more)


def genie(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    remote = workloads.remote(params)
    return _step(remote.compile, params["count"], facts=remote.counters, close=remote.close)


def local(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    return _step(lambda target: workloads.local(target, params["how"]), params["count"])


SIDES = {"genie": genie, "local": local}


def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads[:1]:            # nothing here runs on more than one
        sides = [Side(module=__name__, factory=factory, name=f"{name} {count}", process=name, params={
            "backend": settings.backend, "threads": threads, "how": "empty", "count": count})
            for factory, name in (("local", "empty"), ("genie", "genie")) for count in (FEW, MANY)]
        seen = measure(settings, sides, blocks=2 if settings.quick else 10, samples=50 if settings.quick else 100,
                       settle=10, threads=threads)
        with_empty = seen.difference(f"genie {MANY}", f"genie {FEW}")
        empty = seen.difference(f"empty {MANY}", f"empty {FEW}")
        terms = {label: seen.median(label) for label in seen.series}
        yield Case(
            bench="parameter_check", title=f"{MANY} unchanged parameters against {FEW}", threads=threads,
            pinned=False, series=seen.series, per_call=seen.per_call,
            ratios=tuple(seen.ratio(f"{name} {MANY}", f"{name} {FEW}") for name in ("genie", "empty")),
            targets=(Target(name=f"check of {MANY} unchanged parameters, per call", value=with_empty - empty,
                            limit=LIMIT_S, unit="s", terms=terms),),
            notes=(f"{MANY} against {FEW} parameters: {with_empty * 1e6:.1f} us per call, "
                   f"of which an empty backend pays {empty * 1e6:.1f} us",))
