"""Bringing parameters and buffers to a worker: in bulk before the first run, in a stream beside later ones."""
from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.runtime.client.connection import Connection
from genie_dynamo.runtime.client.residency import DIGEST_BYTES, Entry, Residency, digest_of
from genie_dynamo.runtime.client.workers import WorkerLink
from genie_dynamo.runtime.lanes.zmq_frames import ZmqFrames, cut, travels_in_pieces
from genie_dynamo.runtime.telemetry import Telemetry

CHUNK_BYTES = 32 << 20
"""Bulk uploads wait for the worker after this much, so that neither side's queues grow and progress is real."""
MAX_TOGETHER = 1024
"""Contents that share a message; each may have a frame of its own, of which a message has 4096."""
PROGRESS_BYTES = 32 << 20
"""From this size on a bulk upload shows a progress bar, where the configuration allows."""


class Upload(NamedTuple):
    """One tensor whose current content a worker lacks."""

    entry: Entry
    tensor: torch.Tensor
    epoch: int


class Content(NamedTuple):
    """What a worker is to keep under a handle."""

    tensor_id: int
    epoch: int
    tensor: torch.Tensor
    digest: bytes | None


class Parcel(NamedTuple):
    """One message of an upload."""

    message: m.Put | m.Piece
    frames: Sequence[Any]
    payload_bytes: int
    inline_bytes: int                         # of them, inside the message part


class Needs(NamedTuple):
    """What one worker lacks for one call."""

    fresh: list[Upload]                       # never there before: bulk
    changed: list[Upload]                     # an older content is there: streamed beside the run
    incoming: list[tuple[int, int]]           # (tensor id, epoch) on their way, from whatever thread


def find_needs(residency: Residency, link: WorkerLink, entries: Sequence[Entry],
               statics: Sequence[torch.Tensor]) -> Needs:
    """Compare the epochs the call needs with those the worker has, and claim what this thread will send."""
    needs, key = Needs([], [], []), link.key
    with residency.lock:
        for entry, tensor in zip(entries, statics, strict=True):
            epoch = entry.epoch
            if entry.acked.get(key) == epoch:
                continue
            before = entry.sent.get(key)
            needs.incoming.append((entry.tensor_id, epoch))
            if before != epoch:
                (needs.fresh if before is None else needs.changed).append(Upload(entry, tensor, epoch))
                entry.sent[key] = epoch
    return needs


def unclaim(residency: Residency, link: WorkerLink, uploads: Sequence[Upload]) -> None:
    """The call failed: what was to be sent may not have arrived."""
    with residency.lock:
        for upload in uploads:
            if upload.entry.sent.get(link.key) == upload.epoch:
                del upload.entry.sent[link.key]
        residency.stamp += 1


def acknowledge(residency: Residency, link: WorkerLink, entries: Sequence[Entry],
                incoming: Sequence[tuple[int, int]]) -> None:
    """The worker has used these contents, so it has them."""
    arrived = set(incoming)
    with residency.lock:
        for entry in entries:
            epoch = entry.sent.get(link.key)
            if epoch is not None and (entry.tensor_id, epoch) in arrived:
                entry.acked[link.key] = epoch


def send_fresh(connection: Connection, lane: ZmqFrames, link: WorkerLink, uploads: Sequence[Upload],
               telemetry: Telemetry, *, deadline_s: float, progress: str) -> None:
    """Upload contents a worker never had; those it has under another name or from another client are adopted.

    Raises: what the worker reports, or WorkerError.
    """
    known = _ask_known(connection, link, uploads, telemetry, deadline_s)
    total = sum(u.tensor.numel() * u.tensor.element_size() for u in uploads if u.entry.digest not in known)
    unacknowledged = 0
    missing: list[Upload] = []
    with _progress(total, f"weights to {link.name}", progress) as advance:
        for upload in uploads:
            entry = upload.entry
            if entry.digest is not None and entry.digest in known:
                size = connection.send(m.Adopt(entry.tensor_id, upload.epoch, entry.digest))
                telemetry.moved(link.name, sent={"control": size})
                continue
            missing.append(upload)
        for size in send_contents(connection, lane, link, missing, telemetry):
            advance(size)
            unacknowledged += size
            if unacknowledged > CHUNK_BYTES:
                connection.ask(m.Have(connection.next_request(), ()), deadline_s)
                unacknowledged = 0


