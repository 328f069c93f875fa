"""The published experiment, and three more: what moves, and what a token costs, by how much is known of the model.

    local eager    this process alone, as many threads as the worker has
    driver-level   one message per op, tensors resident: what API remoting does (bench/driver_level.py)
    blind          the graph at a time; everything it reads goes up with each call
    weights        parameters stay on the worker
    full           caches and other state stay too; what is new of them comes down

decode: 50 tokens after a prompt of 72, GPT-2 small and a Llama of 100 M parameters, random weights. chat: ten turns
with one cache. whisper: two pieces of 30 s, token by token. training: forward, backward, AdamW, whose step is local
but for one way more, "full, step there" (`parameters="remote"`). A message per op has no autograd, and does not train.

All ways but the first share a process, a session and its one worker, so that they have the same lanes. Bytes and
seconds are those of the measured stretch alone (each token after the first), and are counted, never modelled.
"""
from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from bench.harness import Case, Measurement, Settings, Side, Step, Target, measure, ratio_target

LOCAL, DRIVER, WAYS = "local eager", "driver-level", ("blind", "weights", "full")
STEP_THERE = "full, step there"
"""Training: the optimizer's step compiled too, with `parameters="remote"`."""
OVER_LOCAL, OVER_FLOOR, OF_WEIGHTS = 1.10, 1.2, 0.03
_WEIGHTS_MODE = "weights"


def local(params: Mapping[str, Any]) -> Step:
    from bench.decode_models import SCENES, model_of

    scene = SCENES[params["scene"]](model_of(params["model"]), lambda function: function, params)
    return _step(scene, dict)


def genie(params: Mapping[str, Any]) -> Step:
    from bench import workloads
    from bench.decode_models import SCENES, model_of, own_code

    remote, way = workloads.remote(params), params["way"]
    parameters = params.get("parameters", "local")

    def wrap(function: Any) -> Any:
        return remote.compile(own_code(function, f"{function.__name__}_{way}_{parameters}"), awareness=way,
                              parameters=parameters, fullgraph=parameters == "local")     # torch breaks a step's graph

    scene = SCENES[params["scene"]](model_of(params["model"]), wrap, params)
    return _step(scene, lambda: _counters(remote), close=remote.close)


def driver_level(params: Mapping[str, Any]) -> Step:
    import genie_dynamo
    from bench import workloads
    from bench.decode_models import SCENES, model_of
    from bench.driver_level import DriverLevel

    remote = workloads.remote(params)
    mode, model = DriverLevel(genie_dynamo.session()), model_of(params["model"])
    mode.place(model)
    scene = SCENES[params["scene"]](model, lambda function: function, params)
    return _step(scene, lambda: mode.counters, inside=mode, close=remote.close)


SIDES = {"local": local, "genie": genie, "driver_level": driver_level}


def _step(scene: Any, counters: Any, *, inside: Any = None, **more: Any) -> Step:
    import contextlib

    import torch

    torch.set_grad_enabled(False)
    sums: dict[str, float] = {}

    def run() -> Any:
        with inside or contextlib.nullcontext():
            return scene.run(counters)

    def sample() -> float:
        outcome = run()
        for key, value in outcome.counters.items():
            sums[key] = sums.get(key, 0.0) + value
        return float(outcome.unit_s)

    checksum = run().checksum               # the first run compiles, and sends what stays
    return Step(measure=sample, checksum=lambda: checksum, facts=lambda: sums, **more)


def _counters(remote: Any) -> dict[str, float]:
    """What genie has counted, in the names that all ways share."""
    stats = remote.stats()
    counted = {f"up.{reason}": float(size["sent"]) for reason, size in stats["by_reason"].items()}
    counted |= {f"down.{reason}": float(size["received"]) for reason, size in stats["by_reason"].items()}
    counted |= {f"{name}_s": float(value) for name, value in stats["seconds"].items()}
    counted["launches"] = float(stats["fragment_runs"])
    return counted


# ---------------------------------------------------------------- cases
def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads:
        for model in ("tiny",) if settings.quick else ("gpt2", "llama"):
            yield measure_case(settings, "decode", model, threads, prompt=72, tokens=8 if settings.quick else 50)
        small = settings.quick
        yield measure_case(settings, "chat", "tiny" if small else "llama", threads, prompt=12,
                           tokens=4 if small else 12)
        yield measure_case(settings, "whisper", "whisper-tiny" if small else "whisper", threads, prompt=4,
                           tokens=4 if small else 24)
        yield measure_case(settings, "training", "tiny" if small else "gpt2-30m", threads, prompt=64,
                           tokens=2 if small else 4)


