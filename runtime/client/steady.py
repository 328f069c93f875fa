"""A call of which nothing but the arguments is new: one worker, and it has everything else.

What attempt.py does for any call, in a straight line for the most common one: arguments go up with the message, values
come down with the answer, nothing is kept, changed or drawn at random. Same messages, same checks, same counters.
"""
from __future__ import annotations

import time
from typing import Any

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.client.binding import BoundProgram, Template
from genie_dynamo.runtime.client.connection import Connection, to_error
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames
from genie_dynamo.runtime.telemetry import Share

CPU = torch.device("cpu")
_lane = ZmqFrames()
_MISSING = object()


class _RefusedError(Exception):
    """The worker has answered that the call did not happen; `__cause__` is why. The connection is still good."""


def steady_call(session: Session, bound: BoundProgram, template: Template, args: list[Any], timeout_s: float,
                started_s: float) -> tuple[Any, ...]:
    """Run the program on its worker. Raises: as Attempts.run; then nothing has changed."""
    link = bound.link
    link.in_flight += 1
    try:
        connection = link.borrow()
        call_id = session.next_id()
        try:
            deadline_s = time.monotonic() + timeout_s
            request, sent = _send(connection, bound, template, args, call_id, deadline_s)
            sent_s = time.perf_counter()
            values, result, received = _receive(connection, bound, request, deadline_s)
        except _RefusedError as refused:
            bound.template = Template(None, template.references, bound.arguments, 0)
            link.give_back(connection)
            assert refused.__cause__ is not None
            raise refused.__cause__ from None
        except BaseException:
            bound.template = Template(None, template.references, bound.arguments, 0)
            if not link.lost:
                connection.send(m.Cancel(call_id))
            connection.close(linger_ms=200)
            raise
    finally:
        link.in_flight -= 1
    link.give_back(connection)
    outputs = tuple([values[at] if kind == "value" else args[at] if kind == "input" else at
                     for kind, at in bound.outputs])
    bound.last_compute_s = result.compute_s
    answered_s = time.perf_counter()
    session.telemetry.call((Share(link.name, 1, result.compute_s, sent, received),),
                           dispatch_s=sent_s - started_s, wait_s=answered_s - sent_s, queue_s=result.queue_s)
    return outputs


def _send(connection: Connection, bound: BoundProgram, template: Template, args: list[Any],
          call_id: int, deadline_s: float) -> tuple[int, dict[str, int]]:
    frames: list[Any] = []
    arguments: list[Any] = []
    inline_bytes = 0
    for _, index in template.others:
        value = args[index]
        if isinstance(value, torch.Tensor):
            wire = _lane.stage(value, frames)
            if type(wire[3]) is bytes:
                inline_bytes += len(wire[3])
            value = (m.INLINE, wire)
        arguments.append(value)
    request = connection.next_request()
    header = pack(m.to_wire(m.Run(request, bound.program.program_id, call_id, tuple(arguments), (), (),
                                  bound.link.take_frees(), -template.number)))
    connection.run(header, frames, deadline_s)
    inputs = inline_bytes + sum(map(len, frames)) if frames else inline_bytes
    return request, {"inputs": inputs, "control": len(header) - inline_bytes}


def _receive(connection: Connection, bound: BoundProgram, request: int,
             deadline_s: float) -> tuple[list[Any], m.Result, dict[str, int]]:
    count = len(bound.return_names)
    values: list[Any] = [_MISSING] * count
    open_count, output_bytes, control_bytes = count, 0, 0
    while True:
        message, frames, header_bytes = connection.receive(deadline_s)
        if isinstance(message, m.Failure) and message.request in (request, 0):
            raise _RefusedError from to_error(message, bound.link.address)
        if not isinstance(message, m.Result | m.Partial) or message.request != request:
            continue
        control_bytes += header_bytes
        for index, value in message.values:
            if not 0 <= index < count or values[index] is not _MISSING:
                raise ProtocolError(f"worker {bound.link.name} sent value {index} of {count} unasked or twice")
            if type(value) is tuple:
                wire = value[1]
                if type(wire[3]) is bytes:
                    control_bytes -= len(wire[3])
                value = _lane.land(wire, frames, CPU)
                output_bytes += value.nbytes
            values[index] = value
            open_count -= 1
        if isinstance(message, m.Result):
            if open_count:
                raise ProtocolError(f"worker {bound.link.name} returned {count - open_count} of {count} values")
            return values, message, {"outputs": output_bytes, "control": control_bytes}
