"""Outputs made where they leave from: the op that makes one writes into memory that its lane sends without a copy.

    lend(output index, bytes) -> a writable buffer of exactly that size, or None: then the op makes its own memory

It needs an overload of the op that takes `out=`, with a kernel of its own (those that torch generates compute first and
copy then), and the sizes and strides of the result before there is one. Those are what the op says on the meta device
of arguments that look like these; they are remembered. Before an op is trusted with arguments of a kind (their dtypes,
number of dimensions and order of strides) it is carried out both ways, and the results are compared to the bit. What
does not come out equal is never made that way again.
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._ops import OpOverload

from genie_dynamo.core.graph_spec import GraphSpec, NodeSpec, Value
from genie_dynamo.core.tensors import is_dense
from genie_dynamo.runtime.steps import Literals, Step, references

log = logging.getLogger(__name__)

Lend = Callable[[int, int], Any]

MIN_BYTES = 2 << 20
"""Smaller outputs are copied as fast: torch's own memory is in the caches still, and that of the lane is not."""
_MAX_FORMS = 64
_PROMISES_NOTHING = frozenset({torch.Tag.nondeterministic_seeded, torch.Tag.data_dependent_output,
                               torch.Tag.dynamic_output_shape})
_SAME_ELEMENTS = frozenset({
    "aten::view.default", "aten::_unsafe_view.default", "aten::unsqueeze.default", "aten::squeeze.dim",
    "aten::squeeze.dims", "aten::t.default", "aten::transpose.int", "aten::permute.default", "aten::alias.default",
    "aten::detach.default",
})
"""Ops whose result is another look at all of the first argument's memory."""
_HIDES_A_VIEW = frozenset({"aten::_unsafe_view", "aten::lift", "aten::lift_fresh"})