def measure_case(settings: Settings, scene: str, model: str, threads: int, *, prompt: int, tokens: int) -> Case:
    """One scene in every way.

    Args: prompt: tokens before, or in each turn or training batch.  tokens: to make, or training steps.
    """
    params = {"scene": scene, "model": model, "prompt": prompt, "tokens": tokens, "threads": threads,
              "backend": settings.backend}
    sides = [Side(module=__name__, factory="local", name=LOCAL, params=params)]
    if settings.backend == "genie" and scene != "training":
        sides.append(Side(module=__name__, factory="driver_level", name=DRIVER, process="remote", params=params))
    sides += [Side(module=__name__, factory="genie", name=way, process="remote", params={**params, "way": way})
              for way in WAYS]
    if settings.backend == "genie" and scene == "training":
        sides.append(Side(module=__name__, factory="genie", name=STEP_THERE, process="remote",
                          params={**params, "way": "full", "parameters": "remote"}))
    seen = measure(settings, sides, blocks=1, samples=1, settle=0, threads=threads, tolerance=1e-5)
    per_unit = {label: dict(counters) for label, counters in seen.per_call.items()}
    unit = {"chat": "turn", "training": "step"}.get(scene, "token")
    titles = {"decode": f"{model}, {tokens} tokens after {prompt}", "chat": f"{model}, 10 turns",
              "whisper": f"{model}, pieces of 30 s", "training": f"{model}, AdamW"}
    targets = _targets(seen, per_unit, model) if scene == "decode" else ()
    return Case(bench="decode", title=f"{scene}: {titles[scene]}, random weights; per {unit}", threads=threads,
                pinned=False, series=seen.series, per_call=per_unit, notes=tuple(_table(seen, per_unit)),
                targets=tuple(targets), ratios=tuple(seen.ratio(side.label, LOCAL) for side in sides[1:]))


def moved(counters: Mapping[str, float], direction: str) -> dict[str, float]:
    """Bytes by reason, one way: "up" or "down"."""
    start = f"{direction}."
    return {key.removeprefix(start): value for key, value in counters.items() if key.startswith(start) and value}


def total_bytes(counters: Mapping[str, float]) -> float:
    return sum(moved(counters, "up").values()) + sum(moved(counters, "down").values())


def shares(counters: Mapping[str, float], unit_s: float) -> dict[str, float]:
    """Parts of a unit's time: the worker computing; the client waiting; of that, neither computing nor queueing. They
    are measured apart and do not add up: waiting includes what it waits for. A local unit is all compute."""
    compute_s, wait_s = counters.get("compute_s", unit_s), counters.get("wait_s", 0.0)
    transfer_s = counters.get("transfer_s", max(0.0, wait_s - compute_s))
    return {"compute": compute_s / unit_s, "transfer": transfer_s / unit_s, "wait": wait_s / unit_s}


def _table(seen: Measurement, per_unit: Mapping[str, Mapping[str, float]]) -> Iterator[str]:
    for label in seen.series:
        counters = per_unit.get(label, {})
        parts = shares(counters, seen.median(label))
        if not counters:
            yield f"{label:14} moves nothing"
            continue
        ways = "; ".join(f"{way} {_bytes(sum(by_reason.values()))}"
                         f" ({', '.join(f'{reason} {_bytes(size)}' for reason, size in by_reason.items())})"
                         for way in ("up", "down") if (by_reason := moved(counters, way)))
        yield (f"{label:14} compute {parts['compute']:4.0%}  transfer {parts['transfer']:4.0%}  "
               f"wait {parts['wait']:4.0%}  messages {counters.get('launches', 0):.0f}")
        yield f"{'':14} {ways}"


def _bytes(size: float) -> str:
    for factor, name in ((1e6, "MB"), (1e3, "KB")):
        if size >= factor:
            return f"{size / factor:.3g} {name}"
    return f"{size:.0f} B"


def _targets(seen: Measurement, per_unit: Mapping[str, Mapping[str, float]], model: str) -> Sequence[Target]:
    from bench.decode_models import size_of

    floor_bytes = size_of(model).floor_bytes
    full, weights = total_bytes(per_unit["full"]), total_bytes(per_unit[_WEIGHTS_MODE])
    return (
        ratio_target(f"{model}: full over local eager, per token", seen.ratio("full", LOCAL), OVER_LOCAL),
        Target(name=f"{model}: bytes of full over token id + logits + new cache rows", value=full / floor_bytes,
               limit=OVER_FLOOR, unit="x", terms={"full": full, "floor_bytes": floor_bytes}),
        Target(name=f"{model}: bytes of full over weights", value=full / weights, limit=OF_WEIGHTS, unit="share",
               terms={"full": full, "weights": weights}),
    )
