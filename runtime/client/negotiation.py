"""Which way payload takes between this process and a worker: offered, tried, proven, measured, and said.

    offers (Welcome.lanes, best first) -> version -> connect -> hello -> echo of a nonce -> (once per worker) rate

A lane counts as usable only after bytes that nobody could guess have come back through it as they were sent. That two
ends are on one host, or that a port is open, proves nothing.
"""
from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import AuthenticationError, GenieError, LaneUnavailableError, ProtocolError
from genie_dynamo.core.program import Offers
from genie_dynamo.runtime.client.connection import POLL_MS, Connection, beside, to_error
from genie_dynamo.runtime.lanes import native, stream
from genie_dynamo.runtime.lanes.compression import Compression
from genie_dynamo.runtime.lanes.ends import SocketEnd, connect_native, is_loopback
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames

log = logging.getLogger(__name__)

NONCE_BYTES = 64 << 10
RATE_BYTES = 4 << 20
RATE_ECHOES = 3
PROOF_TIMEOUT_S = 10.0


@dataclass(slots=True)
class LaneChoice:
    """The way to one worker, and why it is this one."""

    name: str = ""                                            # "shm", "tcp", "stream", "zmq"; empty: not decided yet
    reason: str = ""
    gb_per_s: float = 0.0                                     # one way, of RATE_BYTES; 0: not measured
    refused: dict[str, str] = field(default_factory=dict)     # other lanes -> why not

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "reason": self.reason, "gb_per_s": round(self.gb_per_s, 3),
                "refused": dict(self.refused)}

    def __str__(self) -> str:
        rate = f", {self.gb_per_s:.2f} GB/s" if self.gb_per_s else ""
        why_not = "".join(f"; not {name}: {why}" for name, why in self.refused.items())
        return f"{self.name}{rate} ({self.reason}{why_not})"


def negotiate(connection: Connection, welcome: m.Welcome, choice: LaneChoice, token: bytes, lease_s: float,
              timeout_s: float, require: str | None, spin_s: float = 0.0) -> None:
    """Open the best way that works; `choice` keeps what is found, and which lanes are not to be tried again.

    Args:   spin_s: how long who waits for an answer over a native lane polls before it sleeps.
    Raises: LaneUnavailableError where the required one does not work.
    """
    decided = choice.name
    if native.module() is None:
        choice.refused.setdefault("native lanes", native.why_not())
    for name, version, address in offers_of(welcome, connection.address) if native.module() is not None else ():
        if name in choice.refused or (require is not None and name != require):
            continue
        why_not = _try(connection, welcome, name, version, address, token, lease_s, timeout_s, spin_s)
        if why_not:
            log.info("worker at %s: no %s lane: %s", connection.address, name, why_not)
            choice.refused[name] = why_not
            continue
        _decide(connection, choice, name, token, measured=decided == name)
        return
    if require not in (None, "zmq", "stream"):
        why = choice.refused.get(str(require), native.why_not() or "the worker does not offer it")
        raise LaneUnavailableError(f"require_lane={require!r}, and worker {connection.address} cannot be reached over "
                                   f"it: {why}; see `genie lanes`", lane=require, address=connection.address)
    if require != "zmq" and welcome.stream_address and _open_stream(connection, welcome, choice, token, lease_s,
                                                                    timeout_s):
        choice.name, choice.reason = "stream", "small runs take a plain socket, the rest ZeroMQ"
        return
    if require == "stream":
        raise LaneUnavailableError(f"require_lane='stream', and worker {connection.address} offers none that opens: "
                                   f"{choice.refused.get('stream', 'it asks for keys')}", lane=require)
    choice.name = "zmq"
    choice.reason = "required" if require == "zmq" else "nothing better works"


def agree_on_compression(connection: Connection, welcome: m.Welcome, choice: LaneChoice, names: Sequence[str],
                         token: bytes, counted: Counter[str]) -> str:
    """Compress what travels over the way that was chosen, where it leaves this host. Returns: what was agreed, or why
    nothing was.

    Args:   names: codecs that this side has and may use.  counted: see Compression.
    Raises: what the worker reports, or WorkerError.
    """
    if choice.name == "stream" or choice.name not in ("tcp", "zmq"):
        return f"off: the {choice.name} lane is not compressed"
    if not leaves_host(connection.address):
        return f"off: {connection.address} is this host"
    theirs = welcome.facts.get("codecs")
    both = [name for name in names if isinstance(theirs, tuple) and name in theirs]
    if not both:
        return f"off: the worker has {theirs or 'no codec'}, this side may use {tuple(names)}"
    if not choice.gb_per_s:
        choice.gb_per_s = _rate(connection, token)
    bytes_per_s = choice.gb_per_s * 1e9
    request = connection.next_request()
    connection.ask(m.Compress(request, tuple(both), bytes_per_s), time.monotonic() + PROOF_TIMEOUT_S)
    connection.compression = Compression(both, bytes_per_s, counted)
    return f"{' or '.join(both)}, where a sample pays at {choice.gb_per_s:.3g} GB/s"


