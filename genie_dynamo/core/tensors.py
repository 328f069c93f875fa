"""Tensors as plain data: dtype codes, dense layouts, and the wire form that both ends share.

The wire form of a tensor is `(dtype code, shape, stride, payload)` or, with gaps, `(..., payload, True)`.

    dense strides     any permutation (contiguous, channels_last, transposed): the bytes are in storage order
    gaps=True         the strides leave holes: the bytes are in contiguous order and are scattered on arrival

Dimensions of stride 0 (expanded tensors) are narrowed to one before they travel, and expanded again.
"""
from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.limits import DEFAULT_LIMITS

# The order is the protocol: append, never reorder.
DTYPES: tuple[torch.dtype, ...] = tuple(
    dtype
    for name in (
        "float32", "float64", "float16", "bfloat16", "int64", "int32", "int16", "int8", "uint8", "bool",
        "complex64", "complex128", "complex32", "float8_e4m3fn", "float8_e5m2", "float8_e4m3fnuz",
        "float8_e5m2fnuz", "float8_e8m0fnu", "uint16", "uint32", "uint64", "float4_e2m1fn_x2",
    )
    if isinstance(dtype := getattr(torch, name, None), torch.dtype)
)
DTYPE_CODE: dict[torch.dtype, int] = {dtype: code for code, dtype in enumerate(DTYPES)}
DTYPE_OF_NAME: dict[str, torch.dtype] = {str(dtype).removeprefix("torch."): dtype for dtype in DTYPES}

Payload = bytes | int
TensorWire = tuple[Any, ...]


