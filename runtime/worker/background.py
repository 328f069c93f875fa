"""Work beside the calls: a worker's own measurements, taken in small steps while nothing else is to be done.

A step lasts some tens of milliseconds at most, and the messages that have come meanwhile are read before the next one:
that is the longest that a call waits for a measurement.
"""
from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

import torch
import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import WIRE_ERRORS, ProtocolError, RemoteExecutionError, WorkerTimeoutError
from genie_dynamo.core.wire import pack, unpack
from genie_dynamo.runtime import calibration
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames, send_parts
from genie_dynamo.runtime.worker.echoes import ECHOES, LaneTimes
from genie_dynamo.runtime.worker.events import Measure, Reply, failure

Steps = Generator[None, None, dict[str, Any]]

SMALL_BYTES = 1 << 10
PEER_TIMEOUT_S = 10.0
_STEP_S = 0.02


@dataclass(frozen=True, slots=True)
class _Task:
    connection: bytes
    request: int
    steps: Steps


class Background:
    """Measurements that were asked for and are not done yet."""

    def __init__(self, device: torch.device, num_threads: int, open_peer: Callable[[str, str], zmq.Socket[bytes]],
                 reply: Callable[[Reply], None]) -> None:
        self._device, self._num_threads = device, num_threads
        self._open_peer, self._reply = open_peer, reply
        self._tasks: deque[_Task] = deque()

    def __bool__(self) -> bool:
        return bool(self._tasks)

    def add(self, command: Measure) -> None:
        message = command.message
        if isinstance(message, m.Probe):
            steps = self._probe(message, command.session)
        else:
            steps = self._calibrate(message.fresh)
        self._tasks.append(_Task(command.connection, message.request, steps))

    def step(self) -> None:
        """One step of the oldest task."""
        task = self._tasks[0]
        try:
            next(task.steps)
            return
        except StopIteration as stop:
            answer: m.Message = m.Done(task.request, stop.value)
        except Exception as error:
            # A measurement that fails is its asker's business; the worker goes on.
            answer = failure(task.request, error)
        self._tasks.popleft()
        self._reply(Reply(task.connection, answer))

    def close(self) -> None:
        """Give up what is not done: sockets are closed."""
        for task in self._tasks:
            task.steps.close()
        self._tasks.clear()

    def _calibrate(self, fresh: bool) -> Steps:
        facts = None if fresh else calibration.cached(self._device, self._num_threads)
        if facts is None:
            facts = yield from calibration.measure(self._device, self._num_threads)
            calibration.remember(self._device, self._num_threads, facts)
        return facts.to_json()

    def _probe(self, message: m.Probe, session: bytes) -> Steps:
        """Send payload to another worker and wait for it to come back: over the lane that pushes take, else ZeroMQ."""
        lane = LaneTimes(message.offers, session, (SMALL_BYTES, message.size_bytes))
        while not lane.wait(_STEP_S):
            yield
        if lane.name:
            return {"small_s": lane.best_s[SMALL_BYTES], "large_s": lane.best_s[message.size_bytes],
                    "size_bytes": message.size_bytes, "lane": lane.name}
        socket = self._open_peer(message.address, message.key)
        try:
            small_s = yield from _echoes(socket, session, SMALL_BYTES)
            large_s = yield from _echoes(socket, session, message.size_bytes)
        finally:
            socket.close(linger=0)
        return {"small_s": small_s, "large_s": large_s, "size_bytes": message.size_bytes, "lane": "zmq"}


def _echoes(socket: zmq.Socket[bytes], session: bytes, size_bytes: int) -> Generator[None, None, float]:
    """Seconds of the fastest round trip."""
    lane, best_s = ZmqFrames(), float("inf")
    payload = torch.ones(size_bytes, dtype=torch.uint8)
    for request in range(1, ECHOES + 1):
        frames: list[Any] = []
        echo = m.Echo(request, session, (m.INLINE, lane.stage(payload, frames)))
        started_s = time.monotonic()
        send_parts(socket, [pack(m.to_wire(echo)), *frames])
        while not socket.poll(int(_STEP_S * 1000)):
            if time.monotonic() - started_s > PEER_TIMEOUT_S:
                raise WorkerTimeoutError(f"the other worker did not answer an echo of {size_bytes} bytes within "
                                         f"{PEER_TIMEOUT_S:g} s")
            yield
        _land(socket, lane)
        best_s = min(best_s, time.monotonic() - started_s)
        yield
    return best_s


def _land(socket: zmq.Socket[bytes], lane: ZmqFrames) -> None:
    """Take in the payload that came back."""
    header, *frames = socket.recv_multipart(copy=False)
    answer = m.from_wire(unpack(header.buffer, flat=True))
    if isinstance(answer, m.Failure):
        raise WIRE_ERRORS.get(answer.kind, RemoteExecutionError)(answer.message)
    if not isinstance(answer, m.Result):
        raise ProtocolError(f"the other worker answered an echo with {type(answer).__name__}")
    lane.land(answer.values[0][1][1], frames, torch.device("cpu"))
