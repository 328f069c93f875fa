"""Measures sides against each other in one run.

A *side* is one way to do the same work. Its factory (a function in its bench's SIDES) builds a `Step` in a process
of its own (bench/side.py); sides that name the same `process` share one. The controller holds all processes of a
case at once and lets them take turns, block by block, so that drift of the machine hits every side alike. The one
whose turn it is runs alone: the others wait in a read.

    round 1: block A B C | C B A | ...     round 2: ...     round 3: ...
    value of a side  = median over rounds of the round's median
    value of a ratio = median over rounds of (median of one side / median of the other)
"""
from __future__ import annotations

import contextlib
import json
import math
import os
import select
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

from bench import procfs

ROOT = Path(__file__).resolve().parent.parent
READY_TIMEOUT_S = 900.0
BUSY_POLL_S = 0.01
"""Of the sides that are called "busy polling": longer than any call there takes."""
_ERROR_TAIL_BYTES = 4000
_THAW_S = 0.2

Unit = Literal["s", "bytes", "share", "x"]


class BenchError(RuntimeError):
    """A side could not be built or measured."""


class NotInstalledError(RuntimeError):
    """Raised by a factory whose library is missing; the text says how to get it."""


# ---------------------------------------------------------------- what a bench writes
@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What the command line asked for."""

    quick: bool = False
    threads: tuple[int, ...] = (1, 2)
    cores: Literal["both", "free", "one"] = "both"
    backend: str = "genie"
    rounds: int = 3
    peers_python: str = sys.executable

    def placements(self) -> list[tuple[int, bool]]:
        """(threads, both ends on one core) for benches that report both; one core means one thread."""
        free = [(n, False) for n in self.threads] if self.cores != "one" else []
        pinned = [(1, True)] if self.cores == "one" or (self.cores == "both" and not self.quick) else []
        return free + pinned


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """Where a side's factory is, and with what it is built."""

    module: str
    factory: str
    name: str = ""                     # in tables; default: the factory's
    process: str = ""                  # sides with the same word share a process; default: one of its own
    params: Mapping[str, Any] = field(default_factory=dict)
    python: str = sys.executable
    unit: Unit = "s"
    optional: bool = False             # a failure is reported in the table and does not end the case
    freeze: bool = False               # stopped while others have their turn: for what is busy even when idle

    @property
    def label(self) -> str:
        return self.name or self.factory


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """A side, built. A sample is the wall time of `call`, or what `measure` returns where that is given."""

    call: Callable[[], Any] | None = None
    measure: Callable[[], float] | None = None
    prepare: Callable[[], Any] | None = None               # before each call, not timed
    checksum: Callable[[], Sequence[float]] | None = None  # must agree between the sides of a case
    facts: Callable[[], Mapping[str, float]] | None = None  # counters; the case gets what one call adds
    close: Callable[[], Any] | None = None


# ---------------------------------------------------------------- what comes out
@dataclass(frozen=True, slots=True, kw_only=True)
class Series:
    """The samples of one side, by round."""

    unit: Unit
    rounds: tuple[tuple[float, ...], ...]

    @property
    def medians(self) -> tuple[float, ...]:
        return tuple(statistics.median(r) for r in self.rounds)

    @property
    def median(self) -> float:
        return statistics.median(self.medians)

    def percentile(self, percent: float) -> float:
        """Nearest rank, over the samples of all rounds."""
        ordered = sorted(x for r in self.rounds for x in r)
        return ordered[max(0, math.ceil(len(ordered) * percent / 100) - 1)]

    @property
    def num_samples(self) -> int:
        return sum(map(len, self.rounds))


@dataclass(frozen=True, slots=True, kw_only=True)
class Ratio:
    """One side over another, with both sides."""

    name: str
    value: float
    rounds: tuple[float, ...]
    numerator: float
    denominator: float
    unit: Unit


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A value that the project wants to reach. `terms` are the measured numbers that it was computed from."""

    name: str
    value: float
    limit: float
    unit: Unit
    terms: Mapping[str, float]

    @property
    def reached(self) -> bool:
        return self.value <= self.limit


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One table: sides that did the same work, under the same conditions."""

    bench: str
    title: str
    threads: int
    pinned: bool
    series: Mapping[str, Series]
    ratios: tuple[Ratio, ...] = ()
    targets: tuple[Target, ...] = ()
    skipped: Mapping[str, str] = field(default_factory=dict)
    per_call: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


