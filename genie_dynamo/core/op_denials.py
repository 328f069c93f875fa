"""Registered operators that a worker never runs for a client, each with its reason.

The schema rules of core/allowlist.py refuse most by the types they take. These are refused by name.
"""
from __future__ import annotations

import re

_LAYOUT = "works on a sparse, nested or opaque layout; only strided tensors travel"
_AUTOGRAD = "handles autograd state, which a worker does not have"
_FUNCTORCH = "is internal to functorch's levels"
_STORAGE = "replaces the storage of a tensor that others may share"
_UNCHECKED = "builds a view without checking that it lies inside the storage; as_strided checks"
_PROCESS = "changes state of the whole worker process"
_TEST = "is a test hook of torch"
_TRITON = "starts Triton code from Python"

DENIED_OPS: dict[str, str] = {
    # files, printing
    "aten::from_file": "maps a file of the worker's machine",
    "aten::_print": "prints on the worker",
    # storages and raw memory
    **dict.fromkeys(("aten::set_", "aten::set", "aten::set_data", "aten::is_set_to"), _STORAGE),
    **dict.fromkeys(("aten::_reshape_alias", "aten::_reshape_alias_copy"), _UNCHECKED),
    # memory and caches of the whole process
    **dict.fromkeys(("aten::pin_memory", "aten::_pin_memory", "aten::_cufft_set_plan_cache_max_size",
                     "aten::_cufft_clear_plan_cache"), _PROCESS),
    # Python and autograd state
    **dict.fromkeys(("aten::_backward", "aten::requires_grad_", "aten::retain_grad", "aten::retains_grad",
                     "aten::get_gradients", "aten::_version", "aten::output_nr", "aten::is_leaf",
                     "aten::_fw_primal", "aten::_fw_primal_copy", "aten::_make_dual", "aten::_make_dual_copy",
                     "aten::_unpack_dual", "aten::_has_compatible_shallow_copy_type",
                     "aten::_new_zeros_with_same_feature_meta"), _AUTOGRAD),
    **dict.fromkeys(("aten::_add_batch_dim", "aten::_remove_batch_dim"), _FUNCTORCH),
    **dict.fromkeys(("aten::_triton_scaled_dot_attention", "aten::_triton_multi_head_attention"), _TRITON),
    **dict.fromkeys(("aten::_foobar", "aten::_propagate_xla_data"), _TEST),
    # layouts
    **dict.fromkeys(("aten::to_mkldnn", "aten::to_mkldnn_backward", "aten::_mkldnn_reshape",
                     "aten::_mkldnn_transpose", "aten::_mkldnn_transpose_", "aten::mkldnn_reorder_conv2d_weight",
                     "aten::mkldnn_reorder_conv3d_weight", "aten::hspmm", "aten::sspaddmm", "aten::smm",
                     "aten::_coalesced_", "aten::_coalesced", "aten::_spdiags", "aten::_spsolve",
                     "aten::_cslt_compress"), _LAYOUT),
}

DENIED_NAMES: tuple[tuple[re.Pattern[str], str], ...] = (
    (re.compile(r"aten::_test_"), _TEST),
    (re.compile(r"aten::.*sparse|aten::_?nested_|aten::_cslt_"), _LAYOUT),
)

HIGHER_ORDER_DENIALS: dict[str, str] = {
    "call_torchbind": "calls a method of a script object",
    "print": "prints on the worker",
    "inline_asm_elementwise": "turns a string into code",
    "triton_kernel_wrapper_mutation": "runs a kernel whose source is code",
    "triton_kernel_wrapper_functional": "runs a kernel whose source is code",
    "invoke_leaf_function": "calls a Python function of the client",
    "custom_function_call": "calls a Python autograd function",
    "executorch_call_delegate": "calls a foreign runtime",
    "aoti_call_delegate": "calls compiled code of the client",
    "inductor_compiled_code": "calls compiled code of the client",
    "graphsafe_run_with_rng_state": "takes a torch.Generator, which does not travel",
}


def denied_by_name(qualified: str) -> str | None:
    """Why `ns::op` (no overload) is refused by name, or None."""
    reason = DENIED_OPS.get(qualified)
    if reason is not None:
        return reason
    for pattern, why in DENIED_NAMES:
        if pattern.match(qualified):
            return why
    return None
