"""Cases from entries of torch's op databases: inference, training and the in-place form."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import islice
from typing import Any
from unittest import mock

import torch
from torch.testing._internal import common_methods_invocations
from torch.testing._internal.opinfo.core import OpInfo, SampleInput
from torch.utils import _pytree as pytree

from tests.yardsticks.harness import Case, CompileFn, aliasing, gradients, seed_everything, tensors_in

MAX_SAMPLES_LOOKED_AT = 20

# Their outputs are whatever the memory held: shapes, dtypes and strides are compared, values are not.
UNINITIALISED = frozenset({"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"})

# The first samples of some ask for what Dynamo cannot capture: one_hot looks for the number of classes in the data.
FIRST_SAMPLE = {"nn.functional.one_hot": 3}

# In place, float_power keeps its result, which is of double precision.
INPLACE_DTYPE = {"float_power": torch.float64}


def inference_case(database: str, op: OpInfo, dtype: torch.dtype) -> Case:
    """The op without autograd on its first samples."""

    def observe(compile_fn: CompileFn) -> Any:
        return [
            _observe_inference(_plain(op.op), sample, op, compile_fn) for sample in _first_samples(op, dtype, False)
        ]

    return Case(key=_key(database, "inference", dtype, op), observe=observe)


def training_case(database: str, op: OpInfo, dtype: torch.dtype) -> Case:
    """The op on inputs that require grad, and the gradient of every one of them."""

    def observe(compile_fn: CompileFn) -> Any:
        return [_observe_training(_plain(op.op), sample, op, compile_fn) for sample in _first_samples(op, dtype, True)]

    return Case(key=_key(database, "training", dtype, op), observe=observe)


def inplace_case(database: str, op: OpInfo, dtype: torch.dtype) -> Case:
    """The in-place form on a graph input: the input is mutated, and the result is the input."""

    def observe(compile_fn: CompileFn) -> Any:
        sample = _first_inplace_sample(op, dtype)
        return _observe_inference(_plain(op.inplace_variant), sample, op, compile_fn)

    return Case(key=_key(database, "inplace", dtype, op), observe=observe)


def inplace_training_case(database: str, op: OpInfo, dtype: torch.dtype) -> Case:
    """The in-place form inside the graph, on a copy of the input: autograd must see the mutation.

    The copy stands inside because AOTAutograd itself cannot save a graph input that the graph then overwrites.
    """
    inplace = op.inplace_variant

    def update_copy(first: Any, *args: Any, **kwargs: Any) -> Any:
        return inplace(first.clone(), *args, **kwargs)

    def observe(compile_fn: CompileFn) -> Any:
        sample = _first_inplace_sample(op, dtype, requires_grad=True)
        return _observe_training(update_copy, sample, op, compile_fn)

    return Case(key=_key(database, "inplace_training", dtype, op), observe=observe)


def supports_inplace_training(op: OpInfo, dtype: torch.dtype) -> bool:
    """Whether the in-place form exists and has gradients."""
    return op.inplace_variant is not None and op.supports_inplace_autograd and supports_training(op, dtype)


def supports_training(op: OpInfo, dtype: torch.dtype) -> bool:
    """Whether the entry says that its op has gradients for this dtype on the CPU."""
    differentiable = dtype.is_floating_point or dtype.is_complex
    return op.supports_autograd and differentiable and dtype in op.backward_dtypes


def _key(database: str, mode: str, dtype: torch.dtype, op: OpInfo) -> str:
    return f"{database}/{mode}/{str(dtype).removeprefix('torch.')}/{op.full_name}"


def _plain(op: Callable[..., Any]) -> Callable[..., Any]:
    """Dynamo compiles Python functions; an entry's op may be a builtin or a method descriptor."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return op(*args, **kwargs)

    return call


