"""Both implementations of recording: the extension's kernels, and Python's, which are there without it."""
from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(scope="module", params=["native", "python"])
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """One of them, for the tests of a module that ask for it."""
    from genie_dynamo.device.kernels import recorder
    from genie_dynamo.device.quick import General

    if request.param == "native" and isinstance(recorder, General):
        pytest.skip("the native extension is not built")
    before, recorder.enabled = recorder.enabled, request.param == "native"
    yield request.param
    recorder.enabled = before


@pytest.fixture
def no_lazy_bits() -> Iterator[None]:
    """As in a process that never looked at memory through a conjugate, which another test may have done: from then on
    less is remembered.
    """
    from genie_dynamo.device.memory import lazy_bits

    before, lazy_bits[0] = lazy_bits[0], False
    yield
    lazy_bits[0] = lazy_bits[0] or before
