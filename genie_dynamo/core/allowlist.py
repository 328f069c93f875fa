"""Which callables a graph from a client may name, and how the names look on the wire.

    aten::add.Tensor         a registered operator with its overload, "default" written out
    higher_order::cond       a higher-order operator of the table below
    py::operator.getitem     a Python function of the table below

A name is never imported or evaluated: it is looked up among what this process has registered.

What the list protects from: a graph cannot open files, start processes, load or print text, take raw pointers or
storages, build views beyond a storage, reach script objects, streams, process groups, the profiler or Python
objects, nor change settings of the worker process. What it does not protect from: a client that uses permitted
ops to burn time and memory (the worker's quotas do), to read uninitialised memory (`empty` gives what the allocator
has, which may be another session's old bytes), or to feed kernels with indices and offsets that torch itself does
not check (such as those of embedding bags, packed int4 weights or jagged offsets). Clients that authenticate are
trusted that far; clients that must not see each other's bytes get workers of their own.
"""
from __future__ import annotations

import builtins
import contextlib
import functools
import importlib
import math
import operator
import re
from collections.abc import Callable
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.op_denials import HIGHER_ORDER_DENIALS, denied_by_name

NAMESPACES = frozenset({"aten", "prims", "genie", "rngprims", "quantized", "quantized_decomposed", "torch_nn",
                        "torchvision", "transformers"})
"""Operator namespaces that every worker serves, as far as they are registered there."""

_OP_LIBRARIES = frozenset({"torchvision", "transformers"})
"""Namespaces that exist only once a Python package has been imported."""

_TORCH_LIBRARIES = ("torch.nn.modules.linear_cross_entropy", "torch.ao.quantization.fx._decomposed",
                    "torch._higher_order_ops")
"""Modules of torch itself that register ops when they are imported. Imported here, so that both ends know the same."""

for _module in _TORCH_LIBRARIES:
    with contextlib.suppress(ImportError):  # not in every release
        importlib.import_module(_module)

HIGHER_ORDER = frozenset({
    "cond", "while_loop", "while_loop_stack_output", "scan", "associative_scan", "map_impl", "flex_attention",
    "flex_attention_backward", "auto_functionalized", "auto_functionalized_v2", "invoke_subgraph", "out_dtype",
    "run_and_save_rng_state", "run_with_rng_state", "with_effects", "invoke_quant", "invoke_quant_packed",
})

_OPERATOR_FUNCTIONS = (
    "getitem", "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "pos", "abs", "eq", "ne", "lt", "le",
    "gt", "ge", "and_", "or_", "xor", "not_", "lshift", "rshift", "invert", "index",
)
_MATH_FUNCTIONS = (
    "ceil", "floor", "trunc", "sqrt", "log", "log2", "exp", "sin", "cos", "tan", "asin", "acos", "atan", "sinh",
    "cosh", "tanh", "pow",
)
_TORCH_FUNCTIONS = (
    "sym_float", "sym_int", "sym_max", "sym_min", "sym_not", "sym_ite", "sym_sum", "sym_fresh_size",
    "_sym_sqrt", "_sym_cos", "_sym_cosh", "_sym_sin", "_sym_sinh", "_sym_tan", "_sym_tanh", "_sym_acos", "_sym_asin",
    "_sym_atan", "_sym_log2",
)


def _python_functions() -> dict[str, Callable[..., Any]]:
    table: dict[str, Callable[..., Any]] = {}
    for module, names in ((operator, _OPERATOR_FUNCTIONS), (math, _MATH_FUNCTIONS), (torch, _TORCH_FUNCTIONS)):
        for name in names:
            if (function := getattr(module, name, None)) is not None:
                table[f"py::{module.__name__}.{name}"] = function
    for name in ("round", "int", "float", "bool", "max", "min", "abs", "pow"):
        table[f"py::builtins.{name}"] = getattr(builtins, name)
    if (options := _invoke_quant_options()) is not None:
        table[f"py::{options.__module__}.{options.__qualname__}"] = options
    return table


def _invoke_quant_options() -> Callable[..., Any] | None:
    """The dataclass of one bool that graphs with invoke_quant construct."""
    with contextlib.suppress(ImportError):
        from torch._higher_order_ops._invoke_quant import InvokeQuant

        return InvokeQuant
    return None


PYTHON_FUNCTIONS: dict[str, Callable[..., Any]] = _python_functions()
_PYTHON_NAMES: dict[Callable[..., Any], str] = {}
for _name, _function in PYTHON_FUNCTIONS.items():
    _PYTHON_NAMES.setdefault(_function, _name)  # operator.abs and builtins.abs are one object: the first name wins

TARGET_PATTERN = re.compile(r"[A-Za-z_][A-Za-z0-9_]*::[A-Za-z_][A-Za-z0-9_.]*")
"""What a target looks like; checked before anything looks it up."""

_MAX_NAME_CHARS = 256

_PLAIN_TYPES = frozenset({"Tensor", "int", "float", "bool", "str", "number", "complex", "Device", "NoneType",
                          "Optional[Generator]"})


def target_name(target: Any) -> str:
    """The wire name of an fx node's target.

    Raises: UnsupportedGraphError naming the op, where it may not be shipped to any worker.
    """
    if isinstance(target, OpOverload):
        name = f"{target._schema.name}.{target._overloadname}"
        reason = denial(target)
        if reason is not None:
            raise UnsupportedGraphError(f"op {name} cannot run on a worker: it {reason}", op=name)
        return name
    if isinstance(target, HigherOrderOperator):
        return _higher_order_name(target)
    try:
        known = _PYTHON_NAMES.get(target)
    except TypeError:  # not hashable
        known = None
    if known is None:
        shown = getattr(target, "__qualname__", None) or repr(target)[:80]
        module = getattr(target, "__module__", None)
        raise UnsupportedGraphError(
            f"{module + '.' if module else ''}{shown} cannot run on a worker: it is neither a registered operator "
            f"nor one of the {len(PYTHON_FUNCTIONS)} Python functions that travel", op=str(shown),
        )
    return known


