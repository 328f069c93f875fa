"""Which ops a worker runs for a client: names, denials by schema and by table, and hostile names."""
from __future__ import annotations

import math
import operator
import os
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from genie_dynamo.core.allowlist import HIGHER_ORDER, PYTHON_FUNCTIONS, allowed_ops, denial, resolve, target_name
from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.op_denials import DENIED_OPS, HIGHER_ORDER_DENIALS

ops = torch.ops.aten


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (ops.add.Tensor, "aten::add.Tensor"), (ops.relu.default, "aten::relu.default"),
        (ops.sym_size.int, "aten::sym_size.int"), (torch.ops.prims.iota.default, "prims::iota.default"),
        (torch.ops.higher_order.cond, "higher_order::cond"), (operator.getitem, "py::operator.getitem"),
        (operator.floordiv, "py::operator.floordiv"), (math.ceil, "py::math.ceil"),
        (torch.sym_max, "py::torch.sym_max"), (torch._sym_sqrt, "py::torch._sym_sqrt"),
    ],
)
def test_names_and_back(target: Any, name: str) -> None:
    assert target_name(target) == name
    assert resolve(target_name(target)) is target


def test_every_python_function_has_a_name_that_resolves_to_it() -> None:
    for name, function in PYTHON_FUNCTIONS.items():
        assert resolve(name) is function
        assert resolve(target_name(function)) is function


@pytest.mark.parametrize(
    "target", [print, os.system, eval, lambda x: x, "aten::add", torch.add, ops.add, [], torch.load]
)
def test_anything_else_has_no_name(target: Any) -> None:
    with pytest.raises(UnsupportedGraphError, match="cannot run on a worker"):
        target_name(target)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("aten::from_file.default", "maps a file"), ("aten::set_.source_Storage", "storage"),
        ("aten::set_.source_Tensor", "storage"), ("aten::record_stream.default", "Stream"),
        ("aten::_reshape_alias.default", "without checking"), ("aten::_print.default", "prints"),
        ("aten::append.t", "only inside TorchScript"),
        ("aten::format.default", "only inside TorchScript|not registered"),
        ("aten::save.default", "only inside TorchScript|not registered"), ("aten::pin_memory.default", "whole worker"),
        ("aten::to_sparse.default", "sparse"), ("aten::to_mkldnn.default", "layout"),
        ("aten::qscheme.default", "QScheme"),
        ("aten::_nested_tensor_from_tensor_list.default", "nested"), ("aten::requires_grad_.default", "autograd"),
        ("aten::_add_batch_dim.default", "functorch"), ("aten::_test_check_tensor.default", "test hook"),
        ("quantized::linear.default", "script objects"), ("aten::quantized_lstm.input", "classes"),
        ("higher_order::print", "prints"), ("higher_order::inline_asm_elementwise", "string into code"),
        ("higher_order::triton_kernel_wrapper_mutation", "source is code"), ("higher_order::nonsense", "not among"),
        ("profiler::_record_function_enter_new.default", "namespace"), ("c10d::send.default", "namespace"),
        ("inductor::_reinterpret_tensor.default", "namespace"), ("prim::Print.default", "namespace"),
        ("py::os.system", "not one of the Python functions"), ("py::builtins.eval", "not one of the Python functions"),
    ],
)
def test_dangerous_ops_are_refused_with_their_reason(name: str, why: str) -> None:
    with pytest.raises(UnsupportedGraphError, match=why) as caught:
        resolve(name)
    assert name.split("::")[1].split(".")[0] in str(caught.value)


def test_the_denial_table_names_ops_that_exist() -> None:
    """A misspelt entry would protect from nothing."""
    registered = {name.partition(".")[0] for name in torch._C._dispatch_get_all_op_names()}
    assert sorted(set(DENIED_OPS) - registered) == []
    assert not set(HIGHER_ORDER_DENIALS) & HIGHER_ORDER


