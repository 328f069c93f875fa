"""A plan as the callable that torch gets for a graph: attempts, and what to do when one fails.

Nothing touches a worker before the first call.
"""
from __future__ import annotations

import logging
import random
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import (
    LaneLostError,
    LaneUnavailableError,
    StaleHandleError,
    UnsupportedGraphError,
    WorkerLostError,
)
from genie_dynamo.core.plan import Plan
from genie_dynamo.runtime.client import stale
from genie_dynamo.runtime.client.attempt import Attempts, GraphInfo, SessionPart
from genie_dynamo.runtime.client.binding import Binding
from genie_dynamo.runtime.client.saved import collect_handles, handle_of
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.client.verify import compare, run_reference

log = logging.getLogger(__name__)


class RemoteGraph:
    """Boxed callable: takes the list of arguments, empties it, returns the tuple of outputs.

    Args:
        plan, specs: the plan and its encoded fragments.
        get_session: the session of this process; called once per call.
        run_local: runs the same graph here (for on_worker_loss="local").
        workers: names of the workers that the plan numbers; by default any will do.
    """

    def __init__(self, plan: Plan, specs: dict[int, bytes], info: GraphInfo, config: Config,
                 get_session: Callable[[], Session], run_local: Callable[[list[Any]], Any],
                 workers: Sequence[str] = ()) -> None:
        self._boxed_call = True        # on the instance: torch's wrappers copy its __dict__, not its class
        self.plan = plan
        self.info = info
        self._config = config
        self._get_session = get_session
        self._run_local = run_local
        self._attempts = Attempts(plan, specs, info, config, workers)
        self._per_session: weakref.WeakKeyDictionary[Session, SessionPart] = weakref.WeakKeyDictionary()
        self._last: tuple[weakref.ref[Session] | None, SessionPart] = (None, SessionPart())

    def __call__(self, args: list[Any]) -> tuple[Any, ...]:
        values = list(args)
        args.clear()
        started_s = time.perf_counter()
        session = self._get_session()
        reference, part = self._last
        if reference is None or reference() is not session:
            part = self._part_of(session)
        if stale.any_stale():
            if self.info.partial:
                stale.bring_home()          # eager code follows in the same function, and may read them
            with stale.lifted():
                return self._started(session, part, values, started_s)
        return self._started(session, part, values, started_s)

    def _part_of(self, session: Session) -> SessionPart:
        part = self._per_session.get(session)
        if part is None:
            part = self._per_session[session] = SessionPart()
            weakref.finalize(self, _drop_programs, weakref.ref(session), part.bindings)
        self._last = (weakref.ref(session), part)
        return part

    def _started(self, session: Session, part: SessionPart, values: list[Any], started_s: float) -> tuple[Any, ...]:
        if self._config.verify and random.random() < self._config.verify:
            return self._verified(session, part, values, started_s)
        return self._call(session, part, values, started_s)

    def measured_s(self, session: Session) -> dict[str, float]:
        """Seconds that each worker reported for its share of the last call."""
        part = self._per_session.get(session)
        programs = [b for binding in part.bindings.values() for b in binding.programs.values()] if part else []
        return {b.link.name: b.last_compute_s for b in programs if b.last_compute_s is not None}

    def node_seconds(self, session: Session, timeout_s: float = 10.0) -> dict[str, dict[str, float]]:
        """Seconds of nodes by worker, in runs since the last time this was asked; the next few runs are timed.

        A fragment that has not run since, or runs as Inductor's code, is left out. Raises: WorkerError.
        """
        part = self._per_session.get(session)
        found: dict[str, dict[str, float]] = {}
        for binding in list(part.bindings.values()) if part else []:
            for bound in binding.programs.values():
                if not bound.link.lost:
                    times = session.profile(bound.link, bound.program, timeout_s)
                    found.setdefault(bound.link.name, {}).update(times)
        return found

    def _verified(self, session: Session, part: SessionPart, args: list[Any], started_s: float) -> tuple[Any, ...]:
        stale.bring_home()
        expected = run_reference(self._run_local, materialize(args, self._get_session))
        outputs = self._call(session, part, args, started_s)
        compare(self.plan, self.info.label, outputs, expected)
        session.telemetry.event("call verified")
        return outputs

    def _call(self, session: Session, part: SessionPart, values: list[Any], started_s: float) -> tuple[Any, ...]:
        if part.refusal:
            return self._locally(session, part.refusal, values)
        try:
            return self._over_lanes(session, part, values, started_s)
        except UnsupportedGraphError as error:
            # The worker lacks an op that this process has.
            if self._config.strict:
                raise
            part.refusal = str(error)
            log.warning("%s runs locally, the worker refuses it: %s", self.info.label, error)
            return self._locally(session, part.refusal, values)
        except StaleHandleError as error:
            # Another thread renewed a parameter between our look and the worker's: look again, once.
            if "template" not in error.facts and any(handle_of(v) is not None for v in values):
                raise
            return self._look_again(session, part, values, error)
        except WorkerLostError as error:
            return self._after_loss(session, part, values, error)

    def _over_lanes(self, session: Session, part: SessionPart, values: list[Any],
                    started_s: float) -> tuple[Any, ...]:
        """An attempt, and another over the next best lane where one breaks under it. Raises: as Attempts.run."""
        while True:
            try:
                return self._attempts.run(session, part, values, started_s)
            except LaneLostError as error:
                # Each turn rules one lane out for one worker, so this ends.
                for link in session.links:
                    if link.address == error.facts["address"]:
                        link.lane_lost(error.facts["lane"], error.facts["reason"])
                if self._config.require_lane == error.facts["lane"]:
                    raise LaneUnavailableError(f"{error}; require_lane={self._config.require_lane!r} allows no other",
                                               **error.facts) from error
                log.warning("%s: %s; the call takes the next best lane", self.info.label, error)
                session.telemetry.event("call repeated after a lane broke")
                started_s = time.perf_counter()

    def _look_again(self, session: Session, part: SessionPart, values: list[Any],
                    error: StaleHandleError) -> tuple[Any, ...]:
        """The worker lacks what it was thought to have: it was freed or evicted meanwhile."""
        session.telemetry.event("stale handle, call repeated")
        if session.residency.never_came((error.facts.get("tensor_id", 0), error.facts.get("epoch", 0))):
            session.telemetry.event("state did not come from another worker")
        if "template" in error.facts:
            session.residency.stamp += 1
        else:
            for link in session.links:
                session.residency.distrust(link.key)
        return self._over_lanes(session, part, values, time.perf_counter())

    def _after_loss(self, session: Session, part: SessionPart, args: list[Any],
                    error: WorkerLostError) -> tuple[Any, ...]:
        for link in session.links:
            if link.lost:
                session.lost(link)
        if any(handle_of(v) is not None for v in args):
            raise WorkerLostError(
                f"{error}; the activations that this backward needs were lost with it. Parameters and optimizer state "
                "are untouched: run the training step again", **error.facts) from error
        policy = self._config.on_worker_loss
        if policy == "error":
            raise error
        log.warning("%s: %s; %s", self.info.label, error, "running here" if policy == "local" else "trying once more")
        if policy == "local":
            return self._locally(session, "worker lost, on_worker_loss=local", args)
        session.telemetry.event("call repeated after a worker was lost")
        return self._over_lanes(session, part, args, time.perf_counter())

    def _locally(self, session: Session, reason: str, args: list[Any]) -> tuple[Any, ...]:
        session.telemetry.fallback(reason)
        stale.bring_home()
        return tuple(self._run_local(args))


def materialize(args: Sequence[Any], get_session: Callable[[], Session]) -> list[Any]:
    """The arguments with every activation that stayed on a worker brought here. Raises: WorkerError."""
    values = list(args)
    for index, handle in collect_handles(values).items():
        values[index] = get_session().fetch(handle.link, handle.tensor_id, 0)
    return values


def _drop_programs(session_ref: weakref.ref[Session], bindings: dict[tuple[str, ...], Binding]) -> None:
    """The graph was collected: its programs go with the next housekeeping."""
    session = session_ref()
    if session is None or session.closed:
        return
    for binding in bindings.values():
        for bound in binding.programs.values():
            bound.link.drops.append(binding.program_id)
