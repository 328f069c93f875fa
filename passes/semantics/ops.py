"""One name per operation, whatever the capture calls it.

The same linear layer is `linear` in a Dynamo graph, `view, t, addmm, view` after AOTAutograd, and `t, addmm` when
recorded from eager. `canonical_op` maps the last part of an op's name to the word that patterns use; what it does not
know keeps its own name.
"""
from __future__ import annotations

_ALIASES: dict[str, str] = {}


def _alias(canonical: str, *names: str) -> None:
    _ALIASES.update(dict.fromkeys(names, canonical))


_alias("matmul", "mm", "bmm", "addmm", "baddbmm", "linear", "matmul", "__matmul__", "imatmul", "mv", "addmv", "einsum",
       "__rmatmul__", "addbmm", "_addmm_activation")
_alias("grouped_matmul", "_grouped_mm", "grouped_mm", "grouped_mm_fallback", "_scaled_grouped_mm")
_alias("attention", "scaled_dot_product_attention", "sdpa", "_scaled_dot_product_flash_attention_for_cpu",
       "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
       "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_attention_math",
       "_scaled_dot_product_fused_attention_overrideable", "_flash_attention_forward", "flex_attention",
       "_scaled_dot_product_attention_math_for_mps", "flash_attention_2_forward")
_alias("attention_backward", "sdpa_bw", "_scaled_dot_product_flash_attention_for_cpu_backward",
       "_scaled_dot_product_flash_attention_backward", "_scaled_dot_product_efficient_attention_backward",
       "_scaled_dot_product_cudnn_attention_backward", "flex_attention_backward")
_alias("linalg_vector_norm", "norm", "vector_norm", "linalg_norm", "frobenius_norm")
_alias("softmax", "_softmax", "_safe_softmax", "softmax")
_alias("log_softmax", "_log_softmax")
_alias("conv", "convolution", "conv1d", "conv2d", "conv3d", "_convolution", "conv_transpose1d", "conv_transpose2d",
       "conv_transpose3d", "mkldnn_convolution", "cudnn_convolution")
_alias("layer_norm", "native_layer_norm")
_alias("group_norm", "native_group_norm", "instance_norm")
_alias("rms_norm", "_fused_rms_norm")
_alias("batch_norm", "_native_batch_norm_legit", "native_batch_norm", "cudnn_batch_norm", "_batch_norm_with_update",
       "_native_batch_norm_legit_no_training", "_batch_norm_no_update", "_batch_norm_impl_index")
_alias("embedding_bag", "_embedding_bag", "_embedding_bag_forward_only")
_alias("lstm", "mkldnn_rnn_layer", "_cudnn_rnn", "_thnn_fused_lstm_cell", "lstm_cell")
_alias("gru", "gru_cell", "_thnn_fused_gru_cell")
_alias("rnn", "rnn_tanh", "rnn_relu", "rnn_tanh_cell", "rnn_relu_cell")
_alias("dropout", "native_dropout", "feature_dropout", "alpha_dropout", "dropout1d", "dropout2d", "dropout3d",
       "_fused_dropout")
_alias("max_pool", "max_pool1d", "max_pool2d", "max_pool3d", "max_pool2d_with_indices", "max_pool3d_with_indices",
       "adaptive_max_pool1d", "adaptive_max_pool2d", "boolean_dispatch")
_alias("avg_pool", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d", "adaptive_avg_pool2d",
       "adaptive_avg_pool3d", "_adaptive_avg_pool2d", "_adaptive_avg_pool3d")
_alias("interpolate", "upsample_nearest1d", "upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d",
       "_upsample_nearest_exact2d", "_upsample_bilinear2d_aa", "_upsample_bicubic2d_aa", "upsample", "pixel_shuffle",
       "upsample_linear1d")
_alias("nll_loss", "nll_loss_forward", "nll_loss2d_forward", "nll_loss_nd", "nll_loss2d")
_alias("cross_entropy", "cross_entropy_loss", "linear_cross_entropy")
_alias("binary_cross_entropy", "binary_cross_entropy_with_logits")
_alias("ctc_loss", "_ctc_loss")
_alias("pad", "constant_pad_nd", "reflection_pad2d", "reflection_pad1d", "replication_pad2d", "_pad_circular")
_alias("cast", "_to_copy", "to", "type", "type_as", "float", "half", "bfloat16", "double", "int", "long", "bool",
       "convert_element_type", "cpu", "cuda", "to_dtype")