def test_no_allowed_op_takes_or_returns_anything_but_plain_data() -> None:
    """Read off the schemas anew: only these types may occur."""
    plain = {"Tensor", "int", "float", "bool", "str", "number", "complex", "Device", "Generator", "NoneType"}
    names = allowed_ops()
    assert len(names) > 2500
    for name in names:
        op = resolve(name)
        assert isinstance(op, torch._ops.OpOverload)
        for argument in (*op._schema.arguments, *op._schema.returns):
            kind = str(argument.type).replace("Optional[", "").replace("List[", "").rstrip("]")
            assert kind in plain, (name, str(argument.type))
            assert kind != "Generator" or str(argument.type) == "Optional[Generator]", name


def test_string_arguments_of_allowed_ops_are_known() -> None:
    """A new op that takes a string might open a file: it must be looked at before it is served."""
    known = {
        "approximate", "algorithm", "rounding_mode", "UPLO", "ord", "mode", "norm", "side", "reduce", "driver",
        "padding_mode", "pad_mode", "equation", "indexing", "interpolation", "assert_msg", "api_name", "padding",
        "activation", "reduction", "acc_policy", "p", "padding_side",
        # the named dimensions of torch < 2.13
        "dim", "dims", "names", "order", "outdim", "out_dim", "start_dim", "end_dim", "dim0", "dim1", "dim2",
    }
    unknown = {
        (name, argument.name)
        for name in allowed_ops()
        for argument in getattr(resolve(name), "_schema").arguments  # noqa: B009 - a Callable to mypy
        if "str" in str(argument.type) and argument.name not in known
    }
    assert unknown == set()


@pytest.mark.parametrize(
    "name", ["", "add", "aten::", "::add", "aten::add.Tensor; import os", "aten::__class__.default",
    "aten::add._schema",
             "aten::_dir.default", "aten::__init__.default", "os::system", "aten::..", "aten::add.Tensor.x", "\x00::a",
             "aten::name.default", "genie_dynamo::core.default", "higher_order::__class__", "py::",
             "aten::add.__call__", "aten::" + "a" * 1000],
)
def test_hostile_names_are_refused(name: str) -> None:
    with pytest.raises(UnsupportedGraphError):
        resolve(name)


@given(st.text(max_size=30) | st.from_regex(r"(aten|py|higher_order|prims)::[a-z_.]{1,15}", fullmatch=True))
@settings(max_examples=300, deadline=None)
def test_any_name_resolves_to_something_allowed_or_is_refused(name: str) -> None:
    try:
        found = resolve(name)
    except UnsupportedGraphError:
        return
    if isinstance(found, torch._ops.OpOverload):
        assert denial(found) is None
    else:
        assert found in PYTHON_FUNCTIONS.values() or isinstance(found, torch._ops.HigherOrderOperator)


def test_other_namespaces_need_a_worker_that_serves_them() -> None:
    with torch.library._scoped_library("allowlisttest", "DEF") as library:
        library.define("double(Tensor x) -> Tensor")
        library.impl("double", lambda x: 2 * x, "CompositeExplicitAutograd")
        with pytest.raises(UnsupportedGraphError, match="--op-library"):
            resolve("allowlisttest::double.default")
        op = resolve("allowlisttest::double.default", frozenset({"allowlisttest"}))
        assert op(torch.ones(1)).item() == 2
    with pytest.raises(UnsupportedGraphError, match="--op-library"):
        resolve("transformers::no_such_op.default")
    with pytest.raises(UnsupportedGraphError, match="not registered on this worker"):
        resolve("aten::no_such_op.default")


def test_an_extra_namespace_is_no_way_around_the_rules() -> None:
    for name in ("c10d::broadcast_.default", "quantized::linear.default",
        "profiler::_record_function_enter_new.default"):
        with pytest.raises(UnsupportedGraphError):
            resolve(name, frozenset({"c10d", "quantized", "profiler"}))
