"""A call of which nothing but the arguments is new: one worker, and it has everything else.

What attempt.py does for any call, in a straight line for the most common one: arguments go up with the message, values
come down with the answer or are rebuilt from what does, state stays; no input is changed, nothing is drawn at random.
Same messages, same checks, same counters. Where the parameters have long been the same, they are looked at while the
worker runs with what it has of them; had they changed after all, the call begins anew. Where calls look alike, their
messages are filled in instead of encoded (prepared.py).
"""
from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.client.binding import BoundProgram, Template
from genie_dynamo.runtime.client.connection import Connection
from genie_dynamo.runtime.client.prepared import Prepared
from genie_dynamo.runtime.client.receiving import RefusedError, receive_result
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.state import StateRules, Stored
from genie_dynamo.runtime.lanes.ends import Numbers
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames
from genie_dynamo.runtime.telemetry import Share

_lane = ZmqFrames()


class ChangedError(Exception):
    """The parameters are not what the call was begun with: whatever the worker made of it is not read."""


class _Begun(NamedTuple):
    """A call whose message has been sent: as it was prepared, or as it was encoded."""

    request: int
    sent: dict[str, int]
    arguments: list[Any]              # the caller's values that went along
    prepared: Prepared | None
    run: m.Run | None = None
    header: bytes = b""


class _Came(NamedTuple):
    """What a worker has answered."""

    values: list[Any]
    result: m.Result                  # one like it, where it was recognised: it says the same of state
    compute_s: float
    queue_s: float
    received: dict[str, int]


def steady_call(session: Session, bound: BoundProgram, template: Template, rules: StateRules, args: list[Any],
                timeout_s: float, started_s: float,
                unchanged: Callable[[], bool] | None = None) -> tuple[Any, ...]:
    """Run the program on its worker.

    Args:   unchanged: looks whether the template still holds; asked while the worker is busy with the call already.
    Raises: as Attempts.run, and ChangedError; then nothing has changed.
    """
    link = bound.link
    link.in_flight += 1
    state: tuple[tuple[int, int], ...] = ()
    stored: list[Stored] = []
    try:
        connection = link.borrow()
        call_id = session.next_call()
        try:
            deadline_s = time.monotonic() + timeout_s
            if rules.active:
                state = rules.handles(session, bound.state_names)
            begun = _send(session, connection, bound, template, rules, args, call_id, state, stored, deadline_s)
            sent_s = time.perf_counter()
            if unchanged is not None and not unchanged():
                raise ChangedError
            halves = rules.begin(args) if rules.active and rules.recipes else ()
            came = _receive(connection, bound, template, begun, rules, deadline_s)
        except RefusedError as refused:
            bound.template = Template(None, template.references, bound.arguments, 0)
            rules.gave_up(link, state, stored)
            link.give_back(connection)
            assert refused.__cause__ is not None
            raise refused.__cause__ from None
        except BaseException:
            bound.template = Template(None, template.references, bound.arguments, 0)
            rules.gave_up(link, state, stored)
            if not link.lost:
                connection.send(m.Cancel(call_id))
            connection.close(linger_ms=200)
            raise
    finally:
        link.in_flight -= 1
    link.give_back(connection)
    answered_s = time.perf_counter()
    named = dict(zip(bound.return_names, came.values, strict=True))
    if rules.active:
        rules.finish(session, link, bound.state_names, state, came.result, stored, args, named, halves)
    outputs = tuple([named[at] if kind == "value" else args[at] if kind == "input" else at
                     for kind, at in bound.outputs])
    bound.last_compute_s = came.compute_s
    dispatch_s = sent_s - started_s + time.perf_counter() - answered_s
    session.telemetry.call((Share(link.name, 1, came.compute_s, begun.sent, came.received),),
                           dispatch_s=dispatch_s, wait_s=answered_s - sent_s, queue_s=came.queue_s)
    return outputs


def _send(session: Session, connection: Connection, bound: BoundProgram, template: Template, rules: StateRules,
          args: list[Any], call_id: int, state: tuple[tuple[int, int], ...], stored: list[Stored],
          deadline_s: float) -> _Begun:
    link = bound.link
    frames: list[Any] = []
    sent: dict[str, int] = {"inputs": 0}
    arguments = [args[index] for _, index in template.others]
    resident: list[Any] = [None] * len(arguments)
    if rules.active:
        resident = [rules.argument(session, link, index, value, frames, sent, stored)
                    if isinstance(value, torch.Tensor) else None
                    for (_, index), value in zip(template.others, arguments, strict=True)]
    request = connection.next_request()
    prepared = template.prepared
    if prepared is not None and not any(resident) and not state and not link.frees and connection.takes_stencils:
        filled = prepared.filled(arguments)
        if filled is not None:
            addresses, buffers = filled
            connection.run_stencil(prepared.run, (request, call_id, *addresses), buffers, deadline_s)
            return _Begun(request, prepared.sent, arguments, prepared)
        template.forget_prepared()
    encoded: list[Any] = []
    for value, handle in zip(arguments, resident, strict=True):
        if handle is not None:
            value = handle
        elif isinstance(value, torch.Tensor):
            wire = _lane.stage(value, frames)
            sent["inputs"] += len(wire[3]) if type(wire[3]) is bytes else len(frames[wire[3]])
            value = (m.INLINE, wire)
        encoded.append(value)
    run = m.Run(request, bound.program.program_id, call_id, tuple(encoded), (), (), link.take_frees(),
                -template.number, state)
    header = pack(m.to_wire(run))
    connection.run(header, frames, deadline_s)
    inline_bytes = sum(sent.values()) - (sum(map(len, frames)) if frames else 0)
    sent["control"] = len(header) - inline_bytes
    return _Begun(request, sent, arguments, None, run, header)


def _receive(connection: Connection, bound: BoundProgram, template: Template, begun: _Begun, rules: StateRules,
             deadline_s: float) -> _Came:
    prepared = begun.prepared
    if prepared is None:
        values, result, received = receive_result(connection, bound, begun.request, deadline_s, rules.reason_down)
        if connection.takes_stencils and template.prepared is None and template.streak.lasts(
                (len(begun.header), received["control"])):
            assert begun.run is not None
            template.prepared = Prepared.of(begun.run, begun.header, begun.arguments, result, len(values), begun.sent,
                                            received)
        return _Came(values, result, result.compute_s, result.queue_s, received)
    values, inline, frames = prepared.room()
    came = connection.receive_stencil(prepared.result, inline, begun.request, frames, deadline_s)
    if isinstance(came, Numbers):
        _, compute_s, queue_s = came.values
        return _Came(values, prepared.answer, compute_s, queue_s, prepared.received)
    template.forget_prepared()
    values, result, received = receive_result(connection, bound, begun.request, deadline_s, rules.reason_down, came)
    return _Came(values, result, result.compute_s, result.queue_s, received)
