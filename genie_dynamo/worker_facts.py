"""What is known about the workers of a session, for placement. Measured in the background: no call waits for it."""
from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from genie_dynamo.core.errors import GenieError
from genie_dynamo.core.hardware import HardwareFacts, LinkFacts
from genie_dynamo.core.observations import Observation, merge
from genie_dynamo.observed import MAX_ROWS, kept
from genie_dynamo.passes.costs.fit import CostFit, refine
from genie_dynamo.passes.costs.shipped import shipped_fit
from genie_dynamo.passes.partition import WorkerFacts
from genie_dynamo.runtime.client.session import Session

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """Facts that hold for one set of worker incarnations."""

    key: tuple[str, ...]
    workers: tuple[WorkerFacts, ...]
    lanes: tuple[LinkFacts, ...]


class _Measurement:
    """One session's facts, or the thread that is getting them."""

    def __init__(self) -> None:
        self.facts: Facts | None = None
        self.thread: threading.Thread | None = None
        self.failed: tuple[str, ...] = ()
        self.rows: dict[str, tuple[Observation, ...]] = {}       # by worker, what refines its fit


_sessions: weakref.WeakKeyDictionary[Session, _Measurement] = weakref.WeakKeyDictionary()
_lock = threading.Lock()


def incarnations(session: Session) -> tuple[str, ...]:
    """The workers of a session that live, as facts name them."""
    return tuple([link.key for link in session.links if not link.lost])


def known(session: Session) -> Facts | None:
    """Facts about the workers that live now where they are there; nothing is measured for this."""
    with _lock:
        measurement = _sessions.get(session)
        facts = measurement.facts if measurement is not None else None
    return facts if facts is not None and facts.key == incarnations(session) else None


def facts_of(session: Session, *, wait: bool = False) -> Facts | None:
    """Facts about the workers that live now; None while they are being measured, or where that failed.

    Args: wait: until they are there, as `explain` does.
    """
    key = incarnations(session)
    with _lock:
        measurement = _sessions.setdefault(session, _Measurement())
        if measurement.facts is not None and measurement.facts.key == key:
            return measurement.facts
        if measurement.failed == key:
            return None
        if measurement.thread is None or not measurement.thread.is_alive():
            measurement.thread = threading.Thread(target=_measure, args=(weakref.ref(session), measurement, key),
                                                  name="genie-facts", daemon=True)
            measurement.thread.start()
        thread = measurement.thread
    if wait:
        thread.join()
        facts = measurement.facts
        return facts if facts is not None and facts.key == key else None
    return None


def _measure(session_ref: weakref.ref[Session], measurement: _Measurement, key: tuple[str, ...]) -> None:
    session = session_ref()
    if session is None or session.closed:
        return
    try:
        hardware = session.hardware()
        lanes = session.lanes()
    except GenieError as error:
        log.info("workers could not be measured, graphs stay on one each: %s", error)
        measurement.failed = key
        return
    if session.config.observe:
        measurement.rows = {name: kept(facts) for name, facts in hardware.items()}
    live = [link for link in session.links if link.key in key and link.name in hardware]
    embedded = max(1, sum(link.embedded is not None for link in live))      # they share this machine's memory
    measurement.facts = Facts(
        key=key, lanes=lanes,
        workers=tuple(WorkerFacts(name=link.name, hardware=hardware[link.name],
                                  fit=_fit(hardware[link.name], measurement.rows.get(link.name, ())),
                                  price_per_hour=session.prices.get(link.name),
                                  memory_bytes=_memory_of(hardware[link.name], embedded if link.embedded else 1))
                      for link in live))


def observed(session: Session, worker: str, rows: Iterable[Observation]) -> None:
    """Nodes were timed on a worker: what is estimated of it from now on takes that in."""
    with _lock:
        measurement = _sessions.get(session)
        if measurement is None or measurement.facts is None:
            return
        measurement.rows[worker] = merge(measurement.rows.get(worker, ()), rows, MAX_ROWS)
        facts = measurement.facts
        measurement.facts = replace(facts, workers=tuple(
            replace(w, fit=_fit(w.hardware, measurement.rows[worker])) if w.name == worker else w
            for w in facts.workers))


def _fit(hardware: HardwareFacts, rows: Sequence[Observation]) -> CostFit | None:
    return refine(shipped_fit(hardware.kind), rows, hardware) if rows else None


def _memory_of(hardware: HardwareFacts, sharers: int) -> int | None:
    return None if hardware.memory_bytes is None else hardware.memory_bytes // sharers
