"""The messages of the control plane: immutable, tagged, versioned.

On the wire a message is a msgpack array `[tag, *fields]` (core/wire.py packs and bounds it) followed by payload
frames. `to_wire` and `from_wire` convert; an unknown tag, a wrong arity or a wrong field type is a ProtocolError.

Field types:
    tensor   `(dtype code, shape, stride, payload[, gaps])`; see core/tensors.py. The payload is raw bytes
             where small and otherwise the index of a payload frame.
    argument an int, float, bool or None; or `(INLINE, tensor)`; or a handle: `(RESIDENT, tensor id, epoch)` of a
             parameter, a buffer or an activation, `(HELD, tensor id, epoch[, (shape, stride, offset)])` of state, or of
             a view of it (offset in elements from its first), `(MOVED, tensor id, epoch, seconds)` of state that
             another worker sends within that time, `(STORE, tensor id, epoch, tensor)` of state whose content comes
             along. Templates remember RESIDENT arguments, never state: it changes with every call.
    value    an int, float, bool or None; or `(INLINE, tensor)`; or a view of memory that several values share:
             `(SPAN, uint8 tensor, view)` brings the memory, `(ALIAS, index of the value with the SPAN, view)` refers
             to it; `(INPUT_VIEW, view)` is one of the memory of the call's own input, with the offset counted from
             that input's first element; a view is `(dtype code, shape, stride, offset in bytes)`.
"""
from __future__ import annotations

from typing import Any, NamedTuple

from genie_dynamo.core.errors import ProtocolError

PROTOCOL_VERSION = 6

PIECE_BYTES = 1 << 20
"""Contents of resident tensors beyond this travel in pieces: what is more urgent, or another client's, goes in between,
on the lane and in the worker. Small ones share a message of about this size."""
MAX_PIECES = 512
"""Of one tensor: half of what waits in a lane's queue."""

RESIDENT = 0
INLINE = 1
ALIAS = 2
SPAN = 3
INPUT_VIEW = 4
HELD = 5
STORE = 6
MOVED = 7


class Hello(NamedTuple):
    """Client -> worker, first on every connection: who I am and what I speak."""

    version: int
    session: bytes          # 16 random bytes; whoever knows them may push values into the session
    lease_s: float
    facts: dict[str, Any]   # torch version, pid, awareness: for people who read logs
    route: bytes = b""      # on a stream: the connection (Welcome.connection) for answers too large for a stream


class Welcome(NamedTuple):
    """Worker -> client."""

    version: int
    incarnation: str
    heartbeat_address: str
    stream_address: str     # where the worker takes runs over a stream (runtime/lanes/stream.py); empty: nowhere
    connection: bytes       # how the worker names this connection
    lanes: tuple[Any, ...]  # native lanes it offers, best first: (name, version, address)
    facts: dict[str, Any]   # device, threads, torch version, pid, memory


class Load(NamedTuple):
    """Client -> worker: a worker's share of a plan (core/program.py). Answered by Done."""

    request: int
    program: tuple[Any, ...]


class Have(NamedTuple):
    """Client -> worker: which of these contents (sha256) do you hold? Answered by Done(tuple of bools)."""

    request: int
    digests: tuple[bytes, ...]


class Put(NamedTuple):
    """Client -> worker: contents of resident tensors. Not answered; a bad one fails the runs that want it.

    Each is `(tensor id, epoch, tensor, digest)`; the digest is the sha256 of the bytes where the client wants them
    found again, else None, and the worker recomputes it.
    """

    contents: tuple[Any, ...]


class Piece(NamedTuple):
    """Client or worker -> worker: a part of the content of a large resident tensor. Not answered.

    All have `piece_bytes(of the whole)`, the last one perhaps less. A client's come in order, and one at 0 begins anew;
    another worker's may come out of order, and twice.
    """

    session: bytes          # from a worker that moves state here; empty from the client, whose connection says it
    tensor_id: int
    epoch: int
    tensor: tuple[Any, ...]     # what the whole of it is; the payload is this piece's
    digest: bytes | None    # as in Put, of the whole; None from a worker
    offset: int             # of the piece's first byte


class Adopt(NamedTuple):
    """Client -> worker: like Put, for content the worker said it has."""

    tensor_id: int
    epoch: int
    digest: bytes


