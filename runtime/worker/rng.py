"""The generator state of a call, as a value that travels.

A client sends the state of its default CPU generator; what comes back is the state after the call. On a CPU worker
the ops draw from exactly that state, so a fixed seed gives what eager gives. On a CUDA worker the CPU state is used
to draw one 64-bit seed, which seeds the device's generator: reproducible, but CUDA's numbers, not the CPU's.
"""
from __future__ import annotations

import torch


class Generator:
    """The generator of one fragment's run, which may be interrupted: `with generator: ...` any number of times."""

    def __init__(self, start: torch.Tensor, device: torch.device) -> None:
        self._cpu = start
        self._device = device
        self._cuda: torch.Tensor | None = None

    def __enter__(self) -> Generator:
        torch.set_rng_state(self._cpu)
        if self._device.type == "cuda":
            if self._cuda is None:
                torch.cuda.manual_seed(int(torch.randint(0, 2**63 - 1, (), dtype=torch.int64)))
                self._cpu = torch.get_rng_state()
            else:
                torch.cuda.set_rng_state(self._cuda, self._device)
        return self

    def __exit__(self, *_: object) -> None:
        if self._device.type == "cuda":
            self._cuda = torch.cuda.get_rng_state(self._device)
        else:
            self._cpu = torch.get_rng_state()

    def client_state(self) -> torch.Tensor:
        """The client's generator state after what has run so far."""
        return self._cpu
