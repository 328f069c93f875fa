"""Time left for a search, by a clock that is passed in."""
from __future__ import annotations

from collections.abc import Callable

Clock = Callable[[], float]


class Deadline:
    """`limit_s` None: no limit. `quick`: searches do a fixed, short amount of work though there is time for more."""

    def __init__(self, clock: Clock, limit_s: float | None, *, quick: bool = False) -> None:
        self._clock, self._started = clock, clock()
        self.limit_s = limit_s
        self.quick = quick or limit_s is None

    def spent_s(self) -> float:
        return self._clock() - self._started

    def left_s(self) -> float:
        return float("inf") if self.limit_s is None else self.limit_s - self.spent_s()

    def passed(self) -> bool:
        return self.left_s() <= 0

    def allows(self, needed_s: float) -> bool:
        """Whether a step of about this length ends in time."""
        return needed_s <= self.left_s()

    def part(self, share: float, most_s: float = float("inf"), *, quick: bool = False) -> Deadline:
        """A deadline from now over a share of the time left, and at most `most_s`; no limit stays none."""
        limit_s = None if self.limit_s is None else min(share * self.left_s(), most_s)
        return Deadline(self._clock, limit_s, quick=quick or self.quick)

    def share_left(self) -> float:
        """From 1 at the start down to 0 at the limit."""
        return 1.0 if not self.limit_s else max(0.0, self.left_s() / self.limit_s)
