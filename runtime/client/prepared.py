"""Messages of steady calls that are filled in, not encoded, and read without a decoder.

Made from a call that took the ordinary way (core/stencil.py), used while calls look like it; whatever does not fit
takes the ordinary way again. Native lanes only.
"""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core import tensors
from genie_dynamo.core.stencil import Form, result_form, run_form
from genie_dynamo.core.wire import pack
from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.lanes.zmq_frames import INLINE_BYTES


class Prepared:
    """What the messages of a program's steady calls have in common. Immutable: any thread may use it.

    sent, received: bytes by reason, as telemetry counts them.
    """

    def __init__(self, run: Form, result: Form, arguments: Sequence[Any], answer: m.Result, num_returns: int,
                 sent: dict[str, int], received: dict[str, int]) -> None:
        self.run = native.stencil(run)
        self.result = native.stencil(result)
        self.answer = answer
        self.sent, self.received = sent, received
        self._arguments = [tensors.Look(a) if isinstance(a, torch.Tensor) else a for a in arguments]
        self._values: list[Any] = [None] * num_returns      # numbers stay as they are
        self._forms: list[tuple[int, tensors.Form, bool]] = []
        for index, value in answer.values:
            if type(value) is tuple:
                wire = value[1]
                self._forms.append((index, tensors.form_of(wire), type(wire[3]) is bytes))
            else:
                self._values[index] = value

    @classmethod
    def of(cls, run: m.Run, header: bytes, arguments: Sequence[Any], answer: m.Result, num_returns: int,
           sent: dict[str, int], received: dict[str, int]) -> Prepared | None:
        """From a call that has succeeded; None where its messages cannot be repeated like that.

        Args: arguments: the caller's values behind run.arguments.  answer: the only message that came.
        """
        if len(answer.values) != num_returns or any(isinstance(a, float) for a in arguments):
            return None
        num_frames = 0
        for _, value in answer.values:
            if type(value) is tuple:
                if len(value) != 2 or value[0] != m.INLINE:
                    return None
                form = tensors.form_of(value[1])
                if type(value[1][3]) is int:
                    if value[1][3] != num_frames:
                        return None
                    num_frames += 1
                if form.gaps or form.core != form.shape or not 0 < form.size_bytes < native.COPY_BELOW_BYTES:
                    return None
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and not (
                    argument.is_cpu and tensors.is_dense(argument.shape, argument.stride())
                    and tensors.as_plain(argument).data_ptr() == argument.data_ptr() and argument.numel()):
                return None
        first = run_form(run, header)
        last = result_form(answer, pack(m.to_wire(answer))) if first is not None else None
        if first is None or last is None:
            return None
        return cls(first, last, arguments, answer, num_returns, sent, received)

    def filled(self, arguments: Sequence[Any]) -> tuple[list[int], list[Any]] | None:
        """(addresses of what goes into the message, buffers that go beside it); None where an argument is another."""
        addresses: list[int] = []
        frames: list[Any] = []
        for expected, value in zip(self._arguments, arguments, strict=True):
            if type(expected) is tensors.Look:
                if not expected.fits(value):
                    return None
                if expected.size_bytes <= INLINE_BYTES:
                    addresses.append(value.data_ptr())
                else:
                    frames.append(tensors.view_memory(value, expected.size_bytes))
            elif type(value) is not type(expected) or value != expected:
                return None
        return addresses, frames

    def room(self) -> tuple[list[Any], list[int], list[tuple[int, int]]]:
        """(new values, by index of what is returned; where the inline ones go; where the frames go)."""
        values, inline, frames = list(self._values), [], []
        for index, form, is_inline in self._forms:
            value = torch.empty_strided(form.core, form.core_stride, dtype=form.dtype, device="cpu")
            values[index] = value
            if is_inline:
                inline.append(value.data_ptr())
            else:
                frames.append((value.data_ptr(), form.size_bytes))
        return values, inline, frames
