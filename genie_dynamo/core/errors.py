"""Every error a user of genie can meet.

    GenieError
    ├── ConfigError              an option, environment variable or file that cannot be used (also a ValueError)
    ├── CostGraphError           a cost graph or device that cannot be: a cycle, a negative cost (also a ValueError)
    ├── PlacementError           no placement obeys the limits (memory, support, colocation, latency bound)
    ├── PlanError                a plan that breaks its own rules: our bug or a hand-written plan
    ├── CostError                a cost that cannot be computed: an unknown size, a formula that does not fit
    ├── UnsupportedGraphError    your model asks for what cannot be shipped (strict mode; otherwise it runs locally)
    ├── SessionError
    │   ├── SessionClosedError   you closed it (shutdown), or a forked child used its parent's session
    │   └── SessionExpiredError  the worker gave up on a client that it had not heard from
    ├── WorkerError              the other side broke
    │   ├── WorkerUnreachableError   nobody answers at the address
    │   ├── WorkerLostError          it answered once and is gone now
    │   ├── LaneLostError            the payload lane broke, the worker lives: the call takes the next best lane
    │   ├── LaneUnavailableError     require_lane names a lane that these two ends cannot use
    │   ├── WorkerTimeoutError       alive, but the deadline passed (also a TimeoutError)
    │   ├── WorkerMemoryError        out of memory there; the worker lives on
    │   ├── WorkerBusyError          it is draining, or too many requests wait
    │   └── RemoteExecutionError     an op raised on the worker where eager would raise too
    ├── ProtocolError            bytes that are not our protocol
    │   ├── VersionMismatchError     two releases that do not understand each other
    │   └── MessageLimitError        a message, tensor or list beyond a stated limit
    ├── StaleHandleError         a handle of an old epoch, a dead incarnation or a foreign session
    └── AuthenticationError      a key that is missing, wrong or not on the list

Facts are attributes (see each class); messages say what, where, the numbers and the next step.
"""
from __future__ import annotations

from typing import Any


class GenieError(Exception):
    """Base of the tree. Keyword facts become attributes: `GenieError("...", worker="w0").worker`."""

    def __init__(self, message: str, **facts: Any) -> None:
        super().__init__(message)
        self.facts = facts
        for name, value in facts.items():
            setattr(self, name, value)


class ConfigError(GenieError, ValueError):
    """An option, environment variable or file that cannot be used."""


class CostGraphError(GenieError, ValueError):
    """A cost graph or a device that contradicts itself."""


class PlacementError(GenieError):
    """No placement obeys the limits, or none was found in the time given; the message says which."""


class PlanError(GenieError):
    """A plan that breaks its own rules."""


class CostError(GenieError):
    """A cost that cannot be computed, such as one of a size that nobody knows."""


class UnsupportedGraphError(GenieError):
    """A graph that cannot be shipped to a worker; raised only in strict mode."""


class SessionError(GenieError):
    """Something is wrong with this client's session."""


class SessionClosedError(SessionError):
    """The session was closed by this process, or belongs to the parent of this one."""


class SessionExpiredError(SessionError):
    """The worker dropped the session because the client was silent for longer than its lease."""


class WorkerError(GenieError):
    """The worker, or the way to it, broke."""


class WorkerUnreachableError(WorkerError):
    """Nobody answers at the address."""


class WorkerLostError(WorkerError):
    """The worker answered before and is gone now."""


class LaneLostError(WorkerError):
    """The lane of a call broke while its worker lives. The call is repeated over the next best lane."""


class LaneUnavailableError(WorkerError):
    """`require_lane` names a lane that cannot be used with a worker; the message says why."""


class WorkerTimeoutError(WorkerError, TimeoutError):
    """The worker is alive, but a request outlived its deadline."""


class WorkerMemoryError(WorkerError):
    """The worker ran out of memory for this call; it lives on."""


class WorkerBusyError(WorkerError):
    """The worker refuses new work for now."""


class RemoteExecutionError(WorkerError, RuntimeError):
    """An op raised on the worker. A RuntimeError too, as eager's would be."""


class ProtocolError(GenieError):
    """Bytes that are not our protocol."""


class VersionMismatchError(ProtocolError):
    """Client and worker speak different protocol versions."""


class MessageLimitError(ProtocolError):
    """A message, tensor or list beyond a stated limit."""


class StaleHandleError(GenieError):
    """A handle of an old epoch, a dead incarnation or a foreign session."""


class AuthenticationError(GenieError):
    """A key that is missing, wrong or not on the list."""


# What a worker may report by name. Anything else becomes a RemoteExecutionError.
WIRE_ERRORS: dict[str, type[GenieError]] = {
    cls.__name__: cls
    for cls in (
        PlanError,
        UnsupportedGraphError,
        SessionExpiredError,
        WorkerMemoryError,
        WorkerBusyError,
        RemoteExecutionError,
        ProtocolError,
        VersionMismatchError,
        MessageLimitError,
        StaleHandleError,
        AuthenticationError,
    )
}
