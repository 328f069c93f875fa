"""What a worker's state machine is told, and what it answers with.

    events     Received(message), Left(connection), Finished(run), Failed(run), Tick
    commands   Reply, Execute (a run has all it needs to go on), Abandon (forget a run), Measure (when there is time),
               Deliver (to another worker)
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import WIRE_ERRORS, RemoteExecutionError
from genie_dynamo.runtime.worker.records import Repeatable, RunRecord


class Received(NamedTuple):
    connection: bytes
    message: m.Message
    frames: Sequence[Any]
    now_s: float


class Left(NamedTuple):
    """A stream has ended."""

    connection: bytes


class Finished(NamedTuple):
    """A run is complete: `values` are those not sent as Partial, `kept` is aligned with program.keeps, `state` with
    program.state."""

    run: RunRecord
    values: tuple[tuple[int, Any], ...]
    kept: tuple[Any, ...]
    now_s: float
    state: tuple[Any, ...] = ()


class Failed(NamedTuple):
    run: RunRecord
    error: BaseException
    now_s: float


class Tick(NamedTuple):
    now_s: float


class Reply(NamedTuple):
    connection: bytes
    message: m.Message
    frames: Sequence[Any] = ()
    repeatable: Repeatable | None = None      # what this answers, where it may come again as it is
    returned: Sequence[Any] = ()              # the values behind such an answer


class Execute(NamedTuple):
    run: RunRecord


class Abandon(NamedTuple):
    run: RunRecord


class Deliver(NamedTuple):
    """Send a tensor to another worker, and answer the client that asked for it: it is on its way, or why it is not."""

    address: str
    key: str
    letters: Sequence[tuple[m.Land | m.Piece, Sequence[Any]]]     # messages with their frames
    connection: bytes
    request: int


class Measure(NamedTuple):
    """Take a measurement when there is time for it, and answer."""

    connection: bytes
    message: m.Calibrate | m.Probe
    session: bytes


Event = Received | Left | Finished | Failed | Tick
Command = Reply | Execute | Abandon | Measure | Deliver


def failure(request: int, error: BaseException) -> m.Failure:
    """The wire form of an error: one of the names both sides know, or RemoteExecutionError with the type's name."""
    kind = type(error).__name__
    if kind in WIRE_ERRORS:
        facts = {k: v for k, v in getattr(error, "facts", {}).items() if isinstance(v, str | int | float | bool)}
        return m.Failure(request, kind, str(error), facts)
    notes = "".join(f"\n{note}" for note in getattr(error, "__notes__", ()))
    return m.Failure(request, RemoteExecutionError.__name__, f"{error}{notes}", {"exception": kind})
