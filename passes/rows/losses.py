"""Mean losses over targets, taken apart so that parts of the batch need not wait for each other.

    nll_loss_forward(x, t, w, mean)  ->  nll_loss_forward(x, t, w, sum) / total weight of t

The total weight is that of the targets that are not ignored, and so known before any part has run; the backward, which
divides by it, need not wait for the last forward.
"""
from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

aten = torch.ops.aten
_MEAN, _SUM = 1, 2


def separate_losses(gm: fx.GraphModule) -> None:
    """Rewrite mean losses in place; every new node has meta["val"], and what it came of in meta["origin"]."""
    for node in list(gm.graph.nodes):
        if node.target in (aten.nll_loss_forward.default, aten.nll_loss2d_forward.default) and node.args[3] == _MEAN:
            _separate(gm.graph, node)
    gm.graph.lint()


def _separate(graph: fx.Graph, node: fx.Node) -> None:
    logits, target, weight, _, ignore_index = node.args
    taken = {user.args[1]: user for user in node.users if user.target is operator.getitem}
    loss, total = taken.get(0), taken.get(1)
    node.update_arg(3, _SUM)
    assert isinstance(logits, fx.Node) and isinstance(target, fx.Node)
    dtype = logits.meta["val"].dtype

    def add(op: torch._ops.OpOverload, *args: Any) -> fx.Node:
        new = graph.call_function(op, args)
        given = fx.map_arg(args, lambda n: n.meta["val"])
        with logits.meta["val"].fake_mode:
            new.meta = {**node.meta, "val": op(*given), "origin": node.name}
        return new

    with graph.inserting_before(node):
        counted = add(aten.ne.Scalar, target, ignore_index)
        if isinstance(weight, fx.Node):
            # An ignored target may be no index at all.
            known = add(aten.mul.Tensor, target, counted)
            weights = add(aten.index.Tensor, weight, [known])
            summed = add(aten.sum.default, add(aten.mul.Tensor, weights, counted))
        else:
            summed = add(aten._to_copy.default, add(aten.sum.default, counted))
            summed.kwargs = {"dtype": dtype}
            summed.meta["val"] = summed.meta["val"].to(dtype)
    if loss is not None:
        with graph.inserting_after(loss):
            mean = graph.call_function(aten.div.Tensor, (loss, summed))
            mean.meta = {**loss.meta, "origin": node.name}
        loss.replace_all_uses_with(mean, delete_user_cb=lambda user: user is not mean)
    if total is not None:
        total.replace_all_uses_with(summed)
