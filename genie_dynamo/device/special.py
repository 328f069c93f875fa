"""Kernels that no schema describes: reads, copies between devices, in-place views, batch norm, attention."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._C import DispatchKey

from genie_dynamo.device import engine as engines
from genie_dynamo.device.foreign import NAME, check_ordinal
from genie_dynamo.device.kernels import functional, outputs_of, recorder, resize
from genie_dynamo.device.memory import alias_of, is_ours, lazy_bits, memory_of, new_tensor, node_of, write
from genie_dynamo.device.nodes import Node, layout_of
from genie_dynamo.device.record import Tree, infer, op

Tensor = torch.Tensor
aten = torch.ops.aten
engine = engines.current


def value_of(tensor: Tensor) -> Tensor:
    """The tensor's content on the CPU: what is recorded runs as far as it is needed."""
    node = node_of(tensor)
    value = engine.run((node,))[0]
    assert node.layout is not None
    return value if value.stride() == node.layout.stride else _strided_like(value, node)


def _strided_like(value: Tensor, node: Node) -> Tensor:
    out = node.layout
    assert out is not None
    if 0 in out.stride or not value.numel():
        return value
    return torch.empty_strided(out.shape, out.stride, dtype=out.dtype, device="cpu").copy_(value)


def local_scalar_dense(self: Tensor) -> Any:
    return value_of(self).item()


def copy_(self: Tensor, src: Tensor, non_blocking: bool = False) -> Tensor:
    """Between devices a move of the present content; on the device a write."""
    if not is_ours(self):
        if self.device.type != "cpu":
            raise RuntimeError(f"copies between {NAME} and {self.device} go through the cpu: use .cpu() first")
        return self.copy_(value_of(src))
    if is_ours(src):
        _check_fits(src, self)
        write(self, node_of(src))         # a value is never changed, so both may hold it
        return self
    if src.device.type == "meta":
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    plain = src.detach()
    if plain.dtype != self.dtype and plain.element_size() > self.element_size():
        plain = plain.to(self.dtype)         # fewer bytes travel
    if plain.layout is not torch.strided:
        raise RuntimeError(f"only strided tensors go to {NAME}, this one has layout {plain.layout}")
    _check_fits(plain, self)
    write(self, engine.upload(plain))
    return self


def _check_fits(src: Tensor, target: Tensor) -> None:
    """Raises: eager's error where a copy cannot be broadcast to its target."""
    if src.shape != target.shape:
        infer(aten.copy_.default, [torch.empty(t.shape, device="meta") for t in (target, src)], {})


def to_copy(self: Tensor, *, dtype: Any = None, layout: Any = None, device: Any = None, pin_memory: Any = None,
            non_blocking: bool = False, memory_format: Any = None) -> Tensor:
    if device is not None:
        check_ordinal(device)
    if not is_ours(self):
        plain = self.detach().to(dtype=dtype or self.dtype, memory_format=memory_format or torch.preserve_format)
        return _sent(plain)
    if device is not None and device.type != NAME:
        if device.type == "meta":
            return torch.empty_like(self, dtype=dtype, device=device)
        if dtype is not None and dtype.itemsize < self.dtype.itemsize:
            return value_of(self.to(dtype)).to(device)
        came = value_of(self)
        return came.to(device=device, dtype=dtype or came.dtype, memory_format=memory_format or torch.preserve_format)
    kwargs = {"dtype": dtype, "memory_format": memory_format}
    key, inputs, scalars = op(aten._to_copy.default).gather((self,), {k: v for k, v in kwargs.items() if v is not None})
    own = op(aten._to_copy.default)
    call = own.calls.get(key) or own.call(key, (self,), {k: v for k, v in kwargs.items() if v is not None}, inputs)
    return outputs_of(own, call, inputs, scalars)  # type: ignore[no-any-return]


