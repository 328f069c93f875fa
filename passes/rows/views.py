"""Ops that change shape or order, and move nothing between rows."""
from __future__ import annotations

import math

from genie_dynamo.passes.rows.call import Call, Leaf, MixesRows, Parts, wrap
from genie_dynamo.passes.rows.registry import rule


@rule("view", "_unsafe_view", "reshape")
def view(call: Call) -> Parts:
    """Row-major order does not change, so rows lie along the first dim that has as many elements before it.

        in   (L..., n, inner...)   block of rows: for each of L, n/k * inner elements in sequence
        out  (L..., m, inner'...)  the same elements, where m can be cut into k
    """
    source = call.leaf("self")
    assert source.dim is not None
    if "dtype" in call:
        # Other elements of the same bytes: only in the last dim may there be more of them, or fewer.
        if source.dim == source.ndim - 1 and call.out.shape != source.value.shape:
            raise MixesRows(f"{call.node.name} makes other elements of the bytes of rows")
        return Parts((source.dim,))
    before = math.prod(int(s) for s in source.value.shape[:source.dim])
    shape = [int(s) for s in call.out.shape]
    if 0 in shape:
        raise MixesRows(f"{call.node.name} is empty")
    for dim, size in enumerate(shape):
        if math.prod(shape[:dim]) == before and size > 1:
            shape[dim] = call.part_of(size)
            return Parts((dim,), {"size" if "size" in call else "shape": shape})
    raise MixesRows(f"{call.node.name} merges rows with what comes before them")


@rule("expand")
def expand(call: Call) -> Parts:
    source = call.leaf("self")
    assert source.dim is not None
    dim = source.dim + call.out_ndim - source.ndim
    shape = [int(s) for s in call.out.shape]
    shape[dim] = call.part_of(shape[dim])
    return Parts((dim,), {"size": shape})


@rule("permute")
def permute(call: Call) -> Parts:
    source = call.leaf("self")
    return Parts((next(new for new, old in enumerate(call["dims"]) if wrap(old, source.ndim) == source.dim),))


@rule("transpose")
def transpose(call: Call) -> Parts:
    source = call.leaf("self")
    a, b = (wrap(call[name], source.ndim) for name in ("dim0", "dim1"))
    return Parts((b if source.dim == a else a if source.dim == b else source.dim,))


@rule("t")
def t(call: Call) -> Parts:
    source = call.leaf("self")
    return Parts((1 - source.dim if source.ndim == 2 and source.dim is not None else source.dim,))


@rule("unsqueeze")
def unsqueeze(call: Call) -> Parts:
    source = call.leaf("self")
    assert source.dim is not None
    return Parts((source.dim + (wrap(call["dim"], source.ndim + 1) <= source.dim),))


@rule("squeeze")
def squeeze(call: Call) -> Parts:
    source = call.leaf("self")
    assert source.dim is not None
    dims = call["dim"] if "dim" in call else list(range(source.ndim))
    asked = {wrap(d, source.ndim) for d in (dims if isinstance(dims, list) else [dims])}
    gone = {d for d in asked if source.size(d) == 1}
    if source.dim in asked and source.size(source.dim) == call.num_parts:
        raise MixesRows(f"{call.node.name} would squeeze the rows of a part away")
    return Parts((source.dim - sum(d < source.dim for d in gone),))


@rule("slice")
def slice_(call: Call) -> Parts:
    source = call.leaf("self")
    dim = wrap(call["dim"] or 0, source.ndim)
    if dim == source.dim and not _takes_all(call, source, dim):
        raise MixesRows(f"{call.node.name} takes some of the rows")
    return Parts((source.dim,))


def _takes_all(call: Call, source: Leaf, dim: int) -> bool:
    start, end = call["start"] or 0, call["end"]
    return start == 0 and call["step"] in (1, None) and (end is None or end >= source.size(dim))


@rule("select")
def select(call: Call) -> Parts:
    source = call.leaf("self")
    dim = wrap(call["dim"], source.ndim)
    if dim == source.dim or source.dim is None:
        raise MixesRows(f"{call.node.name} takes one of the rows")
    return Parts((source.dim - (dim < source.dim),))


@rule("split", "split_with_sizes", "chunk", "unbind", "tensor_split", "unsafe_split", "unsafe_split_with_sizes",
      "unsafe_chunk")
def split(call: Call) -> Parts:
    source = call.leaf("self")
    dim = wrap(call["dim"] or 0, source.ndim)
    if dim == source.dim or source.dim is None:
        raise MixesRows(f"{call.node.name} takes rows apart")
    lost = call.name == "aten::unbind" and dim < source.dim
    return Parts(tuple(source.dim - lost for _ in call.out))


@rule("cat", "concat")
def cat(call: Call) -> Parts:
    leaves: list[Leaf] = call["tensors"]
    dim = wrap(call["dim"] or 0, call.out_ndim)
    rows = _common(call, leaves)
    if dim == rows:
        raise MixesRows(f"{call.node.name} puts rows beside others")
    for leaf in leaves:
        if leaf.ndim == call.out_ndim:      # torch lets an empty vector stand among them
            call.align(leaf, rows)
    return Parts((rows,))


@rule("stack")
def stack(call: Call) -> Parts:
    leaves: list[Leaf] = call["tensors"]
    rows = _common(call, leaves)
    for leaf in leaves:
        call.align(leaf, rows)
    return Parts((rows + (wrap(call["dim"] or 0, call.out_ndim) <= rows),))


def _common(call: Call, leaves: list[Leaf]) -> int:
    dims = {leaf.dim for leaf in leaves if leaf.dim is not None}
    if len(dims) != 1:
        raise MixesRows(f"arguments of {call.node.name} have rows along different dims")
    return int(dims.pop())


@rule("repeat")
def repeat(call: Call) -> Parts:
    source = call.leaf("self")
    assert source.dim is not None
    dim = source.dim + call.out_ndim - source.ndim
    if call["repeats"][dim] != 1:
        raise MixesRows(f"{call.node.name} repeats rows")
    return Parts((dim,))


@rule("flip", "roll")
def flip(call: Call) -> Parts:
    source = call.leaf("self")
    moved = {wrap(d, source.ndim) for d in call["dims"]} or set(range(source.ndim))
    if source.dim in moved:
        raise MixesRows(f"{call.node.name} moves rows")
    return Parts((source.dim,))


@rule("constant_pad_nd")
def constant_pad(call: Call) -> Parts:
    source = call.leaf("self")
    assert source.dim is not None
    pads = call["pad"]
    at = 2 * (source.ndim - 1 - source.dim)
    if any(pads[at:at + 2]):
        raise MixesRows(f"{call.node.name} adds rows")
    return Parts((source.dim,))


@rule("slice_backward", "select_backward")
def grad_of_slice(call: Call) -> Parts:
    """The gradient goes where the slice was taken; the rest is zero."""
    grad, shape = call.leaf("grad_output"), [int(s) for s in call["input_sizes"]]
    dim = wrap(call["dim"], len(shape))
    assert grad.dim is not None
    rows = grad.dim + (call.name == "aten::select_backward" and dim <= grad.dim)
    if rows == dim and not (call["start"] == 0 and call["end"] >= shape[dim] and call["step"] == 1):
        raise MixesRows(f"{call.node.name} goes to some of the rows")
    shape[rows] = call.part_of(shape[rows])
    return Parts((rows,), {"input_sizes": shape})


@rule("new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided")
def new(call: Call) -> Parts:
    """Only dtype and device of the argument matter."""
    return Parts(("same",))
