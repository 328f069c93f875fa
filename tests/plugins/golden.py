"""Golden files: text that is looked at by a person when it changes. `make golden` (--update-golden) writes them anew.

    def test_plan(golden): golden("mlp", str(plan))     # compared with golden/mlp.txt beside the test
"""
from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

Golden = Callable[[str, str], None]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--update-golden", action="store_true", help="write golden files instead of comparing with them")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "golden: compares text with a golden file; `make golden` writes it anew")


@pytest.fixture
def golden(request: pytest.FixtureRequest) -> Golden:
    """`golden(name, text)`: the text is that of the golden file, or becomes it."""
    folder = Path(request.path).parent / "golden"
    update = request.config.getoption("--update-golden")

    def compare(name: str, text: str) -> None:
        path = folder / f"{name}.txt"
        if update:
            folder.mkdir(exist_ok=True)
            path.write_text(text)
            return
        assert path.exists(), f"{path} is missing; make golden writes it"
        assert text == path.read_text(), f"{path} differs; if that is meant: make golden, and look at the diff"

    return compare