class Measurement:
    """What `measure` saw, and the sums that benches do with it."""

    def __init__(self, series: dict[str, Series], skipped: dict[str, str],
                 per_call: dict[str, dict[str, float]]) -> None:
        self.series, self.skipped, self.per_call = series, skipped, per_call

    def __contains__(self, label: str) -> bool:
        return label in self.series

    def median(self, label: str) -> float:
        return self.series[label].median

    def fastest(self, *labels: str) -> str:
        """The side with the smallest median."""
        return min((x for x in labels if x in self.series), key=self.median)

    def ratio(self, one: str, other: str) -> Ratio:
        a, b = self.series[one], self.series[other]
        rounds = tuple(x / y for x, y in zip(a.medians, b.medians, strict=True))
        return Ratio(name=f"{one} / {other}", value=statistics.median(rounds), rounds=rounds,
                     numerator=a.median, denominator=b.median, unit=a.unit)

    def difference(self, one: str, other: str) -> float:
        """Median over rounds of (median of one - median of the other)."""
        a, b = self.series[one], self.series[other]
        return statistics.median(x - y for x, y in zip(a.medians, b.medians, strict=True))


def ratio_target(name: str, ratio: Ratio, limit: float) -> Target:
    one, other = ratio.name.split(" / ")
    return Target(name=name, value=ratio.value, limit=limit, unit="x",
                  terms={one: ratio.numerator, other: ratio.denominator})


# ---------------------------------------------------------------- the processes
class SideProcess:
    """A process with one or more sides, and the pipe that it is asked through."""

    def __init__(self, sides: Sequence[Side], *, threads: int, cpu: int | None) -> None:
        self.sides = tuple(sides)
        spec = {"cpu": cpu, "sides": [
            {"label": s.label, "module": s.module, "factory": s.factory, "params": dict(s.params)} for s in sides]}
        env = os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the process
        self._buffer = b""
        self._process = subprocess.Popen(
            [sides[0].python, "-m", "bench.side", json.dumps(spec)], cwd=ROOT, env=env,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()        # the side closes what it holds and exits
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()
        self._log.close()

    def freeze(self, frozen: bool) -> None:
        """Stop, or continue, this process and all that it has started."""
        for pid in [self._process.pid, *procfs.descendants(self._process.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGSTOP if frozen else signal.SIGCONT)

    def ask(self, request: Mapping[str, Any], timeout_s: float) -> Any:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(request).encode() + b"\n")
            self._process.stdin.flush()
        except OSError as exc:
            raise BenchError(self._story(f"the process of {self._names()} is gone")) from exc
        return self.reply(timeout_s)

    def reply(self, timeout_s: float) -> Any:
        """The next line of JSON. Raises: BenchError with the end of the process's log."""
        assert self._process.stdout is not None
        fd, deadline = self._process.stdout.fileno(), time.monotonic() + timeout_s
        while b"\n" not in self._buffer:
            left_s = deadline - time.monotonic()
            if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
                self._process.kill()
                raise BenchError(self._story(f"{self._names()} did not answer within {timeout_s:g} s"))
            chunk = os.read(fd, 1 << 20)
            if not chunk:
                raise BenchError(self._story(f"the process of {self._names()} is gone"))
            self._buffer += chunk
        line, _, self._buffer = self._buffer.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise BenchError(self._story(f"{self._names()}: {answer['error']}"))
        return answer["ok"]

    def _names(self) -> str:
        return ", ".join(s.label for s in self.sides)

    def _story(self, what: str) -> str:
        self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, self._log.tell() - _ERROR_TAIL_BYTES))
        return f"{what}\n{self._log.read().decode(errors='replace')}".rstrip()


