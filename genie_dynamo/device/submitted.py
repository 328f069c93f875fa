"""Runs that were handed to the worker and not waited for.

What such a run leaves counts as resident at once: its handles are named by the client. Where the run turns out to have
failed it is undone, with those that hang on it: their values are recorded again, as if nothing had been sent, and the
engine runs them as it runs a read, to find out what fails and what does not.
"""
from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

from genie_dynamo.core.errors import GenieError
from genie_dynamo.device.nodes import Call, Node
from genie_dynamo.device.structure import Recording
from genie_dynamo.runtime.client.resident import Answer, Resident, Underway

_INEXACT = Call(None, (), {}, (), (), exact=False)


class Submitted:
    """One of them.

    generator   for a run that draws: the node of the generator's state before it, and the random node it ended with
    keeps       what it leaves, in its program's order
    """

    def __init__(self, run: Underway, recording: Recording, keeps: Sequence[Resident], in_order: Sequence[Resident],
                 holders: Sequence[Any], generator: tuple[Node | None, Node | None] | None) -> None:
        self.run, self.recording, self.generator = run, recording, generator
        self.keeps = in_order
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
        for resident, form in zip(self.keeps, answer.forms, strict=True):
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


class Submissions:
    """All of them that have not been answered, in the order in which they were sent.

    A worker may answer one that hangs on nothing before those that were sent earlier; so may be waited for.
    """

    def __init__(self) -> None:
        self._sent: list[Submitted] = []

    def __len__(self) -> int:
        return len(self._sent)

    def add(self, submitted: Submitted) -> None:
        self._sent.append(submitted)

    def maker(self, resident: Resident) -> Submitted | None:
        """The one that is to leave this value."""
        return next((one for one in self._sent if any(kept is resident for kept in one.keeps)), None)

    def wait_for_maker(self, resident: Resident) -> None:
        """Until the value is there. Raises: as wait_for."""
        maker = self.maker(resident)
        if maker is not None:
            self.wait_for(maker)

    def wait_for(self, wanted: Submitted) -> Answer:
        """Its answer; others that have come meanwhile are taken too. Raises: what has stopped it, or one of those."""
        answer = self._take(wanted)
        while self._sent and self._sent[0].run.has_answer():
            self._take(self._sent[0])
        return answer

    def wait_for_first(self) -> None:
        """The answer that has been waited for longest. Raises: what has stopped it."""
        self._take(self._sent[0])

    def wait_for_all(self) -> None:
        """Raises: what has stopped one of them."""
        while self._sent:
            self.wait_for_first()

    def _take(self, submitted: Submitted) -> Answer:
        answer = submitted.run.wait()
        self._sent.remove(submitted)
        submitted.answered(answer)
        return answer

    def close(self, *, wait: bool) -> list[Submitted]:
        """Give up what has failed: nothing is under way any more.

        Args:    wait: for each to end, so that its values are freed after they have come to be, and those that
                 succeed are kept; otherwise no answer counts.
        Returns: what has not happened, last sent first.
        """
        failed = []
        for submitted in self._sent:
            if submitted.run.over:
                failed.append(submitted)
            elif not wait:
                submitted.run.abandon()
                failed.append(submitted)
            else:
                try:
                    submitted.answered(submitted.run.wait())
                except GenieError:
                    failed.append(submitted)
        self._sent.clear()
        return failed[::-1]