def is_dense(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the strides visit `numel` consecutive elements exactly once, in any order of dimensions."""
    expected = 1
    for step, size in sorted((step, size) for step, size in zip(stride, shape, strict=True) if size != 1):
        if step != expected:
            return False
        expected *= size
    return True


def as_plain(tensor: torch.Tensor) -> torch.Tensor:
    """A detached, strided CPU tensor with the same values in memory: no lazy conj or neg bits, no implied zeros."""
    if tensor.requires_grad:
        tensor = tensor.detach()
    if tensor._is_zerotensor():
        return torch.zeros(tensor.shape, dtype=tensor.dtype, device="cpu")      # it has no memory to copy from
    if tensor.is_conj():
        tensor = tensor.resolve_conj()
    if tensor.is_neg():
        tensor = tensor.resolve_neg()
    return tensor if tensor.is_cpu else tensor.cpu()


def describe(tensor: torch.Tensor) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """`(flat bytes owner, (dtype code, shape, stride, gaps))`: what to send, and how to rebuild it.

    The first element's memory, from `data_ptr()` on for `numel * element_size` bytes, is what travels.
    """
    tensor = as_plain(tensor)
    shape = tuple(tensor.shape)
    code = DTYPE_CODE[tensor.dtype]
    stride = tensor.stride()
    if tensor.is_contiguous():
        return tensor, (code, shape, stride, False)
    if is_dense(shape, stride):
        return tensor, (code, shape, stride, False)
    if 0 in stride:
        narrow = tuple(1 if step == 0 else size for size, step in zip(shape, stride, strict=True))
        core = tensor.as_strided(narrow, stride)
        if is_dense(narrow, stride):
            return core, (code, shape, stride, False)
        return core.contiguous(), (code, shape, stride, True)
    return tensor.contiguous(), (code, shape, stride, True)


def check_form(wire: Any) -> tuple[torch.dtype, tuple[int, ...], tuple[int, ...], Any, bool]:
    """Validate a tensor's wire form from a peer.

    Raises: ProtocolError for anything else than the form in this file's docstring.
    """
    if type(wire) is not tuple or not 4 <= len(wire) <= 5:
        raise ProtocolError(f"a tensor is an array of 4 or 5 fields, got {wire!r:.80}")
    code, shape, stride, payload = wire[:4]
    if type(code) is not int or not 0 <= code < len(DTYPES):
        raise ProtocolError(f"unknown dtype code {code!r}; this side knows 0..{len(DTYPES) - 1}")
    if type(shape) is not tuple or len(shape) > DEFAULT_LIMITS.tensor_dims:
        raise ProtocolError(f"a shape has at most {DEFAULT_LIMITS.tensor_dims} dims, got {shape!r:.80}")
    if type(stride) is not tuple or len(stride) != len(shape):
        raise ProtocolError(f"stride {stride!r:.80} does not fit shape {shape!r:.80}")
    for dims in (shape, stride):
        for size in dims:
            if type(size) is not int or size < 0:
                raise ProtocolError(f"sizes and strides are integers >= 0, got {size!r} in {dims!r:.80}")
    return DTYPES[code], shape, stride, payload, len(wire) == 5 and bool(wire[4])


class Form(NamedTuple):
    """A wire form that was checked, without its payload."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    core: tuple[int, ...]             # the shape whose bytes travel
    core_stride: tuple[int, ...]      # how they lie
    gaps: bool
    size_bytes: int


class Look:
    """What a tensor looks like: who knows how to send it knows how to send all that look like it."""

    __slots__ = ("_dtype", "_keys", "_shape", "_stride", "size_bytes")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._dtype, self._shape, self._stride = tensor.dtype, tensor.shape, tensor.stride()
        self._keys = _dispatch_keys(tensor).raw_repr()      # device, layout, conjugation, inference mode, subclasses
        self.size_bytes = tensor.nbytes

    def fits(self, value: Any) -> bool:
        """Whether this is a tensor that looks the same."""
        return (isinstance(value, torch.Tensor) and value.dtype is self._dtype and value.shape == self._shape
                and value.stride() == self._stride and _dispatch_keys(value).raw_repr() == self._keys)


_dispatch_keys: Any = torch._C._dispatch_keys
_forms: dict[Any, Form] = {}
_MAX_FORMS = 1024


def form_of(wire: Any) -> Form:
    """`check_form`, with what follows from the form; remembered, since few forms come again and again.

    Raises: ProtocolError.
    """
    try:
        key = (wire[:3], len(wire) == 5 and wire[4])
        form = _forms.get(key)
    except (TypeError, IndexError):
        form = key = None             # nothing that is right is unhashable
    if form is None:
        dtype, shape, stride, _, gaps = check_form(wire)
        core = core_shape(shape, stride)
        form = Form(dtype, shape, stride, core, contiguous_stride(core) if gaps else stride, gaps,
                    numel(core) * dtype.itemsize)
        if len(_forms) >= _MAX_FORMS:
            _forms.clear()
        _forms[key] = form
    return form


def contiguous_stride(shape: Sequence[int]) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides: list[int] = []
    step = 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


def core_shape(shape: tuple[int, ...], stride: tuple[int, ...]) -> tuple[int, ...]:
    """The shape whose bytes travel: expanded dimensions count once."""
    if 0 not in stride:
        return shape
    return tuple(1 if step == 0 and size > 0 else size for size, step in zip(shape, stride, strict=True))


def numel(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


def copy_out(tensor: torch.Tensor, size_bytes: int) -> bytes:
    """The tensor's first `size_bytes` bytes of memory, copied."""
    return ctypes.string_at(tensor.data_ptr(), size_bytes) if size_bytes else b""


def copy_in(tensor: torch.Tensor, data: bytes) -> None:
    """Overwrite the tensor's memory with `data`; the caller has checked the length."""
    if data:
        ctypes.memmove(tensor.data_ptr(), data, len(data))


def view_memory(tensor: torch.Tensor, size_bytes: int, offset_bytes: int = 0) -> Any:
    """A buffer object over the tensor's memory, or a part of it, that keeps the tensor alive."""
    buffer = (ctypes.c_char * size_bytes).from_address(tensor.data_ptr() + offset_bytes)
    buffer._owner = tensor  # type: ignore[attr-defined]
    return buffer


View = tuple[Any, ...]
_SPAN_ALIGNMENT_BYTES = 16


def span_of(group: Sequence[torch.Tensor]) -> tuple[torch.Tensor, list[View]]:
    """The memory that tensors over one storage touch, as a uint8 tensor, and each tensor as a view of it."""
    ends = []
    for tensor in group:
        start = tensor.storage_offset() * tensor.element_size()
        reach = sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
        ends.append((start, start + (reach + 1) * tensor.element_size() if tensor.numel() else start))
    low = min(start for start, _ in ends)
    low -= low % _SPAN_ALIGNMENT_BYTES
    memory = torch.empty(0, dtype=torch.uint8, device=group[0].device)
    memory.set_(group[0].untyped_storage(), low, (max(end for _, end in ends) - low,), (1,))
    views = [(DTYPE_CODE[t.dtype], tuple(t.shape), t.stride(), start - low)
             for t, (start, _) in zip(group, ends, strict=True)]
    return memory, views


def view_of(memory: torch.Tensor, view: View) -> torch.Tensor:
    """A tensor over `memory`'s storage. Raises: ProtocolError or RuntimeError where it reaches beyond it."""
    code, shape, stride, offset_bytes = view
    dtype, shape, stride, _, _ = check_form((code, shape, stride, b""))
    if type(offset_bytes) is not int or offset_bytes < 0 or offset_bytes % dtype.itemsize:
        raise ProtocolError(f"a view of {dtype} cannot start at byte {offset_bytes!r}")
    if memory.storage_offset():
        memory = memory.clone()
    start = offset_bytes // dtype.itemsize
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 if numel(shape) else 0
    if offset_bytes + reach * dtype.itemsize > memory.numel():
        raise ProtocolError(f"a view of shape {shape} and stride {stride} reaches beyond {memory.numel()} bytes")
    return torch.empty(0, dtype=dtype, device=memory.device).set_(memory.untyped_storage(), start, shape, stride)


def view_within(base: torch.Tensor, view: Any) -> torch.Tensor:
    """A view `(shape, stride, offset in elements)` of the elements of a dense tensor, and of nothing beside them.

    Raises: ProtocolError where it is not that.
    """
    if type(view) is not tuple or len(view) != 3:
        raise ProtocolError(f"a view is (shape, stride, offset), got {view!r:.60}")
    shape, stride, offset = view
    check_form((DTYPE_CODE[base.dtype], shape, stride, b""))
    reach = sum((size - 1) * step for size, step in zip(shape, stride, strict=True)) + 1 if numel(shape) else 0
    if type(offset) is not int or offset < 0 or offset + reach > base.numel() \
            or not is_dense(base.shape, base.stride()):
        raise ProtocolError(f"a view of shape {shape}, stride {stride} and offset {offset!r} reaches beyond the "
                            f"{base.numel()} elements of {tuple(base.shape)}")
    return base.as_strided(shape, stride, base.storage_offset() + offset)


def view_of_input(source: torch.Tensor, view: View) -> torch.Tensor:
    """A view of a caller's own tensor. Raises: ProtocolError where the offset does not fit the dtype."""
    code, shape, stride, offset_bytes = view
    dtype, shape, stride, _, _ = check_form((code, shape, stride, b""))
    start_bytes = source.storage_offset() * source.element_size() + offset_bytes
    if start_bytes < 0 or start_bytes % dtype.itemsize:
        raise ProtocolError(f"a view of {dtype} cannot start at byte {start_bytes}")
    start = start_bytes // dtype.itemsize
    if dtype == source.dtype:
        return source.as_strided(shape, stride, start)
    return torch.empty(0, dtype=dtype, device=source.device).set_(source.untyped_storage(), start, shape, stride)
