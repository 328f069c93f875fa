"""The C++ tests: optimised in every run, under the sanitizers in the long one."""
from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
pytestmark = pytest.mark.heavy


def tool(name: str) -> str:
    """CMake and its friends: those of this environment, else the system's."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=NATIVE, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-4000:]


@pytest.mark.parametrize("preset", [
    "test",
    pytest.param("asan", marks=pytest.mark.slow),
    pytest.param("tsan", marks=pytest.mark.slow),
])
def test_the_cpp_tests_pass(preset: str) -> None:
    if not Path("/usr/include/doctest/doctest.h").exists():
        pytest.skip("doctest is not installed (apt-get install doctest-dev)")
    if importlib.util.find_spec("genie_dynamo._native") is None:
        pytest.skip("the native extension is not built")
    run(tool("cmake"), "--preset", preset, f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}")
    run(tool("cmake"), "--build", "--preset", preset)
    run(tool("ctest"), "--preset", preset)
