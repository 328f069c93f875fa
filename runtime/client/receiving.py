"""The answer to a run on one worker: read until it is whole."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.tensors import view_of
from genie_dynamo.runtime.client.binding import BoundProgram
from genie_dynamo.runtime.client.connection import Connection, Received, to_error
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames

CPU = torch.device("cpu")
_lane = ZmqFrames()
_MISSING = object()


class RefusedError(Exception):
    """The worker has answered that the run did not happen; `__cause__` is why. The connection is still good."""


def receive_result(connection: Connection, bound: BoundProgram, request: int, deadline_s: float,
                   reason_of: Callable[[str], str],
                   first: Received | None = None) -> tuple[list[Any], m.Result, dict[str, int]]:
    """`(values in the order of bound.return_names, the last message, bytes that came by reason)`.

    Args:   reason_of: what a returned value comes down for, by its name.  first: a message that was read already.
    Raises: RefusedError, ProtocolError, WorkerLostError, WorkerTimeoutError.
    """
    names = bound.return_names
    count = len(names)
    values: list[Any] = [_MISSING] * count
    spans: dict[int, torch.Tensor] = {}
    open_count, control_bytes = count, 0
    received: dict[str, int] = {"outputs": 0}
    while True:
        message, frames, header_bytes = first or connection.receive(deadline_s)
        first = None
        if isinstance(message, m.Failure) and message.request in (request, 0):
            raise RefusedError from to_error(message, bound.link.address)
        if not isinstance(message, m.Result | m.Partial) or message.request != request:
            continue
        control_bytes += header_bytes
        for index, value in message.values:
            if not 0 <= index < count or values[index] is not _MISSING:
                raise ProtocolError(f"worker {bound.link.name} sent value {index} of {count} unasked or twice")
            if type(value) is tuple:
                kind, wire, view = value[0], value[1], value[-1]
                if kind == m.ALIAS:
                    if wire not in spans:
                        raise ProtocolError(f"worker {bound.link.name} sent value {index} as a part of value {wire!r}, "
                                            "which has not come")
                    value = view_of(spans[wire], view)
                else:
                    if type(wire[3]) is bytes:
                        control_bytes -= len(wire[3])
                    value = _lane.land(wire, frames, CPU)
                    reason = reason_of(names[index])
                    received[reason] = received.get(reason, 0) + value.nbytes
                    if kind == m.SPAN:
                        spans[index] = value
                        value = view_of(value, view)
            values[index] = value
            open_count -= 1
        if isinstance(message, m.Result):
            if open_count:
                raise ProtocolError(f"worker {bound.link.name} returned {count - open_count} of {count} values")
            received["control"] = control_bytes
            return values, message, received
