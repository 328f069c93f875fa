"""Run the same thing eagerly and compiled, and hold all that can be seen of the two against each other.

A `Case` is built around one function `observe(compile_fn)`: it makes its inputs from a fixed seed, wraps the callable
under test with `compile_fn`, runs it and returns a pytree of what a user could see. Eager and compiled are the same
code with another `compile_fn`, so a difference between the two observations is a difference of the backend.
"""

from __future__ import annotations

import math
import os
import random
import re
import textwrap
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._dynamo.guards
import torch._dynamo.utils
from torch.utils import _pytree as pytree

from tests.tolerances import tolerance_for
from tests.yardsticks.known_failures import KNOWN_FAILURES, MEASURED_WITH_TORCH

BACKEND = os.environ.get("GENIE_TEST_BACKEND", "genie")
# Another torch fails in other places. There the list excuses what it names and demands nothing, and what else fails is
# tried with the reference backend.
STRICT = torch.__version__.split("+")[0] == MEASURED_WITH_TORCH
REFERENCE_BACKEND = "aot_eager"
SEED = 20250

CompileFn = Callable[[Callable[..., Any]], Callable[..., Any]]
Observe = Callable[[CompileFn], Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One entry of a yardstick.

    Fields:  key: its name, as in `known_failures.py`.  observe: runs one side of it.
             fullgraph: False where torch itself breaks the graph on purpose; then at least one graph must be compiled.
    """

    key: str
    observe: Observe
    fullgraph: bool = True

    def run(self, backend: str = BACKEND) -> None:
        """Compare the compiled side with the eager one. An expected failure where this torch fails without us.

        Raises: AssertionError where the two differ; what the backend or Dynamo raises, unchanged.
        """
        try:
            self._compare(backend)
        except Exception:
            if STRICT or backend == REFERENCE_BACKEND or (reason := self._failure_of_reference()) is None:
                raise
            pytest.xfail(f"torch {torch.__version__} fails with {REFERENCE_BACKEND}: {reason}")

    def _failure_of_reference(self) -> str | None:
        try:
            self._compare(REFERENCE_BACKEND)
        except Exception as error:
            return first_line(error)
        return None

    def _compare(self, backend: str) -> None:
        expected = observe_eager(self.observe)
        actual = observe_compiled(self.observe, backend, fullgraph=self.fullgraph)
        assert_same(actual, expected, where=self.key)


def observe_eager(observe: Observe) -> Any:
    """The observation with nothing compiled."""
    with _quiet():
        return observe(lambda fn: fn)


def observe_compiled(observe: Observe, backend: str = BACKEND, *, fullgraph: bool = True) -> Any:
    """The observation with the callable compiled by `backend`, in a Dynamo that remembers nothing."""

    def compile_fn(fn: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(fn, backend=backend, fullgraph=fullgraph, dynamic=False)

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    # What Dynamo can capture on request stays in the graph (data-dependent shapes and scalars as unbacked symbols)
    # instead of ending the test before the backend is asked.
    capture_all = torch._dynamo.config.patch(
        capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True, allow_rnn=True
    )
    # Dynamo times its guards once per compile, after flushing the cache: a tenth of the suite's time, for a log line.
    no_guard_timing = mock.patch.object(torch._dynamo.guards, "profile_guard_manager", lambda *_: 0.0)
    try:
        with _quiet(), capture_all, no_guard_timing:
            observation = observe(compile_fn)
        compiled_some = fullgraph or torch._dynamo.utils.counters["stats"]["unique_graphs"]
        assert compiled_some, f"Dynamo compiled nothing: {_last_graph_break()}"
        return observation
    finally:
        torch._dynamo.reset()


def seed_everything(seed: int = SEED) -> None:
    """Give every generator that a sample or an op may read the same state."""
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """The tensors among the leaves of a pytree, in order."""
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def gradients(outputs: Any, leaves: list[torch.Tensor]) -> list[torch.Tensor | None]:
    """Gradients of the differentiable outputs for fixed random cotangents; None where a leaf is not reached."""
    roots = [out for out in tensors_in(outputs) if out.requires_grad]
    if not roots or not leaves:
        return []
    generator = torch.Generator().manual_seed(SEED)
    cotangents = [_random_like(root, generator) for root in roots]
    return list(torch.autograd.grad(roots, leaves, cotangents, allow_unused=True))


def aliasing(outputs: Any, inputs: Any) -> list[str]:
    """For each output tensor the positions of the input tensors whose storage it shares, as text."""
    addresses = [_storage_address(tensor) for tensor in tensors_in(inputs)]
    return [
        "shares memory with inputs " + str([i for i, address in enumerate(addresses) if address == shared])
        if (shared := _storage_address(output)) and shared in addresses
        else "own memory"
        for output in tensors_in(outputs)
    ]


def assert_same(actual: Any, expected: Any, *, where: str) -> None:
    """Equal structure, and for each tensor equal dtype, layout, strides, requires_grad, and values within tolerance.

    Args:    where: what is compared, for the message; the path of the leaf is added to it.
    Raises:  AssertionError naming the first leaf that differs.
    """
    expected_leaves, expected_spec = pytree.tree_flatten_with_path(expected)
    actual_leaves, actual_spec = pytree.tree_flatten_with_path(actual)
    assert actual_spec == expected_spec, f"{where}: structure {actual_spec} differs from eager's {expected_spec}"
    for (path, expected_leaf), (_, actual_leaf) in zip(expected_leaves, actual_leaves, strict=True):
        leaf_where = where + pytree.keystr(path)
        assert type(actual_leaf) is type(expected_leaf), (
            f"{leaf_where}: type {type(actual_leaf).__name__}, eager gives {type(expected_leaf).__name__}"
        )
        if isinstance(expected_leaf, torch.Tensor):
            _assert_same_tensor(actual_leaf, expected_leaf, leaf_where)
        else:
            assert _same_scalar(actual_leaf, expected_leaf), f"{leaf_where}: {actual_leaf!r}, eager {expected_leaf!r}"


def first_line(error: BaseException, limit: int = 240) -> str:
    """The type and the first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else ""
    return textwrap.shorten(f"{type(error).__name__}: {text}", limit, placeholder=" ...")


def unique(cases: Iterable[Case]) -> list[Case]:
    """The cases as a list; two with one key would make the list of known failures ambiguous."""
    result = list(cases)
    keys = [case.key for case in result]
    repeated = sorted({key for key in keys if keys.count(key) > 1})
    assert not repeated, f"cases share a key: {repeated}"
    return result


def parametrize(cases: list[Case]) -> pytest.MarkDecorator:
    """The cases as parameters of a test; a known failure must fail, so that the list cannot go stale."""
    parameters = []
    for case in cases:
        reason = KNOWN_FAILURES.get(case.key)
        marks = [] if reason is None else [pytest.mark.xfail(strict=STRICT, reason=reason)]
        parameters.append(pytest.param(case, id=case.key, marks=marks))
    return pytest.mark.parametrize("case", parameters)


def _assert_same_tensor(actual: torch.Tensor, expected: torch.Tensor, where: str) -> None:
    for attribute in ("dtype", "device", "layout", "shape", "requires_grad", "is_leaf"):
        got, want = getattr(actual, attribute), getattr(expected, attribute)
        assert got == want, f"{where}: {attribute} {got}, eager gives {want}"
    if expected.layout is torch.strided and not expected.is_nested:
        got_stride, want_stride = _significant_stride(actual), _significant_stride(expected)
        assert got_stride == want_stride, f"{where}: strides {actual.stride()}, eager gives {expected.stride()}"
    tolerance = tolerance_for(expected.dtype)
    torch.testing.assert_close(
        actual.detach(),
        expected.detach(),
        rtol=tolerance.rtol,
        atol=tolerance.atol,
        equal_nan=True,
        msg=lambda text: f"{where}: {text}",
    )


def _significant_stride(tensor: torch.Tensor) -> tuple[int, ...]:
    """Strides of the dims that are stepped along; those of size one, and all of an empty tensor, mean nothing."""
    if tensor.numel() == 0:
        return ()
    return tuple(stride for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)


def _same_scalar(actual: Any, expected: Any) -> bool:
    if isinstance(expected, float):
        if math.isnan(expected):
            return math.isnan(actual)
        tolerance = tolerance_for(torch.float32)
        return math.isclose(actual, expected, rel_tol=tolerance.rtol, abs_tol=tolerance.atol)
    return bool(actual == expected)


def _storage_address(tensor: torch.Tensor) -> int:
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # sparse and nested layouts have no storage of their own
        return 0


def _last_graph_break() -> str:
    """Why Dynamo left the code that it met last to Python, in its own words."""
    reasons = list(torch._dynamo.utils.counters["graph_break"])
    given = re.search(r"\(reason: (.*)\)", reasons[-1]) if reasons else None
    return given[1] if given else "; ".join(reasons[-1].splitlines()[:2]) if reasons else "no graph break either"


def _random_like(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if tensor.layout is not torch.strided or tensor.is_nested:
        return torch.ones_like(tensor)
    values = torch.rand(tensor.shape, generator=generator, dtype=torch.float32)
    return torch.empty_like(tensor, requires_grad=False).copy_(values)


@contextmanager
def _quiet() -> Iterator[None]:
    """Samples use deprecated ops and odd strides on purpose; only this project's warnings stay errors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.filterwarnings("error", module=r"genie_dynamo(\..*)?")
        yield
