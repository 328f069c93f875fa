"""The C++ tests: optimised in every run, under the sanitizers in the long one; a bounded run of the fuzzers."""
from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

NATIVE = Path(__file__).resolve().parents[2] / "native"
pytestmark = [pytest.mark.heavy, pytest.mark.timeout(600)]      # a cold build beside another test process


def tool(name: str) -> str:
    """CMake and its friends: those of this environment, else the system's."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def run(*command: str) -> None:
    done = subprocess.run(command, cwd=NATIVE, capture_output=True, text=True, timeout=580, check=False)
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


def test_fuzzers_find_nothing(tmp_path: Path) -> None:
    """Three seconds for each target, from a fixed seed; longer by hand: build/native/fuzz/tests/fuzz_session."""
    if shutil.which("clang++") is None:
        pytest.skip("clang is not installed (apt-get install clang)")
    run(tool("cmake"), "--preset", "fuzz", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}", "-DGENIE_DPDK=OFF")
    run(tool("cmake"), "--build", "--preset", "fuzz")
    built = NATIVE.parent / "build" / "native" / "fuzz" / "tests"
    for target in ("frame", "sack", "ticket", "session"):
        run(str(built / f"fuzz_{target}"), "-max_total_time=3", "-seed=1", "-max_len=4096",
            f"-artifact_prefix={tmp_path}/")
