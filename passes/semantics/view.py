"""A graph as patterns see it: plain data, one vocabulary for all three captures.

    view = read_graph(gm)                     # reading.py, the border to torch.fx
    for node in view.by_op["softmax"]:
        source = view.through_views(node.inputs[0])

Nodes are read-only. Shapes hold ints, and strings for symbolic dims; `hint` holds the sizes of the call that was
captured. A node is `static` when nothing but weights and constants reaches it.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from genie_dynamo.passes.semantics.ops import ELEMENTWISE, VIEWS

Dim = int | str
_ROOTS = {0.5: "sqrt", -0.5: "rsqrt"}        # a power that is a root, spelt otherwise


class ViewNode:
    """One node.

    kind    "input" | "constant" | "call" | "output"
    op      the canonical word of ops.py; for an input its role: parameter, buffer, input
    args    as in the graph, with ViewNode in place of nodes; tuples, never lists
    path, class_name   of the innermost nn.Module, "" where the capture does not know
    taint   bit set of the non-weight inputs that reach the node; 0: static
    """

    __slots__ = ("args", "class_name", "dtype", "hint", "index", "inplace", "inputs", "kind", "kwargs", "name", "op",
                 "path", "shape", "source", "taint", "target", "users", "weighted")

    def __init__(self, *, index: int, name: str, kind: str, op: str, target: str, args: tuple[Any, ...] = (),
                 kwargs: dict[str, Any] | None = None, shape: tuple[Dim, ...] | None = None,
                 hint: tuple[int, ...] | None = None, dtype: str = "", path: str = "", class_name: str = "",
                 source: str = "", inplace: bool = False) -> None:
        self.index, self.name, self.kind, self.op, self.target = index, name, kind, op, target
        self.args, self.kwargs = args, kwargs or {}
        self.shape, self.hint, self.dtype = shape, hint, dtype
        self.path, self.class_name, self.source, self.inplace = path, class_name, source, inplace
        self.inputs: tuple[ViewNode, ...] = tuple(_nodes_in((args, self.kwargs)))
        self.users: list[ViewNode] = []
        self.taint = 0
        self.weighted = False

    @property
    def static(self) -> bool:
        return self.taint == 0 and self.kind != "output"

    @property
    def rank(self) -> int:
        return len(self.shape) if self.shape is not None else -1

    @property
    def is_float(self) -> bool:
        return self.dtype.startswith(("float", "bfloat", "complex"))

    @property
    def is_int(self) -> bool:
        return self.dtype.startswith(("int", "uint"))

    def __repr__(self) -> str:
        return f"{self.name}:{self.op}{list(self.shape) if self.shape is not None else ''}"


def _nodes_in(value: Any) -> Iterator[ViewNode]:
    if isinstance(value, ViewNode):
        yield value
    elif isinstance(value, tuple):
        for item in value:
            yield from _nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _nodes_in(item)


class GraphView:
    """Nodes in topological order, indexed by op; the walks that patterns need."""

    def __init__(self, nodes: Iterable[ViewNode]) -> None:
        self.nodes: tuple[ViewNode, ...] = tuple(nodes)
        self.by_op: dict[str, list[ViewNode]] = {}
        self.by_name: dict[str, ViewNode] = {}
        self.data_inputs: list[ViewNode] = []
        self.memo: dict[Any, Any] = {}       # what patterns worked out about this graph and share
        for node in self.nodes:
            self.by_name[node.name] = node
            for producer in dict.fromkeys(node.inputs):
                producer.users.append(node)
            self._flow(node)
            if node.op == "index" and not node.static and all(n.static for n in node.inputs[1:]):
                node.op = "select"       # indices that do not depend on the input: a view, spelt otherwise
            if node.op == "pow" and len(node.args) > 1 and node.args[1] in _ROOTS:
                node.op = _ROOTS[node.args[1]]
            self.by_op.setdefault(node.op, []).append(node)

    def _flow(self, node: ViewNode) -> None:
        if node.kind == "input":
            if node.op == "input" and node.shape is not None:
                node.taint = 1 << len(self.data_inputs)
                self.data_inputs.append(node)
            node.weighted = node.op == "parameter"
            return
        node.weighted = node.op == "parameter"
        for producer in node.inputs:
            node.taint |= producer.taint
            node.weighted |= producer.weighted

    # ---------------------------------------------------------------- walks
    def through(self, node: ViewNode, ops: frozenset[str], limit: int = 24) -> ViewNode:
        """Up the first input while the op is one of `ops`."""
        while limit and node.op in ops and node.inputs:
            node, limit = node.inputs[0], limit - 1
        return node

    def through_views(self, node: ViewNode) -> ViewNode:
        """The value behind views, casts and eval-time dropout."""
        return self.through(node, VIEWS)

    def forward(self, node: ViewNode, ops: frozenset[str], limit: int = 64) -> Iterator[ViewNode]:
        """Every node reached downstream through `ops`: those ops themselves, and what ends a path."""
        seen, queue = {node.index}, list(node.users)
        while queue and limit:
            user = queue.pop()
            if user.index in seen:
                continue
            seen.add(user.index)
            limit -= 1
            yield user
            if user.op in ops:
                queue.extend(user.users)

    def backward(self, node: ViewNode, ops: frozenset[str], limit: int = 64) -> Iterator[ViewNode]:
        """Every node reached upstream through `ops`, and what ends a path."""
        seen, queue = {node.index}, list(node.inputs)
        while queue and limit:
            producer = queue.pop()
            if producer.index in seen:
                continue
            seen.add(producer.index)
            limit -= 1
            yield producer
            if producer.op in ops:
                queue.extend(producer.inputs)

    def between(self, sources: Iterable[ViewNode], sink: ViewNode, allowed: Callable[[ViewNode], bool],
                limit: int = 256) -> set[ViewNode]:
        """Nodes upstream of `sink`, `sink` included, down to and including `sources`; stops at what is not allowed."""
        ends, found, queue = set(sources), {sink}, [sink]
        while queue and len(found) < limit:
            node = queue.pop()
            if node in ends:
                continue
            for producer in node.inputs:
                if producer not in found and (producer in ends or (producer.kind == "call" and allowed(producer))):
                    found.add(producer)
                    queue.append(producer)
        return found


def operands(node: ViewNode) -> tuple[ViewNode, ViewNode] | None:
    """The two factors of a matmul, in order: `linear(x, w)`, `addmm(bias, x, w)`, `einsum("..", x, w)`."""
    if node.op != "matmul":
        return None
    name = node.target.rsplit(".", 1)[-1]
    found = [n for n in (node.inputs[1:] if name in ("addmm", "baddbmm", "addmv", "addbmm") else node.inputs)]
    return (found[0], found[1]) if len(found) >= 2 else None


def is_linear(node: ViewNode) -> bool:
    """A matmul of data with a weight."""
    pair = operands(node)
    return pair is not None and not pair[0].static and pair[1].static and pair[1].weighted


def elementwise_or_view(node: ViewNode) -> bool:
    return node.op in ELEMENTWISE or node.op in VIEWS
