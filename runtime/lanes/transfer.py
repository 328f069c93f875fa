"""A message on its way over a native lane, as a future."""
from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Callable
from typing import Any


class TransferError(OSError):
    """A transfer that did not end in OK; `end` says how: TIMEOUT, PEER_LOST, CORRUPT, CANCELLED or LOCAL."""

    def __init__(self, message: str, end: str) -> None:
        super().__init__(message)
        self.end = end


class Transfer:
    """One message. Its end is learnt by asking (`done`, `result`), in any number of threads; the first that learns it
    calls the callbacks.

    Args: channel: of genie_dynamo._native; the message was sent with `watch`.  size_bytes: of all its buffers.
    """

    def __init__(self, channel: Any, number: int, size_bytes: int) -> None:
        self.size_bytes = size_bytes
        self.end = "PENDING"
        self._channel = channel
        self._number = number
        self._callbacks: list[Callable[[Transfer], None]] = []
        self._lock = threading.Lock()

    def __del__(self) -> None:
        if self.end == "PENDING":
            with contextlib.suppress(Exception):      # the module may be gone when the interpreter ends
                self._channel.forget(self._number)

    def done(self) -> bool:
        """Whether it has ended, in whichever way."""
        return self._wait(0.0) != "PENDING"

    def result(self, timeout_s: float = math.inf) -> int:
        """Its size in bytes, once the peer has all of it. Raises: TransferError; TimeoutError if it goes on."""
        end = self._wait(timeout_s)
        if end == "PENDING":
            raise TimeoutError(f"a transfer of {self.size_bytes} bytes has not ended within {timeout_s:g} s")
        if end != "OK":
            raise TransferError(f"a transfer of {self.size_bytes} bytes over the {self._channel.name} lane ended in "
                                f"{end} {self._channel.close_reason}".rstrip(), end)
        return self.size_bytes

    def cancel(self) -> bool:
        """End it in CANCELLED unless it has ended; what the peer has of it by then it may still get."""
        return bool(self._channel.cancel(self._number))

    def progress(self) -> float:
        """The part that has left this side: 0.0 to 1.0."""
        if self.done():
            return 1.0 if self.end == "OK" else 0.0
        return int(self._channel.bytes_moved(self._number)) / self.size_bytes if self.size_bytes else 0.0

    def add_done_callback(self, callback: Callable[[Transfer], None]) -> None:
        """Call `callback(self)` when the end is learnt; at once where it is known."""
        with self._lock:
            if self.end == "PENDING":
                self._callbacks.append(callback)
                return
        callback(self)

    def _wait(self, timeout_s: float) -> str:
        if self.end != "PENDING":
            return self.end
        end = self._channel.wait_ended(self._number, timeout_s)
        if end in (None, "PENDING"):        # None: another thread has learnt it, and has set `end` before it forgot it
            return self.end
        with self._lock:
            if self.end != "PENDING":
                return self.end
            self.end = end
            callbacks, self._callbacks = self._callbacks, []
        self._channel.forget(self._number)
        for callback in callbacks:
            callback(self)
        return self.end