def _sent(plain: Tensor) -> Tensor:
    """A tensor of the device with the content of a CPU tensor."""
    if plain.device.type == "meta":
        raise NotImplementedError("Cannot copy out of meta tensor; no data!")
    if plain.layout is not torch.strided:
        raise RuntimeError(f"only strided tensors go to {NAME}, this one has layout {plain.layout}")
    return new_tensor(engine.upload(plain.cpu()))


def random_from(self: Tensor, low: int, high: int | None, *, generator: torch.Generator | None = None) -> Tensor:
    """randint_like draws the same numbers; `aten.random.from` itself is no Python, so no graph can hold it."""
    if high is None:
        raise NotImplementedError(f"random_ on {NAME} takes with a lower bound an upper one too")
    return self.copy_(torch.randint_like(self, low, high))


def equal(self: Tensor, other: Tensor) -> bool:
    if self.shape != other.shape:
        return False
    return bool(torch.eq(self, other).all().item())


def assert_async(self: Tensor, message: str = "Expected Tensor with single nonzero value, but got zero") -> None:
    if not bool(self.item()):
        raise RuntimeError(message)


def conj(self: Tensor) -> Tensor:
    return _lazily(aten._conj.default, self)


def neg_view(self: Tensor) -> Tensor:
    return _lazily(aten._neg_view.default, self)


def _lazily(target: Any, self: Tensor) -> Tensor:
    memory = memory_of(self)
    assert memory is not None
    memory.plain = False
    lazy_bits[0] = True
    result: Tensor = target._op_dk(DispatchKey.CompositeExplicitAutograd, self)
    return result


def zero_tensor(size: Sequence[int], *, dtype: Any = None, device: Any = None, **_: Any) -> Tensor:
    """A zero without memory, which autograd makes; here a plain one."""
    return torch.zeros(size, dtype=dtype, device=device)


def reshape_alias(self: Tensor, size: Sequence[int], stride: Sequence[int]) -> Tensor:
    return torch.as_strided(self, size, stride, self.storage_offset())


