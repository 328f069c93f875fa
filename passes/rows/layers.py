"""Normalisation, pooling, resizing, embedding and losses."""
from __future__ import annotations

from genie_dynamo.passes.rows.call import Call, MixesRows, Parts, State
from genie_dynamo.passes.rows.registry import rule


@rule("native_layer_norm", "_fused_rms_norm")
def layer_norm(call: Call) -> Parts:
    source = call.leaf("input")
    call.without_rows("weight", *(["bias"] if "bias" in call else []))
    if source.dim is None or source.dim >= source.ndim - len(call["normalized_shape"]):
        raise MixesRows(f"{call.node.name} normalises over rows")
    return Parts(tuple(source.dim for _ in call.out))


@rule("native_layer_norm_backward", "_fused_rms_norm_backward")
def layer_norm_backward(call: Call) -> Parts:
    source = call.leaf("input")
    dims = {leaf.dim for leaf in call.with_rows}
    call.without_rows("weight")
    if len(dims) != 1 or (dim := dims.pop()) is None or dim >= source.ndim - len(call["normalized_shape"]):
        raise MixesRows(f"{call.node.name} normalises over rows")
    call.rows_at(dim, "grad_out", "input", "rstd", *(["mean"] if "mean" in call else []))
    mask = call["output_mask"]
    together: list[State] = ["sum" if asked else "same" for asked in mask[1:]]
    return Parts((dim if mask[0] else "same", *together))


@rule("native_group_norm", "native_group_norm_backward")
def group_norm(call: Call) -> Parts:
    call.without_rows("weight", *(["bias"] if "bias" in call else []))
    call.rows_at(0, "input", *(["grad_out", "mean", "rstd"] if "grad_out" in call else []))
    change = {"N": call.part_of(call["N"])}
    if "grad_out" not in call:
        return Parts((0, 0, 0), change)
    mask = call["output_mask"]
    return Parts((0 if mask[0] else "same", "sum" if mask[1] else "same", "sum" if mask[2] else "same"), change)


@rule("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_functional",
      "_native_batch_norm_legit_no_training", "_batch_norm_with_update", "_batch_norm_with_update_functional",
      "_batch_norm_no_update", "cudnn_batch_norm")
def batch_norm(call: Call) -> Parts:
    training = call.get("training", "with_update" in call.name)
    if training or "running_mean" not in call or call["running_mean"] is None:
        raise MixesRows(f"{call.node.name}: BatchNorm in training normalises over the rows of the batch")
    call.without_rows("weight", "bias", "running_mean", "running_var")
    call.rows_at(0, "input")
    same: list[State] = ["same" for _ in call.out[1:]]
    return Parts((0, *same))


@rule("native_batch_norm_backward")
def batch_norm_backward(call: Call) -> Parts:
    if call["train"]:
        raise MixesRows(f"{call.node.name}: BatchNorm in training normalises over the rows of the batch")
    call.without_rows("weight", "running_mean", "running_var")
    call.rows_at(0, "grad_out", "input")
    mask = call["output_mask"]
    return Parts((0 if mask[0] else "same", "sum" if mask[1] else "same", "sum" if mask[2] else "same"))


_SPATIAL = {
    "avg_pool1d": 1, "avg_pool2d": 2, "avg_pool3d": 3, "max_pool2d_with_indices": 2, "max_pool3d_with_indices": 3,
    "_adaptive_avg_pool2d": 2, "_adaptive_avg_pool3d": 3, "adaptive_max_pool2d": 2, "adaptive_max_pool3d": 3,
    "upsample_nearest1d": 1, "upsample_nearest2d": 2, "upsample_bilinear2d": 2, "upsample_bicubic2d": 2,
    "_upsample_nearest_exact2d": 2, "_upsample_bilinear2d_aa": 2, "upsample_linear1d": 1, "reflection_pad1d": 1,
    "reflection_pad2d": 2, "replication_pad1d": 1, "replication_pad2d": 2, "pixel_shuffle": 2, "pixel_unshuffle": 2,
    "im2col": 2,
}


@rule(*_SPATIAL)
def spatial(call: Call) -> Parts:
    """(B, C, space...): every image by itself."""
    source = call.leaves[0]
    if source.dim != 0 or source.ndim != _SPATIAL[call.name.removeprefix("aten::")] + 2:
        raise MixesRows(f"{call.node.name} works along rows")
    values = call.out if isinstance(call.out, list | tuple) else (call.out,)
    return Parts(tuple(0 for _ in values))


@rule("avg_pool2d_backward", "max_pool2d_with_indices_backward", "_adaptive_avg_pool2d_backward")
def pool_backward(call: Call) -> Parts:
    if any(leaf.dim not in (0, None) or leaf.ndim != 4 for leaf in call.leaves):
        raise MixesRows(f"{call.node.name} works along rows")
    for leaf in call.leaves:
        call.align(leaf, 0)
    return Parts((0,))


@rule("embedding")
def embedding(call: Call) -> Parts:
    call.without_rows("weight")
    return Parts((call.leaf("indices").dim,))


@rule("embedding_dense_backward")
def embedding_backward(call: Call) -> Parts:
    indices = call.leaf("indices")
    if call["scale_grad_by_freq"]:
        raise MixesRows(f"{call.node.name} counts indices over all rows")
    dim = next(leaf.dim for leaf in call.with_rows)
    if dim is None or dim >= indices.ndim:
        raise MixesRows(f"{call.node.name} has rows along the features")
    call.rows_at(dim, "indices", "grad_output")
    return Parts(("sum",))


@rule("nll_loss_forward", "nll_loss2d_forward")
def nll_loss(call: Call) -> Parts:
    """reduction: 0 none, 1 mean (over targets, whose number is not the same in every part), 2 sum."""
    call.without_rows("weight")
    call.rows_at(0, "self", "target")
    if call["reduction"] == 1:
        raise MixesRows(f"{call.node.name} divides by the number of targets in the whole batch")
    return Parts((0 if call["reduction"] == 0 else "sum", "sum"))


@rule("nll_loss_backward", "nll_loss2d_backward")
def nll_loss_backward(call: Call) -> Parts:
    call.without_rows("weight", "total_weight")
    call.rows_at(0, "self", "target")
    grad = call.leaf("grad_output")
    if grad.ndim:
        call.align(grad, 0)
    return Parts((0,))
