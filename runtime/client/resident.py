"""Runs of a bound program on values that live on its worker: handles in, handles out, and only what is read comes down.

The client names the values that a run leaves before the run has happened, so that a run can be handed over without
waiting for the one before it.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import zmq

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import GenieError, StaleHandleError, WorkerLostError
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.client.binding import RNG_ARGUMENT, BoundProgram
from genie_dynamo.runtime.client.connection import Connection
from genie_dynamo.runtime.client.receiving import RefusedError, receive_result
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.uploads import CHUNK_BYTES, Content, parcels
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames
from genie_dynamo.runtime.telemetry import Share

_lane = ZmqFrames()
_EPOCH = 0


class Resident:
    """A value on a worker, by handle (incarnation, id, epoch 0). It is freed there when this object dies."""

    __slots__ = ("_usage", "form", "link", "session", "size_bytes", "tensor_id", "underway")

    def __init__(self, session: Session, link: WorkerLink, size_bytes: int) -> None:
        self.session, self.link = session, link
        self.tensor_id = session.next_id()
        self.size_bytes = size_bytes
        self.underway = True            # no run that used it has been answered yet
        self.form: Any = None           # (dtype code, shape, stride), as the worker tells it
        self._usage = usage = _usage(link)
        usage[0] += size_bytes
        usage[1] = max(usage)

    def __del__(self) -> None:
        # Also at the interpreter's end, when the names of this module are gone.
        self._usage[0] -= self.size_bytes
        self.link.frees.append((self.tensor_id, 0))

    def check(self, session: Session, link: WorkerLink) -> None:
        """Raises: WorkerLostError, StaleHandleError where the value can no longer be had."""
        if self.link is link:
            return
        if self.session is not session:
            raise StaleHandleError(
                "a tensor of remote_accelerator belongs to a session that was closed, and its value with it; make it "
                "again in this session (model.to, load_state_dict), or save what must last with torch.save")
        raise WorkerLostError(
            f"worker {self.link.name} was lost ({self.link.lost or 'replaced'}), and with it the tensors of "
            "remote_accelerator that lived there; move the model and load its last checkpoint again",
            worker=self.link.name)


_used: dict[str, list[int]] = {}


def _usage(link: WorkerLink) -> list[int]:
    return _used.setdefault(link.key, [0, 0])


def resident_bytes(link: WorkerLink) -> tuple[int, int]:
    """Bytes of the values that live on the worker now, and the most that ever did."""
    now, peak = _usage(link)
    return now, peak


def reset_peak(link: WorkerLink) -> None:
    """Count the peak from here on."""
    usage = _usage(link)
    usage[1] = usage[0]


class Answer(NamedTuple):
    """What a run brought: the values that were asked for, and the forms of those that stayed."""

    values: list[Any]
    forms: tuple[Any, ...]


class Uploader:
    """Sends contents to one worker without waiting for each."""

    def __init__(self) -> None:
        self._unanswered = 0

    def put(self, session: Session, link: WorkerLink, tensor: torch.Tensor, timeout_s: float) -> Resident:
        """Send a CPU tensor that nobody will change. Raises: WorkerError."""
        resident = Resident(session, link, tensor.numel() * tensor.element_size())
        with link.connection() as connection:
            for parcel in parcels(_lane, [Content(resident.tensor_id, _EPOCH, tensor, None)]):
                header = connection.send(parcel.message, parcel.frames)
                session.telemetry.moved(link.name, sent={"inputs": parcel.payload_bytes,
                                                         "control": header - parcel.inline_bytes})
                self._unanswered += parcel.payload_bytes
                if self._unanswered > CHUNK_BYTES:
                    connection.ask(m.Have(connection.next_request(), ()), time.monotonic() + timeout_s)
                    self._unanswered = 0
        return resident


class Underway:
    """A run that was sent and has not been answered. What it reads is not freed before that."""

    def __init__(self, session: Session, bound: BoundProgram, args: Sequence[Any], rng: Any, keeps: Sequence[Resident],
                 timeout_s: float) -> None:
        """Hand a run of a program to its worker; it may read what runs that are not answered yet are to leave.

        Args:    args: by position in the plan's inputs: Resident, CPU tensor or number.
                 rng: the generator's state, Resident or tensor, where the program draws.
                 keeps: what the program keeps, in its order.
        Raises:  WorkerError where it could not be sent.
        """
        started_s = time.perf_counter()
        self.over = False                   # nothing more will come
        self._session, self._bound, self._uses = session, bound, (*args, rng, *keeps)
        self._deadline_s = time.monotonic() + timeout_s
        self._connection = bound.link.borrow()
        try:
            self._request, self._sent = _send(session, self._connection, bound, args, rng, keeps, self._deadline_s)
        except BaseException:
            self._connection.close(linger_ms=200)
            raise
        self._sent_s = time.perf_counter()
        self._dispatch_s = self._sent_s - started_s

    def wait(self) -> Answer:
        """What it brought. Raises: whatever stopped it; then no value of it exists anywhere."""
        session, bound, link = self._session, self._bound, self._bound.link
        self.over = True
        link.in_flight += 1
        waiting_s = time.perf_counter()
        try:
            session.check_open()
            values, result, received = receive_result(self._connection, bound, self._request, self._deadline_s,
                                                      _as_output)
        except RefusedError as refused:
            link.give_back(self._connection)
            assert refused.__cause__ is not None
            raise refused.__cause__ from None
        except BaseException:
            self.abandon()
            raise
        finally:
            link.in_flight -= 1
        link.give_back(self._connection)
        for value in self._uses:
            if type(value) is Resident:
                value.underway = False
        answered_s = time.perf_counter()
        bound.last_compute_s = result.compute_s
        session.telemetry.call((Share(link.name, bound.num_fragments, result.compute_s, self._sent, received),),
                               dispatch_s=self._dispatch_s, wait_s=answered_s - waiting_s, queue_s=result.queue_s)
        return Answer(values, result.kept)

    def has_answer(self) -> bool:
        """Whether something of the answer is there to be read."""
        handle = self._connection.wait_handle()
        if handle is None:
            return True
        poller = zmq.Poller()
        poller.register(handle, zmq.POLLIN)
        return bool(poller.poll(0))

    def abandon(self) -> None:
        """Wait for no answer."""
        self.over = True
        self._connection.close(linger_ms=200)


def _send(session: Session, connection: Connection, bound: BoundProgram, args: Sequence[Any], rng: Any,
          keeps: Sequence[Resident], deadline_s: float) -> tuple[int, dict[str, int]]:
    frames: list[Any] = []
    arguments: list[Any] = []
    incoming: list[tuple[int, int]] = []
    inline_bytes = 0
    for position in bound.arguments:
        value = rng if position == RNG_ARGUMENT else args[position]
        if type(value) is Resident:
            if value.underway:
                incoming.append((value.tensor_id, _EPOCH))
            value = (m.RESIDENT, value.tensor_id, _EPOCH)
        elif isinstance(value, torch.Tensor):
            wire = _lane.stage(value, frames)
            if type(wire[3]) is bytes:
                inline_bytes += len(wire[3])
            value = (m.INLINE, wire)
        arguments.append(value)
    request = connection.next_request()
    handles = tuple([(keep.tensor_id, _EPOCH) for keep in keeps])
    header = pack(m.to_wire(m.Run(request, bound.program.program_id, session.next_call(), tuple(arguments), handles,
                                  tuple(incoming), bound.link.take_frees())))
    connection.run(header, frames, deadline_s)
    return request, {"inputs": inline_bytes + sum(map(len, frames)), "control": len(header) - inline_bytes}


def _as_output(_: str) -> str:
    return "outputs"


def fetch(session: Session, resident: Resident) -> torch.Tensor:
    """The value, here. Raises: WorkerError, StaleHandleError."""
    resident.link.check_alive()
    try:
        return session.fetch(resident.link, resident.tensor_id, _EPOCH)
    except GenieError:
        resident.link.check_alive()
        raise
