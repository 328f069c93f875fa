"""What a demo run found, as plain facts and as the table it prints."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field
from typing import Any

EMBEDDING_TOLERANCE = 1e-5   # float32, normalised embeddings: other thread counts sum in another order


@dataclass(frozen=True, slots=True)
class Moved:
    """Bytes between the client and its workers."""

    up_bytes: int
    down_bytes: int

    def __str__(self) -> str:
        return f"{human_bytes(self.up_bytes)} up, {human_bytes(self.down_bytes)} down"


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """One half of the demo: the same work done by local eager and through the backend."""

    name: str
    what: str                       # in words: how much of what
    equal: bool
    difference: str                 # in words: the largest difference, or which token differs first
    local_s: float
    remote_s: float                 # steady state: without the first call
    first_call_s: float             # compiling, shipping the graph and the weights
    moved: Mapping[str, Moved] = field(default_factory=dict)
    runs_by_worker: Mapping[str, int] = field(default_factory=dict)
    fallbacks: Mapping[str, int] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Answer:
    """A query and the functions whose docstrings are nearest to it."""

    query: str
    hits: tuple[tuple[str, float, str], ...]   # name, cosine similarity, docstring

    def __str__(self) -> str:
        lines = [f'  "{self.query}"']
        lines += [f"    {score:.2f}  {name}: {_short(text, 60)}" for name, score, text in self.hits]
        return "\n".join(lines)


def human_bytes(count: float) -> str:
    """1536 -> '1.5 kB' (1 kB = 1024 B)."""
    for unit in ("B", "kB", "MB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} GB"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of equal length in columns; the first row is the head."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
             for row in rows]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def summary(parts: Sequence[Part]) -> str:
    """The table at the end: equality, time, bytes by reason, who ran it."""
    reasons = sorted({reason for part in parts for reason in part.moved if any(astuple(part.moved[reason]))})
    workers = sorted({worker for part in parts for worker in part.runs_by_worker})
    rows: list[list[str]] = [["", *(part.name for part in parts)]]

    def row(title: str, cells: list[str]) -> None:
        rows.append([title, *cells])

    row("work", [part.what for part in parts])
    row("equal to local eager", ["yes" if part.equal else "NO" for part in parts])
    row("difference", [part.difference for part in parts])
    row("time, local eager, as many threads", [f"{part.local_s:.2f} s" for part in parts])
    row("time, remote", [f"{part.remote_s:.2f} s ({part.remote_s / part.local_s:.2f}x local)" for part in parts])
    row("first call (compile, ship, upload)", [f"{part.first_call_s:.2f} s" for part in parts])
    for reason in reasons:
        row(f"moved: {reason}", [str(part.moved.get(reason, Moved(0, 0))) for part in parts])
    for worker in workers:
        row(f"fragment runs: {worker}", [str(part.runs_by_worker.get(worker, 0)) for part in parts])
    row("fallbacks to local", [str(sum(part.fallbacks.values())) for part in parts])
    return table(rows)


def _short(text: str, width: int) -> str:
    return text if len(text) <= width else text[:width - 3].rstrip() + "..."
