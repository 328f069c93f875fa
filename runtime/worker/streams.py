"""A worker's streams (runtime/lanes/stream.py): the listening socket and its clients, none of which is waited for."""
from __future__ import annotations

import contextlib
import errno
import itertools
import logging
import os
import select
from collections.abc import Callable, Sequence
from typing import Any

from genie_dynamo.core.errors import GenieError, MessageLimitError
from genie_dynamo.runtime.lanes import stream

log = logging.getLogger(__name__)

_MAX_UNREAD_BYTES = 4 * stream.STREAM_BYTES
"""A client that lets more answers than this pile up is dropped."""

OnMessage = Callable[[bytes, bytes, Sequence[Any]], None]


class _Client:
    def __init__(self, name: bytes, sock: stream.Socket) -> None:
        self.name = name
        self.socket = sock
        self.reader = stream.Reader(sock)
        self.outbox = stream.Outbox(sock)


class Streams:
    """Every stream of one worker, under one epoll.

    Args:
        listener: where clients come from; this object closes it.
        on_message: told `(connection, header, frames)`.
        on_left: told which connection is gone.
    """

    def __init__(self, listener: stream.Socket, poller: select.epoll, on_message: OnMessage,
                 on_left: Callable[[bytes], None]) -> None:
        self._listener = listener
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        self._poller = poller
        self._on_message = on_message
        self._on_left = on_left
        self._numbers = itertools.count(1)
        self._by_fd: dict[int, _Client] = {}
        self._by_name: dict[bytes, _Client] = {}
        self._more: set[_Client] = set()
        poller.register(listener.fileno(), select.EPOLLIN)

    def __contains__(self, connection: bytes) -> bool:
        return connection in self._by_name

    def serve(self, fd: int, mask: int) -> None:
        """Do what an event asks for: accept, read, or go on sending."""
        client = self._by_fd.get(fd)
        if client is None:
            if fd == self._listener.fileno():
                self._accept()
            return
        try:
            if mask & select.EPOLLOUT and client.outbox.flush():
                self._poller.modify(fd, select.EPOLLIN)
            if mask & ~select.EPOLLOUT:
                self._read(client)
        except (EOFError, OSError, GenieError) as error:
            self._drop(client, error)

    @property
    def has_more(self) -> bool:
        """Whether clients sent more than one message at a time: epoll does not tell of what has been read already."""
        return bool(self._more)

    def serve_more(self) -> None:
        """One more message of each such client."""
        for client in list(self._more):
            self._more.discard(client)
            try:
                self._read(client)
            except (EOFError, OSError, GenieError) as error:
                self._drop(client, error)

    def _read(self, client: _Client) -> None:
        try:
            message = client.reader.read()
        except BlockingIOError:
            return
        if message is not None:
            self._on_message(client.name, *message)
        if client.reader.has_more and client.name in self._by_name:
            self._more.add(client)

    def send(self, connection: bytes, parts: Sequence[Any]) -> None:
        """Send, or queue what the socket does not take; a client that is gone is forgotten."""
        client = self._by_name.get(connection)
        if client is None:
            return
        try:
            if not client.outbox.send(parts):
                if client.outbox.size_bytes > _MAX_UNREAD_BYTES:
                    self._drop(client, MessageLimitError(
                        f"it does not read its answers: {client.outbox.size_bytes} bytes wait"))
                    return
                self._poller.modify(client.socket.fileno(), select.EPOLLIN | select.EPOLLOUT)
        except OSError as error:
            self._drop(client, error)

    def close(self) -> None:
        """Close every socket, and remove the listener's file."""
        for client in list(self._by_fd.values()):
            client.socket.close()
        self._by_fd.clear()
        self._by_name.clear()
        stream.close_listener(self._listener)
        os.close(self._spare)

    def _accept(self) -> None:
        try:
            sock = stream.accept(self._listener)
        except BlockingIOError:
            return
        except (OSError, GenieError) as error:
            log.warning("a client's stream was refused: %s", error)
            if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
                self._turn_away()
            return
        # ZeroMQ's own names of this first byte have five bytes, and clients cannot choose one.
        name = b"\0stream" + next(self._numbers).to_bytes(8, "big")
        client = self._by_fd[sock.fileno()] = self._by_name[name] = _Client(name, sock)
        self._poller.register(client.socket.fileno(), select.EPOLLIN)

    def _turn_away(self) -> None:
        """Take a connection off the queue with the spare descriptor: else the listener stays readable, and we spin."""
        os.close(self._spare)
        with contextlib.suppress(OSError, GenieError):
            stream.accept(self._listener).close()
        self._spare = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)

    def _drop(self, client: _Client, error: BaseException) -> None:
        if not isinstance(error, EOFError | ConnectionError):
            log.warning("a client's stream is closed: %s", error)
        fd = client.socket.fileno()
        self._poller.unregister(fd)
        del self._by_fd[fd], self._by_name[client.name]
        self._more.discard(client)
        client.socket.close()
        self._on_left(client.name)
