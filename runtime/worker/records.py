"""What a worker remembers: its sessions, their resident tensors and templates, and the runs under way."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import GenieError
from genie_dynamo.core.program import WorkerProgram
from genie_dynamo.runtime.lanes.copies import Tally, Work


@dataclass(slots=True, eq=False)
class RunRecord:
    """One Run message on its way through the worker."""

    session: SessionRecord
    connection: bytes
    message: m.Run
    program: WorkerProgram
    loaded: Any
    env: dict[int, Any]                                    # value id -> value, as far as known
    pending: dict[tuple[int, int], list[int]]              # (tensor id, epoch) still to come -> value ids
    awaited: set[int]                                      # value ids that peers still have to push
    received_s: float
    compute_s: float = 0.0
    queue_s: float = 0.0
    abandoned: bool = False
    state: Any = None                                      # the engine's own
    readers: dict[int, int] = field(default_factory=dict)  # value id -> fragments that have still to take it, for
                                                           # values that nobody wants after the last fragment

    def wants(self, value_id: int) -> bool:
        """Whether a value that a fragment made is used here after it has been sent on."""
        return self.readers.get(value_id, 1) > 0

    def arrived(self, value_id: int, value: Any) -> None:
        self.env[value_id] = value
        self.awaited.discard(value_id)


@dataclass(frozen=True, slots=True)
class Template:
    """The resident arguments of a program's last calls, so that the next ones need not name them."""

    number: int
    env: dict[int, Any]                                    # value id -> tensor
    keys: frozenset[tuple[int, int]]                       # (tensor id, epoch) of what env holds
    others: tuple[int, ...]                                # value ids of the arguments that each call brings


@dataclass(slots=True, eq=False)
class Arriving:
    """A large tensor of which pieces have come."""

    assembly: Any
    sender: bytes                                          # the client's connection; empty: other workers
    heard_s: float                                         # when the last piece came


@dataclass(slots=True, eq=False)
class SessionRecord:
    """One client's life on this worker."""

    token: bytes
    lease_s: float
    last_heard_s: float
    quota_bytes: int = 1 << 62                             # of resident tensors; beyond it what can be re-sent goes
    connections: set[bytes] = field(default_factory=set)
    programs: dict[int, tuple[WorkerProgram, Any, bool]] = field(default_factory=dict)   # the last: small
    tensors: dict[tuple[int, int], Any] = field(default_factory=dict)    # least recently used first
    arriving: dict[tuple[int, int], Arriving] = field(default_factory=dict)
    evicted: list[tuple[int, int]] = field(default_factory=list)         # that the client does not know of yet
    resident_bytes: int = 0
    templates: dict[int, Template] = field(default_factory=dict)         # program id -> its remembered arguments
    mailbox: dict[int, dict[int, Any]] = field(default_factory=dict)     # call id -> value id -> value
    cancelled: dict[int, None] = field(default_factory=dict)             # call ids whose late pushes are dropped
    runs: dict[int, list[RunRecord]] = field(default_factory=dict)       # call id -> runs
    broken: dict[tuple[int, int], GenieError] = field(default_factory=dict)
    pushed_bytes: int = 0                                  # of values of calls, to other workers
    moved_bytes: int = 0                                   # of state, to other workers
    work: Work = field(default_factory=lambda: Work(Tally()))            # counts copies of its payload, but open lanes


class Repeatable(NamedTuple):
    """A run that was carried out at once and had nothing to it but its arguments."""

    session: SessionRecord
    message: m.Run
    value_ids: Sequence[int]          # of its arguments
