"""Bytes that a call moves on two workers, neither of which holds all weights: placed with and without knowing.

    blind     costs alone place the graphs; nothing stays on workers
    weights   costs alone place the graphs; parameters stay
    full      regions, phases and what lies where steer placement too; caches and activations stay where they are read

The same calls on the same two workers in one session; bytes are those that client and workers have counted as sent
and received, worker to worker as well. Outputs have to agree. Placement is told that a worker has room for 70 % of the
weights, beside what a call needs at its peak, so that each graph has to be cut: everything else is measured.
"""
from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import BenchError, Case, Series, Settings, Target

WAYS = ("blind", "weights", "full")
OF_BLIND = {"decode": 0.05, "training": 0.6}
"""Aims: a token of `full` over one of `blind`, and a training step."""

_SHARE_OF_WEIGHTS = 0.7
_WARM_UP = 2


def run(settings: Settings) -> Iterator[Case]:
    yield measured("decode", "tiny" if settings.quick else "gpt2-30m", 4 if settings.quick else 16)
    yield measured("training", "decoder", 2 if settings.quick else 4)


def measured(scene: str, model: str, units: int) -> Case:
    """One scene in every way, one way after the other: bytes do not depend on the machine's other work."""
    import genie_dynamo as genie

    per_unit: dict[str, dict[str, float]] = {}
    checks: dict[str, list[float]] = {}
    genie.shutdown()
    genie.init(workers=2, num_threads=1, strict=True, observe=False)
    try:
        for way in WAYS:
            per_unit[way], checks[way] = _moved(scene, model, units, way)
    finally:
        genie.shutdown()
    _check(checks)
    totals = {way: sum(by.values()) for way, by in per_unit.items()}
    unit = {"decode": "token", "training": "step"}[scene]
    target = Target(name=f"{scene}: bytes of full over blind, per {unit}", value=totals["full"] / totals["blind"],
                    limit=OF_BLIND[scene], unit="x", terms=totals)
    notes = [f"{way:8} {_bytes(totals[way]):>9} per {unit}: " + ", ".join(
        f"{reason} {_bytes(size)}" for reason, size in sorted(by.items(), key=lambda row: -row[1]) if size)
        for way, by in per_unit.items()]
    return Case(bench="bytes_moved", title=f"{scene} of {model} cut over two workers; per {unit}", threads=1,
                pinned=False, series={way: Series(unit="bytes", rounds=((total,),)) for way, total in totals.items()},
                per_call=per_unit, targets=(target,), notes=tuple(notes))


def _moved(scene: str, model: str, units: int, way: str) -> tuple[dict[str, float], list[float]]:
    """Mean bytes per unit by reason ("state w2w" where workers sent it to each other), and numbers to compare."""
    import torch

    import genie_dynamo as genie

    torch._dynamo.reset()
    call, parameter_bytes = {"decode": _decode, "training": _training}[scene](model, way)
    with _small_workers(int(_SHARE_OF_WEIGHTS * parameter_bytes)):
        for _ in range(_WARM_UP):
            call(units)
        genie.reset_stats()
        check = call(units)
        stats = genie.get_stats()
    idle = [name for name, row in stats["workers"].items() if not row["calls"]]
    if idle:
        raise BenchError(f"{scene}, {way}: {', '.join(idle)} took no part, nothing was cut")
    found: dict[str, float] = {}
    for reason, row in stats["by_reason"].items():
        found[reason] = (row["sent"] + row["received"]) / units
        found[f"{reason} w2w"] = row["worker_to_worker"] / units
    return found, check


def _decode(model: str, way: str) -> tuple[Callable[[int], list[float]], int]:
    """Greedy tokens after a prompt, with a growing cache."""
    import torch

    from bench.decode_models import Decode, model_of

    module = model_of(model)
    decode = Decode(module, lambda f: torch.compile(f, backend="genie", options={"awareness": way}),
                    {"prompt": 32, "tokens": 0})

    def call(units: int) -> list[float]:
        decode._num_tokens = units
        with torch.no_grad():
            return decode.run(dict).checksum

    return call, _size(module)


def _training(_: str, way: str) -> tuple[Callable[[int], list[float]], int]:
    """Forward and backward of a decoder; the gradients come home."""
    import torch

    from bench.pipeline import build

    module, ids = build("decoder")
    module.requires_grad_(True).train()
    compiled = torch.compile(module, backend="genie", options={"awareness": way})

    def call(units: int) -> list[float]:
        for _ in range(units):
            module.zero_grad()
            loss = compiled(ids[:8]).square().mean()
            loss.backward()
        return [float(loss.detach()), *(float(p.grad.abs().sum()) for p in module.parameters() if p.grad is not None)]

    return call, _size(module)


def _size(module: Any) -> int:
    return sum(p.numel() * p.element_size() for p in dict.fromkeys(module.parameters()))


@contextlib.contextmanager
def _small_workers(weights_bytes: int) -> Iterator[None]:
    """Placement waits for what the workers measured, and is told of room for so many bytes of weights on each."""
    from genie_dynamo import worker_facts
    from genie_dynamo.passes import partition

    facts_of, device = worker_facts.facts_of, partition._device

    def small(worker: Any, lanes: Any, _: int) -> Any:
        return device(dataclasses.replace(worker, memory_bytes=weights_bytes), lanes, 0)

    worker_facts.facts_of = lambda session, *, wait=False: facts_of(session, wait=True)
    partition._device = small
    try:
        yield
    finally:
        worker_facts.facts_of, partition._device = facts_of, device


def _check(checks: Mapping[str, list[float]]) -> None:
    for way, numbers in checks.items():
        for one, other in zip(numbers, checks["blind"], strict=True):
            if abs(one - other) > 1e-4 * max(1.0, abs(other)):
                raise BenchError(f"{way} gives {one}, blind {other}")


def _bytes(size: float) -> str:
    for factor, name in ((1e6, "MB"), (1e3, "kB")):
        if size >= factor:
            return f"{size / factor:.3g} {name}"
    return f"{size:.0f} B"
