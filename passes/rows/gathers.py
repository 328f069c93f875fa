"""Ops that take elements by index."""
from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from genie_dynamo.passes.rows.call import Call, Leaf, MixesRows, Parts, wrap
from genie_dynamo.passes.rows.elementwise import aligned
from genie_dynamo.passes.rows.registry import rule


@rule("gather", "scatter", "scatter_add", "scatter_reduce", "gather_backward")
def same_places(call: Call) -> Parts:
    """Along one dim by index, elsewhere each at its own place."""
    dims = {leaf.dim for leaf in call.with_rows}
    source = call.leaf("self")
    if len(dims) != 1 or (rows := dims.pop()) is None or rows == wrap(call["dim"], source.ndim):
        raise MixesRows(f"{call.node.name} takes from other rows")
    for leaf in call.leaves:
        if leaf.ndim != source.ndim or leaf.size(rows) != source.size(rows):
            raise MixesRows(f"{call.node.name} reads some of the rows")
        call.align(leaf, rows)
    return Parts((rows,))


@rule("index_select")
def index_select(call: Call) -> Parts:
    source, index, dim = call.leaf("self"), call.leaf("index"), call["dim"]
    dim = wrap(dim, source.ndim)
    if source.dim is None and index.ndim == 1:
        return Parts((dim,))
    if index.dim is not None or source.dim == dim:
        raise MixesRows(f"{call.node.name} takes from other rows")
    return Parts((source.dim,))


@rule("index", "_unsafe_index")
def index(call: Call) -> Parts:
    """x[i, :, j]: rows of the indices become rows of the result; rows of x stay where x is not indexed."""
    source, indices = call.leaf("self"), call["indices"]
    places = [d for d, item in enumerate(indices) if isinstance(item, Leaf)]
    chosen = [indices[d] for d in places]
    if any(item.value.dtype in (torch.bool, torch.uint8) for item in chosen):
        raise MixesRows(f"{call.node.name} takes a number of elements that depends on their values")
    width = max(item.ndim for item in chosen)
    adjacent = all(b - a == 1 for a, b in itertools.pairwise(places))
    first = places[0] if adjacent else 0
    if source.dim is None:
        return Parts((first + aligned(call, chosen, width),))
    if any(item.dim is not None for item in chosen) or source.dim in places:
        raise MixesRows(f"{call.node.name} takes from other rows")
    return Parts((_after_indexing(source.dim, places, width),))


@rule("index_copy", "index_add", "index_fill")
def at_places(call: Call) -> Parts:
    """Places along one dim, the same for each row, are written: a cache at the positions of the new tokens."""
    source, new = call.leaf("self"), call.get("source")
    dim = wrap(call["dim"], source.ndim)
    leaves = [source, *([new] if isinstance(new, Leaf) else [])]
    dims = {leaf.dim for leaf in leaves if leaf.dim is not None}
    if call.leaf("index").dim is not None or len(dims) != 1 or dim in dims:
        raise MixesRows(f"{call.node.name} writes to other rows")
    (rows,) = dims
    for leaf in leaves:
        call.align(leaf, rows)
    return Parts((rows,))


@rule("index_put")
def put_at(call: Call) -> Parts:
    """x[:, i] = v: rows of x stay where x is not indexed, and v has them there too, or is the same for all."""
    source, new, indices = call.leaf("self"), call.leaf("values"), call["indices"]
    places = [d for d, item in enumerate(indices) if isinstance(item, Leaf)]
    chosen = [indices[d] for d in places]
    if any(item.value.dtype in (torch.bool, torch.uint8) for item in chosen):
        raise MixesRows(f"{call.node.name} writes a number of elements that depends on values")
    if source.dim is None or source.dim in places or any(item.dim is not None for item in chosen):
        raise MixesRows(f"{call.node.name} writes to other rows")
    call.align(source, source.dim)
    width = max(item.ndim for item in chosen)
    rows = _after_indexing(source.dim, places, width) - (source.ndim - len(places) + width - new.ndim)
    if rows >= 0 and new.size(rows) != 1:
        call.align(new, rows)
    elif new.dim is not None:
        raise MixesRows(f"{call.node.name} writes to other rows")
    return Parts((source.dim,))


def _after_indexing(dim: int, places: Sequence[int], width: int) -> int:
    """Where a dim that is not indexed is in the result, by numpy's rules; indices broadcast to `width` dims."""
    adjacent = all(b - a == 1 for a, b in itertools.pairwise(places))
    if adjacent and dim < places[0]:
        return dim
    return dim - sum(place < dim for place in places) + width


@rule("select_scatter", "slice_scatter")
def put(call: Call) -> Parts:
    """A slice is put where it belongs, in each row."""
    source, new = call.leaf("self"), call.leaf("src")
    dim = wrap(call["dim"] or 0, source.ndim)
    lost = call.name == "aten::select_scatter"
    dims = {leaf.dim + (lost and leaf is new and dim <= leaf.dim) for leaf in (source, new) if leaf.dim is not None}
    if len(dims) != 1 or dim in dims:
        raise MixesRows(f"{call.node.name} puts values among other rows")
    (rows,) = dims
    call.align(source, rows)
    call.align(new, rows - (lost and dim < rows))
    return Parts((rows,))
