"""Sequences of atoms in which cutting into intervals may be good.

No single topological order is: weights enter late or early, branches side by side or one after the other. What the
orders differ in is when a node comes that could come at several times.
"""
from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from genie_dynamo.passes.placement.problem import Ints, Problem


def sequences(problem: Problem) -> Iterator[Ints]:
    """Atoms in sequence, the orders that are best most often first."""
    order = problem.graph.order
    makers: list[list[int]] = [[] for _ in order]
    users: list[list[int]] = [[] for _ in order]
    for src, dst in problem.graph.pairs:
        users[src].append(dst)
        makers[dst].append(src)
    backwards = order[::-1]
    # Depth first from the outputs: what a node needs comes just before it.
    yield _by_first(problem, _post_order([m[::-1] for m in makers], [i for i in backwards if not users[i]]))
    early = np.array(_depths(order, users), dtype=np.int64)
    yield _by_last(problem, np.argsort(early, kind="stable"))
    late = np.array(_depths(backwards, makers), dtype=np.int64)
    yield _by_first(problem, np.argsort(-late, kind="stable"))
    yield _by_first(problem, _post_order(makers, [i for i in order if not users[i]]))
    yield _by_last(problem, _post_order(users, [i for i in order if not makers[i]])[::-1])


def _depths(order: Sequence[int], following: list[list[int]]) -> list[int]:
    depth = [0] * len(order)
    for node in order:
        below = depth[node] + 1
        for user in following[node]:
            if depth[user] < below:
                depth[user] = below
    return depth


def _post_order(before: list[list[int]], roots: Sequence[int]) -> Ints:
    seen = bytearray(len(before))
    order = []
    for root in roots:
        if seen[root]:
            continue
        seen[root] = 1
        stack = [(root, iter(before[root]))]
        while stack:
            node, rest = stack[-1]
            for earlier in rest:
                if not seen[earlier]:
                    seen[earlier] = 1
                    stack.append((earlier, iter(before[earlier])))
                    break
            else:
                order.append(node)
                stack.pop()
    return np.array(order, dtype=np.int64)


def _positions(order: Ints) -> Ints:
    position = np.empty(len(order), dtype=np.int64)
    position[order] = np.arange(len(order))
    return position


def _by_first(problem: Problem, order: Ints) -> Ints:
    first = np.full(problem.num_atoms, len(order))
    np.minimum.at(first, problem.atom_of_N, _positions(order))
    return np.argsort(first, kind="stable")


def _by_last(problem: Problem, order: Ints) -> Ints:
    last = np.zeros(problem.num_atoms, dtype=np.int64)
    np.maximum.at(last, problem.atom_of_N, _positions(order))
    return np.argsort(last, kind="stable")
