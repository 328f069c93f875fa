"""Embedding: rows of a table picked by the input's ids; a bag sums several. Positions and segments are told apart by
where their ids come from."""
from __future__ import annotations

from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.ops import ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

_IDS = ELEMENTWISE | VIEWS | {
    "index", "ne", "eq", "gt", "lt", "floor_divide", "abs", "min", "full_like", "zeros_like"}
_COUNTS = frozenset({"arange", "cumsum"})
_ADDED = VIEWS | {"add", "sub", "cat"}
_SEGMENT_ROWS = 4


def match_embedding(view: GraphView, node: ViewNode) -> Outcome:
    if node.op == "index":
        return _table_of_biases(view, node)
    if len(node.inputs) < 2:
        return NoMatch("a lookup without a table")
    table, ids = _table_and_ids(node)
    rows = table.shape[0] if table.shape else 0
    if node.op == "embedding_bag":
        items = tuple(user for user in node.users if user.op == "item" and user.args[1] == 0)
        return Match(kind="embedding", core=(node, *items), confidence=0.99, reason="a bag of table rows",
                     annotations={"variant": "bag", "rows": rows})
    if not table.weighted:
        return NoMatch("the table is not a weight")
    segment = isinstance(rows, int) and rows <= _SEGMENT_ROWS
    if _counts_positions(view, ids) and not segment:
        annotations: dict[str, Scalar] = {"variant": "relative" if _square(ids) else "learned", "rows": rows}
        return Match(kind="positional", core=(node,), confidence=0.92, reason="a table read by position",
                     annotations=annotations)
    if ids.static and not segment and _has_twin(view, node, table):
        return Match(kind="positional", core=(node,), confidence=0.8, annotations={"variant": "learned", "rows": rows},
                     reason="constant rows of a table as large as that of the positions")
    if ids.static:
        return Match(kind="embedding", core=(node,), confidence=0.8, annotations={"variant": "segment", "rows": rows},
                     reason="a table read by constant ids")
    return Match(kind="embedding", core=(node,), confidence=0.95, reason="a table read by the input's ids",
                 annotations={"variant": "dense", "rows": rows})


def _table_and_ids(node: ViewNode) -> tuple[ViewNode, ViewNode]:
    """F.embedding takes (ids, table), aten.embedding (table, ids)."""
    first, second = node.inputs[:2]
    return (second, first) if first.is_int or second.is_float else (first, second)


def _counts_positions(view: GraphView, ids: ViewNode) -> bool:
    """Whether the ids are counted, not given: from arange, a running sum, or a buffer that is as good as one."""
    sources = [ids, *view.backward(ids, _IDS, 64)]
    if any(n.kind == "input" and n.op == "input" and n.is_int and n.rank >= 2
           for n in (ids, *view.backward(ids, _ADDED, 32))):
        return False                       # given ids, each with a table of its own or beside others that are counted
    if any(n.op in _COUNTS for n in sources):
        return True
    return ids.static and any(n.kind != "call" and n.is_int for n in sources) and \
        not any(n.op in ("zeros", "zeros_like", "full", "ones") for n in sources)


def _has_twin(view: GraphView, node: ViewNode, table: ViewNode) -> bool:
    """Whether another table of this shape is read by position: then this one holds positions too."""
    for other in view.by_op["embedding"]:
        twin, ids = _table_and_ids(other)
        if other is not node and twin is not table and twin.shape == table.shape and _counts_positions(view, ids):
            return True
    return False


def _square(ids: ViewNode) -> bool:
    """Ids for pairs of positions."""
    return ids.hint is not None and len(ids.hint) >= 2 and ids.hint[-2] > 1 and ids.hint[-1] > 1


def _table_of_biases(view: GraphView, node: ViewNode) -> Outcome:
    table, ids = node.inputs[0], node.inputs[-1]
    if not table.static or not table.is_float or not ids.is_int or len(node.inputs) != 2:
        return NoMatch("indexing of values, not of a table")
    if node.static and table.weighted:
        return Match(kind="positional", core=(node,), confidence=0.85, annotations={"variant": "relative"},
                     reason="a table of biases read by pairs of positions")
    if view.through_views(table).kind == "call" or table.weighted or not _counts_positions(view, ids):
        return NoMatch("indexing of constants by ids that nobody counted")
    counted = [n for n in (ids, *view.backward(ids, _IDS, 64)) if n.kind == "call" and n.op in _COUNTS | ELEMENTWISE]
    return Match(kind="positional", core=(node,), nodes=tuple(counted), confidence=0.85,
                 annotations={"variant": "sinusoidal", "table": True}, reason="a constant table read by position")


EMBEDDING = Pattern(name="embedding", matcher=match_embedding, kinds=("embedding", "positional"), priority=30,
                    anchors=("embedding", "embedding_bag", "index"))
