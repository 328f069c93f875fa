"""Runs that were handed to the worker and not waited for.

What such a run leaves counts as resident at once: its handles are named by the client. Where the run turns out to have
failed it is undone, with all that were sent after it: their values are recorded again, as if nothing had been sent, and
the engine runs them as it runs a read, to find out what fails and what does not.
"""
from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from genie_dynamo.device.nodes import Call, Node
from genie_dynamo.device.structure import Recording
from genie_dynamo.runtime.client.resident import Answer, Resident, Underway

_INEXACT = Call(None, (), {}, (), (), exact=False)


class Submitted:
    """One of them.

    generator   for a run that draws: the node of the generator's state before it, and the random node it ended with
    """

    def __init__(self, run: Underway, recording: Recording, keeps: Sequence[Resident], in_order: Sequence[Resident],
                 holders: Sequence[Any], generator: tuple[Node | None, Node | None] | None) -> None:
        self.run, self.recording, self.generator = run, recording, generator
        self._in_order = in_order
        self._holders = [weakref.ref(storage) for storage in holders]
        self._before: list[tuple[Node, Resident, Call | None, tuple[Node, ...], tuple[Any, ...]]] = []
        for index, resident in zip(recording.kept, keeps, strict=False):
            node = recording.nodes[index]
            self._before.append((node, resident, node.call, node.inputs, node.scalars))
            node.value = resident
            node.call = None if node.exact else _INEXACT
            node.inputs = ()
            node.scalars = ()

    def answered(self, answer: Answer) -> None:
        """It has run: the worker says how the values lie in memory."""
        for resident, form in zip(self._in_order, answer.forms, strict=True):
            resident.form = form
        for node, resident, _, _, _ in self._before:
            own = node.layout
            _, shape, stride = resident.form
            if node.value is resident and (own is None or own.shape != shape or own.stride != stride):
                node.call = _INEXACT

    def undo(self) -> list[Any]:
        """Record its values again. Returns: the live storages that it was to fill."""
        for node, resident, call, inputs, scalars in self._before:
            if node.value is resident:
                node.value, node.call, node.inputs, node.scalars = None, call, inputs, scalars
        return [storage for reference in self._holders if (storage := reference()) is not None]
