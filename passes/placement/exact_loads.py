"""max_throughput as a CP-SAT model: the best load with proof where that can be, else a bound and a better load."""
from __future__ import annotations

from typing import Any

import numpy as np

from genie_dynamo.passes.placement import solver
from genie_dynamo.passes.placement.deadline import Deadline
from genie_dynamo.passes.placement.loads import device_loads, fits
from genie_dynamo.passes.placement.problem import Ints, Problem

_S_PER_LITERAL = 12e-6     # about what building and presolving the model takes, per literal


def time_to_build_s(problem: Problem) -> float:
    """About how long it takes until the search starts."""
    pins = problem.num_tensors + len(problem.pin_atom_P)
    per_pin = problem.num_devices if problem.uniform else problem.num_devices**2
    return (problem.num_atoms * problem.num_devices + 2 * pins * per_pin) * _S_PER_LITERAL


def solve(problem: Problem, known_A: Ints | None, value: float, deadline: Deadline, seed: int) -> solver.Solution:
    """A placement with a largest load below `value`, which `known_A` has; with known_A None, any that obeys limits."""
    from ortools.sat.python import cp_model

    model = cp_model.CpModel()
    on = solver.assignment(model, problem)
    scale = solver.scale_for(value)
    if known_A is not None:
        top = model.new_int_var(0, int(np.floor(value * scale)), "largest load")
        for load in _load_terms(model, problem, on, scale):
            model.add(sum(load) <= top)
        model.minimize(top)
        for atom, device in enumerate(solver.canonical(problem, known_A)):
            for d, literal in enumerate(on[atom]):
                model.add_hint(literal, d == device)
    answer, status = solver.run(model, deadline, seed)
    found = None
    if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
        found = np.array([next(d for d, x in enumerate(row) if answer.boolean_value(x)) for row in on], dtype=np.int64)
        if not fits(problem, found) or (known_A is not None and device_loads(problem, found).max() >= value):
            found = None
    proven = status in (cp_model.OPTIMAL, cp_model.INFEASIBLE)
    bound = 0.0
    if known_A is not None and status != cp_model.MODEL_INVALID:
        bound = answer.best_objective_bound / scale * (1 - 1e-12) if status != cp_model.INFEASIBLE else value
    return solver.Solution(device_A=found, lower_bound=max(0.0, bound), proven=proven)


def _load_terms(model: Any, problem: Problem, on: list[list[Any]], scale: float) -> list[list[Any]]:
    """Per device, what adds up to its load."""
    seconds = solver.units(problem.seconds_AD, scale)
    terms = [[int(seconds[a, d]) * on[a][d] for a in range(problem.num_atoms) if seconds[a, d] > 0]
             for d in range(problem.num_devices)]
    times = solver.units(problem.transfer_times_TDD(), scale)
    readers: list[list[int]] = [[] for _ in range(problem.num_tensors)]
    for tensor, atom in zip(problem.pin_tensor_P.tolist(), problem.pin_atom_P.tolist(), strict=True):
        readers[tensor].append(atom)
    add = _uniform_tensor if problem.uniform else _tensor
    for tensor, source in enumerate(problem.source_T.tolist()):
        if times[tensor].max() > 0:
            add(model, problem, on, terms, source, readers[tensor], times[tensor])
    return terms


def _uniform_tensor(model: Any, problem: Problem, on: list[list[Any]], terms: list[list[Any]], source: int,
                    readers: list[int], times: Any) -> None:
    """Every device that holds some but not all of source and readers is charged the same."""
    atoms = [source, *readers]
    for d in np.flatnonzero(problem.pays_D):
        touched, charged = model.new_bool_var(""), model.new_bool_var("")
        for atom in atoms:
            model.add_implication(on[atom][d], touched)
            model.add_bool_or([touched.negated(), on[atom][d], charged])
        terms[d].append(int(times.max()) * charged)


def _tensor(model: Any, problem: Problem, on: list[list[Any]], terms: list[list[Any]], source: int,
            readers: list[int], times: Any) -> None:
    """Charges depend on both ends: one literal per pair of devices, and the slowest receiver for the sender."""
    wanted = [model.new_bool_var("") for _ in problem.devices]
    for d, literal in enumerate(wanted):
        for atom in readers:
            model.add_implication(on[atom][d], literal)
    for p in range(problem.num_devices):
        slowest = model.new_int_var(0, int(times[p].max()), "")
        for q in np.flatnonzero(times[p] > 0):
            moved = model.new_bool_var("")
            model.add_bool_or([on[source][p].negated(), wanted[q].negated(), moved])
            model.add(slowest >= int(times[p, q])).only_enforce_if(moved)
            if problem.pays_D[q]:
                terms[q].append(int(times[p, q]) * moved)
        if problem.pays_D[p]:
            terms[p].append(slowest)