def send_contents(connection: Connection, lane: ZmqFrames, link: WorkerLink, uploads: Sequence[Upload],
                  telemetry: Telemetry) -> Iterator[int]:
    """Send contents as the caller asks for the next; how many bytes each message brought."""
    for parcel in parcels(lane, [Content(u.entry.tensor_id, u.epoch, u.tensor, u.entry.digest) for u in uploads]):
        header = connection.send(parcel.message, parcel.frames)
        telemetry.moved(link.name, sent={"weights": parcel.payload_bytes, "control": header - parcel.inline_bytes})
        yield parcel.payload_bytes


def parcels(lane: ZmqFrames, contents: Sequence[Content]) -> Iterator[Parcel]:
    """The messages that bring contents: small ones together, large ones in pieces.

    Raises: MessageLimitError for a tensor that cannot travel.
    """
    together: list[tuple[Any, ...]] = []
    frames: list[Any] = []
    size = inline = 0
    for content in contents:
        if travels_in_pieces(content.tensor):
            for wire, frame, offset in cut(content.tensor):
                yield Parcel(m.Piece(b"", content.tensor_id, content.epoch, wire, content.digest, offset), (frame,),
                             len(frame), 0)
            continue
        wire = lane.stage(content.tensor, frames)
        together.append((content.tensor_id, content.epoch, wire, content.digest))
        size += payload_bytes(wire, frames)
        inline += len(wire[3]) if type(wire[3]) is bytes else 0
        if size >= m.PIECE_BYTES or len(together) == MAX_TOGETHER:
            yield Parcel(m.Put(tuple(together)), frames, size, inline)
            together, frames, size, inline = [], [], 0, 0
    if together:
        yield Parcel(m.Put(tuple(together)), frames, size, inline)


def payload_bytes(wire: Sequence[Any], frames: Sequence[Any]) -> int:
    """How many bytes of tensor content a wire form stands for."""
    payload = wire[3]
    return len(payload) if type(payload) is bytes else len(frames[payload])


def _ask_known(connection: Connection, link: WorkerLink, uploads: Sequence[Upload], telemetry: Telemetry,
               deadline_s: float) -> set[bytes]:
    asked: list[bytes] = []
    for upload in uploads:
        if upload.tensor.numel() * upload.tensor.element_size() >= DIGEST_BYTES:
            if upload.entry.digest is None:
                upload.entry.digest = digest_of(upload.tensor)
            asked.append(upload.entry.digest)
    if not asked:
        return set()
    answer = connection.ask(m.Have(connection.next_request(), tuple(asked)), deadline_s)
    if not isinstance(answer, m.Done) or len(answer.info) != len(asked):
        raise ProtocolError(f"{link.address} answered {len(asked)} digests with {answer!r:.80}")
    telemetry.moved(link.name, sent={"control": 34 * len(asked)}, received={"control": len(asked)})
    return {digest for digest, held in zip(asked, answer.info, strict=True) if held}


@contextmanager
def _progress(total_bytes: int, label: str, mode: str) -> Iterator[Any]:
    wanted = mode == "on" or (mode == "auto" and total_bytes >= PROGRESS_BYTES and sys.stderr.isatty())
    if not wanted or total_bytes == 0:
        yield lambda size: None
        return
    from tqdm import tqdm

    with tqdm(total=total_bytes, desc=label, unit="B", unit_scale=True, leave=False) as bar:
        yield bar.update


