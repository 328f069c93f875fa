"""Stages of convolutions: what computes at one resolution, and whether it is backbone, neck or head.

    backbone   each resolution of the way down
    neck       where something upsampled meets something of its own resolution, with what only feeds that
    head       what follows the neck, after the convolution that smooths the meeting
"""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, PURE_VIEWS
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

_KEEPS = ELEMENTWISE | PURE_VIEWS | {
    "batch_norm", "group_norm", "layer_norm", "item", "cat", "mean", "matmul", "pad", "slice", "max_pool", "avg_pool",
    "interpolate"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """One stage; `role` as above, `size` the spatial sizes of its values."""

    role: str
    size: tuple[int, ...]
    dims: int
    nodes: tuple[ViewNode, ...]


def find_stages(view: GraphView, taken: Iterable[ViewNode]) -> tuple[Stage, ...]:
    """The stages of a graph. `taken`: convolutions that belong to something else (patches, state spaces)."""
    skipped = set(taken)
    convolutions = [n for n in view.by_op.get("conv", ()) if n not in skipped and n.hint is not None and not n.static]
    if not convolutions:
        return ()
    roles = _roles(view, convolutions)
    groups = _Groups()
    for node in view.nodes:
        if node.kind != "call" or node.static or node.hint is None or node in skipped:
            continue
        role = roles.get(node.index, "backbone")
        joins = [p for p in dict.fromkeys(node.inputs) if p.index in groups.parent
                 and roles.get(p.index, "backbone") == role and _fits(groups.size(p.index), node)]
        if node.op == "conv":
            size = tuple(node.hint[2:])
            joins = [p for p in joins if groups.size(p.index) == size]
            groups.add(node, size, joins)
        elif node.op in _KEEPS and joins and node.rank >= 3:
            groups.add(node, groups.size(joins[0].index), joins)
    return groups.stages(view, roles)


def _fits(size: tuple[int, ...], node: ViewNode) -> bool:
    """Whether a value has these spatial sizes among its dims."""
    dims = list(node.hint or ())[1:]
    for length in size:
        if length not in dims:
            return False
        dims.remove(length)
    return True


class _Groups:
    """Union-find over nodes by index."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}
        self._size: dict[int, tuple[int, ...]] = {}

    def find(self, index: int) -> int:
        while self.parent[index] != index:
            self.parent[index] = index = self.parent[self.parent[index]]
        return index

    def size(self, index: int) -> tuple[int, ...]:
        return self._size[self.find(index)]

    def add(self, node: ViewNode, size: tuple[int, ...], joins: list[ViewNode]) -> None:
        self.parent[node.index] = node.index
        self._size[node.index] = size
        for other in joins:
            self.parent[self.find(other.index)] = node.index

    def stages(self, view: GraphView, roles: dict[int, str]) -> tuple[Stage, ...]:
        members: dict[int, list[ViewNode]] = {}
        for node in view.nodes:
            if node.index in self.parent:
                members.setdefault(self.find(node.index), []).append(node)
        return tuple(
            Stage(role=roles.get(nodes[0].index, "backbone"), size=self._size[root], dims=len(self._size[root]),
                  nodes=tuple(nodes)) for root, nodes in members.items() if any(n.op == "conv" for n in nodes))


def _roles(view: GraphView, convolutions: list[ViewNode]) -> dict[int, str]:
    """Node index -> "neck" or "head"; what is not there is backbone."""
    grown = [n for n in view.nodes if not n.static and _grows(n)]
    merges = [m for g in grown for m in view.forward(g, PURE_VIEWS | {"item"}, 8)
              if m.op in ("add", "cat") and len(set(m.inputs)) >= 2]
    if not merges:
        return {}
    above = _reach(merges, down=False)
    laterals = [n for end in dict.fromkeys([*merges, *grown]) for n in _sources(view, end)
                if not any(_shrinks(view.nodes[i]) for i in _reach([n], down=True))]
    below = _reach([*merges, *laterals], down=True) | {n.index for n in grown}
    meeting = {n.index for n in (*merges, *grown, *laterals)}
    roles: dict[int, str] = {}
    for index in sorted(below):
        node = view.nodes[index]
        near = index in above or index in meeting or _convolutions_since(node, below, above | meeting) <= 1
        roles[index] = "neck" if near else "head"
    return roles


def _sources(view: GraphView, end: ViewNode) -> list[ViewNode]:
    """The convolutions whose results go into a meeting as they are."""
    return [n for n in view.backward(end, PURE_VIEWS | {"batch_norm", "item", "relu", "silu"}, 12)
            if n.op == "conv" and not n.static]


def _grows(node: ViewNode) -> bool:
    """Upsampling: its own op, a transposed convolution, or an index that repeats rows and columns."""
    if node.op == "interpolate" or (node.op == "conv" and _transposed(node)):
        return True
    if node.op not in ("index", "select", "repeat") or not node.inputs or node.rank != 4:
        return False
    before, after = node.inputs[0].hint, node.hint
    return before is not None and after is not None and len(before) == 4 and all(
        b < a for b, a in zip(before[2:], after[2:], strict=True)) and before[:2] == after[:2]


def _shrinks(node: ViewNode) -> bool:
    if node.op not in ("conv", "max_pool", "avg_pool") or node.hint is None or not node.inputs:
        return False
    before = node.inputs[0].hint
    return before is not None and len(before) == len(node.hint) and node.hint[-1] < before[-1]


def _transposed(node: ViewNode) -> bool:
    return "transpose" in node.target or (node.target == "convolution" and len(node.args) > 6 and node.args[6] is True)


def _reach(starts: list[ViewNode], *, down: bool) -> set[int]:
    seen = {n.index for n in starts}
    queue = list(starts)
    while queue:
        node = queue.pop()
        for other in (node.users if down else node.inputs):
            if other.index not in seen and other.kind == "call" and not other.static:
                seen.add(other.index)
                queue.append(other)
    return seen


def _convolutions_since(node: ViewNode, below: set[int], above: set[int]) -> int:
    """Convolutions on the way from the last meeting to a node, itself included; counted along the first input."""
    count, current, limit = 0, node, 64
    while limit and current.index in below and current.index not in above:
        count += current.op == "conv"
        source = next((p for p in current.inputs if p.index in below), None)
        if source is None:
            break
        current, limit = source, limit - 1
    return count
