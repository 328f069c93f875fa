"""Entries of torch's op databases on `remote_accelerator`: the same call on copies of a sample, here and there.

What is compared is what a user could see: outputs, gradients, the inputs afterwards, and which outputs share memory
with which inputs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree as pytree

from tests.yardsticks.harness import SEED, _quiet, assert_same, gradients, seed_everything, tensors_in
from tests.yardsticks.op_cases import _called_unseeded, _comparable

DEVICE = "remote_accelerator"

KNOWN_FAILURES: dict[str, str] = {
    **dict.fromkeys(
        [f"{mode}/{name}" for mode in ("inference", "training")
         for name in ("sparse.sampled_addmm", "sparse.mm.reduce", "to_sparse")],
        "sparse tensors do not travel"),
    **dict.fromkeys(
        [f"{mode}/tensor_split" for mode in ("inference", "training")],
        "torch wants its indices on the cpu, on every device"),
    **dict.fromkeys(
        [f"{mode}/{name}" for mode in ("inference", "training")
         for name in ("svd_lowrank", "pca_lowrank", "linalg.eig")],
        "torch's shape function gives a matrix other strides than its CPU kernel does; values are right"),
}

Move = Callable[[Any], Any]


def here(value: Any) -> Any:
    """A copy of a leaf on the CPU."""
    if not isinstance(value, torch.Tensor):
        return value
    return value.detach().clone().requires_grad_(value.requires_grad)


def there(value: Any) -> Any:
    """A copy of a leaf on the device."""
    if not isinstance(value, torch.Tensor) or value.layout is not torch.strided:
        return value
    return value.detach().to(DEVICE).requires_grad_(value.requires_grad)


def back(value: Any) -> Any:
    """A leaf on the CPU, comparable."""
    if not isinstance(value, torch.Tensor):
        return value
    assert value.layout is not torch.strided or value.device.type in ("cpu", DEVICE)
    return value.detach().cpu().requires_grad_(value.requires_grad)


def compare(fn: Callable[..., Any], sample: SampleInput, op: OpInfo, *, training: bool, where: str) -> None:
    """Run the sample on both and compare. Raises: AssertionError; what the device raises."""
    with _quiet():
        expected = _observe(fn, sample, op, here, training=training)
        actual = _observe(fn, sample, op, there, training=training)
    assert_same(actual, expected, where=where)


def _observe(fn: Callable[..., Any], sample: SampleInput, op: OpInfo, move: Move, *, training: bool) -> Any:
    inputs = pytree.tree_map(move, (sample.input, sample.args, sample.kwargs))
    if move is there and "device" in inputs[2]:
        inputs[2]["device"] = DEVICE
    seed_everything()
    with torch.set_grad_enabled(training):
        outputs = _called_unseeded(fn, inputs[0], *inputs[1], **inputs[2])
    grads: list[torch.Tensor | None] = []
    if training:
        leaves = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad]
        grads = gradients(sample.output_process_fn_grad(outputs), leaves)
    storages = [t.untyped_storage()._cdata for t in tensors_in(inputs) if t.layout is torch.strided]
    seen = {
        "outputs": _comparable(outputs, op), "gradients": grads, "inputs_after": tensors_in(inputs),
        "aliasing": [[i for i, s in enumerate(storages) if s == t.untyped_storage()._cdata]
                     for t in tensors_in(outputs) if t.layout is torch.strided],
    }
    return pytree.tree_map(back, seen)


def updates_copy(inplace: Callable[..., Any]) -> Callable[..., Any]:
    """The in-place form on a copy of its input, so that leaves which want gradients may be given."""

    @functools.wraps(inplace)
    def call(first: Any, *args: Any, **kwargs: Any) -> Any:
        return inplace(first.clone(), *args, **kwargs)

    return call


def marked(key: str, *values: Any) -> Any:
    """A pytest parameter; what is known to fail must fail."""
    reason = KNOWN_FAILURES.get(key)
    marks = [] if reason is None else [pytest.mark.xfail(strict=True, reason=reason)]
    return pytest.param(*values, id=key, marks=marks)


__all__ = ["SEED", "back", "compare", "here", "marked", "there", "updates_copy"]