def _samples(op: OpInfo, dtype: torch.dtype, requires_grad: bool) -> Iterator[SampleInput]:
    seed_everything()
    # Not `op.sample_inputs`: it inspects the whole call stack, which under pytest takes longer than the case itself.
    samples = op.sample_inputs_func(op, "cpu", dtype, requires_grad)
    first = FIRST_SAMPLE.get(op.full_name, 0)
    return islice((sample for sample in samples if not _is_degenerate_dropout(sample)), first, MAX_SAMPLES_LOOKED_AT)


def _first_samples(op: OpInfo, dtype: torch.dtype, requires_grad: bool) -> list[SampleInput]:
    """The first sample, and where that holds only scalars or nothing the first one with more to compute on."""
    samples = list(_samples(op, dtype, requires_grad))
    assert samples, f"{op.full_name} has no samples for {dtype}"
    if _is_substantial(samples[0]):
        return samples[:1]
    return samples[:1] + [sample for sample in samples[1:] if _is_substantial(sample)][:1]


def _is_degenerate_dropout(sample: SampleInput) -> bool:
    """Dropout with p of 0 or 1 draws nothing that could differ (and for 0 eager returns the input itself)."""
    return "training" in sample.kwargs and sample.kwargs.get("p") in (0.0, 1.0)


def _is_substantial(sample: SampleInput) -> bool:
    return any(tensor.numel() > 1 for tensor in tensors_in((sample.input, sample.args, sample.kwargs)))


def _first_inplace_sample(op: OpInfo, dtype: torch.dtype, requires_grad: bool = False) -> SampleInput:
    """The first sample that eager can update in place: neither the shape nor the dtype of the input may change."""
    for sample in _samples(op, dtype, requires_grad):
        if sample.broadcasts_input:
            continue
        args, kwargs = pytree.tree_map_only(torch.Tensor, _detached_copy, (sample.args, sample.kwargs))
        try:
            _called_unseeded(op.inplace_variant, _detached_copy(sample.input), *args, **kwargs)
        except RuntimeError:
            continue
        return sample
    raise LookupError(f"eager refuses {op.full_name}_ on each of its first {MAX_SAMPLES_LOOKED_AT} samples")


def _detached_copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().clone()


def _observe_inference(
    fn: Callable[..., Any], sample: SampleInput, op: OpInfo, compile_fn: CompileFn
) -> dict[str, Any]:
    inputs = (sample.input, sample.args, sample.kwargs)
    compiled = compile_fn(fn)
    seed_everything()
    with torch.no_grad():
        outputs = _called_unseeded(compiled, sample.input, *sample.args, **sample.kwargs)
    return {
        "outputs": _comparable(outputs, op),
        "inputs_after": tensors_in(inputs),
        "aliasing": aliasing(outputs, inputs),
        "rng": torch.get_rng_state(),
    }


def _observe_training(fn: Callable[..., Any], sample: SampleInput, op: OpInfo, compile_fn: CompileFn) -> dict[str, Any]:
    inputs = (sample.input, sample.args, sample.kwargs)
    leaves = [tensor for tensor in tensors_in(inputs) if tensor.requires_grad]
    compiled = compile_fn(fn)
    seed_everything()
    outputs = _called_unseeded(compiled, sample.input, *sample.args, **sample.kwargs)
    rng_state = torch.get_rng_state()
    return {
        "outputs": _comparable(outputs, op),
        # Where a result is free up to a sign or a phase, the entry says what of it is determined.
        "gradients": gradients(sample.output_process_fn_grad(outputs), leaves),
        "inputs_after": tensors_in(inputs),
        "aliasing": aliasing(outputs, inputs),
        "rng": rng_state,
    }


def _called_unseeded(fn: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call an entry's op without the seeding that torch wraps around its random ops: Dynamo cannot trace that.

    The harness seeds both sides itself, before the call.
    """
    with mock.patch.object(common_methods_invocations, "wrapper_set_seed", _plain_call):
        return fn(*args, **kwargs)


def _plain_call(op: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return op(*args, **kwargs)


def _comparable(outputs: Any, op: OpInfo) -> Any:
    if op.name not in UNINITIALISED:
        return outputs
    with torch.no_grad():
        return pytree.tree_map_only(torch.Tensor, torch.zero_, outputs)
