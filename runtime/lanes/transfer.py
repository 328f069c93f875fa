"""A message on its way over a native lane, as a future."""
from __future__ import annotations

import atexit
import contextlib
import logging
import math
import threading
import weakref
from collections import deque
from collections.abc import Callable
from typing import Any

log = logging.getLogger(__name__)

_SWEEP_S = 0.05
"""How late a callback may come whose transfer ends before one that was posted earlier."""


class TransferError(OSError):
    """A transfer that did not end in OK; `end` says how: TIMEOUT, PEER_LOST, CORRUPT, CANCELLED or LOCAL."""

    def __init__(self, message: str, end: str) -> None:
        super().__init__(message)
        self.end = end


class Transfer:
    """One message. Its end is learnt by who asks (`done`, `result`), in any number of threads, or where there are
    callbacks by a thread of the lane's own; the first that learns it calls the callbacks.

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
        """Call `callback(self)` when it has ended, whether somebody asks or not; at once where that is known.

        It is called in a thread that asks, or in one of the lane's own; what it raises is shown there and changes
        nothing.
        """
        with self._lock:
            if self.end == "PENDING":
                self._callbacks.append(callback)
                if len(self._callbacks) == 1:
                    _watch(self)
                return
        self._call(callback)

    def _call(self, callback: Callable[[Transfer], None]) -> None:
        try:
            callback(self)
        except Exception:
            log.exception("a callback of a transfer of %d bytes raised", self.size_bytes)

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
            self._call(callback)
        return self.end


class _Watcher:
    """Learns the ends of one channel's transfers that have callbacks, in a thread that lives while there are any."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: deque[Transfer] = deque()        # in the order in which callbacks came
        self._thread: threading.Thread | None = None
        self._over = False

    def add(self, transfer: Transfer) -> None:
        with self._lock:
            self._open.append(transfer)
            if len(self._open) == 1:
                self._thread = threading.Thread(target=self._run, name="genie-transfers", daemon=True)
                self._thread.start()

    def stop(self) -> None:
        """The interpreter ends: no thread may then be inside the extension."""
        self._over = True
        if self._thread is not None:
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._over:
            with self._lock:
                first, *others = self._open
            first._wait(_SWEEP_S)
            ended = {id(transfer) for transfer in (first, *others) if transfer.done()}
            with self._lock:
                self._open = deque(transfer for transfer in self._open if id(transfer) not in ended)
                if not self._open:
                    return


_watchers: weakref.WeakKeyDictionary[Any, _Watcher] = weakref.WeakKeyDictionary()
_watchers_lock = threading.Lock()


def _watch(transfer: Transfer) -> None:
    with _watchers_lock:
        watcher = _watchers.get(transfer._channel)
        if watcher is None:
            watcher = _watchers[transfer._channel] = _Watcher()
    watcher.add(transfer)


@atexit.register
def _stop() -> None:
    with _watchers_lock:
        watchers = list(_watchers.values())
    for watcher in watchers:
        watcher.stop()