class Run(NamedTuple):
    """Client -> worker: run a loaded program. Answered by Partial* then Result, or by Failure."""

    request: int
    program_id: int
    call_id: int
    arguments: tuple[Any, ...]               # aligned with program.inputs
    keeps: tuple[tuple[int, int], ...]       # (tensor id, epoch) for program.keeps, in order; empty: return them
    incoming: tuple[tuple[int, int], ...]    # (tensor id, epoch) that a Put, Pieces or a Run before this one bring
    frees: tuple[tuple[int, int], ...]       # (tensor id, epoch) no longer needed
    template: int = 0
    """Resident arguments need not be said in every call. n > 0: remember this call's as template n of the program;
    -n: take them from template n, `arguments` holds the others; 0: neither. Only epochs >= 1 are remembered."""
    state: tuple[tuple[int, int], ...] = ()  # (tensor id, epoch) for program.state, in order; (0, 0) or empty: not kept


class Partial(NamedTuple):
    """Worker -> client: outputs that were ready before the end: ((index in program.returns, value), ...)."""

    request: int
    values: tuple[Any, ...]


class Result(NamedTuple):
    """Worker -> client: the rest of the outputs, what the kept ones look like, and what it cost."""

    request: int
    values: tuple[Any, ...]                  # ((index in program.returns, value), ...)
    kept: tuple[Any, ...]                    # (dtype code, shape, stride) or a scalar, per program.keeps
    compute_s: float
    queue_s: float
    resident_bytes: int
    state: tuple[Any, ...] = ()              # (dtype code, shape, stride) per program.state, or None; empty: none kept
    evicted: tuple[tuple[int, int], ...] = ()    # (tensor id, epoch) that had to go since the last Result


class Failure(NamedTuple):
    """Worker -> client: the request did not happen; nothing it would have changed has changed."""

    request: int
    kind: str                                # a name of core/errors.py:WIRE_ERRORS
    message: str
    facts: dict[str, Any]


class Done(NamedTuple):
    """Worker -> client: a request without tensors has been carried out."""

    request: int
    info: Any


class Push(NamedTuple):
    """Worker -> worker: an intermediate value of a call."""

    session: bytes
    call_id: int
    value_id: int
    value: Any                               # an argument


class Cancel(NamedTuple):
    """Client -> worker: forget the runs and mailbox of a call. Not answered."""

    call_id: int


class Free(NamedTuple):
    """Client -> worker: drop resident tensors. Not answered."""

    tensors: tuple[tuple[int, int], ...]


class Drop(NamedTuple):
    """Client -> worker: a graph was collected; drop its program. Not answered."""

    program_id: int


class Fetch(NamedTuple):
    """Client -> worker: send me a resident tensor. Answered by Result with one value."""

    request: int
    tensor_id: int
    epoch: int


class Stats(NamedTuple):
    """Client -> worker: memory, counters. Answered by Done(dict)."""

    request: int


class Calibrate(NamedTuple):
    """Client -> worker: measure what you can do (core/hardware.py), in small steps and while nothing else is to be
    done; `fresh` also where it is known from before. Answered by Done(dict)."""

    request: int
    fresh: bool


class Echo(NamedTuple):
    """Client or worker -> worker: send the value back, so that the lane can be timed. Answered by Result."""

    request: int
    session: bytes
    value: Any                               # an argument


class Probe(NamedTuple):
    """Client -> worker: time echoes of a payload to another worker. Answered by Done(dict of seconds)."""

    request: int
    address: str
    key: str                                 # the other worker's public key, or ""
    offers: tuple[Any, ...]                  # native lanes that it offers: (name, version, address), best first
    size_bytes: int


class Move(NamedTuple):
    """Client -> worker: send a resident tensor to another worker of the session. Answered by Done once it is sent."""

    request: int
    tensor_id: int
    epoch: int
    address: str
    key: str                                 # the other worker's public key, or ""


class Land(NamedTuple):
    """Worker -> worker: a resident tensor of a session that moves. Not answered; runs that name it wait for it."""

    session: bytes
    tensor_id: int
    epoch: int
    tensor: tuple[Any, ...]


class Profile(NamedTuple):
    """Client -> worker: the times of a program's nodes in its latest runs, and take them in its next ones. Answered by
    Done(((seconds per node, ...) or None where they have not run yet, per fragment))."""

    request: int
    program_id: int


class Compress(NamedTuple):
    """Client -> worker: from here on frames over this connection may come compressed, both ways, by these codecs
    (runtime/lanes/compression.py; Welcome.facts says which the worker has). Answered by Done, or by Failure."""

    request: int
    codecs: tuple[Any, ...]
    bytes_per_s: float                       # of the lane, as the client has measured it


