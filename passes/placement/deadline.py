"""Time left for a search, by a clock that is passed in."""
from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]


class Deadline:
    """`limit_s` None: no limit, and searches do a fixed amount of work instead."""

    def __init__(self, clock: Clock, limit_s: float | None) -> None:
        self._clock, self._started = clock, clock()
        self.limit_s = limit_s

    def spent_s(self) -> float:
        return self._clock() - self._started

    def left_s(self) -> float:
        return float("inf") if self.limit_s is None else self.limit_s - self.spent_s()

    def passed(self) -> bool:
        return self.left_s() <= 0

    def allows(self, needed_s: float) -> bool:
        """Whether a step of about this length ends in time."""
        return needed_s <= self.left_s()

    def slice(self, seconds: float) -> Deadline:
        """A deadline from now, no later than this one. `seconds` is finite: no limit is no slice."""
        return Deadline(self._clock, min(seconds, self.left_s()))

    def share_left(self) -> float:
        return 1.0 if self.limit_s is None else max(0.0, self.left_s() / self.limit_s) if self.limit_s else 0.0
