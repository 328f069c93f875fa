"""Ops that every device can run, where ATen's own are one device's.

A CPU client traces attention to `_scaled_dot_product_flash_attention_for_cpu`, which a CUDA worker has not got.
`genie::sdpa` is the same attention under one name, and each device's kernel picks its own way:

    genie::sdpa(q, k, v, attn_mask, is_causal, scale, enable_gqa) -> (out, lse)
    genie::sdpa_bw(grad_out, q, k, v, out, lse, attn_mask, is_causal, scale, enable_gqa) -> (grad_q, grad_k, grad_v)

    q (..., H, L, E)   k (..., Hkv, S, E)   v (..., Hkv, S, Ev)   attn_mask to (..., H, L, S), bool or q's dtype
    out (..., H, L, Ev)   lse (..., H, L): log-sum-exp where the flash kernel ran, else zeros that nothing reads

Contract: on the CPU, out is bit for bit what F.scaled_dot_product_attention gives and has its strides; gradients
are those of eager's autograd. On other devices the values are that device's, and the strides still those that the
CPU gives: a graph traced on the client views the result by them. No dropout; attn_mask gets no gradient.

    genie::laid_out(x, stride) -> x, or a copy of it where it does not start its memory or its strides are others

Importing this module registers the ops. It needs torch and nothing else of this project.
"""
from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.nn.attention import SDPBackend
from torch.utils._python_dispatch import TorchDispatchMode

Grads = tuple[Tensor, Tensor, Tensor]

_LIBRARY: Any = torch.library.Library("genie", "FRAGMENT")  # type: ignore[no-untyped-call]
_SIGNATURE = "Tensor q, Tensor k, Tensor v"
_OPTIONS = "Tensor? attn_mask=None, bool is_causal=False, float? scale=None, bool enable_gqa=False"
_TAGS = tuple(
    getattr(torch.Tag, name) for name in ("pt2_compliant_tag", "needs_exact_strides") if hasattr(torch.Tag, name))
_LIBRARY.define(f"sdpa({_SIGNATURE}, {_OPTIONS}) -> (Tensor out, Tensor lse)", tags=_TAGS)
_LIBRARY.define(
    f"sdpa_bw(Tensor grad_out, {_SIGNATURE}, Tensor out, Tensor lse, {_OPTIONS})"
    " -> (Tensor grad_q, Tensor grad_k, Tensor grad_v)", tags=_TAGS)
_LIBRARY.define("laid_out(Tensor x, SymInt[] stride) -> Tensor", tags=_TAGS)

sdpa = torch.ops.genie.sdpa.default
sdpa_bw = torch.ops.genie.sdpa_bw.default

_ATEN_SDPA = torch.ops.aten.scaled_dot_product_attention.default
_ATEN_FLASH = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default
_ATEN_FLASH_BW = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward.default
_FLASH = SDPBackend.FLASH_ATTENTION.value


