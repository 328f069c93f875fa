"""Inductor's code for a fragment, by torch._inductor.standalone_compile."""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.fragment import GraphSpec
from genie_dynamo.runtime.flat import FlatPlan
from genie_dynamo.runtime.rebuild import to_graph_module

_compiling = threading.Lock()


def compile_with_inductor(spec: GraphSpec, example_inputs: Sequence[Any], *, device: torch.device,
                          extra_namespaces: frozenset[str] = frozenset()) -> Callable[[list[Any]], list[Any]]:
    """Code for inputs like the examples; other shapes run on the flat plan.

    Raises: UnsupportedGraphError where Inductor refuses the graph.
    """
    gm = to_graph_module(spec, device=device, extra_namespaces=extra_namespaces)
    try:
        with _compiling, torch.no_grad():
            code = torch._inductor.standalone_compile(
                gm, list(example_inputs), dynamic_shapes="from_example_inputs"
            )
    except Exception as exc:
        raise UnsupportedGraphError(f"Inductor refuses the fragment: {type(exc).__name__}: {exc}") from exc
    key = _form(example_inputs)
    flat = FlatPlan(spec, device=device, extra_namespaces=extra_namespaces)

    def run(inputs: list[Any]) -> list[Any]:
        if _form(inputs) != key:
            return flat.run(inputs)
        with torch.no_grad():
            outputs = list(code(*inputs))
        inputs.clear()
        return outputs

    return run


def _form(inputs: Sequence[Any]) -> tuple[Any, ...]:
    """What Inductor's code depends on: shapes, strides and dtypes of tensors, values of numbers."""
    return tuple((x.dtype, x.shape, x.stride()) if isinstance(x, torch.Tensor) else x for x in inputs)
