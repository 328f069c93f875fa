"""One call over the workers of a plan, as a state machine without I/O.

    events     Answered(worker, message), Broke(worker, error)
    outcome    None while open; then `values` are complete, or `error` says why the call did not happen

A call succeeds only when every worker has answered with its Result. Until then nothing is committed.
"""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import GenieError, ProtocolError


@dataclass(frozen=True, slots=True)
class Answered:
    """A message from a worker that belongs to this call; `landed` are its values as tensors and numbers."""

    worker: int
    message: m.Message
    landed: tuple[tuple[int, Any], ...] = ()


@dataclass(frozen=True, slots=True)
class Broke:
    """The way to a worker, or the worker, is gone; or a deadline has passed."""

    worker: int
    error: GenieError


class CallState:
    """See the module's docstring.

    Args: num_returns: worker -> how many values its program returns (kept ones included where they come back).
    """

    def __init__(self, num_returns: dict[int, int]) -> None:
        self._num_returns = num_returns
        self.values: dict[int, dict[int, Any]] = {worker: {} for worker in num_returns}
        self.results: dict[int, m.Result] = {}
        self.error: GenieError | None = None

    @property
    def open_workers(self) -> list[int]:
        """Workers that still owe their Result."""
        return [worker for worker in self._num_returns if worker not in self.results]

    @property
    def done(self) -> bool:
        return self.error is not None or len(self.results) == len(self._num_returns)

    def handle(self, event: Answered | Broke) -> None:
        """Advance by one event. The first error decides the call; later events change nothing."""
        if self.error is not None:
            return
        if isinstance(event, Broke):
            self.error = event.error
            return
        have, expected = self.values[event.worker], self._num_returns[event.worker]
        for index, value in event.landed:
            if not 0 <= index < expected or index in have:
                self.error = ProtocolError(f"worker {event.worker} sent value {index} of {expected} unasked or twice")
                return
            have[index] = value
        if isinstance(event.message, m.Result):
            if len(have) != expected:
                self.error = ProtocolError(f"worker {event.worker} returned {len(have)} of {expected} values")
                return
            self.results[event.worker] = event.message
