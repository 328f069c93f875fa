"""Counters of a session: calls, bytes by reason and direction, seconds by stage, fallbacks, per worker and in total.

    seconds.dispatch   client CPU before a call's messages are handed over, and after its answer is there
    seconds.wait       from then until the answer is there; of it
    seconds.compute    is what workers report as running the graph, and
    seconds.transfer   is the rest, less the time a run queued behind others: wire, serialisation, wake-ups
"""
from __future__ import annotations

import threading
from collections import Counter
from typing import Any

REASONS = ("weights", "inputs", "outputs", "state", "gradients", "control")


class _Counters:
    """One set of counters: a worker's, or the session's total."""

    def __init__(self) -> None:
        self.calls = 0
        self.fragment_runs = 0
        self.sent = dict.fromkeys(REASONS, 0)
        self.received = dict.fromkeys(REASONS, 0)
        self.seconds = dict.fromkeys(("dispatch", "wait", "transfer", "compute"), 0.0)

    def snapshot(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "fragment_runs": self.fragment_runs,
            "bytes_sent": sum(self.sent.values()),
            "bytes_received": sum(self.received.values()),
            "by_reason": {
                reason: {"sent": self.sent[reason], "received": self.received[reason],
                         "total": self.sent[reason] + self.received[reason]}
                for reason in REASONS
            },
            "seconds": dict(self.seconds),
        }


class Telemetry:
    """Thread-safe counters; see the module's docstring for what each means."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.reset()

    def reset(self) -> None:
        """Set everything to zero."""
        with self._lock:
            self._total = _Counters()
            self._workers: dict[str, _Counters] = {}
            self._fallbacks: Counter[str] = Counter()
            self._events: Counter[str] = Counter()

    def moved(self, worker: str, *, sent: dict[str, int] | None = None, received: dict[str, int] | None = None) -> None:
        """Count bytes between the client and a worker."""
        with self._lock:
            for counters in (self._total, self._of(worker)):
                for reason, size in (sent or {}).items():
                    counters.sent[reason] += size
                for reason, size in (received or {}).items():
                    counters.received[reason] += size

    def call(self, workers: dict[str, tuple[int, float]], *, dispatch_s: float, wait_s: float, queue_s: float) -> None:
        """Count a finished call: worker -> (fragments run, compute seconds)."""
        compute_s = max((seconds for _, seconds in workers.values()), default=0.0)
        transfer_s = max(0.0, wait_s - compute_s - queue_s)
        with self._lock:
            self._total.calls += 1
            for name, (fragments, seconds) in workers.items():
                mine = self._of(name)
                mine.calls += 1
                mine.fragment_runs += fragments
                mine.seconds["compute"] += seconds
                mine.seconds["wait"] += wait_s
                mine.seconds["transfer"] += transfer_s
                mine.seconds["dispatch"] += dispatch_s
                self._total.fragment_runs += fragments
                self._total.seconds["compute"] += seconds
            self._total.seconds["dispatch"] += dispatch_s
            self._total.seconds["wait"] += wait_s
            self._total.seconds["transfer"] += transfer_s

    def fallback(self, reason: str) -> int:
        """Count a call that ran locally; returns how often this reason has been counted."""
        with self._lock:
            self._fallbacks[reason] += 1
            return self._fallbacks[reason]

    def event(self, name: str) -> None:
        """Count something worth knowing: a retry, a restarted worker, an edit found by fingerprint."""
        with self._lock:
            self._events[name] += 1

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain data, in the shape that genie.get_stats() documents."""
        with self._lock:
            return {
                **self._total.snapshot(),
                "fallbacks": dict(self._fallbacks),
                "events": dict(self._events),
                "workers": {name: counters.snapshot() for name, counters in self._workers.items()},
            }

    def _of(self, worker: str) -> _Counters:
        counters = self._workers.get(worker)
        if counters is None:
            counters = self._workers[worker] = _Counters()
        return counters