def _higher_order_name(target: HigherOrderOperator) -> str:
    name: str = target._name
    if name not in HIGHER_ORDER or getattr(torch.ops.higher_order, name, None) is not target:
        reason = HIGHER_ORDER_DENIALS.get(name, "is not among the higher-order ops that travel")
        raise UnsupportedGraphError(f"higher-order op {name} cannot run on a worker: it {reason}", op=name)
    return f"higher_order::{name}"


@functools.lru_cache(maxsize=8192)
def denial(op: OpOverload) -> str | None:
    """Why a registered operator is never run for a client, in any namespace; None where it may be."""
    schema = op._schema
    if not isinstance(op, OpOverload) or type(op) is not OpOverload:
        return "takes script objects"
    reason = denied_by_name(schema.name)
    if reason is not None:
        return reason
    if not _is_dispatched(schema.name, schema.overload_name):
        return "exists only inside TorchScript"
    for argument in (*schema.arguments, *schema.returns):
        if not _is_plain(str(argument.type)):
            return f"takes or returns {argument.type}, which is not plain data"
    return None


def _is_dispatched(name: str, overload: str) -> bool:
    qualified = f"{name}.{overload}" if overload else name
    return bool(torch._C._dispatch_has_kernel(qualified)) or qualified in _dispatched_names()


def _dispatched_names() -> frozenset[str]:
    return frozenset(torch._C._dispatch_get_all_op_names())


def _is_plain(kind: str) -> bool:
    """Whether a schema type is plain data, or an Optional or List of it."""
    if kind in _PLAIN_TYPES:
        return True
    for wrapper in ("Optional[", "List["):
        if kind.startswith(wrapper) and kind.endswith("]"):
            return _is_plain(kind[len(wrapper) : -1])
    return False


def resolve(name: str, extra_namespaces: frozenset[str] = frozenset()) -> Callable[..., Any]:
    """The callable behind a wire name, if this process may run it.

    Args:    extra_namespaces: operator namespaces this worker was started with, beside NAMESPACES.
    Raises:  UnsupportedGraphError naming the op and, where a library is missing, the option that brings it.
    """
    if len(name) > _MAX_NAME_CHARS or not TARGET_PATTERN.fullmatch(name):
        raise UnsupportedGraphError(f"{name[:80]!r} is not the name of an op", op=name[:80])
    namespace, _, rest = name.partition("::")
    if namespace == "py":
        function = PYTHON_FUNCTIONS.get(name)
        if function is None:
            raise UnsupportedGraphError(f"{name} is not one of the Python functions that travel", op=name)
        return function
    if namespace == "higher_order":
        return _resolve_higher_order(rest)
    if namespace not in NAMESPACES and namespace not in extra_namespaces:
        raise UnsupportedGraphError(
            f"op {name}: this worker does not serve the namespace {namespace!r}; start it with "
            f"--op-library <the Python module that registers {namespace}::>", op=name,
        )
    overload = _registered(namespace, rest)
    if overload is None and namespace == "prims":
        # Some of torch's own prims exist only once this fixed module of torch is there.
        importlib.import_module("torch._inductor.inductor_prims")
        overload = _registered(namespace, rest)
    if overload is None:
        hint = ""
        if namespace in _OP_LIBRARIES or namespace in extra_namespaces:
            hint = f"; if a package registers it, start the worker with --op-library {namespace}"
        raise UnsupportedGraphError(f"op {name} is not registered on this worker (torch {torch.__version__}){hint}",
                                    op=name)
    reason = denial(overload)
    if reason is not None:
        raise UnsupportedGraphError(f"op {name} cannot run on a worker: it {reason}", op=name)
    return overload


def _resolve_higher_order(name: str) -> Callable[..., Any]:
    if name not in HIGHER_ORDER:
        reason = HIGHER_ORDER_DENIALS.get(name, "is not among the higher-order ops that travel")
        raise UnsupportedGraphError(f"higher-order op {name} cannot run on a worker: it {reason}", op=name)
    op = getattr(torch.ops.higher_order, name, None)
    if not isinstance(op, HigherOrderOperator):
        raise UnsupportedGraphError(
            f"higher-order op {name} does not exist in this worker's torch {torch.__version__}", op=name
        )
    return op


def _registered(namespace: str, rest: str) -> OpOverload | None:
    """The registered overload, without creating or importing anything for a name that is not registered."""
    op, _, overload = rest.partition(".")
    schema_overload = "" if overload in ("", "default") else overload
    try:
        torch._C._get_schema(f"{namespace}::{op}", schema_overload)
    except RuntimeError:
        return None
    packet = getattr(getattr(torch.ops, namespace), op, None)
    if not isinstance(packet, torch._ops.OpOverloadPacket):
        return None
    found = getattr(packet, overload or "default", None)
    return found if isinstance(found, OpOverload) else None


def allowed_ops(extra_namespaces: frozenset[str] = frozenset()) -> tuple[str, ...]:
    """Every registered operator that this process may run for a client, sorted."""
    names = []
    for qualified in torch._C._dispatch_get_all_op_names():
        if qualified.partition("::")[0] in NAMESPACES | extra_namespaces:
            name = qualified if "." in qualified else f"{qualified}.default"
            try:
                resolve(name, extra_namespaces)
            except UnsupportedGraphError:
                continue
            names.append(name)
    return tuple(sorted(names))
