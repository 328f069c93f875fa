"""A skip is a test that was not run: only those listed in tests/expected_skips.txt are accepted, any other fails.

A line of the list is `PATTERN :: REASON`: PATTERN is matched with the test's id (* and ? as in file names), REASON
must occur in the reason that the skip gives. Lines that start with # and empty ones are comments.

An entry says what may be skipped, not what must: a test that needs a GPU runs where there is one.
"""
from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

LIST_NAME = "expected_skips.txt"
SEPARATOR = " :: "


@dataclass(frozen=True, slots=True)
class ExpectedSkip:
    """One line of the list."""

    pattern: str
    reason: str

    def covers(self, nodeid: str, reason: str) -> bool:
        return fnmatchcase(nodeid, self.pattern.replace("[", "[[]")) and self.reason in reason


def read_list(path: Path) -> tuple[ExpectedSkip, ...]:
    """The entries of a list. Raises: pytest.UsageError, naming the line that is none."""
    entries = []
    for number, line in enumerate(path.read_text().splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        pattern, separator, reason = line.partition(SEPARATOR)
        if not separator or not pattern.strip() or not reason.strip():
            raise pytest.UsageError(f"{path}:{number}: expected `PATTERN{SEPARATOR}REASON`, found {line!r}")
        entries.append(ExpectedSkip(pattern.strip(), reason.strip()))
    return tuple(entries)


class _Guard:
    """Turns the report of a skip that is not listed into that of a failure."""

    def __init__(self, expected: tuple[ExpectedSkip, ...], path: Path) -> None:
        self._expected = expected
        self._path = path

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self) -> Generator[None, Any, Any]:
        return self._judged((yield))

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(self) -> Generator[None, Any, Any]:
        return self._judged((yield))

    def _judged(self, report: Any) -> Any:
        if not report.skipped or hasattr(report, "wasxfail"):
            return report
        reason = _reason(report.longrepr)
        if not any(entry.covers(report.nodeid, reason) for entry in self._expected):
            report.outcome = "failed"
            report.longrepr = (f"unexpected skip of {report.nodeid}: {reason}\n"
                               f"Make it run, or list it with its reason in {self._path}.")
        return report


def _reason(longrepr: Any) -> str:
    """The words of a skip; pytest keeps (file, line, 'Skipped: ...')."""
    text = longrepr[2] if isinstance(longrepr, tuple) else str(longrepr)
    return text.removeprefix("Skipped: ")


def pytest_configure(config: pytest.Config) -> None:
    path = config.rootpath / "tests" / LIST_NAME
    config.pluginmanager.register(_Guard(read_list(path), path), "genie-expected-skips")
