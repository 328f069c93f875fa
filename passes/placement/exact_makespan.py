"""min_latency as a CP-SAT model with optional intervals: devices, and links between them, do one thing at a time."""
from __future__ import annotations

from typing import Any

import numpy as np

from genie_dynamo.passes.placement import solver
from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.loads import fits
from genie_dynamo.passes.placement.problem import Ints
from genie_dynamo.passes.placement.timeline import Schedule, Timeline

_S_PER_INTERVAL = 60e-6
_MAX_INTERVALS = 40_000


def num_intervals(timeline: Timeline) -> int:
    problem = timeline.problem
    return (len(problem.graph.nodes) * problem.num_devices
            + problem.num_tensors * problem.num_devices * (problem.num_devices - 1))


def time_to_build_s(timeline: Timeline) -> float:
    """About how long it takes until the search starts; inf for a model that is hopeless."""
    count = num_intervals(timeline)
    return count * _S_PER_INTERVAL if count <= _MAX_INTERVALS else float("inf")


class _Model:
    def __init__(self, timeline: Timeline, known_A: Ints, known: Schedule) -> None:
        from ortools.sat.python import cp_model

        self.timeline, self.problem = timeline, timeline.problem
        self.model: Any = cp_model.CpModel()
        self.scale = solver.scale_for(known.makespan_s)
        self.horizon = int(np.floor(known.makespan_s * self.scale))
        self.on = solver.assignment(self.model, self.problem)
        self.sent: list[tuple[int, int, int, Any, Any]] = []      # node, from, to, start, end
        self.start = [self._time() for _ in self.problem.graph.nodes]
        self.end = [self._time() for _ in self.problem.graph.nodes]
        self._nodes()
        self._edges()
        makespan = self._time()
        self.model.add_max_equality(makespan, self.end)
        self.model.minimize(makespan)
        self._hint(known_A, known)

    def _time(self) -> Any:
        return self.model.new_int_var(0, self.horizon, "")

    def _nodes(self) -> None:
        seconds = solver.units(self.problem.node_seconds_ND, self.scale)
        for d in range(self.problem.num_devices):
            intervals = []
            for node, atom in enumerate(self.timeline.atom_of):
                if seconds[node, d] >= 0:
                    intervals.append(self.model.new_optional_interval_var(
                        self.start[node], int(seconds[node, d]), self.end[node], self.on[atom][d], ""))
            self.model.add_no_overlap(intervals)
        for node, users in enumerate(self.timeline.users):
            for user in users:
                self.model.add(self.start[user] >= self.end[node])

    def _edges(self) -> None:
        """A transfer from p to q, present where the node is on p and some reader on q."""
        times = solver.units(self.problem.transfer_times_TDD(), self.scale)
        links: dict[tuple[int, int], list[Any]] = {}
        for tensor, node in enumerate(self.problem.tensor_node_T.tolist()):
            source = self.timeline.atom_of[node]
            users = [u for u in self.timeline.users[node] if self.timeline.atom_of[u] != source]
            for p, q in np.argwhere(times[tensor] > 0).tolist():
                moved = self.model.new_bool_var("")
                begin, end = self._time(), self._time()
                links.setdefault((p, q), []).append(
                    self.model.new_optional_interval_var(begin, int(times[tensor, p, q]), end, moved, ""))
                self.sent.append((node, p, q, begin, end))
                self.model.add(begin >= self.end[node]).only_enforce_if(moved)
                for user in users:
                    reads = self.on[self.timeline.atom_of[user]][q]
                    self.model.add_bool_or([self.on[source][p].negated(), reads.negated(), moved])
                    self.model.add(self.start[user] >= end).only_enforce_if([moved, reads])
        for intervals in links.values():
            self.model.add_no_overlap(intervals)

    def _hint(self, known_A: Ints, known: Schedule) -> None:
        for atom, device in enumerate(solver.canonical(self.problem, known_A)):
            for d, literal in enumerate(self.on[atom]):
                self.model.add_hint(literal, d == device)
        for variable, start in zip(self.start, known.start_N, strict=True):
            self.model.add_hint(variable, int(start * self.scale))


def solve(timeline: Timeline, known_A: Ints, known: Schedule, deadline: Deadline,
          seed: int) -> tuple[solver.Solution, Schedule | None]:
    """A placement and a schedule with a makespan below `known`, where one was found."""
    from ortools.sat.python import cp_model

    built = _Model(timeline, known_A, known)
    answer, status = solver.run(built.model, deadline, seed)
    found, schedule = None, None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = np.array([next(d for d, x in enumerate(row) if answer.boolean_value(x)) for row in built.on],
                         dtype=np.int64)
        device_N = timeline.devices_of_nodes(found)
        ran = [(answer.value(a), answer.value(b)) for a, b in zip(built.start, built.end, strict=True)]
        sent = {(node, q): (answer.value(begin), answer.value(end)) for node, p, q, begin, end in built.sent
                if device_N[node] == p and any(device_N[u] == q for u in timeline.users[node])}
        schedule = min(timeline.run(device_N), timeline.replay(device_N, ran, sent), key=lambda s: s.makespan_s)
        if not fits(timeline.problem, found) or schedule.makespan_s >= known.makespan_s:
            found, schedule = None, None
    proven = status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    bound = known.makespan_s if status == cp_model.INFEASIBLE else (
        0.0 if status == cp_model.MODEL_INVALID else answer.best_objective_bound / built.scale * (1 - 1e-12))
    return solver.Solution(device_A=found, lower_bound=max(0.0, bound), proven=proven), schedule