def inplace_view(target: Any) -> Callable[..., Tensor]:
    """The kernel of an op that changes how a tensor looks at its memory."""

    def kernel(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        memory = memory_of(self)
        assert memory is not None
        own = layout_of(self)
        meta = Tree([own])
        slot = meta.add(Node(None, (), (), own), "tensor")
        (tried,) = meta.filled((slot,), meta.metas)
        infer(target, (tried, *args), kwargs)
        memory.plain = False
        self.data = alias_of(self, tuple(tried.shape), tried.stride(), tried.storage_offset())
        return self

    return kernel


def resize_(self: Tensor, size: Sequence[int], *, memory_format: Any = None) -> Tensor:
    meta = torch.empty(size, device="meta", memory_format=memory_format or torch.contiguous_format)
    memory = memory_of(self)
    assert memory is not None and memory.node.layout is not None
    if meta.shape == self.shape and memory_format is None:
        return self
    if math.prod(size) + self.storage_offset() <= memory.node.layout.extent:
        memory.plain = False
        self.data = alias_of(self, tuple(size), meta.stride(), self.storage_offset())
        return self
    resize(self, size, meta.stride())
    return self


def set_tensor(self: Tensor, source: Tensor) -> Tensor:
    memory = memory_of(source)
    if memory is None:
        raise RuntimeError(f"set_ of a tensor of {NAME} to one of {source.device}")
    memory.plain = False
    self.data = alias_of(source, tuple(source.shape), source.stride(), source.storage_offset())
    return self


def set_other(self: Tensor, *_: Any, **__: Any) -> Tensor:
    raise NotImplementedError(f"a tensor of {NAME} has no storage of bytes to set; use set_(tensor), copy_ or .data")


def set_empty(self: Tensor) -> Tensor:
    self.data = torch.empty((0,), dtype=self.dtype, device=self.device)
    return self


def native_batch_norm(input: Tensor, weight: Tensor | None, bias: Tensor | None, running_mean: Tensor | None,
                      running_var: Tensor | None, training: bool, momentum: float, eps: float) -> Any:
    """It changes the running statistics, which its schema does not say."""
    if running_mean is None or running_var is None or not training:
        return _plain_batch_norm(input, weight, bias, running_mean, running_var, training, momentum, eps)
    out, mean, invstd, new_mean, new_var = aten._native_batch_norm_legit_functional(
        input, weight, bias, running_mean, running_var, training, momentum, eps)
    running_mean.copy_(new_mean)
    running_var.copy_(new_var)
    return out, mean, invstd


_plain_batch_norm = functional(aten.native_batch_norm.default)


def fused_sdp_choice(*_: Any, **__: Any) -> int:
    return 0               # the composition of ops; what is worth more goes to genie::sdpa before it is asked


_SDPA = aten.scaled_dot_product_attention.default


def attention(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0,
              is_causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False) -> Tensor:
    """One op for the worker, which has its own kernels; with dropout or a mask that learns, what it is composed of."""
    learns = attn_mask is not None and attn_mask.requires_grad and torch.is_grad_enabled()
    if dropout_p or learns or query.is_nested:
        composed: Tensor = _SDPA.decompose(query, key, value, attn_mask, dropout_p, is_causal, scale=scale,
                                           enable_gqa=enable_gqa)
        return composed
    out: Tensor = torch.ops.genie.sdpa(query, key, value, attn_mask, is_causal, scale, enable_gqa)[0]
    return out


def lstm_cell(input_gates: Tensor, hidden_gates: Tensor, cx: Tensor, input_bias: Tensor | None = None,
              hidden_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """What torch has fused kernels for on accelerators only, of ops that every worker has."""
    gates = _biased(input_gates, input_bias) + _biased(hidden_gates, hidden_bias)
    entry, forget, cell, out = gates.chunk(4, 1)
    cy = forget.sigmoid() * cx + entry.sigmoid() * cell.tanh()
    return out.sigmoid() * cy.tanh(), cy, gates


def gru_cell(input_gates: Tensor, hidden_gates: Tensor, hx: Tensor, input_bias: Tensor | None = None,
             hidden_bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """As lstm_cell."""
    reset_in, update_in, new_in = _biased(input_gates, input_bias).chunk(3, 1)
    reset, update, new = _biased(hidden_gates, hidden_bias).chunk(3, 1)
    candidate = (new_in + (reset_in + reset).sigmoid() * new).tanh()
    return (hx - candidate) * (update_in + update).sigmoid() + candidate, candidate


def _biased(gates: Tensor, bias: Tensor | None) -> Tensor:
    return gates if bias is None else gates + bias


COMPOSED: dict[str, Callable[..., Any]] = {
    "scaled_dot_product_attention": attention,
    "_thnn_fused_lstm_cell": lstm_cell,
    "_thnn_fused_gru_cell": gru_cell,
}
"""Ops that the device makes of others, with autograd looking at those."""

SPECIAL: dict[str, Callable[..., Any]] = {
    "aten::_local_scalar_dense": local_scalar_dense,
    "aten::copy_": recorder.copy(copy_),
    "aten::_to_copy": to_copy,
    "aten::equal": equal,
    "aten::random_.from": random_from,
    "aten::_assert_async": assert_async,
    "aten::_assert_async.msg": assert_async,
    "aten::_conj": conj,
    "aten::_neg_view": neg_view,
    "aten::_efficientzerotensor": zero_tensor,
    "aten::_reshape_alias": reshape_alias,
    "aten::resize_": resize_,
    "aten::set_": set_empty,
    "aten::set_.source_Tensor": set_tensor,
    "aten::set_.source_Storage": set_other,
    "aten::set_.source_Storage_storage_offset": set_other,
    "aten::set_.source_Tensor_storage_offset": set_other,
    "aten::native_batch_norm": native_batch_norm,
    "aten::_fused_sdp_choice": fused_sdp_choice,
}

__all__ = ["COMPOSED", "SPECIAL", "inplace_view", "value_of"]
