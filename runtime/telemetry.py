"""Counters of a session: calls, bytes by reason and direction, seconds by stage, fallbacks, per worker and in total.

    seconds.dispatch   client CPU before a call's messages are handed over, and after its answer is there
    seconds.wait       from then until the answer is there; of it
    seconds.compute    is what workers report as running the graph, and
    seconds.transfer   is the rest, less the time a run queued behind others: wire, serialisation, wake-ups
"""
from __future__ import annotations

import threading
from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, NamedTuple

REASONS = ("weights", "inputs", "outputs", "state", "gradients", "activations", "control")
"""Activations move between workers only; what a client sends or receives of them counts as inputs or outputs."""


class _Counters:
    """One set of counters: a worker's, or the session's total."""

    def __init__(self) -> None:
        self.calls = 0
        self.fragment_runs = 0
        self.sent = dict.fromkeys(REASONS, 0)
        self.received = dict.fromkeys(REASONS, 0)
        self.between = dict.fromkeys(REASONS, 0)     # from workers to workers
        self.seconds = dict.fromkeys(("dispatch", "wait", "transfer", "compute"), 0.0)

    def snapshot(self) -> dict[str, Any]:
        return {
            "calls": self.calls,
            "fragment_runs": self.fragment_runs,
            "bytes_sent": sum(self.sent.values()),
            "bytes_received": sum(self.received.values()),
            "by_reason": {
                reason: {"sent": self.sent[reason], "received": self.received[reason],
                         "worker_to_worker": self.between[reason],
                         "total": self.sent[reason] + self.received[reason] + self.between[reason]}
                for reason in REASONS
            },
            "seconds": dict(self.seconds),
        }


_MAX_NOTED = 1024


class Share(NamedTuple):
    """What one worker had to do with a call."""

    worker: str
    num_fragments: int
    compute_s: float
    sent: dict[str, int]
    received: dict[str, int]


def _add(seconds: dict[str, float], dispatch_s: float, wait_s: float, transfer_s: float) -> None:
    seconds["dispatch"] += dispatch_s
    seconds["wait"] += wait_s
    seconds["transfer"] += transfer_s


class Telemetry:
    """Thread-safe counters; see the module's docstring for what each means."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By incarnation of a worker: bytes by reason that it has sent to others, ever.
        self._pushed: dict[str, dict[str, int]] = {}
        self.reset()

    def reset(self) -> None:
        """Set everything to zero."""
        with self._lock:
            self._noted: deque[tuple[Sequence[Share], float, float, float]] = deque()
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

    def pushed(self, worker: str, key: str, by_reason: dict[str, int]) -> None:
        """What a worker (its incarnation is `key`) says that it has sent to others in this session, ever."""
        with self._lock:
            before = self._pushed.setdefault(key, {})
            for reason, size_bytes in by_reason.items():
                for counters in (self._total, self._of(worker)):
                    counters.between[reason] += size_bytes - before.get(reason, 0)
                before[reason] = size_bytes

    def call(self, shares: Sequence[Share], *, dispatch_s: float, wait_s: float, queue_s: float) -> None:
        """Count a finished call. It is only noted here: adding up can wait until somebody asks."""
        self._noted.append((shares, dispatch_s, wait_s, queue_s))
        if len(self._noted) > _MAX_NOTED:
            with self._lock:
                self._add_up()

    def _add_up(self) -> None:
        """Add up what was noted. The lock is held."""
        total = self._total
        while self._noted:
            shares, dispatch_s, wait_s, queue_s = self._noted.popleft()
            transfer_s = max(0.0, wait_s - max(share.compute_s for share in shares) - queue_s)
            total.calls += 1
            for share in shares:
                mine = self._of(share.worker)
                mine.calls += 1
                for counters in (mine, total):
                    counters.fragment_runs += share.num_fragments
                    for reason, size in share.sent.items():
                        counters.sent[reason] += size
                    for reason, size in share.received.items():
                        counters.received[reason] += size
                    counters.seconds["compute"] += share.compute_s
                _add(mine.seconds, dispatch_s, wait_s, transfer_s)
            _add(total.seconds, dispatch_s, wait_s, transfer_s)

    def fallback(self, reason: str) -> int:
        """Count a call that ran locally; returns how often this reason has been counted."""
        with self._lock:
            self._fallbacks[reason] += 1
            return self._fallbacks[reason]

    def event(self, name: str, count: int = 1) -> None:
        """Count something worth knowing: a retry, a restarted worker, an edit found by fingerprint."""
        with self._lock:
            self._events[name] += count

    def snapshot(self) -> dict[str, Any]:
        """Everything as plain data, in the shape that genie.get_stats() documents."""
        with self._lock:
            self._add_up()
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
