"""The resident tensors of a worker's sessions: put, adopted, kept, freed, fetched.

A resident tensor is stored under (tensor id, epoch) and never changes. A session keeps at most its quota: beyond it,
what the client can send again (epoch >= 1) goes, least recently used first, and the client is told with the next
result. Activations (epoch 0) exist nowhere else and stay.
"""
from __future__ import annotations

import hashlib
import weakref
from collections.abc import Callable, Collection, Sequence
from typing import Any

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import (
    GenieError,
    ProtocolError,
    RemoteExecutionError,
    StaleHandleError,
    WorkerMemoryError,
)
from genie_dynamo.runtime.worker.events import Abandon, Command, Deliver, Execute, Failed, Received, Reply
from genie_dynamo.runtime.worker.records import Arriving, SessionRecord
from genie_dynamo.runtime.worker.toolbox import Toolbox


class Residents:
    """Answers the messages that are about resident tensors.

    Args: fail: what a run's failure leads to (Runs.failed).
    """

    def __init__(self, toolbox: Toolbox, incarnation: str, fail: Callable[[Failed], list[Command]]) -> None:
        self._tools = toolbox
        self._incarnation = incarnation
        self._fail = fail
        self._contents: weakref.WeakValueDictionary[bytes, Any] = weakref.WeakValueDictionary()

    def have(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Have = event.message  # type: ignore[assignment]
        known = tuple(type(d) is bytes and d in self._contents for d in message.digests)
        return [Reply(event.connection, m.Done(message.request, known))]

    def put(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Put = event.message  # type: ignore[assignment]
        commands: list[Command] = []
        for content in message.contents:
            tensor_id, epoch, wire, digest = _checked(content)
            key = (tensor_id, epoch)
            try:
                tensor = self._tools.own(self._tools.land(wire, event.frames))
                if digest is not None:
                    self._remember(digest, hashlib.sha256(self._tools.content_bytes(tensor)).digest(), tensor)
            except Exception as error:
                commands += self.broke(session, key, error)
                continue
            commands += self._store(session, key, tensor)
        return commands

    def piece(self, session: SessionRecord | None, event: Received) -> list[Command]:
        """A part of a large content, from the client or from another worker."""
        message: m.Piece = event.message  # type: ignore[assignment]
        if session is None:
            return []
        key, landing = (message.tensor_id, message.epoch), bool(message.session)
        if landing:
            _check_landing(key)
            if key in session.tensors:
                return []        # it came twice, or from somebody who should not: what is resident never changes
        try:
            arriving = self._arriving(session, message, b"" if landing else event.connection, event.now_s)
            if arriving is None:
                return []
            arriving.heard_s = event.now_s
            arriving.assembly.add(message.tensor, message.offset, event.frames, digest=message.digest is not None)
            if not arriving.assembly.whole:
                return []
            del session.arriving[key]
            tensor = self._tools.land(*arriving.assembly.wire(message.tensor))
            if message.digest is not None:
                self._remember(message.digest, arriving.assembly.sha256, tensor)
        except Exception as error:
            session.arriving.pop(key, None)
            return self._no_landing(session, key, error) if landing else self.broke(session, key, error)
        return self._landed(session, key, tensor) if landing else self._store(session, key, tensor)

    def _arriving(self, session: SessionRecord, message: m.Piece, sender: bytes, now_s: float) -> Arriving | None:
        """What the piece is a part of; None for an upload that was given up.

        Raises: ProtocolError; WorkerMemoryError where the session may not keep so much.
        """
        key = (message.tensor_id, message.epoch)
        arriving = session.arriving.get(key)
        if arriving is not None and arriving.sender == sender and (message.offset or not sender):
            return arriving
        if message.offset and sender:
            return None
        session.arriving.pop(key, None)
        size_bytes = self._tools.announced_bytes(message.tensor)
        others_bytes = sum(other.assembly.size_bytes for other in session.arriving.values())
        if size_bytes + others_bytes > session.quota_bytes:
            raise WorkerMemoryError(
                f"a tensor of {size_bytes / 2**20:.1f} MiB is on its way, with {others_bytes / 2**20:.1f} MiB of "
                f"others, and this session may keep {session.quota_bytes / 2**20:.1f} MiB on the worker; raise the "
                "quota (resident_quota_gib, or --resident-quota-gib of the worker) or add a worker",
                size_bytes=size_bytes, quota_bytes=session.quota_bytes)
        session.broken.pop(key, None)        # an upload that was given up begins anew
        arriving = session.arriving[key] = Arriving(self._tools.assemble(message.tensor), sender, now_s)
        return arriving

    def give_up(self, session: SessionRecord, is_over: Callable[[Arriving], bool]) -> list[Command]:
        """Drop what has come of uploads of which nothing more will come. Runs that wait for them are told."""
        commands: list[Command] = []
        for key in [key for key, arriving in session.arriving.items() if is_over(arriving)]:
            left = session.arriving.pop(key)
            commands += self.broke(session, key, StaleHandleError(
                f"of tensor {key[0]}, {left.assembly.size_bytes} bytes, not all has come: its upload ended"))
            if not left.sender:
                del session.broken[key]              # nobody else asks
        return commands

    def _remember(self, digest: bytes, actual: bytes, tensor: Any) -> None:
        if actual != digest:
            raise ProtocolError(f"content arrived with sha256 {actual.hex()[:16]}, announced was {digest.hex()[:16]}")
        self._contents[digest] = tensor

    def broke(self, session: SessionRecord, key: tuple[int, int], error: BaseException) -> list[Command]:
        """A content will not come: the runs that wait for it fail, and those that ask later learn why."""
        wrapped = error if isinstance(error, GenieError) else RemoteExecutionError(str(error))
        session.broken[key] = wrapped
        failed = [run for runs in session.runs.values() for run in runs if key in run.pending]
        return [command for run in failed for command in self._fail(Failed(run, error, 0.0))] + [
            Abandon(run) for run in failed]

    def adopt(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Adopt = event.message  # type: ignore[assignment]
        tensor = self._contents.get(message.digest)
        key = (message.tensor_id, message.epoch)
        if tensor is None:
            gone = StaleHandleError(f"content {message.digest.hex()[:16]} was freed before it could be adopted")
            return self.broke(session, key, gone)
        return self._store(session, key, tensor)

    def _store(self, session: SessionRecord, key: tuple[int, int], tensor: Any) -> list[Command]:
        self.keep(session, key, tensor)
        return self.arrived(session, key, tensor)

    def arrived(self, session: SessionRecord, key: tuple[int, int], tensor: Any) -> list[Command]:
        """Hand a content to the runs that wait for it."""
        ready: list[Command] = []
        for runs in session.runs.values():
            for run in runs:
                value_ids = run.pending.pop(key, None)
                if value_ids:
                    for value_id in value_ids:
                        run.arrived(value_id, tensor)
                    ready.append(Execute(run))
        return ready

    def keep(self, session: SessionRecord, key: tuple[int, int], tensor: Any) -> None:
        before = session.tensors.pop(key, None)
        if before is not None:
            session.resident_bytes -= self._tools.size_bytes(before)
        session.tensors[key] = tensor
        session.resident_bytes += self._tools.size_bytes(tensor)

    def make_room(self, session: SessionRecord, needed: Collection[tuple[int, int]]) -> None:
        """Bring the session back to its quota, without those that are needed now.

        Raises: WorkerMemoryError where what is needed now, with what exists nowhere else, is more than the quota.
        """
        if session.resident_bytes <= session.quota_bytes:
            return
        remembered: set[tuple[int, int]] = set().union(*(t.keys for t in session.templates.values()))
        candidates = [key for key in session.tensors if key[1] >= 1 and key not in needed]
        for key in sorted(candidates, key=remembered.__contains__):
            if session.resident_bytes <= session.quota_bytes:
                return
            self.discard(session, key)
            session.evicted.append(key)
        if session.resident_bytes > session.quota_bytes:
            raise WorkerMemoryError(
                f"this session may keep {session.quota_bytes / 2**20:.1f} MiB on the worker, and "
                f"{session.resident_bytes / 2**20:.1f} MiB are needed at once, with nothing left that could go;"
                " raise the quota (resident_quota_gib, or --resident-quota-gib of the worker) or add a worker",
                resident_bytes=session.resident_bytes, quota_bytes=session.quota_bytes)

    def find(self, session: SessionRecord, key: tuple[int, int]) -> Any:
        """The state under a handle, which counts as used. Raises: StaleHandleError."""
        tensor = session.tensors.pop(key, None)
        if tensor is None:
            raise self.stale(key)
        session.tensors[key] = tensor
        return tensor

    def stale(self, key: tuple[int, int]) -> StaleHandleError:
        return StaleHandleError(f"tensor {key[0]} at epoch {key[1]} is not on this worker (incarnation "
                                f"{self._incarnation})", tensor_id=key[0], epoch=key[1])

    def discard(self, session: SessionRecord, key: tuple[int, int]) -> None:
        if key[1]:
            for program_id in [p for p, t in session.templates.items() if key in t.keys]:
                del session.templates[program_id]
        tensor = session.tensors.pop(key, None)
        session.arriving.pop(key, None)
        session.broken.pop(key, None)
        if tensor is not None:
            session.resident_bytes -= self._tools.size_bytes(tensor)

    def free(self, session: SessionRecord, event: Received) -> list[Command]:
        for key in event.message.tensors:  # type: ignore[union-attr]
            self.discard(session, key)
        return []

    def move(self, session: SessionRecord, event: Received) -> list[Command]:
        """Send a tensor to the worker that will run with it."""
        message: m.Move = event.message  # type: ignore[assignment]
        tensor = self.find(session, (message.tensor_id, message.epoch))
        letters: list[tuple[m.Land | m.Piece, Sequence[Any]]] = [
            (m.Piece(session.token, message.tensor_id, message.epoch, wire, None, offset), (frame,))
            for wire, frame, offset in self._tools.cut(tensor)]
        if not letters:
            frames: list[Any] = []
            staged = self._tools.stage(tensor, frames)
            letters.append((m.Land(session.token, message.tensor_id, message.epoch, staged[1]), frames))
        session.moved_bytes += self._tools.content_size(tensor)
        return [Deliver(message.address, message.key, letters, event.connection, message.request)]

    def land(self, session: SessionRecord | None, message: m.Land, frames: Sequence[Any]) -> list[Command]:
        """A tensor has come from another worker."""
        if session is None:
            return []
        key = (message.tensor_id, message.epoch)
        _check_landing(key)
        if key in session.tensors:
            return []            # it came twice, or from somebody who should not: what is resident never changes
        try:
            tensor = self._tools.own(self._tools.land(message.tensor, frames))
        except Exception as error:
            return self._no_landing(session, key, error)
        return self._landed(session, key, tensor)

    def _landed(self, session: SessionRecord, key: tuple[int, int], tensor: Any) -> list[Command]:
        self.keep(session, key, tensor)
        try:
            self.make_room(session, {key})
        except WorkerMemoryError as error:
            return self._no_landing(session, key, error)
        return self.arrived(session, key, tensor)

    def _no_landing(self, session: SessionRecord, key: tuple[int, int], error: BaseException) -> list[Command]:
        self.discard(session, key)
        failed = self.broke(session, key, error)    # the run that waits for it need not wait until it is late
        del session.broken[key]                     # and nobody else asks
        return failed

    def fetch(self, session: SessionRecord, event: Received) -> list[Command]:
        message: m.Fetch = event.message  # type: ignore[assignment]
        tensor = session.tensors.get((message.tensor_id, message.epoch))
        if tensor is None:
            raise self.stale((message.tensor_id, message.epoch))
        frames: list[Any] = []
        value = self._tools.stage(tensor, frames)
        return [Reply(event.connection, m.Result(message.request, ((0, value),), (), 0.0, 0.0,
                                                 session.resident_bytes), frames)]


def _checked(content: Any) -> tuple[int, int, Any, bytes | None]:
    """A content of a Put. Raises: ProtocolError."""
    if type(content) is not tuple or len(content) != 4 or type(content[0]) is not int or type(content[1]) is not int \
            or type(content[2]) is not tuple or type(content[3]) not in (bytes, type(None)):
        raise ProtocolError(f"a content is (tensor id, epoch, tensor, digest), got {content!r:.80}")
    return content


def _check_landing(key: tuple[int, int]) -> None:
    if key[1] < 1:
        raise ProtocolError(f"state has an epoch above 0, tensor {key[0]} came with {key[1]}")
