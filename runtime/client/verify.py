"""Comparing remote calls with the same graph run here: `verify=0.01` checks one call in a hundred."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from genie_dynamo.core.errors import RemoteExecutionError
from genie_dynamo.core.plan import Plan

# What the same ops may differ by between two builds or devices, relative and absolute.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-4, torch.complex64: 1e-4, torch.complex128: 1e-7}
_LOW_PRECISION = 2e-2


def run_reference(run_local: Callable[[list[Any]], Any], args: Sequence[Any]) -> tuple[Any, ...]:
    """The graph's outputs here, on copies of the arguments; the generator's state is left as it was."""
    state = torch.get_rng_state()
    copies = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
    try:
        return tuple(run_local(copies))
    finally:
        torch.set_rng_state(state)


def compare(plan: Plan, label: str, actual: Sequence[Any], expected: Sequence[Any]) -> None:
    """Raises: RemoteExecutionError that names the first output beyond tolerance, with the largest difference."""
    # After the graph's own outputs come copies of activations for a backward, which the local run does not make.
    for index, (rule, a, e) in enumerate(zip(plan.outputs, actual, expected, strict=False)):
        if rule.kind != "value" or not isinstance(a, torch.Tensor):
            continue
        if not a.is_floating_point() and not a.is_complex():
            same = torch.equal(a, e)
            difference = float((a != e).sum())
        else:
            tolerance = _TOLERANCE.get(a.dtype, _LOW_PRECISION)
            wide_a, wide_e = (a, e) if a.is_complex() else (a.double(), e.double())
            same = torch.allclose(wide_a, wide_e, rtol=tolerance, atol=tolerance, equal_nan=True)
            difference = 0.0 if same or not a.numel() else float((wide_a - wide_e).abs().max())
        if not same:
            raise RemoteExecutionError(
                f"verify: output {index} ({rule.name}) of {label} differs from the local run by up to "
                f"{difference:.3g}, shape {tuple(a.shape)}, {a.dtype}; nothing was changed on this side by the check",
                output=index, difference=difference)
