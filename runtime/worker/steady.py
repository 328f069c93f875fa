"""A small run as a client repeats it: its message is recognised and its answer filled in, without decoder or encoder.

Learnt from a run that took the ordinary way (core/stencil.py). Only native lanes know of it, and what it needs of the
session is looked up in every call: where anything is not as it was, the message takes the ordinary way.
"""
from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core import tensors
from genie_dynamo.core.stencil import result_form, run_form
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.zmq_frames import INLINE_BYTES
from genie_dynamo.runtime.worker.engine import Engine
from genie_dynamo.runtime.worker.records import Repeatable


class Answer(NamedTuple):
    """What a repeated run returns."""

    values: tuple[Any, ...]           # for the holes of `result`
    frames: list[Any]                 # beside it
    owners: Sequence[Any]             # of the memory that values are addresses of: keep them until the holes are filled


class SteadyRun:
    """Such a run, ready to be repeated.

    run, result: stencils.  into, frames: where the payload of a message goes, as Channel.receive_stencil takes it.
    """

    def __init__(self, engine: Engine, origin: Repeatable, program: Any, run: Any, result: Any,
                 returned: Sequence[Any], resident_bytes: int, connection: bytes) -> None:
        self.run, self.result = run, result
        self.into: list[int] = []
        self.frames: list[tuple[int, int]] = []
        self._engine = engine
        self._session = origin.session
        self._connection = connection
        self._program_id, self._template = origin.message.program_id, origin.message.template
        self._program = program
        self._returned = [tensors.Look(value) for value in returned]
        self._resident_bytes = resident_bytes
        self._fixed: dict[int, Any] = {}                                # numbers, and the memory that `into` points to
        self._brought: list[tuple[int, tensors.Form]] = []              # what comes beside the message
        for value_id, argument in zip(origin.value_ids, origin.message.arguments, strict=True):
            if type(argument) is not tuple:
                self._fixed[value_id] = argument
                continue
            form = tensors.form_of(argument[1])
            if type(argument[1][3]) is bytes:
                own = torch.empty_strided(form.core, form.core_stride, dtype=form.dtype, device="cpu")
                self._fixed[value_id] = own
                self.into.append(own.data_ptr())
            else:
                self._brought.append((value_id, form))
                self.frames.append((0, form.size_bytes))

    @classmethod
    def of(cls, engine: Engine, origin: Repeatable, header: bytes, answer: m.Result,
           returned: Sequence[Any], connection: bytes) -> SteadyRun | None:
        """From a run that came as `header` over `connection` and was answered; None where it cannot be repeated."""
        run = run_form(origin.message, header)
        result = result_form(answer, pack(m.to_wire(answer))) if run is not None else None
        entry = origin.session.programs.get(origin.message.program_id)
        if run is None or result is None or entry is None or engine.device.type != "cpu":
            return None
        if entry[1].small.plan.may_write:
            return None              # a message whose payload was written to could not take the ordinary way any more
        if not all(isinstance(value, torch.Tensor) and _is_plain(value) for value in returned):
            return None
        for values in (origin.message.arguments, [value for _, value in answer.values]):
            wires = [value[1] for value in values if type(value) is tuple]
            forms = [tensors.form_of(wire) for wire in wires]
            frames = [wire[3] for wire in wires if type(wire[3]) is int]
            if any(form.gaps or form.core != form.shape for form in forms) or frames != [*range(len(frames))]:
                return None
        return cls(engine, origin, entry[1], native.stencil(run), native.stencil(result), returned,
                   answer.resident_bytes, connection)

    def carry_out(self, numbers: Sequence[Any], memory: Sequence[Any]) -> Answer | None:
        """Run with a message that has come; None: it has to take the ordinary way.

        Nothing has changed then, and what is wrong with the message or the run will be found again there.
        """
        session, (request, call_id) = self._session, numbers
        entry = session.programs.get(self._program_id)
        if entry is None or entry[1] is not self._program:
            return None
        if call_id in session.cancelled or session.resident_bytes != self._resident_bytes:
            return None
        env = dict(self._fixed)
        if self._template:
            template = session.templates.get(self._program_id)
            if template is None or template.number != -self._template:
                return None
            env.update(template.env)
        session.last_heard_s = time.monotonic()
        self._engine.works_for(session.work)
        try:
            for (value_id, form), frame in zip(self._brought, memory, strict=True):
                env[value_id] = native.to_tensor(frame).view(form.dtype).as_strided(form.core, form.core_stride)
            returned, compute_s = self._engine.run_now(self._program, env, session.resident_bytes,
                                                        self._connection)
        except Exception:
            return None
        inline: list[Any] = []
        frames: list[Any] = []
        for look, value in zip(self._returned, returned, strict=True):
            if not look.fits(value):
                return None
            if look.size_bytes <= INLINE_BYTES:
                inline.append(value.data_ptr())
            else:
                frames.append(tensors.view_memory(value, look.size_bytes))
        self._engine.num_repeated += 1
        return Answer((request, *inline, compute_s, 0.0), frames, returned)

    def refilled(self, numbers: Sequence[Any]) -> bytes:
        """The message as it came."""
        header: bytes = self.run.fill([*numbers, *self.into])
        return header


def _is_plain(value: torch.Tensor) -> bool:
    """Whether the memory holds what the tensor says: nothing is conjugated, negated or zero only when it is read."""
    return not (value.is_conj() or value.is_neg() or value._is_zerotensor())
