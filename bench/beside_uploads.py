"""What a small call of one thread takes while another thread of the same client brings a large parameter to the worker.

"first" is a parameter that the worker never had: it is asked for by digest, sent, and its digest checked there.
"changed" is one that was edited: it is streamed beside the run that reads it. The small call is timed only while bytes
of the upload are leaving. What is asked for is the p99; two cores are shared by the caller, the thread that uploads,
and the worker, so that the medians also show what they compute.
"""
from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from bench.harness import Case, Settings, Side, Step, Target, measure

LIMIT_S = 0.05
"""Of the p99: what a person who reads a model's words as they come does not notice."""
LARGE = (8192, 8192)     # 256 MiB
WIDTH = 64


def small_call(params: Mapping[str, Any]) -> Step:
    import torch
    from torch import nn

    import genie_dynamo as genie

    genie.init(workers=1, num_threads=1, require_lane=params["lane"], strict=True)
    torch.set_num_threads(1)
    net, x = nn.Linear(WIDTH, WIDTH).eval().requires_grad_(False), torch.randn(2, WIDTH)
    call = torch.compile(net, backend="genie")

    def step() -> None:
        with torch.no_grad():
            call(x)

    step()
    if params["upload"] == "none":
        return Step(call=step, close=genie.shutdown)
    uploads = _Uploads(params["upload"])
    return Step(call=step, prepare=uploads.ensure, facts=uploads.facts, close=uploads.close)


class _Uploads:
    """A thread that uploads one large parameter after the other, as long as somebody looks."""

    def __init__(self, kind: str) -> None:
        import torch
        from torch import nn

        import genie_dynamo as genie

        self._genie, self._kind, self._torch = genie, kind, torch
        self._net = nn.Linear(LARGE[1], LARGE[0], bias=False).eval().requires_grad_(False)
        self._call = torch.compile(self._net, backend="genie")
        self._x = torch.randn(1, LARGE[1])
        self._wanted, self._over = threading.Event(), threading.Event()
        self._uploaded = 0
        self._upload()
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def ensure(self) -> None:
        """Return while bytes of an upload are leaving."""
        before = self._sent_bytes()
        self._wanted.set()
        while self._sent_bytes() == before:
            time.sleep(200e-6)

    def facts(self) -> Mapping[str, float]:
        return {"uploads": self._uploaded, "bytes_sent": self._sent_bytes()}

    def _sent_bytes(self) -> int:
        return int(self._genie.session().telemetry.snapshot()["by_reason"]["weights"]["sent"])

    def _upload(self) -> None:
        with self._torch.no_grad():
            self._net.weight[0, 0] += 1
            if self._kind == "first":
                self._genie.session().residency.forget(self._net.weight)
            self._call(self._x)

    def _work(self) -> None:
        while self._wanted.wait() and not self._over.is_set():
            self._wanted.clear()
            self._upload()
            self._uploaded += 1

    def close(self) -> None:
        self._over.set()
        self._wanted.set()
        self._thread.join()
        self._genie.shutdown()


SIDES = {"small_call": small_call}


def run(settings: Settings) -> Iterator[Case]:
    lanes = ("shm",) if settings.quick else ("shm", "zmq")
    for lane in lanes:
        sides = [Side(module=__name__, factory="small_call", name=name, params={"lane": lane, "upload": upload})
                 for name, upload in (("alone", "none"), ("beside a first upload", "first"),
                                      ("beside a changed parameter", "changed"))]
        seen = measure(settings, sides, blocks=1, samples=40 if settings.quick else 150, settle=5)
        beside = [side.label for side in sides[1:]]
        p99_s = {label: series.percentile(99) for label, series in seen.series.items()}
        targets = [Target(name=f"p99 {label} ({lane})", value=p99_s[label], limit=LIMIT_S, unit="s",
                          terms={name: p99_s[name] for name in ("alone", label)}) for label in beside]
        notes = [f"p99 {label} / p99 alone: {p99_s[label] / p99_s['alone']:.1f}x" for label in beside]
        yield Case(bench="beside_uploads", title=f"a small call beside an upload of 256 MiB over {lane}", threads=1,
                   pinned=False, series=seen.series, ratios=tuple(seen.ratio(label, "alone") for label in beside),
                   targets=tuple(targets), per_call=seen.per_call, notes=tuple(notes))
