"""What a graph has seen of its tensors: whether those met at one place, an input or an output, come back.

State is what comes back. Where a graph's structure says so (a cache that is appended to, an input that is written to)
nothing needs to be learned; elsewhere the first few tensors are kept on trial, and then only at places whose tensors
come back, until so many have not come back that they are thought to have stopped.
"""
from __future__ import annotations

TRIALS = 3
"""So many tensors of one place are kept before any has come back."""
PATIENCE = 8
"""So many are kept after the last one that has."""
MIN_STATE_BYTES = 4 << 10
"""Smaller tensors travel: to send them costs less time than to know where they are."""


class Habit:
    """One place of one graph. Changed without a lock: it only steers what is kept."""

    __slots__ = ("comes_back", "kind", "small", "structural", "trials")

    def __init__(self, kind: str, structural: bool = False) -> None:
        self.kind = kind                   # "input" | "output"
        self.structural = structural
        self.comes_back = structural
        self.small = False                 # the last one was too small to be worth it
        self.trials = 0                    # tensors met since one has come back

    @property
    def wanted(self) -> bool:
        """Whether the next tensor of this place is to be kept."""
        if self.comes_back:
            return self.structural or self.trials < PATIENCE
        return self.trials < TRIALS and not self.small

    def met(self, size_bytes: int) -> None:
        """A tensor of this place was met."""
        self.small = size_bytes < MIN_STATE_BYTES
        self.trials += 1

    def came_back(self) -> None:
        """A tensor that was met at this place is an argument again, and as it was."""
        self.comes_back = True
        self.trials = 0

    @property
    def why(self) -> str:
        """For people: why tensors of this place are kept."""
        if self.structural:
            return "cache"
        if self.kind == "output":
            return "output fed back" if self.comes_back else "output, on trial"
        return "input seen again" if self.comes_back else "input, on trial"
