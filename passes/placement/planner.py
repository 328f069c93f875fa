"""Placement by policy: the strategy that `genie.place` and `genie.Scheduler` use unless given another."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.placement import Placement, Policy, Transfer
from genie_dynamo.passes.placement import solver
from genie_dynamo.passes.placement.cost import best_cost
from genie_dynamo.passes.placement.deadline import Clock, Deadline
from genie_dynamo.passes.placement.interfaces import Limits, PlacementStrategy
from genie_dynamo.passes.placement.kernel import Kernels
from genie_dynamo.passes.placement.latency import best_makespan
from genie_dynamo.passes.placement.loads import device_loads
from genie_dynamo.passes.placement.problem import Ints, Problem, build_problem
from genie_dynamo.passes.placement.throughput import PROVEN, best_loads
from genie_dynamo.passes.placement.timeline import Schedule

_RESERVE = 0.02                # of the limit, for what comes after the search
_RESERVE_S_PER_NODE = 6e-7
_EXACT = {"auto": None, "heuristic": False, "exact": True}


@dataclass(frozen=True, slots=True)
class Planner(PlacementStrategy):
    """Heuristics first, annealing and the exact solver as time allows.

    Fields:  clock: counts seconds.  kernels: native inner loops; None: Python's.
    """

    clock: Clock
    kernels: Kernels | None = None

    def place(self, cost_graph: CostGraph, devices: Sequence[Device], policy: Policy, limits: Limits) -> Placement:
        whole = Deadline(self.clock, None)
        limit_s = limits.time_limit_s
        if limit_s is not None:
            limit_s = max(0.0, limit_s * (1 - _RESERVE) - _RESERVE_S_PER_NODE * len(cost_graph.nodes))
        deadline = Deadline(self.clock, limit_s)
        problem = build_problem(cost_graph, devices)
        exact = _EXACT[limits.method]
        missing = "" if solver.installed() or exact is False or deadline.quick else ", exact solver not installed"
        if not cost_graph.nodes:
            return Placement(device={}, policy=policy, objective_value=0.0, lower_bound=0.0, method="nothing to place",
                             seconds=whole.spent_s())
        if policy == "max_throughput":
            loads = best_loads(problem, deadline, exact=exact, seed=limits.seed, kernels=self.kernels)
            return _of_loads(problem, loads.device_A, loads.lower_bound, loads.method + missing, whole)
        if policy == "min_latency":
            fast = best_makespan(problem, deadline, exact=exact, seed=limits.seed,
                                 kernels=self.kernels)
            return _of_schedule(problem, policy, fast.device_A, fast.schedule, fast.schedule.makespan_s,
                                fast.lower_bound, fast.method + missing, whole)
        cheap = best_cost(problem, deadline, latency_bound_s=limits.latency_bound_s, exact=exact, seed=limits.seed,
                          kernels=self.kernels)
        return _of_schedule(problem, policy, cheap.device_A, cheap.schedule, cheap.value, cheap.lower_bound,
                            cheap.method + missing, whole)


def _devices(problem: Problem, device_A: Ints) -> dict[str, str]:
    names = [d.id for d in problem.devices]
    chosen = device_A[problem.atom_of_N].tolist()
    return {node.id: names[d] for node, d in zip(problem.graph.nodes, chosen, strict=True)}


def _proven(method: str, value: float, lower_bound: float) -> str:
    return f"{method}, proven optimal" if value <= lower_bound * (1 + PROVEN) else method


def _bound(value: float, lower_bound: float) -> float | None:
    return None if lower_bound <= 0 < value else min(lower_bound, value)


def _of_loads(problem: Problem, device_A: Ints, lower_bound: float, method: str, whole: Deadline) -> Placement:
    loads = device_loads(problem, device_A)
    value = float(np.max(loads))
    return Placement(
        device=_devices(problem, device_A), policy="max_throughput", objective_value=value,
        lower_bound=_bound(value, lower_bound), method=_proven(method, value, lower_bound),
        loads_s={d.id: float(load) for d, load in zip(problem.devices, loads, strict=True)}, seconds=whole.spent_s())


def _of_schedule(problem: Problem, policy: Policy, device_A: Ints, schedule: Schedule, value: float,
                 lower_bound: float, method: str, whole: Deadline) -> Placement:
    nodes, devices = problem.graph.nodes, problem.devices
    return Placement(
        device=_devices(problem, device_A), policy=policy, objective_value=value,
        lower_bound=_bound(value, lower_bound), method=_proven(method, value, lower_bound),
        start_s={node.id: start for node, start in zip(nodes, schedule.start_N, strict=True)},
        transfers=tuple(Transfer(node=nodes[n].id, src=devices[p].id, dst=devices[q].id, start_s=start, end_s=end)
                        for n, p, q, start, end in schedule.transfers),
        makespan_s=schedule.makespan_s, seconds=whole.spent_s())