class Form(NamedTuple):
    """What a result will look like."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    numel: int
    size_bytes: int


class Birth:
    """The op that makes the memory of one output.

    Args: index: of the output.  call: the op.  out: its overload that writes to `out=`.
    """

    def __init__(self, index: int, call: Callable[..., Any], out: Callable[..., Any], name: str) -> None:
        self.wanted = False               # the last result was large enough, and nothing is known against it
        self._index = index
        self._call, self._out, self._name = call, out, name
        self._refused = False
        self._forms: dict[Any, Form | None] = {}
        self._proven: set[Any] = set()

    def met(self, result: torch.Tensor) -> None:
        """The op has made a result the ordinary way."""
        self.wanted = not self._refused and result.nbytes >= MIN_BYTES

    def make(self, lend: Lend, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """The op's result, in memory that was lent where that can be."""
        key = _look([*args, *kwargs.values()])
        form = self._forms.get(key)
        if form is None and key not in self._forms:
            form = self._foresee(key, args, kwargs)
        memory = lend(self._index, form.size_bytes) if form is not None and form.size_bytes >= MIN_BYTES else None
        if form is None or memory is None:
            result = self._call(*args, **kwargs)
            self.met(result)
            return result
        lent = torch.frombuffer(memory, dtype=form.dtype, count=form.numel).as_strided(form.shape, form.stride)
        kind = _kind([*args, *kwargs.values()])
        if kind in self._proven:
            return self._out(*args, **kwargs, out=lent)
        return self._prove(kind, lent, args, kwargs)

    def _foresee(self, key: Any, args: list[Any], kwargs: dict[str, Any]) -> Form | None:
        form = None
        try:
            form = _form_of(self._call(*map(_on_meta, args), **{name: _on_meta(a) for name, a in kwargs.items()}))
        except Exception as error:
            # Arguments that cannot be, as the op itself will say, or an op that the meta device does not know.
            log.info("the result of %s cannot be foreseen: %.200s", self._name, error)
        if len(self._forms) >= _MAX_FORMS:
            self._forms.clear()
        self._forms[key] = form
        return form

    def _prove(self, kind: Any, lent: torch.Tensor, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Both ways, once for arguments of a kind."""
        result = self._call(*args, **kwargs)
        try:
            self._out(*args, **kwargs, out=lent)
        except Exception as error:
            self._refuse(f"out= raises {error}")
            return result
        if _form_of(result) != _form_of(lent) or not _same_bits(result, lent):
            self._refuse("out= gives something else")
            return result
        self._proven.add(kind)
        return lent

    def _refuse(self, why: str) -> None:
        self._refused, self.wanted = True, False
        log.info("outputs of %s are copied to where they leave from: %.200s", self._name, why)


def find_births(spec: GraphSpec, travels: frozenset[int], function: Callable[[NodeSpec], Any]) -> dict[int, Birth]:
    """The nodes that make the memory of an output, by index; none whose memory another output may share.

    Args: travels: indices of outputs.  function: what a node calls.
    """
    behind = [_behind(spec, output, function) for output in spec.outputs]
    births = {}
    for index in sorted(travels):
        owner = _owner(spec, spec.outputs[index])
        if owner >= 0 and not any(owner in other for j, other in enumerate(behind) if j != index):
            op = function(spec.nodes[owner])
            if isinstance(op, OpOverload) and (out := out_overload(op)) is not None:
                births[owner] = Birth(index, op._op, out._op, spec.nodes[owner].target)
    return births


def birth_step(birth: Birth, plain: Step, node: NodeSpec, registers: list[int], out: int, lender: int,
               literals: Literals) -> Step:
    """The step of a node that makes an output: in memory that is lent where register `lender` says who lends.

    Args: plain: its step as it is otherwise.
    """
    args = [literals.builder(a, registers) for a in node.args]
    kwargs = [(key, literals.builder(value, registers)) for key, value in node.kwargs.items()]

    def step(regs: list[Any]) -> None:
        if birth.wanted and (lend := regs[lender]) is not None:
            regs[out] = birth.make(lend, [build(regs) for build in args], {key: build(regs) for key, build in kwargs})
            return
        plain(regs)
        if regs[out].nbytes >= MIN_BYTES:
            birth.met(regs[out])

    return step


def _owner(spec: GraphSpec, output: Any) -> int:
    """The node that makes an output's memory, where the output is all of it; else -1."""
    while isinstance(output, Value) and output.index >= spec.num_inputs:
        node = spec.nodes[output.index - spec.num_inputs]
        if node.target not in _SAME_ELEMENTS:
            return output.index - spec.num_inputs
        output = node.args[0]
    return -1


def _behind(spec: GraphSpec, output: Any, function: Callable[[NodeSpec], Any]) -> set[int]:
    """The nodes whose memory an output may lie in."""
    found: set[int] = set()
    todo = [value - spec.num_inputs for value in references(output)]
    while todo:
        node = todo.pop()
        if node >= 0 and node not in found:
            found.add(node)
            if not _is_new(function(spec.nodes[node])):
                given = references((spec.nodes[node].args, spec.nodes[node].kwargs))
                todo += [value - spec.num_inputs for value in given]
    return found


def _is_new(op: Any) -> bool:
    """Whether all that an op returns is memory of its own."""
    return (isinstance(op, OpOverload) and op.namespace in ("aten", "genie")
            and all(returned.alias_info is None for returned in op._schema.returns)
            and not torch._C._dispatch_has_kernel_for_dispatch_key(op._name, "CompositeImplicitAutograd")
            and op._schema.name not in _HIDES_A_VIEW)


def out_overload(op: OpOverload) -> OpOverload | None:
    """The overload that writes the same result to `out=`, by a kernel of its own on the CPU; None where there is none.

    Args: op: a function that returns one new tensor and draws no random numbers.
    """
    schema = op._schema
    if schema.is_mutable or _PROMISES_NOTHING & set(op.tags) or len(schema.returns) != 1 \
            or schema.returns[0].alias_info is not None or str(schema.returns[0].type) != "Tensor":
        return None
    wanted = [(a.name, str(a.type), a.kwarg_only) for a in schema.arguments]
    packet = op.overloadpacket
    for name in packet.overloads():
        found = getattr(packet, name)
        takes = found._schema.arguments
        if [a.name for a in takes if a.is_out] == ["out"] and found._name != op._name \
                and [(a.name, str(a.type), a.kwarg_only) for a in takes if not a.is_out] == wanted \
                and torch._C._dispatch_has_kernel_for_dispatch_key(found._name, "CPU"):
            return found  # type: ignore[no-any-return]
    return None


def _look(args: list[Any]) -> Any:
    """What decides of a result's form, to be compared."""
    return tuple([(a.shape, a.stride(), a.dtype) if isinstance(a, torch.Tensor)
                  else _look(a) if isinstance(a, list) else (type(a), a) for a in args])


def _kind(args: list[Any]) -> Any:
    """What decides of the way in which a result is computed, but for its sizes."""
    return tuple([(a.dtype, a.dim(), _order(a)) if isinstance(a, torch.Tensor)
                  else _kind(a) if isinstance(a, list) else type(a) for a in args])


def _order(tensor: torch.Tensor) -> tuple[Any, ...]:
    stride = tensor.stride()
    order = tuple(sorted(range(len(stride)), key=stride.__getitem__))
    return (order, 0 in stride, is_dense(tensor.shape, stride))


def _on_meta(arg: Any) -> Any:
    if isinstance(arg, torch.Tensor):
        return torch.empty_strided(arg.shape, arg.stride(), dtype=arg.dtype, device="meta")
    return [_on_meta(item) for item in arg] if isinstance(arg, list) else arg


def _form_of(result: torch.Tensor) -> Form | None:
    """None where the elements do not fill a run of memory."""
    shape, stride = tuple(result.shape), result.stride()
    if not is_dense(shape, stride):
        return None
    return Form(shape, stride, result.dtype, result.numel(), result.nbytes)


def _same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Of two tensors of one form."""
    flat = [t.as_strided((t.numel(),), (1,)).view(torch.uint8) for t in (one, other)]
    return torch.equal(*flat)
