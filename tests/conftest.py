"""The suite's defaults: strict mode (a fallback is an error), one embedded worker per test process, warnings are errors
where they are ours."""
from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before anything reads the configuration.
os.environ.setdefault("GENIE_STRICT", "1")
os.environ.setdefault("GENIE_NUM_THREADS", "1")
# Estimates must not depend on what ran on this machine before.
os.environ.setdefault("GENIE_OBSERVE", "0")
# Starting a worker imports torch, which takes its time on a busy machine.
os.environ.setdefault("GENIE_CONNECT_TIMEOUT_S", "120")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

pytest_plugins = ["tests.plugins.expected_skips", "tests.plugins.golden"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "fallback: this test may run graphs locally (strict mode is off in it)")
    config.addinivalue_line("markers", "slow: only in `make test-long`")


@pytest.fixture(autouse=True)
def _strict_unless_marked(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("fallback"):
        monkeypatch.setenv("GENIE_STRICT", "0")


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    """As many threads as the worker has, so that both sides sum in the same order."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _graphs_survive_their_bytes() -> Iterator[None]:
    """Each graph that any test compiles must decode to what was encoded."""
    from genie_dynamo import backend
    from tests.round_trip import checked_encode

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend, "encode", checked_encode)
        yield


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """No compiled code of other tests before, none of this one after."""
    import torch

    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def session() -> Iterator[object]:
    """The default session of this test process, with one worker of one thread; counters at zero."""
    import genie_dynamo as genie

    opened = genie.session()
    genie.reset_stats()
    yield opened


@pytest.fixture
def own_session() -> Iterator[object]:
    """`own_session(workers=2, ...)` opens a default session of this test's own; it is closed at the end."""
    import genie_dynamo as genie

    yield genie.init
    genie.shutdown()
    from genie_dynamo import sessions

    sessions._config = None
