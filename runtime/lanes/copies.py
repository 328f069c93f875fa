"""Copies of payload by this process's processors, counted where they are made.

What travels is copied by code that does not know for whom: tensors are staged before there is a message, and landed
after it was read. So each thread has a tally that its copies go to, set by who begins to work for a connection (a
client) or a session (a worker). Native lanes and channels count their own copies (Channel.statistics); those of the
kernel (sockets), and of ZeroMQ's threads, are nobody's.
"""
from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

LENT_BYTES = 64 << 10
"""Less is not worth a slab of a lane."""


class Tally:
    """Bytes that one connection's or session's payload was copied: before it left, and after it came.

    Numbers of a lane that is gone are added to it. Written by one thread at a time; who reads it meanwhile may be a
    message behind.
    """

    __slots__ = ("copied_in", "copied_out", "moved_in", "moved_out")

    def __init__(self) -> None:
        self.copied_out = self.copied_in = 0
        self.moved_out = self.moved_in = 0

    def add(self, counters: dict[str, int]) -> None:
        """Add what a native lane has counted (Channel.statistics); nothing where it has not."""
        if counters:
            self.copied_out += counters["bytes_copied_out"]
            self.copied_in += counters["bytes_copied_in"]
            self.moved_out += counters["bytes_sent"]
            self.moved_in += counters["bytes_arrived"]

    def merge(self, other: Tally) -> None:
        """Add another's numbers."""
        for name in self.__slots__:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def plus(self, counters: dict[str, int]) -> Tally:
        """The sum of this and what a lane has counted."""
        total = Tally()
        total.merge(self)
        total.add(counters)
        return total


Lend = Callable[[int], Any]
"""Lends memory that a lane sends without a copy: so many bytes, or None for want of them."""


class Work(NamedTuple):
    """What a thread copies for. lend: of the lane that what is to leave will take."""

    tally: Tally
    lend: Lend | None = None


class _Thread(threading.local):
    work = Work(Tally())          # of whoever works for nobody


_thread = _Thread()


def count_for(work: Work) -> None:
    """What this thread copies is counted there from here on."""
    _thread.work = work


def copied_out(size_bytes: int) -> None:
    """Payload that is to leave was copied."""
    _thread.work.tally.copied_out += size_bytes


def gathered(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous copy of a CPU tensor that is to leave, in memory of its lane where there is some."""
    copied_out(tensor.nbytes)
    lend = _thread.work.lend
    memory = lend(tensor.nbytes) if lend is not None and tensor.nbytes >= LENT_BYTES else None
    if memory is None:
        return tensor.contiguous()
    return torch.frombuffer(memory, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)


def copied_in(size_bytes: int) -> None:
    """Payload that came was copied."""
    _thread.work.tally.copied_in += size_bytes
