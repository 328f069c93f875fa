"""The device's random numbers: the state they continue from, and the recorded ops that are still to draw."""
from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch

from genie_dynamo.device.failures import follows, gone
from genie_dynamo.device.nodes import Call, Node, uploaded
from genie_dynamo.runtime.client.resident import Resident
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.workers import WorkerLink

log = logging.getLogger(__name__)


class Generator:
    """What draws is run in the order in which it was recorded: each such node has the one before among its inputs.

    tail   the node that drew last and has not run; None where all have
    """

    def __init__(self) -> None:
        self.tail: Node | None = None
        self._state: Node | None = None                # before the first of them

    def node(self, call: Call, inputs: Sequence[Node], scalars: Sequence[Any]) -> Node:
        """The node of an op that draws."""
        ordered = (*inputs, self.tail) if self.tail is not None and self.tail.value is None else tuple(inputs)
        self.tail = Node(call, ordered, tuple(scalars), call.single)
        return self.tail

    def state(self, session: Session, link: WorkerLink) -> Node:
        """The state that the next run starts from."""
        if self._state is not None and gone(self._state, session, link):
            log.warning("the state of remote_accelerator's generator was lost with its worker; it starts anew from "
                        "torch.initial_seed()")
            self._state = None
        if self._state is None:
            self.start_from(torch.Generator().manual_seed(torch.initial_seed()).get_state())
        assert self._state is not None
        return self._state

    def start_from(self, state: torch.Tensor) -> None:
        """Continue from a CPU generator's state. Nothing recorded may still have to draw."""
        self._state, self.tail = uploaded(state.detach().clone().cpu()), None

    def leave(self, resident: Resident) -> None:
        """What is recorded has been handed over; it leaves its state here."""
        self._state = Node(None, (), (), None)
        self._state.value = resident
        self.tail = None

    def take_back(self, state: Node | None, tail: Node | None) -> None:
        """The run that went from `state` to `tail` has not happened: what was recorded since follows `tail` again."""
        self._state = state
        first = self.tail
        if first is None or tail is None:
            self.tail = tail or first
            return
        while (before := follows(first)) is not None:
            first = before
        first.inputs = (*first.inputs, tail)