_alias("view", "_unsafe_view", "reshape", "_reshape_alias", "view_as", "reshape_as", "flatten", "unflatten",
       "_reshape_copy", "view_copy")
_alias("transpose", "t", "T", "mT", "transpose", "permute", "swapaxes", "swapdims", "movedim", "adjoint", "moveaxis")
_alias("expand", "expand_as", "broadcast_to", "expand_copy")
_alias("identity", "contiguous", "clone", "alias", "detach", "lift_fresh_copy", "lift_fresh", "lift", "positive",
       "_conj", "resolve_conj", "resolve_neg", "requires_grad", "checkpoint_name", "_assert_tensor_metadata")
_alias("unsqueeze", "unsqueeze_copy")
_alias("squeeze", "squeeze_copy")
_alias("chunk", "split", "split_with_sizes", "unbind", "tensor_split", "unsafe_chunk", "unsafe_split",
       "split_with_sizes_copy")
_alias("slice", "narrow", "slice_copy")
_alias("cat", "concat", "concatenate", "hstack")
_alias("add", "iadd", "radd", "__add__", "__radd__")
_alias("sub", "isub", "rsub", "__sub__", "__rsub__", "subtract")
_alias("mul", "imul", "rmul", "__mul__", "__rmul__", "multiply")
_alias("div", "truediv", "itruediv", "__truediv__", "divide", "true_divide", "__rtruediv__", "__rdiv__")
_alias("pow", "__pow__", "__rpow__", "square", "float_power")
_alias("and", "and_", "__and__", "bitwise_and", "logical_and", "iand")
_alias("or", "or_", "__or__", "bitwise_or", "logical_or", "ior")
_alias("not", "invert", "bitwise_not", "logical_not", "__invert__")
_alias("gt", "__gt__", "greater")
_alias("lt", "__lt__", "less")
_alias("ge", "__ge__")
_alias("le", "__le__")
_alias("where", "masked_fill", "masked_fill_", "_scalar_tensor_where")
_alias("maximum", "max", "amax", "maximum", "clamp_min")
_alias("minimum", "min", "amin", "clamp_max")
_alias("index_write", "index_copy", "index_put", "_unsafe_index_put", "_index_put_impl", "setitem", "slice_scatter",
       "select_scatter", "scatter", "index_fill")
_alias("index_add", "scatter_add", "index_reduce", "scatter_reduce", "bincount")
_alias("index", "_unsafe_index", "index_select", "gather", "take_along_dim", "take")
_alias("silu", "swish")
_alias("repeat", "repeat_interleave", "tile")
_alias("sinc", "sinc")

VIEWS = frozenset({"view", "transpose", "expand", "unsqueeze", "squeeze", "identity", "cast", "item", "dropout",
                   "chunk", "select", "slice", "repeat", "roll", "pad", "view_as_complex", "view_as_real"})
"""Ops that move or convert values without computing with them (dropout: outside training)."""

PURE_VIEWS = VIEWS - {"slice", "select", "pad", "roll", "chunk", "item"}
"""Views that keep every element."""

ACTIVATIONS = frozenset({
    "gelu", "silu", "relu", "tanh", "sigmoid", "erf", "elu", "leaky_relu", "mish", "hardswish", "hardsigmoid",
    "relu6", "hardtanh", "prelu", "softplus", "glu", "quick_gelu", "selu", "celu", "logsigmoid", "expm1"})

ELEMENTWISE = ACTIVATIONS | frozenset({
    "add", "sub", "mul", "div", "pow", "neg", "exp", "sqrt", "rsqrt", "reciprocal", "abs", "clamp", "where", "maximum",
    "minimum", "addcmul", "addcdiv", "lerp", "square", "log", "log1p", "acos"})


def canonical_op(name: str) -> str:
    """The word for an operation, from the last part of its name: `add_`, `add.Tensor` and `iadd` are all `add`."""
    known = _ALIASES.get(name)
    if known is None and name.endswith("_") and not name.startswith("__"):
        bare = name.rstrip("_")
        return _ALIASES.get(bare, bare)
    return known if known is not None else name