class Ping(NamedTuple):
    """Client -> worker: keeps the session's lease. Not answered."""


class Bye(NamedTuple):
    """Client -> worker: the session ends; everything of it is freed. Answered by Done."""

    request: int


Message = (
    Hello | Welcome | Load | Have | Put | Adopt | Run | Partial | Result | Failure | Done | Push | Cancel | Free
    | Drop | Fetch | Stats | Ping | Bye | Calibrate | Echo | Probe | Move | Land | Profile | Piece
    | Compress
)

_TYPES: tuple[type[Any], ...] = (
    Hello, Welcome, Load, Have, Put, Adopt, Run, Partial, Result, Failure, Done, Push, Cancel, Free, Drop, Fetch,
    Stats, Ping, Bye, Calibrate, Echo, Probe, Move, Land, Profile, Piece, Compress,
)
_TAG_OF: dict[type[Any], int] = {cls: tag for tag, cls in enumerate(_TYPES)}
_NUMBER = (int, float)
_FIELD_TYPES: dict[str, Any] = {
    "version": int, "session": bytes, "lease_s": _NUMBER, "facts": dict, "incarnation": str,
    "heartbeat_address": str, "stream_address": str, "connection": bytes, "route": bytes, "request": int,
    "program": tuple, "digests": tuple, "tensor_id": int, "epoch": int, "tensor": tuple,
    "digest": (bytes, type(None)), "program_id": int, "call_id": int, "arguments": tuple, "keeps": tuple,
    "incoming": tuple, "frees": tuple, "values": tuple, "kept": tuple, "compute_s": _NUMBER, "queue_s": _NUMBER,
    "resident_bytes": int, "kind": str, "message": str, "value_id": int, "tensors": tuple, "value": object,
    "info": object, "template": int, "lanes": tuple, "fresh": bool, "address": str, "key": str, "size_bytes": int,
    "state": tuple, "evicted": tuple, "offers": tuple, "contents": tuple, "offset": int,
    "codecs": tuple, "bytes_per_s": _NUMBER,
}
_CHECKS: tuple[tuple[Any, ...], ...] = tuple(tuple(_FIELD_TYPES[f] for f in cls._fields) for cls in _TYPES)
_PAIR_FIELDS = frozenset({"keeps", "incoming", "frees", "tensors", "evicted"})
_PAIRS: tuple[tuple[int, ...], ...] = tuple(
    tuple(index for index, field in enumerate(cls._fields, 1)
          if field in _PAIR_FIELDS or (cls is Run and field == "state")) for cls in _TYPES)


def piece_bytes(size_bytes: int) -> int:
    """How large the pieces of a content are."""
    return PIECE_BYTES * max(1, -(-size_bytes // (PIECE_BYTES * MAX_PIECES)))


def to_wire(message: Message) -> tuple[Any, ...]:
    """`(tag, *fields)`, ready for core.wire.pack."""
    return (_TAG_OF[type(message)], *message)


def from_wire(data: Any) -> Message:
    """The message behind an unpacked array.

    Raises: ProtocolError for anything that is not exactly one of the messages above.
    """
    if type(data) is not tuple or not data:
        raise ProtocolError(f"a message must be a non-empty array, got {type(data).__name__}")
    tag = data[0]
    if type(tag) is not int or not 0 <= tag < len(_TYPES):
        raise ProtocolError(f"unknown message tag {tag!r}; this side knows 0..{len(_TYPES) - 1}")
    cls, checks = _TYPES[tag], _CHECKS[tag]
    if len(data) != len(checks) + 1:
        raise ProtocolError(f"{cls.__name__} has {len(checks)} fields, got {len(data) - 1}")
    for index, kind in enumerate(checks, 1):
        if not isinstance(data[index], kind):
            raise ProtocolError(
                f"{cls.__name__}.{cls._fields[index - 1]} must be {kind}, got {type(data[index]).__name__}"
            )
    for index in _PAIRS[tag]:
        for pair in data[index]:
            if type(pair) is not tuple or len(pair) != 2 or type(pair[0]) is not int or type(pair[1]) is not int:
                raise ProtocolError(f"{cls.__name__}.{cls._fields[index - 1]} must hold (tensor id, epoch) pairs")
    message: Message = cls(*data[1:])
    return message
