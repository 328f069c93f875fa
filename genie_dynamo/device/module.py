"""`torch.remote_accelerator`: what torch asks of a device module, and what users know from torch.cuda."""
from __future__ import annotations

from typing import Any


class RemoteAccelerator:
    """Registered as `torch.remote_accelerator`."""

    __name__ = "torch.remote_accelerator"

    def is_available(self) -> bool:
        """Whether tensors can be made on the device."""
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        """One: the device is the first worker of the process's session."""
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        """Raises: RuntimeError for any device but the one there is."""
        index = getattr(device, "index", device)
        if index not in (0, None) and str(device) not in ("remote_accelerator", "remote_accelerator:0"):
            raise RuntimeError(f"there is one remote_accelerator, number 0; asked was {device!r}")

    def get_device_name(self, device: Any = None) -> str:
        """The worker and its own device."""
        _, link = _engine().place()
        return f"{link.welcome.facts.get('device', '?')} of worker {link.name} at {link.address}"

    def manual_seed(self, seed: int) -> None:
        """Seed the device's generator."""
        _engine().seed(int(seed))

    def manual_seed_all(self, seed: int) -> None:
        """What torch.manual_seed calls."""
        _engine().seed(int(seed))

    def get_rng_state(self, device: Any = None) -> Any:
        """The generator's state, as that of a CPU generator."""
        return _engine().rng_state()

    def set_rng_state(self, state: Any, device: Any = None) -> None:
        """Continue from a state that get_rng_state gave."""
        _engine().set_rng_state(state)

    def initial_seed(self) -> int:
        import torch

        return torch.initial_seed()

    def synchronize(self, device: Any = None) -> None:
        """Run everything recorded whose result is still held, and wait for it."""
        _engine().run(())

    def memory_allocated(self, device: Any = None) -> int:
        """Bytes of the values that live on the worker now. What is recorded and has not run takes none."""
        from genie_dynamo.runtime.client.resident import resident_bytes

        return resident_bytes(_engine().place()[1])[0]

    def max_memory_allocated(self, device: Any = None) -> int:
        """The most that memory_allocated has been since reset_peak_memory_stats."""
        from genie_dynamo.runtime.client.resident import resident_bytes

        return resident_bytes(_engine().place()[1])[1]

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        from genie_dynamo.runtime.client.resident import reset_peak

        reset_peak(_engine().place()[1])

    def empty_cache(self) -> None:
        """Nothing is cached: memory is freed on the worker with the next run or within a second."""

    def get_amp_supported_dtype(self) -> list[Any]:
        import torch

        return [torch.bfloat16, torch.float16]

    def is_bf16_supported(self) -> bool:
        return True

    def stats(self) -> dict[str, int]:
        """Ops recorded, runs, programs made for them, cuts of long recordings, compiled calls recorded from memory."""
        return dict(_engine().counters)


class Unavailable:
    """Stands as `torch.remote_accelerator` where another backend has the place in torch."""

    def __init__(self, reason: str) -> None:
        self._reason = reason

    def is_available(self) -> bool:
        return False

    def device_count(self) -> int:
        return 0

    def __getattr__(self, name: str) -> Any:
        """Raises: ConfigError that says why."""
        from genie_dynamo.core.errors import ConfigError

        if name.startswith("__"):
            raise AttributeError(name)
        raise ConfigError(f"torch.remote_accelerator.{name}: the device cannot be had: {self._reason}")


def _engine() -> Any:
    from genie_dynamo.device.engine import current

    return current