def measure(settings: Settings, sides: Sequence[Side], *, blocks: int, samples: int, settle: int = 1,
            threads: int = 1, pinned: bool = False, tolerance: float = 1e-4,
            timeout_s: float = READY_TIMEOUT_S) -> Measurement:
    """Build all sides, check that they compute the same, and sample them in turns.

    Args:    blocks: turns of a side per round.  samples: per block.  settle: calls before each block that do not
             count.  pinned: all processes, with their workers, on one core.  tolerance: relative, for checksums.
    Raises:  BenchError where a side fails or the sides disagree.
    """
    groups: dict[tuple[str, str], list[Side]] = {}
    for side in sides:
        groups.setdefault((side.process or side.label, side.python), []).append(side)
    cpu = min(os.sched_getaffinity(0)) if pinned else None
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(SideProcess(g, threads=threads, cpu=cpu)) for g in groups.values()]
        skipped: dict[str, str] = {}
        running: list[tuple[Side, SideProcess]] = []
        for process in processes:
            running += _await_ready(process, skipped, timeout_s)
        running.sort(key=lambda pair: sides.index(pair[0]))
        _check_agreement(running, tolerance, timeout_s)
        before = _facts(running, timeout_s)
        stack.callback(_freeze, running, False)
        _freeze(running, True)
        rounds: dict[str, list[list[float]]] = {s.label: [] for s, _ in running}
        for _ in range(settings.rounds):
            for values in rounds.values():
                values.append([])
            for block in range(blocks):
                for side, process in running if block % 2 == 0 else reversed(running):
                    with _turn(side, process):
                        rounds[side.label][-1] += process.ask(
                            {"verb": "sample", "side": side.label, "count": samples, "settle": settle}, timeout_s)
        _freeze(running, False)
        calls = settings.rounds * blocks * (samples + settle)
        per_call = {label: {k: (v - before[label].get(k, 0)) / calls for k, v in after.items()}
                    for label, after in _facts(running, timeout_s).items()}
    series = {s.label: Series(unit=s.unit, rounds=tuple(map(tuple, rounds[s.label]))) for s, _ in running}
    return Measurement(series, skipped, per_call)


def _await_ready(process: SideProcess, skipped: dict[str, str], timeout_s: float) -> list[tuple[Side, SideProcess]]:
    """The sides of a process that can be measured. Raises: BenchError where one fails that is not optional."""
    optional = all(side.optional for side in process.sides)
    try:
        state: Mapping[str, str] = process.reply(timeout_s)
    except BenchError as exc:
        if not optional:
            raise
        state = {side.label: f"failed: {str(exc).splitlines()[-1]:.200}" for side in process.sides}
    for side in process.sides:
        if state[side.label] and not side.optional:
            raise BenchError(f"{side.label}: {state[side.label]}")
    skipped.update({label: why for label, why in state.items() if why})
    return [(side, process) for side in process.sides if not state[side.label]]


def _freeze(running: Iterable[tuple[Side, SideProcess]], frozen: bool) -> None:
    for side, process in running:
        if side.freeze:
            process.freeze(frozen)


@contextlib.contextmanager
def _turn(side: Side, process: SideProcess) -> Iterator[None]:
    """A side's turn: if it is frozen between turns, it runs for this long."""
    if side.freeze:
        process.freeze(False)
        time.sleep(_THAW_S)            # what it does in the background catches up
    yield
    if side.freeze:
        process.freeze(True)


def _check_agreement(running: Iterable[tuple[Side, SideProcess]], tolerance: float, timeout_s: float) -> None:
    first: tuple[str, list[float]] | None = None
    for side, process in running:
        values = process.ask({"verb": "checksum", "side": side.label}, timeout_s)
        if values is None:
            continue
        if first is None:
            first = (side.label, values)
        scale = max(map(abs, first[1]), default=0.0)
        if len(values) != len(first[1]) or any(
                not abs(x - y) <= tolerance * scale for x, y in zip(values, first[1], strict=False)):
            raise BenchError(f"{side.label} computes {values}, {first[0]} computes {first[1]}: not the same work")


def _facts(running: Iterable[tuple[Side, SideProcess]], timeout_s: float) -> dict[str, dict[str, float]]:
    answers = {s.label: p.ask({"verb": "facts", "side": s.label}, timeout_s) for s, p in running}
    return {label: facts for label, facts in answers.items() if facts is not None}
