"""What torch decides in Python by device type and has no hook for: printing, deepcopy, pickling.

Each function is replaced by one that looks whether the tensor is the device's and otherwise calls the original.
"""
from __future__ import annotations

import collections
import copy
import sys
from typing import Any

import torch
import torch._tensor_str

from genie_dynamo.device.memory import alias_of, is_ours, memory_of

Tensor = torch.Tensor


def patch_torch() -> None:
    """Once per process."""
    _patch_printing()
    _patch_deepcopy()
    _patch_pickling()


def _patch_printing() -> None:
    """The content is read whole, once; torch's own way runs dozens of ops on it."""
    original = torch._tensor_str._str_intern

    def _str_intern(inp: Any, *, tensor_contents: Any = None) -> str:
        if tensor_contents is None and type(inp) in (Tensor, torch.nn.Parameter) and is_ours(inp):
            here = inp.detach().cpu()
            indent = len("tensor(" if type(inp) is Tensor else "Parameter containing:\ntensor(".rpartition("\n")[2])
            tensor_contents = "[]"
            if here.numel():
                tensor_contents = torch._tensor_str._tensor_str(here, indent)  # type: ignore[no-untyped-call]
        return original(inp, tensor_contents=tensor_contents)  # type: ignore[no-untyped-call,no-any-return]

    torch._tensor_str._str_intern = _str_intern


def _patch_deepcopy() -> None:
    original = Tensor.__deepcopy__

    def __deepcopy__(self: Tensor, memo: dict[int, Any]) -> Tensor:
        if not is_ours(self) or type(self) not in (Tensor, torch.nn.Parameter):
            return original(self, memo)  # type: ignore[no-untyped-call,no-any-return]
        if id(self) in memo:
            return memo[id(self)]  # type: ignore[no-any-return]
        if not self.is_leaf:
            raise RuntimeError("Only Tensors created explicitly by the user (graph leaves) support the deepcopy "
                               "protocol at the moment.")
        with torch.no_grad():
            storage = self.untyped_storage()
            whole = memo.get(id(storage))
            if whole is None:
                memory = memory_of(self)
                assert memory is not None and memory.node.layout is not None
                out = memory.node.layout
                whole = alias_of(self.detach(), out.shape, out.stride, 0).clone()
                memo[id(storage)] = whole
            fresh = whole.as_strided(self.shape, self.stride(), self.storage_offset())
            result: Tensor = fresh.detach() if type(self) is Tensor else torch.nn.Parameter(fresh, self.requires_grad)
            result.requires_grad_(self.requires_grad)
        if self.grad is not None:
            result.grad = copy.deepcopy(self.grad, memo)
        memo[id(self)] = result
        for name, value in self.__dict__.items():
            setattr(result, name, copy.deepcopy(value, memo))
        return result

    Tensor.__deepcopy__ = __deepcopy__  # type: ignore[method-assign]


def rebuild(here: Tensor, requires_grad: bool, parameter: bool, hooks: Any) -> Tensor:
    """A tensor of the device from what torch.save has kept of it; stays on the CPU where it was loaded to it."""
    if torch.serialization._serialization_tls.map_location in (None, "remote_accelerator", "remote_accelerator:0"):
        here = here.to("remote_accelerator")
    result = torch.nn.Parameter(here, requires_grad) if parameter else here.requires_grad_(requires_grad)
    result._backward_hooks = hooks
    return result


def _patch_pickling() -> None:
    """torch.save keeps the content, by way of the CPU. Any other pickle would carry a handle that means nothing."""
    original = Tensor.__reduce_ex__

    def __reduce_ex__(self: Tensor, protocol: Any) -> Any:
        if type(self) not in (Tensor, torch.nn.Parameter) or not is_ours(self):
            return original(self, protocol)  # type: ignore[no-untyped-call]
        if not _inside_torch_save():
            raise TypeError(
                "a tensor of remote_accelerator cannot be pickled: its content is on a worker. Use x.cpu(), or "
                "torch.save, which takes the content along")
        return (rebuild, (self.detach().cpu(), self.requires_grad, isinstance(self, torch.nn.Parameter),
                          collections.OrderedDict()))

    Tensor.__reduce_ex__ = __reduce_ex__  # type: ignore[method-assign]
    torch.serialization.add_safe_globals([rebuild])


def _inside_torch_save() -> bool:
    frame: Any = sys._getframe(1)
    while frame is not None:
        if frame.f_code in (torch.serialization._save.__code__, torch.serialization._legacy_save.__code__):
            return True
        frame = frame.f_back
    return False
