"""Matrix products, convolutions and attention: rows may be those of the result, or be summed over."""
from __future__ import annotations

from genie_dynamo.passes.rows.call import Call, Leaf, MixesRows, Parts, State
from genie_dynamo.passes.rows.registry import rule


@rule("mm", "bmm")
def product(call: Call) -> Parts:
    a, b = call.leaf("self"), call.leaf("mat2")
    return Parts((_rows_of_product(call, a, b),))


def _rows_of_product(call: Call, a: Leaf, b: Leaf) -> State:
    """(..., M, K) x (..., K, N): rows along M or N are the result's, along K parts are summed."""
    batch = a.ndim - 2
    if batch and 0 in (a.dim, b.dim):
        call.align(a, 0)
        call.align(b, 0)
        return 0
    if a.dim == batch and b.dim is None:
        return batch
    if b.dim == batch + 1 and a.dim is None:
        return batch + 1
    if a.dim in (None, batch + 1) and b.dim in (None, batch):
        call.align(a, batch + 1)
        call.align(b, batch)
        return "sum"
    raise MixesRows(f"{call.node.name} multiplies rows with each other")


@rule("addmm", "baddbmm")
def product_and_sum(call: Call) -> Parts:
    bias = call.leaf("self")
    a, b = (call.leaf(n) for n in (("mat1", "mat2") if "mat1" in call else ("batch1", "batch2")))
    if a.dim is None and b.dim is None:
        raise MixesRows(f"{call.node.name} adds rows to what has none")
    dim = _rows_of_product(call, a, b)
    if not isinstance(dim, int):
        raise MixesRows(f"{call.node.name} sums over rows and adds more to it")
    own = dim - (call.out_ndim - bias.ndim)
    if own >= 0 and bias.size(own) != 1:
        call.align(bias, own)
    elif bias.dim is not None:
        raise MixesRows(f"arguments of {call.node.name} have rows along different dims")
    return Parts((dim,))


@rule("mv")
def matrix_vector(call: Call) -> Parts:
    a, b = call.leaf("self"), call.leaf("vec")
    if a.dim == 0 and b.dim is None:
        return Parts((0,))
    call.align(a, 1)
    call.align(b, 0)
    return Parts(("sum",))


@rule("convolution")
def convolution(call: Call) -> Parts:
    call.without_rows("weight", "bias")
    _first(call, "input")
    return Parts((0,))


@rule("convolution_backward")
def convolution_backward(call: Call) -> Parts:
    call.without_rows("weight")
    call.rows_at(0, "grad_output", "input")
    mask = call["output_mask"]
    return Parts((0 if mask[0] else "same", "sum" if mask[1] else "same", "sum" if mask[2] else "same"))


@rule("genie::sdpa", "_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_attention_math_for_cpu")
def attention(call: Call) -> Parts:
    """(B, ..., L, E): every batch entry attends to itself alone."""
    _no_dropout(call)
    q, k, v = call.leaves[:3]
    if q.ndim < 3 or {leaf.dim for leaf in (q, k, v)} - {0, None}:
        raise MixesRows(f"{call.node.name} attends over rows")
    for leaf in (q, k, v):
        call.align(leaf, 0)
    _mask(call, q.ndim)
    return Parts((0, 0))


@rule("genie::sdpa_bw", "_scaled_dot_product_flash_attention_for_cpu_backward")
def attention_backward(call: Call) -> Parts:
    _no_dropout(call)
    mask = call["attn_mask"]
    for leaf in call.leaves:
        if leaf is not mask:
            if leaf.dim not in (0, None) or call.leaves[0].ndim < 3:
                raise MixesRows(f"{call.node.name} attends over rows")
            call.align(leaf, 0)
    _mask(call, call.leaves[0].ndim)
    return Parts((0, 0, 0))


def _no_dropout(call: Call) -> None:
    if call.get("dropout_p"):
        raise MixesRows(f"{call.node.name} draws random numbers for the whole batch at once; for parts they would "
                        "be others")


def _mask(call: Call, ndim: int) -> None:
    mask = call["attn_mask"]
    if not isinstance(mask, Leaf):
        return
    if mask.ndim == ndim and mask.size(0) != 1:
        call.align(mask, 0)
    elif mask.dim is not None:
        raise MixesRows(f"the mask of {call.node.name} has rows along dim {mask.dim}")


def _first(call: Call, name: str) -> None:
    leaf = call.leaf(name)
    if leaf.dim != 0:
        raise MixesRows(f"{leaf.node.name} has rows along dim {leaf.dim}, {call.node.name} wants them along 0")