def leaves_host(address: str) -> bool:
    """Whether a worker's address is reached over a network."""
    return address.startswith("tcp://") and not is_loopback(address.removeprefix("tcp://"))


def lane_lost(choice: LaneChoice, name: str, reason: str) -> None:
    """A lane broke in use: it is not tried again in this link's life."""
    choice.refused[name] = f"it broke: {reason}"


def offers_of(welcome: m.Welcome, address: str) -> Offers:
    """The native lanes that a worker offers, at the host under which we reach it. Raises: ProtocolError."""
    offers = []
    for row in welcome.lanes:
        if type(row) is not tuple or len(row) != 3 or type(row[0]) is not str or type(row[1]) is not int \
                or type(row[2]) is not str:
            raise ProtocolError(f"a lane is offered as (name, version, address), got {row!r:.80}")
        name, version, where = row
        offers.append((name, version, beside(address, f"tcp://{where}").removeprefix("tcp://") if name == "tcp"
                       else where))
    return tuple(offers)


def _try(connection: Connection, welcome: m.Welcome, name: str, version: int, address: str, token: bytes,
         lease_s: float, timeout_s: float, spin_s: float) -> str:
    """Open and prove one lane; why it cannot be used, or nothing."""
    if version != native.lane_version():
        return f"the worker speaks version {version} of it, this client {native.lane_version()}"
    try:
        end = connect_native(name, address, min(timeout_s, PROOF_TIMEOUT_S), POLL_MS / 1000, spin_s)
    except OSError as error:
        return str(error)
    try:
        connection.open_end(end, welcome.connection, token, lease_s, timeout_s)
        nonce = torch.randint(256, (NONCE_BYTES,), dtype=torch.uint8, device="cpu", generator=_fresh_generator())
        if not torch.equal(_echo(connection, token, nonce), nonce):
            raise ProtocolError("what came back is not what was sent")
    except GenieError as error:
        connection.close_end()
        return f"it was opened but not proven: {error}"
    return ""


def _fresh_generator() -> torch.Generator:
    """Random bytes that leave the caller's generator as it is."""
    generator = torch.Generator()
    generator.seed()
    return generator


def _decide(connection: Connection, choice: LaneChoice, name: str, token: bytes, *, measured: bool) -> None:
    choice.name = name
    choice.reason = "the best of those offered" if not choice.refused else "the best of those that work"
    if measured and choice.gb_per_s:
        return
    choice.gb_per_s = _rate(connection, token)


def _rate(connection: Connection, token: bytes) -> float:
    """GB/s one way, of RATE_BYTES."""
    payload = torch.zeros(RATE_BYTES, dtype=torch.uint8, device="cpu")
    best_s = float("inf")
    for _ in range(RATE_ECHOES):
        started_s = time.perf_counter()
        _echo(connection, token, payload)
        best_s = min(best_s, time.perf_counter() - started_s)
    return 2 * RATE_BYTES / best_s / 1e9


def _echo(connection: Connection, token: bytes, payload: torch.Tensor) -> torch.Tensor:
    frames: list[Any] = []
    lane, request = ZmqFrames(), connection.next_request()
    value = (m.INLINE, lane.stage(payload, frames))
    deadline_s = time.monotonic() + PROOF_TIMEOUT_S
    connection.request(m.Echo(request, token, value), frames)
    while True:
        answer, returned, _ = connection.receive(deadline_s)
        if isinstance(answer, m.Failure):
            raise to_error(answer, connection.address)
        if isinstance(answer, m.Result) and answer.request == request:
            return lane.land(answer.values[0][1][1], returned, torch.device("cpu"))


def _open_stream(connection: Connection, welcome: m.Welcome, choice: LaneChoice, token: bytes, lease_s: float,
                 timeout_s: float) -> bool:
    try:
        sock = stream.connect(beside(connection.address, welcome.stream_address), POLL_MS / 1000, timeout_s)
    except (OSError, AuthenticationError) as error:
        log.info("no stream to %s: %s", connection.address, error)
        choice.refused["stream"] = str(error)
        return False
    connection.open_end(SocketEnd(sock), welcome.connection, token, lease_s, timeout_s)
    return True
