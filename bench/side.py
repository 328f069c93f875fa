"""A process that holds sides and samples them when asked; see bench/harness.py.

One JSON object per line: requests on stdin, answers on what was stdout (whatever prints goes to stderr instead).
It ends when its stdin does.
"""
from __future__ import annotations

import gc
import importlib
import json
import os
import sys
import time
import traceback
from typing import Any

from bench.harness import NotInstalledError, Step


def main() -> None:
    spec = json.loads(sys.argv[1])
    if spec["cpu"] is not None:
        os.sched_setaffinity(0, {spec["cpu"]})      # before anything starts threads or processes
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    steps: dict[str, Step] = {}
    state: dict[str, str] = {}
    for side in spec["sides"]:
        try:
            factory = importlib.import_module(side["module"]).SIDES[side["factory"]]
            steps[side["label"]] = factory(side["params"])
            state[side["label"]] = ""
        except NotInstalledError as exc:
            state[side["label"]] = str(exc)
        except Exception as exc:                    # the controller decides whether the case can go on without it
            traceback.print_exc()
            state[side["label"]] = f"failed: {_one_line(exc)}"
    gc.collect()
    gc.freeze()          # what was built stays; a collection in a sample looks only at what the samples made
    _say(answers, {"ok": state})
    for line in sys.stdin:
        try:
            _say(answers, {"ok": _answer(steps, json.loads(line))})
        except Exception as exc:
            traceback.print_exc()
            _say(answers, {"error": _one_line(exc)})
    for step in steps.values():
        if step.close is not None:
            step.close()


def _one_line(exc: Exception) -> str:
    return f"{type(exc).__name__}: {' '.join(str(exc).split()):.300}"


def _say(answers: Any, what: dict[str, Any]) -> None:
    answers.write(json.dumps(what) + "\n")
    answers.flush()


def _answer(steps: dict[str, Step], request: dict[str, Any]) -> Any:
    step = steps[request["side"]]
    if request["verb"] == "checksum":
        return None if step.checksum is None else [float(x) for x in step.checksum()]
    if request["verb"] == "facts":
        return None if step.facts is None else dict(step.facts())
    return _sample(step, request["count"], request["settle"])


def _sample(step: Step, count: int, settle: int) -> list[float]:
    prepare, call, measure, clock = step.prepare, step.call, step.measure, time.perf_counter_ns
    samples = []
    for index in range(-settle, count):
        if prepare is not None:
            prepare()
        if measure is not None:
            value = measure()
        else:
            assert call is not None
            started = clock()
            call()
            value = (clock() - started) * 1e-9
        if index >= 0:
            samples.append(value)
    return samples


if __name__ == "__main__":
    main()
