"""Asks workers what they can do, and times the ways to them and between them."""
from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, TypeVar

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.fragment import decode
from genie_dynamo.core.hardware import HardwareFacts, LinkFacts
from genie_dynamo.core.program import WorkerProgram
from genie_dynamo.runtime.client.connection import Connection, to_error
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames

T = TypeVar("T")

ECHOES = 5
SMALL_BYTES = 1 << 10
LARGE_BYTES = 4 << 20
CLIENT = "client"
_MAX_NAME = 32


def hardware_of(link: WorkerLink, timeout_s: float, *, fresh: bool = False) -> HardwareFacts:
    """What a worker's device can do: from its cache, or measured (under a second of an idle worker's time).

    Raises: WorkerTimeoutError where it is busy for longer; CostError where its answer is not what facts look like.
    """
    answer = link.ask(lambda request: m.Calibrate(request, fresh), timeout_s)
    return HardwareFacts.from_json(_info(answer, link.address))


def link_to(link: WorkerLink, timeout_s: float, size_bytes: int = LARGE_BYTES) -> LinkFacts:
    """The way between this process and a worker, by echoes of payload."""
    deadline_s = time.monotonic() + timeout_s
    with link.connection() as connection:
        small_s, large_s = (_echo(connection, link.token, size, deadline_s)
                            for size in (SMALL_BYTES, size_bytes))
    return _facts(CLIENT, link.name, link.lane.name, small_s, large_s, size_bytes)


def link_between(start: WorkerLink, end: WorkerLink, timeout_s: float, size_bytes: int = LARGE_BYTES) -> LinkFacts:
    """The way between two workers, timed by the first: the lane that it would push over."""
    key = (end.server_key or b"").decode()
    answer = start.ask(lambda request: m.Probe(request, end.address, key, end.offers, size_bytes), timeout_s)
    info = _info(answer, start.address)
    small_s, large_s = info.get("small_s"), info.get("large_s")
    if not (isinstance(small_s, float) and isinstance(large_s, float) and min(small_s, large_s) > 0):
        raise ProtocolError(f"{start.address} answered a probe with {info!r:.80}")
    lane = info.get("lane")
    if type(lane) is not str or len(lane) > _MAX_NAME:
        raise ProtocolError(f"{start.address} answered a probe with the lane {lane!r:.40}")
    return _facts(start.name, end.name, lane, small_s, large_s, size_bytes)


def links_among(workers: Sequence[WorkerLink], timeout_s: float) -> tuple[LinkFacts, ...]:
    """Client to each worker, and each pair of workers once (an echo goes both ways)."""
    found = [link_to(link, timeout_s) for link in workers]
    found += [link_between(start, end, timeout_s) for index, start in enumerate(workers)
              for end in workers[index + 1:]]
    return tuple(found)


def node_seconds_of(link: WorkerLink, program: WorkerProgram, timeout_s: float) -> dict[str, float]:
    """Seconds by node of a program's runs since the last time this was asked; its next few runs are timed.

    Raises: ProtocolError where the answer does not fit the program; what the worker reports.
    """
    info = _info_of(link.ask(lambda request: m.Profile(request, program.program_id), timeout_s), link.address, tuple)
    if len(info) != len(program.fragments):
        raise ProtocolError(f"{link.address} has times of {len(info)} fragments, {len(program.fragments)} are loaded")
    found: dict[str, float] = {}
    for times, fragment in zip(info, program.fragments, strict=True):
        if times is None:
            continue
        names = [node.name for node in decode(fragment.spec).nodes]
        if type(times) is not tuple or len(times) != len(names) or not all(
                type(t) is float and math.isfinite(t) and t >= 0 for t in times):
            raise ProtocolError(f"{link.address} answered with times that do not fit fragment {fragment.fragment_id}")
        found.update(zip(names, times, strict=True))
    return found


def _echo(connection: Connection, session: bytes, size_bytes: int, deadline_s: float) -> float:
    """Seconds of the fastest round trip."""
    lane, best_s = ZmqFrames(), float("inf")
    payload = torch.ones(size_bytes, dtype=torch.uint8, device="cpu")
    for _ in range(ECHOES):
        frames: list[Any] = []
        request = connection.next_request()
        started_s = time.perf_counter()
        connection.request(m.Echo(request, session, (m.INLINE, lane.stage(payload, frames))), frames)
        answer, returned, _ = connection.receive(deadline_s)
        while getattr(answer, "request", None) not in (request, 0):
            answer, returned, _ = connection.receive(deadline_s)
        if isinstance(answer, m.Failure):
            raise to_error(answer, connection.address)
        if not isinstance(answer, m.Result):
            raise ProtocolError(f"{connection.address} answered an echo with {type(answer).__name__}")
        lane.land(answer.values[0][1][1], returned, torch.device("cpu"))
        best_s = min(best_s, time.perf_counter() - started_s)
    return best_s


def _facts(start: str, end: str, lane: str, small_s: float, large_s: float, size_bytes: int) -> LinkFacts:
    """One way is half of a round trip; what a large payload takes longer than a small one is its bytes."""
    rate = 2 * size_bytes / max(large_s - small_s, large_s / 10)
    return LinkFacts(start=start, end=end, latency_s=small_s / 2, bytes_per_s=rate,
                     source=f"fastest of {ECHOES} echoes of {SMALL_BYTES} and {size_bytes} bytes over {lane}")


def _info(answer: m.Message, address: str) -> dict[str, Any]:
    return _info_of(answer, address, dict)


def _info_of(answer: m.Message, address: str, kind: type[T]) -> T:
    if not isinstance(answer, m.Done) or not isinstance(answer.info, kind):
        raise ProtocolError(f"{address} answered a measurement with {type(answer).__name__}")
    return answer.info
