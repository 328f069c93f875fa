"""What the classifier sees of a node: its op, the ops around it, and how shapes change. No names.

The neighbourhood is the same in all three captures, since views are walked through: three steps up and three down,
each as the shares of the ops that are met. Everything is bounded per node.
"""
from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from genie_dynamo.passes.semantics.ops import VIEWS
from genie_dynamo.passes.semantics.patterns.search import LOSSES
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

OPS = (
    "matmul", "grouped_matmul", "attention", "softmax", "log_softmax", "conv", "layer_norm", "rms_norm", "group_norm",
    "batch_norm", "embedding", "embedding_bag", "lstm", "gru", "rnn", "max_pool", "avg_pool", "interpolate", "gelu",
    "silu", "relu", "tanh", "sigmoid", "softplus", "erf", "exp", "log", "sqrt", "rsqrt", "pow", "neg", "cos", "sin",
    "add", "sub", "mul", "div", "where", "maximum", "mean", "sum", "var", "cat", "stack", "index", "index_write",
    "index_add", "copy", "topk", "sort", "cumsum", "arange", "one_hot", "eq", "zeros", "input", "parameter", "buffer",
    "output")
_LOSS, _LIST, _OTHER = len(OPS), len(OPS) + 1, len(OPS) + 2
_WIDTH = len(OPS) + 3
_NUMBER = {op: index for index, op in enumerate(OPS)}
HOPS = 3
_FRONTIER = 16
_RANKS = 6
_FACTS = _RANKS + 8
NUM_FEATURES = _WIDTH * (1 + 2 * HOPS) + _FACTS

Array = NDArray[np.float32]


def describe(view: GraphView, nodes: Sequence[ViewNode]) -> Array:
    """Features (N, NUM_FEATURES) of N nodes."""
    found = np.zeros((len(nodes), NUM_FEATURES), dtype=np.float32)
    for row, node in zip(found, nodes, strict=True):
        row[_number(node)] = 1.0
        _around(row, view, node)
        _facts(row[-_FACTS:], node)
    return found


def _number(node: ViewNode) -> int:
    known = _NUMBER.get(node.op)
    if known is not None:
        return known
    return _LOSS if node.op in LOSSES else _LIST if node.op.startswith(("_foreach", "_fused")) else _OTHER


def _around(row: Array, view: GraphView, node: ViewNode) -> None:
    """Shares of ops one, two and three steps up and down."""
    for direction, walk in enumerate((_above, _below)):
        frontier, seen = [node], {node}
        for hop in range(HOPS):
            frontier = [n for f in frontier for n in walk(view, f) if n not in seen and not seen.add(n)]  # type: ignore[func-returns-value]
            if not frontier:
                break
            del frontier[_FRONTIER:]
            start = _WIDTH * (1 + direction * HOPS + hop)
            for other in frontier:
                row[start + _number(other)] += 1.0 / len(frontier)


def _above(view: GraphView, node: ViewNode) -> list[ViewNode]:
    return [view.through_views(producer) for producer in node.inputs]


def _below(view: GraphView, node: ViewNode) -> list[ViewNode]:
    found, queue, limit = [], list(node.users), 32
    while queue and limit:
        user, limit = queue.pop(0), limit - 1
        if user.op in VIEWS:
            queue.extend(user.users)
        else:
            found.append(user)
    return found


def _facts(row: Array, node: ViewNode) -> None:
    """Rank, and how the value differs from the first that it is made of."""
    row[min(max(node.rank, 0), _RANKS - 1)] = 1.0
    source = node.inputs[0] if node.inputs else None
    weights = [p for p in node.inputs if p.weighted and p.static]
    row[_RANKS] = _ratio(_last(node), _last(source))
    row[_RANKS + 1] = _ratio(_count(node), _count(source))
    row[_RANKS + 2] = float(node.static)
    row[_RANKS + 3] = float(bool(weights))
    row[_RANKS + 4] = float(any(p.rank >= 3 for p in weights))
    row[_RANKS + 5] = float(node.is_int)
    row[_RANKS + 6] = math.log2(1 + len(node.inputs)) / 3
    row[_RANKS + 7] = float(node.inplace)


def _last(node: ViewNode | None) -> int:
    return node.hint[-1] if node is not None and node.hint else 1


def _count(node: ViewNode | None) -> int:
    return math.prod(node.hint) if node is not None and node.hint else 1


def _ratio(first: int, second: int) -> float:
    return max(-1.0, min(1.0, math.log2((first + 1e-9) / max(second, 1)) / 6)) if first else -1.0
