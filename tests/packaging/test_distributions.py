"""The wheel and the sdist hold what they should, and what they hold runs without the checkout."""
from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ("genie.py", "genie_dynamo", "passes", "runtime", "native", "pyproject.toml", "README.md", "LICENSE")
pytestmark = pytest.mark.heavy


def installed_name(path: Path) -> str:
    """Where a source file of the checkout lies once installed."""
    relative = path.relative_to(ROOT).as_posix()
    return f"genie_dynamo/{relative}" if relative.startswith(("passes/", "runtime/")) else relative


def source_files() -> set[str]:
    folders = [ROOT / name for name in ("genie_dynamo", "passes", "runtime")]
    return {installed_name(path) for folder in folders for kind in ("*.py", "*.json", "*.npz")
            for path in folder.rglob(kind)} | {"genie.py"}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | variables
    done = subprocess.run([sys.executable, *map(str, command)], cwd=cwd, capture_output=True, text=True, timeout=280,
                          check=False, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    found, = folder.glob("genie_dynamo-*.whl")
    return found


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    program = ("import sys\nfrom scikit_build_core import build\n"
               "print(build.build_sdist(sys.argv[1]))")
    run("-c", program, folder, cwd=ROOT)
    found, = folder.glob("genie_dynamo-*.tar.gz")
    return found


def test_the_wheel_holds_every_module_and_nothing_else(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    modules = {name for name in names if ".dist-info/" not in name}
    extensions = {name for name in modules if name.endswith(".so")}
    built = {name.split(".")[0] for name in extensions}
    assert built - {"genie_dynamo/_dpdk"} == {"genie_dynamo/_native"}     # the other one where libdpdk is
    assert modules - extensions == source_files()
    for expected in ("genie.py", "genie_dynamo/cli/main.py", "genie_dynamo/passes/__init__.py",
                     "genie_dynamo/runtime/worker/__main__.py"):
        assert expected in modules


def test_the_wheel_names_its_platform_its_entry_points_and_its_licence(wheel: Path) -> None:
    assert "-none-any" not in wheel.name
    archive = zipfile.ZipFile(wheel)
    info = next(name for name in archive.namelist() if name.endswith(".dist-info/entry_points.txt"))
    text = archive.read(info).decode()
    assert "genie = genie_dynamo.cli:main" in text
    assert "[torch_dynamo_backends]\ngenie = genie_dynamo.backend:genie" in text
    folder = info.rpartition("/")[0]
    assert archive.read(f"{folder}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()
    assert "License-Expression: Apache-2.0" in archive.read(f"{folder}/METADATA").decode()


def test_the_sdist_builds_the_same_wheel(sdist: Path, wheel: Path, tmp_path: Path) -> None:
    with tarfile.open(sdist) as archive:
        # Python 3.11 has filters from its fourth patch on, Debian 12 its second; later releases ask for one.
        archive.extractall(tmp_path, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    source, = tmp_path.iterdir()
    assert {path.name for path in source.iterdir()} >= set(SOURCES)
    run("-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", tmp_path, source,
        cwd=tmp_path)
    again, = tmp_path.glob("*.whl")
    assert set(zipfile.ZipFile(again).namelist()) == set(zipfile.ZipFile(wheel).namelist())


def test_the_installed_wheel_imports_from_its_own_place(wheel: Path, tmp_path: Path) -> None:
    """-S: without site-packages' .pth files, so that the editable checkout cannot answer for the wheel."""
    target = tmp_path / "site"
    run("-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", target, wheel, cwd=tmp_path)
    program = (
        "import sys, site\n"
        f"sys.path[:0] = [{str(target)!r}]\n"
        f"sys.path += {[path for path in sys.path if path.endswith('site-packages')]!r}\n"
        "import genie, genie_dynamo\n"
        "import genie_dynamo.passes, genie_dynamo.runtime.worker.main, genie_dynamo.backend, genie_dynamo.cli\n"
        "assert genie is genie_dynamo\n"
        "names = [name for name in sys.modules if name.split('.')[0] in ('genie', 'genie_dynamo')]\n"
        "print('\\n'.join(sys.modules[name].__file__ for name in names))\n")
    program = program.replace("import genie, genie_dynamo\n", "import genie, genie_dynamo, genie_dynamo._native\n")
    files = run("-S", "-c", program, cwd=tmp_path).split()
    assert len(files) > 10
    assert all(file.startswith(str(target)) for file in files)
    assert (target / "bin" / "genie").exists()


def failing_cmake(folder: Path) -> Path:
    """A CMake that says its version and then fails, as one does that finds no compiler."""
    cmake = folder / "cmake"
    cmake.write_text("#!/bin/sh\ncase \"$*\" in *capabilities*) echo '{\"version\": {\"string\": \"3.25.1\"}}' ;; "
                     "*version*) echo cmake version 3.25.1 ;; *) echo no compiler here >&2; exit 1 ;; esac\n")
    cmake.chmod(0o755)
    return cmake


@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_without_a_compiler_the_package_is_pure_and_says_why(hook: str, tmp_path: Path) -> None:
    program = ("import sys\nsys.path.insert(0, 'native')\nimport genie_build\n"
               f"print(genie_build.{hook}(sys.argv[1], {{'build-dir': sys.argv[2]}}))")
    command = [sys.executable, "-c", program, str(tmp_path), str(tmp_path / "build")]
    environment = os.environ | {"CMAKE_EXECUTABLE": str(failing_cmake(tmp_path)), "GENIE_REQUIRE_NATIVE": ""}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert "native extension is left out" in done.stderr
    assert done.stdout.split()[-1].endswith("-py3-none-any.whl")
    found, = tmp_path.glob("*.whl")
    assert not [name for name in zipfile.ZipFile(found).namelist() if name.endswith(".so")]
    required = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False,
                              env=environment | {"GENIE_REQUIRE_NATIVE": "1"})
    assert required.returncode != 0
