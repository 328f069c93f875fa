"""A fragment's graph as plain data: what a client lowers to and a worker runs.

In a graph with `n` inputs, value `k < n` is input `k` and value `n + j` is what node `j` makes. An argument (Arg) is

    Value, Constant, Subgraph    references into this graph
    Op                           an operator as an argument (auto_functionalized takes one)
    None, bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format, Device, slice, Ellipsis
    list, tuple, dict            of arguments; dict keys are str

core/fragment.py turns graphs into bytes and back.
"""
from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from genie_dynamo.core import tensors
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.limits import Limits

Arg = Any

_MAX_DIM = 1 << 40


@dataclass(frozen=True, slots=True)
class Value:
    """An input or what an earlier node made."""

    index: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A tensor that travels with the graph."""

    index: int


@dataclass(frozen=True, slots=True)
class Subgraph:
    """A graph that a higher-order op calls."""

    index: int


@dataclass(frozen=True, slots=True)
class Op:
    """A registered operator as an argument, by its allow-list name."""

    target: str


class Device(enum.Enum):
    """Where a tensor is made. A client's own device stands for whichever device the worker owns."""

    WORKER = 0
    META = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class ConstantSpec:
    """A tensor's bits. `data` is laid out as core/tensors.py describes."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    data: bytes
    gaps: bool = False

    @classmethod
    def from_tensor(cls, tensor: torch.Tensor) -> ConstantSpec:
        """The bits of a strided tensor on any device."""
        plain, (code, shape, stride, gaps) = tensors.describe(tensor)
        data = tensors.copy_out(plain, plain.numel() * plain.element_size())
        return cls(dtype=tensors.DTYPES[code], shape=shape, stride=tuple(stride), data=data, gaps=gaps)

    def to_tensor(self, device: torch.device) -> torch.Tensor:
        """A fresh tensor with these bits, shape and strides."""
        core = tensors.core_shape(self.shape, self.stride)
        if self.gaps:
            packed = torch.empty(core, dtype=self.dtype, device="cpu")
            tensors.copy_in(packed, self.data)
            flat = torch.empty_strided(core, self.stride, dtype=self.dtype, device="cpu").copy_(packed)
        else:
            flat = torch.empty_strided(core, self.stride, dtype=self.dtype, device="cpu")
            tensors.copy_in(flat, self.data)
        if device.type != "cpu":
            flat = flat.to(device)
        return flat if core == self.shape else flat.as_strided(self.shape, self.stride)

    def to_wire(self) -> tuple[Any, ...]:
        return (tensors.DTYPE_CODE[self.dtype], self.shape, self.stride, self.data, self.gaps)

    @classmethod
    def from_wire(cls, wire: Any, limits: Limits) -> ConstantSpec:
        """The constant behind an array from a peer.

        Raises: ProtocolError where the bytes do not fit the shape, or the strides ask for memory without reason.
        """
        dtype, shape, stride, data, gaps = tensors.check_form(wire)
        if len(wire) != 5 or type(wire[4]) is not bool or type(data) is not bytes:
            raise ProtocolError(f"a constant is (dtype, shape, stride, bytes, bool), got {wire!r:.80}")
        core = tensors.core_shape(shape, stride)
        expected = tensors.numel(core) * dtype.itemsize
        if len(data) != expected:
            raise ProtocolError(f"a {dtype} constant of shape {shape!r:.80} takes {expected} bytes, got {len(data)}")
        if max((*shape, *stride), default=0) > _MAX_DIM or tensors.numel(shape) > _MAX_DIM:
            raise ProtocolError(f"shape {shape!r:.80} or stride {stride!r:.80} of a constant is beyond 2**40")
        if expected and not gaps and not tensors.is_dense(core, stride):
            raise ProtocolError(f"stride {stride!r:.80} of a constant of shape {shape!r:.80} leaves gaps unannounced")
        extent = 1 + sum((size - 1) * step for size, step in zip(core, stride, strict=True))
        if expected and extent * dtype.itemsize > limits.message_bytes:
            raise ProtocolError(f"a constant spreads {expected} bytes over {extent * dtype.itemsize}")
        return cls(dtype=dtype, shape=shape, stride=stride, data=data, gaps=gaps)


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """One call. `name` is the client's name for it, for messages only."""

    name: str
    target: str
    args: tuple[Arg, ...]
    kwargs: dict[str, Arg] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, eq=False)
class GraphSpec:
    """A graph. `returns` says how a subgraph hands back its outputs: "value" means the one output itself.

    Two graphs are equal when their bytes are: that tells True from 1 and -0.0 from 0.0, and a nan equals itself.
    """

    num_inputs: int
    nodes: tuple[NodeSpec, ...]
    outputs: tuple[Arg, ...]
    constants: tuple[ConstantSpec, ...] = ()
    subgraphs: tuple[GraphSpec, ...] = ()
    returns: Literal["tuple", "list", "value"] = "tuple"

    def __eq__(self, other: object) -> bool:
        from genie_dynamo.core.fragment import encode  # the codec builds on these types

        return isinstance(other, GraphSpec) and encode(self) == encode(other)

    def __hash__(self) -> int:
        return hash((self.num_inputs, len(self.nodes), self.returns))
