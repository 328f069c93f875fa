"""What every yardstick needs: one thread, and torch left as it was found."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
import torch

from tests.yardsticks.harness import BACKEND

_expected_failure = pytest.StashKey[bool]()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, Any, Any]:
    report = yield
    if report.when == "call":
        item.stash[_expected_failure] = hasattr(report, "wasxfail")
    return report


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """As the worker has; and several test processes on few cores wait for each other's threads otherwise."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture
def runs_on_workers(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that used the backend without giving a worker anything to run; what torch cannot trace has none."""
    if BACKEND != "genie":
        yield
        return
    import genie_dynamo as genie

    genie.session()  # opens the default session where no test has yet
    before = genie.get_stats()["fragment_runs"]
    yield
    if request.node.stash.get(_expected_failure, False):
        return
    stats = genie.get_stats()
    assert stats["fragment_runs"] > before, "no fragment ran on a worker"
    assert not stats["fallbacks"], stats["fallbacks"]


@pytest.fixture(autouse=True, scope="session")
def _backend_flags_stay_settable() -> None:
    """Importing torch's test utilities forbids plain assignments like `torch.backends.mkldnn.enabled = False`.

    That is for torch's own suite; here it would change what the other tests of the process may do.
    """
    setattr(torch.backends, "__allow_nonbracketed_mutation_flag", True)
