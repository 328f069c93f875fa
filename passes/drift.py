"""Measured against estimated seconds of a plan: when is it worth planning again, and with which corrections?

    plan -> estimates per worker      calls -> measured per worker      ratio of medians outside a bound, long enough
                                                                        -> corrections for the next plan

Flapping is damped three ways: a plan is judged by the median of several calls; a new plan has to be better by a margin
under the corrected costs; and after every change the next look comes later, twice as late each time, until a
plan has held for as long as that. Workers that come and go are damped in the same way. Pure: the clock is passed in.
"""
from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Callable, Mapping

BOUND = 1.5
"""Measured over estimated, or the other way round, from which on a plan is looked at again."""

CALLS = 9
"""Calls whose median is compared."""

FIRST_WAIT_S = 5.0
MAX_WAIT_S = 600.0

MARGIN = 0.9
"""A new plan must be estimated to take at most this share of what the present one takes."""


class Drift:
    """One graph's plan and how it fares. Not thread-safe: its owner looks at it between two calls.

    `slowness` holds measured over estimated seconds by worker, as far as known: what costs are multiplied with.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.slowness: dict[str, float] = {}
        self._est_s: dict[str, float] = {}
        self._seen: dict[str, deque[float]] = {}
        self._wait_s = FIRST_WAIT_S
        self._not_before_s = clock() + FIRST_WAIT_S
        self._changed_s = clock()

    def planned(self, est_s: Mapping[str, float], *, changed: bool) -> None:
        """A plan was made with these estimates, corrections included.

        Args: changed: whether it differs from the one before.
        """
        now_s = self._clock()
        if changed:
            held_s = now_s - self._changed_s
            self._wait_s = FIRST_WAIT_S if held_s > 4 * self._wait_s else min(2 * self._wait_s, MAX_WAIT_S)
            self._changed_s = now_s
        self._not_before_s = now_s + self._wait_s
        self._est_s = {worker: seconds for worker, seconds in est_s.items() if seconds > 0}
        self._seen = {}

    def observe(self, measured_s: Mapping[str, float]) -> None:
        """A call has ended; seconds of computing by worker."""
        for worker, seconds in measured_s.items():
            if worker in self._est_s:
                seen = self._seen.get(worker)
                if seen is None:
                    seen = self._seen[worker] = deque(maxlen=CALLS)
                seen.append(seconds)

    def learn(self, worker: str, slowness: float) -> None:
        """What this graph takes on a worker, as a multiple of what is estimated without corrections."""
        if worker in self._est_s:
            self._est_s[worker] *= slowness / self.slowness.get(worker, 1.0)
        self.slowness[worker] = slowness

    def ratios(self) -> dict[str, float]:
        """Measured over estimated by worker, where enough calls were seen."""
        return {worker: statistics.median(seen) / self._est_s[worker]
                for worker, seen in self._seen.items() if len(seen) == CALLS}

    def due(self) -> bool:
        """Whether the plan should be made again; `slowness` is up to date then."""
        if self._clock() < self._not_before_s:
            return False
        ratios = self.ratios()
        if all(1 / BOUND <= ratio <= BOUND for ratio in ratios.values()):
            return False
        for worker, ratio in ratios.items():
            self.slowness[worker] = self.slowness.get(worker, 1.0) * ratio
        return True

    @staticmethod
    def better(new_s: float, present_s: float | None) -> bool:
        """Whether a new plan is enough better than the present one, both under corrected costs."""
        return present_s is None or new_s <= MARGIN * present_s

    def present_s(self, est_s: float) -> float:
        """What the present plan takes by what was measured, `est_s` being its estimate."""
        ratios = self.ratios()
        return est_s * max(ratios.values(), default=1.0)


class Membership:
    """The workers of one session, as one graph is planned for them: what comes and goes is planned with ever later.

    The first change is followed at once. A worker that restarts all the time would have every graph planned and loaded
    again each time: each further change doubles the wait for the next plan, until nothing has changed for four waits.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._key: object = None
        self._wait_s = 0.0
        self._changed_s = self._not_before_s = clock()

    def settled(self, key: object) -> bool:
        """Whether it is time to plan for these workers, which may be others than at the last look."""
        now_s = self._clock()
        if key != self._key:
            if self._key is not None:
                often = self._wait_s and now_s - self._changed_s < 4 * self._wait_s
                self._not_before_s = now_s + (self._wait_s if often else 0.0)
                self._wait_s = min(2 * self._wait_s, MAX_WAIT_S) if often else FIRST_WAIT_S
                self._changed_s = now_s
            self._key = key
        return now_s >= self._not_before_s
