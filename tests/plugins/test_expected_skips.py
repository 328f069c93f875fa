"""The plugin, in a suite of its own: listed skips pass, all others fail."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.plugins.expected_skips import ExpectedSkip, read_list

ROOT = Path(__file__).resolve().parents[2]
SUITE = '''
import pytest

def test_runs():
    pass

def test_skips():
    pytest.skip("needs a GPU")

@pytest.mark.skipif(True, reason="another reason")
def test_marked():
    pass

@pytest.mark.xfail(reason="known")
def test_fails_as_known():
    assert False

@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each(device):
    if device == "cuda":
        pytest.skip("needs a GPU")
'''


def outcome(folder: Path, listed: str, *arguments: str, suite: str = SUITE) -> tuple[int, str]:
    """(status, output) of pytest on the suite with that list."""
    tests = folder / "tests"
    tests.mkdir(parents=True)
    (folder / "pytest.ini").write_text("[pytest]\n")
    (tests / "expected_skips.txt").write_text(listed)
    (tests / "test_it.py").write_text(suite)
    program = (f"import sys; sys.path.insert(0, {str(ROOT)!r}); import pytest; "
               "sys.exit(pytest.main(sys.argv[1:], plugins=[]))")
    done = subprocess.run(
        [sys.executable, "-c", program, "-p", "tests.plugins.expected_skips", "-p", "no:cacheprovider", "-rA",
         *arguments, "tests"], cwd=folder, capture_output=True, text=True, timeout=120, check=False)
    return done.returncode, done.stdout + done.stderr


def test_listed_skips_are_accepted(tmp_path: Path) -> None:
    listed = ("# why\n\ntests/test_it.py::test_skips :: needs a GPU\ntests/*::test_marked :: another\n"
              "tests/test_it.py::test_each[cuda] :: GPU\n")
    status, output = outcome(tmp_path, listed)
    assert status == 0, output
    assert "2 passed, 3 skipped, 1 xfailed" in output


@pytest.mark.heavy
@pytest.mark.parametrize("processes", [(), ("-n", "2")])
def test_any_other_skip_fails(tmp_path: Path, processes: tuple[str, ...]) -> None:
    listed = "tests/test_it.py::test_skips :: needs two GPUs\ntests/test_it.py::test_each[cuda] :: needs a GPU\n"
    status, output = outcome(tmp_path, listed, *processes)
    assert status == 1, output
    assert "unexpected skip of tests/test_it.py::test_skips: needs a GPU" in output      # another reason
    assert "unexpected skip of tests/test_it.py::test_marked: another reason" in output  # not listed
    assert "unexpected skip of tests/test_it.py::test_each" not in output


def test_a_module_that_skips_itself_fails(tmp_path: Path) -> None:
    suite = 'import pytest\npytest.importorskip("no_such_module")\n'
    status, output = outcome(tmp_path / "unlisted", "", suite=suite)
    assert status != 0
    assert "unexpected skip of tests/test_it.py" in output
    status, output = outcome(tmp_path / "listed", "tests/test_it.py :: no_such_module\n", suite=suite)
    assert "unexpected skip" not in output


@pytest.mark.parametrize("line", ["tests/test_it.py", "tests/test_it.py :: ", " :: reason", "a::b::c"])
def test_a_line_that_is_no_entry_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "list.txt"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(pytest.UsageError, match=r"list\.txt:2"):
        read_list(path)


def test_patterns_take_brackets_literally() -> None:
    entry = ExpectedSkip("tests/a.py::test[x-*]", "GPU")
    assert entry.covers("tests/a.py::test[x-1]", "needs a GPU")
    assert not entry.covers("tests/a.py::testx", "needs a GPU")
    assert not entry.covers("tests/a.py::test[x-1]", "needs time")


def test_the_list_of_this_suite_reads() -> None:
    read_list(ROOT / "tests" / "expected_skips.txt")
