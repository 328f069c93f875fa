"""Ops that compute each element from the elements at the same place: rows stay where they are."""
from __future__ import annotations

from genie_dynamo.passes.rows.call import Call, Leaf, MixesRows, Parts
from genie_dynamo.passes.rows.registry import register_pointwise, rule


@register_pointwise
@rule("_to_copy", "clone", "alias", "detach", "lift_fresh_copy", "contiguous", "hardtanh_backward",
      "leaky_relu_backward", "elu_backward", "hardswish_backward", "hardsigmoid_backward", "softplus_backward",
      "ones_like", "zeros_like", "full_like", "empty_like", "log_sigmoid_backward")
def pointwise(call: Call) -> Parts:
    """Arguments are broadcast to the result: their rows must meet along one of its dims."""
    values = call.out if isinstance(call.out, list | tuple) else (call.out,)
    dim = aligned(call, call.leaves, call.out_ndim)
    return Parts(tuple(dim for _ in values))


def aligned(call: Call, leaves: list[Leaf], ndim: int) -> int:
    """The dim of the broadcast result along which rows lie; every argument is asked for its block there."""
    dims = {leaf.dim + ndim - leaf.ndim for leaf in leaves if leaf.dim is not None}
    if len(dims) != 1:
        raise MixesRows(f"arguments of {call.node.name} have rows along different dims")
    (dim,) = dims
    for leaf in leaves:
        own = dim - (ndim - leaf.ndim)
        if own >= 0 and leaf.size(own) != 1:
            call.align(leaf, own)
    return dim


@rule("copy")
def copy(call: Call) -> Parts:
    target = call.leaf("self")
    dim = aligned(call, call.leaves, target.ndim)
    return Parts((dim,))


@rule("mse_loss", "smooth_l1_loss", "huber_loss", "binary_cross_entropy", "soft_margin_loss")
def loss(call: Call) -> Parts:
    """reduction: 0 none, 1 mean, 2 sum."""
    dim = aligned(call, call.leaves, max(leaf.ndim for leaf in call.leaves))
    return Parts(((dim, "mean", "sum")[call["reduction"]],))


@rule("mse_loss_backward", "smooth_l1_loss_backward", "huber_loss_backward", "binary_cross_entropy_backward",
      "soft_margin_loss_backward")
def loss_backward(call: Call) -> Parts:
    """With reduction "mean" it divides by the number of elements, of which a part has one k-th."""
    return Parts((aligned(call, call.leaves, call.out_ndim),), divide=call["reduction"] == 1)