# ---------------------------------------------------------------- the CPU
def _is_flash_on_cpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> bool:
    """Torch's own choice, by the same function that F.scaled_dot_product_attention asks."""
    choice: int = torch._fused_sdp_choice(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return choice == _FLASH


def _as_bias(attn_mask: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """A mask of booleans as eager turns it into a bias before its kernels see it: 0 where True, -inf elsewhere."""
    if attn_mask is None or attn_mask.dtype != torch.bool:
        return attn_mask
    return torch.zeros_like(attn_mask, dtype=dtype).masked_fill_(attn_mask.logical_not(), float("-inf"))


def _lse_like(q: Tensor) -> Tensor:
    """Zeros of the shape, dtype and strides of the flash kernel's log-sum-exp: (B, L, H) seen as (B, H, L)."""
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    if q.dim() != 4:
        return q.new_zeros(q.shape[:-1], dtype=dtype)
    batch, heads, length, _ = q.shape
    return q.new_zeros((batch, length, heads), dtype=dtype).transpose(1, 2)


def sdpa_cpu(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """The CPU kernel of genie::sdpa."""
    if _is_flash_on_cpu(q, k, v, attn_mask, is_causal, scale, enable_gqa):
        bias = _as_bias(attn_mask, q.dtype)
        result: tuple[Tensor, Tensor] = _ATEN_FLASH(q, k, v, 0.0, is_causal, attn_mask=bias, scale=scale)
        return result
    out = _ATEN_SDPA(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out, _lse_like(q)


def sdpa_bw_cpu(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attn_mask: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Grads:
    """The CPU kernel of genie::sdpa_bw."""
    if _is_flash_on_cpu(q, k, v, attn_mask, is_causal, scale, enable_gqa):
        bias = _as_bias(attn_mask, q.dtype)
        grads: Grads = _ATEN_FLASH_BW(
            grad_out, q, k, v, out, lse, 0.0, is_causal, attn_mask=bias, scale=scale)
        return grads
    return _grads_by_autograd(grad_out, q, k, v, attn_mask, is_causal, scale, enable_gqa)


def _sdpa_cpu_without_lse(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, None]:
    return F.scaled_dot_product_attention(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa), None


def direct_kernel(op: Any, device_type: str, *, needs_lse: bool = True) -> Callable[..., Any] | None:
    """A function to call instead of the op `sdpa` or `sdpa_bw`, with the same arguments; None where there is none.

    For code that has plain tensors, wants no gradients, and calls often. Of 19 us for a call of the op with one
    query, 14 are not attention; `sdpa_cpu` has 7 of these, and without lse (None is returned in its place) one.
    """
    if device_type != "cpu":
        return None
    if op is sdpa_bw:
        return sdpa_bw_cpu
    if op is sdpa:
        return sdpa_cpu if needs_lse else _sdpa_cpu_without_lse
    return None


def _grads_by_autograd(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool,
    scale: float | None, enable_gqa: bool,
) -> Grads:
    """Run the forward again under autograd: right for whatever kernel a device picks."""
    with _autograd_on():
        # A clone of an inference tensor is an ordinary one, and autograd may keep it.
        leaves = [(x.clone() if x.is_inference() else x.detach()).requires_grad_() for x in (q, k, v)]
        mask = attn_mask.clone() if attn_mask is not None and attn_mask.is_inference() else attn_mask
        grad = grad_out.clone() if grad_out.is_inference() else grad_out
        out = _ATEN_SDPA(*leaves, mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
        grad_q, grad_k, grad_v = torch.autograd.grad(out, leaves, grad)
    return grad_q, grad_k, grad_v


def _autograd_on() -> AbstractContextManager[Any]:
    """Inside a kernel autograd is off in three ways: grad mode, inference mode, and excluded dispatch keys."""
    excluded = torch._C._dispatch_tls_local_exclude_set()
    for key in ("AutogradFunctionality", "AutogradOther", "AutogradNestedTensor", "ADInplaceOrView"):
        excluded = excluded.remove(getattr(torch._C.DispatchKey, key))
    stack = ExitStack()
    stack.enter_context(torch.inference_mode(False))
    stack.enter_context(torch._C._ForceDispatchKeyGuard(torch._C._dispatch_tls_local_include_set(), excluded))
    stack.enter_context(torch.enable_grad())
    return stack


# ---------------------------------------------------------------- other devices
_layouts: dict[Any, tuple[tuple[int, ...], bool]] = {}
_grad_layouts: dict[Any, tuple[tuple[int, ...], ...]] = {}
_MAX_LAYOUTS = 4096


def _cpu_layout(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> tuple[tuple[int, ...], bool]:
    """(strides of out, whether flash) that the CPU would give for inputs like these; remembered by shape."""
    inputs = tuple(None if x is None else (x.dtype, x.shape, x.stride()) for x in (q, k, v, attn_mask))
    key = (inputs, is_causal, enable_gqa)
    if key not in _layouts:
        if len(_layouts) >= _MAX_LAYOUTS:
            _layouts.clear()
        with FakeTensorMode():
            stand_ins = [None if x is None else torch.empty_strided(x[1], x[2], dtype=x[0]) for x in inputs]
            out, is_flash = _trace(*stand_ins, is_causal, None, enable_gqa)  # type: ignore[call-arg, arg-type]
        _layouts[key] = (tuple(out.stride()), is_flash)
    return _layouts[key]


def _cpu_grad_layouts(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, enable_gqa: bool
) -> tuple[tuple[int, ...], ...]:
    """Strides of the gradients that the CPU's math path would give; remembered by shape."""
    inputs = tuple(None if x is None else (x.dtype, x.shape, x.stride()) for x in (grad_out, q, k, v, attn_mask))
    key = (inputs, is_causal, enable_gqa)
    if key not in _grad_layouts:
        if len(_grad_layouts) >= _MAX_LAYOUTS:
            _grad_layouts.clear()
        with FakeTensorMode():
            stand_ins = [None if x is None else torch.empty_strided(x[1], x[2], dtype=x[0]) for x in inputs]
            grads = _grads_by_autograd(*stand_ins, is_causal, None, enable_gqa)  # type: ignore[call-arg, arg-type]
        _grad_layouts[key] = tuple(tuple(g.stride()) for g in grads)
    return _grad_layouts[key]


def _sdpa_elsewhere(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    out = _ATEN_SDPA(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    strides, _ = _cpu_layout(q, k, v, attn_mask, is_causal, enable_gqa)
    return _with_strides(out, strides), _lse_like(q)


def _sdpa_bw_elsewhere(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attn_mask: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Grads:
    grads = _grads_by_autograd(grad_out, q, k, v, attn_mask, is_causal, scale, enable_gqa)
    _, is_flash = _cpu_layout(q, k, v, attn_mask, is_causal, enable_gqa)
    if not is_flash:
        layouts = _cpu_grad_layouts(grad_out, q, k, v, attn_mask, is_causal, enable_gqa)
        grad_q, grad_k, grad_v = map(_with_strides, grads, layouts)
        return grad_q, grad_k, grad_v
    grad_q, grad_k, grad_v = (g.transpose(1, 2).contiguous().transpose(1, 2) for g in grads)
    return grad_q, grad_k, grad_v


def _with_strides(tensor: Tensor, strides: tuple[int, ...]) -> Tensor:
    if tensor.stride() == strides:
        return tensor
    return torch.empty_strided(tensor.shape, strides, dtype=tensor.dtype, device=tensor.device).copy_(tensor)


def _laid_out(x: Tensor, stride: list[int]) -> Tensor:
    if x.storage_offset() == 0 and x.stride() == tuple(stride):
        return x
    return torch.empty_strided(x.shape, stride, dtype=x.dtype, device=x.device).copy_(x)


# ---------------------------------------------------------------- tracing
class _SeesFlash(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notices which way the composite op goes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.is_flash = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _ATEN_SDPA:      # below autograd a mode meets the composite itself: look inside
            with self:
                return func.decompose(*args, **(kwargs or {}))
        self.is_flash |= func is _ATEN_FLASH
        return func(*args, **(kwargs or {}))


def _trace(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, bool]:
    """(fake out, whether flash): eager's own decision on fake CPU tensors, with the guards it needs."""
    with _SeesFlash() as seen:
        out = _ATEN_SDPA(q, k, v, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    return out, seen.is_flash


def _trace_anywhere(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, is_causal: bool, scale: float | None, enable_gqa: bool
) -> tuple[Tensor, bool]:
    """`_trace` for fake tensors of any device and for meta tensors: what the CPU would do."""
    if q.device.type == "cpu":
        return _trace(q, k, v, attn_mask, is_causal, scale, enable_gqa)
    mode = q.fake_mode if isinstance(q, FakeTensor) else FakeTensorMode()
    with mode:
        stand_ins = [
            None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cpu")
            for x in (q, k, v, attn_mask)]
        out, is_flash = _trace(*stand_ins, is_causal, scale, enable_gqa)  # type: ignore[call-arg, arg-type]
    return torch.empty_strided(out.shape, out.stride(), dtype=out.dtype, device=q.device), is_flash


def _sdpa_fake(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    out, _ = _trace_anywhere(q, k, v, attn_mask, is_causal, scale, enable_gqa)
    return out, _lse_like(q)


def _sdpa_bw_fake(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, attn_mask: Tensor | None = None,
    is_causal: bool = False, scale: float | None = None, enable_gqa: bool = False,
) -> Grads:
    _, is_flash = _trace_anywhere(q, k, v, attn_mask, is_causal, scale, enable_gqa)
    if not is_flash and q.device.type == "cpu":
        return _grads_by_autograd(grad_out, q, k, v, attn_mask, is_causal, scale, enable_gqa)
    # The flash kernel makes its gradients as (B, L, H, E) seen as (B, H, L, E).
    order = (0, 2, 1, 3) if is_flash else tuple(range(q.dim()))
    grad_q, grad_k, grad_v = (
        torch.empty_permuted(x.shape, order, dtype=x.dtype, device=x.device) for x in (q, k, v))
    return grad_q, grad_k, grad_v


# ---------------------------------------------------------------- autograd and autocast
class _Differentiable(torch.autograd.Function):
    """genie::sdpa for inputs that ask for gradients."""

    @staticmethod
    def forward(ctx: Any, keyset: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None, *options: Any) -> Any:
        with torch._C._AutoDispatchBelowAutograd():
            out, lse = sdpa.redispatch(keyset & torch._C._after_autograd_keyset, q, k, v, attn_mask, *options)
        ctx.save_for_backward(q, k, v, out, lse, attn_mask)
        ctx.mark_non_differentiable(lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> tuple[Tensor | None, ...]:
        grads = sdpa_bw(grad_out, *ctx.saved_tensors, *ctx.options)
        return (None, *grads, None, None, None, None)


def _autograd_kernel(
    keyset: Any, q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> tuple[Tensor, Tensor]:
    """Written out because torch.library.register_autograd costs 16 us per call even where no gradient is asked."""
    result: tuple[Tensor, Tensor]
    grad_enabled = torch.is_grad_enabled()
    if grad_enabled and attn_mask is not None and attn_mask.requires_grad:
        raise NotImplementedError("genie::sdpa gives attn_mask no gradient; call scaled_dot_product_attention")
    if grad_enabled and (q.requires_grad or k.requires_grad or v.requires_grad):
        result = _Differentiable.apply(  # type: ignore[no-untyped-call]
            keyset, q, k, v, attn_mask, is_causal, scale, enable_gqa)
        return result
    with torch._C._AutoDispatchBelowAutograd():
        result = sdpa.redispatch(
            keyset & torch._C._after_autograd_keyset, q, k, v, attn_mask, is_causal, scale, enable_gqa)
        return result


def _autocast_kernel(device_type: str) -> Any:
    """Casts as autocast does for F.scaled_dot_product_attention: floating arguments but float64, mask included."""
    key = torch._C.DispatchKey.AutocastCPU if device_type == "cpu" else torch._C.DispatchKey.AutocastCUDA
    off = torch._C.DispatchKeySet(key)

    def cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        eligible = x is not None and x.is_floating_point() and x.dtype != torch.float64
        return x.to(dtype) if x is not None and eligible and x.device.type == device_type else x

    def kernel(
        q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False,
        scale: float | None = None, enable_gqa: bool = False,
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.get_autocast_dtype(device_type)
        with torch._C._ExcludeDispatchKeyGuard(off):
            tensors = [cast(x, dtype) for x in (q, k, v, attn_mask)]
            result: tuple[Tensor, Tensor] = sdpa(*tensors, is_causal, scale, enable_gqa)
            return result

    return kernel


_LIBRARY.impl("sdpa", sdpa_cpu, "CPU")
_LIBRARY.impl("sdpa_bw", sdpa_bw_cpu, "CPU")
_LIBRARY.impl("sdpa", _sdpa_elsewhere, "CUDA")
_LIBRARY.impl("sdpa_bw", _sdpa_bw_elsewhere, "CUDA")
_LIBRARY.impl("sdpa", _autocast_kernel("cpu"), "AutocastCPU")
_LIBRARY.impl("sdpa", _autocast_kernel("cuda"), "AutocastCUDA")
torch.library.register_fake("genie::sdpa", _sdpa_fake, lib=_LIBRARY)
torch.library.register_fake("genie::sdpa_bw", _sdpa_bw_fake, lib=_LIBRARY)
_LIBRARY.impl("sdpa", _autograd_kernel, "Autograd", with_keyset=True)
_LIBRARY.impl("laid_out", _laid_out, "CompositeExplicitAutograd")
