"""`make setup` and its friends: what they say when something is missing, and that the second run does nothing."""
from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TARGETS = ("setup", "demo", "test", "test-long", "check", "bench", "bench-peers", "notebooks", "docs", "golden")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What set-up reads, in a folder of its own: the real environment is not touched."""
    (tmp_path / "tools").mkdir()
    for name in ("tools/setup.sh", "constraints.txt", "pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def setup(checkout: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["tools/setup.sh"], cwd=checkout, env=os.environ | {"GENIE_SYSTEM": "0"} | environment,
                          capture_output=True,
                          text=True, timeout=120, check=False)


def test_no_python_says_what_to_install(checkout: Path) -> None:
    done = setup(checkout, PYTHON="no-such-python")
    assert done.returncode == 1
    assert "no-such-python" in done.stderr
    assert "python3-venv" in done.stderr
    assert not (checkout / ".venv").exists()


def test_an_old_python_is_not_taken(checkout: Path) -> None:
    old = program(checkout / "bin" / "python3", "#!/bin/sh\nexit 1\n")   # what the version check answers
    done = setup(checkout, PYTHON=str(old))
    assert done.returncode == 1
    assert "no Python >= 3.11" in done.stderr


def test_a_python_without_venv_says_what_to_install(checkout: Path) -> None:
    fake = program(checkout / "bin" / "python3", f"""#!/bin/sh
if [ "$1" = -m ]; then echo "ensurepip is not available"; exit 1; fi
exec {sys.executable} "$@"
""")
    done = setup(checkout, PYTHON=str(fake))
    assert done.returncode == 1
    assert "ensurepip is not available" in done.stderr
    for package in ("python3-venv", "python3-dev", "pkg-config"):
        assert package in done.stderr


@pytest.fixture
def recorded(checkout: Path) -> Path:
    """A set-up whose Python makes a virtual environment of stand-ins; the file lists what pip was asked for."""
    asked = checkout / "asked.txt"
    inner = f"""#!/bin/sh
case "$*" in
    "-m pip install"*) echo "$*" >>{asked} ;;
    *sys.prefix*) echo {checkout}/.venv ;;
    *'version("torch")'*) echo 9.9.9+cpu ;;
    *) exec {sys.executable} "$@" ;;
esac
"""
    program(checkout / "inner-python", inner)
    program(checkout / "inner-genie", "#!/bin/sh\necho genie-dynamo 0\n")
    program(checkout / "bin" / "python3", f"""#!/bin/sh
if [ "$1 $2" = "-m venv" ]; then
    mkdir -p .venv/bin && cp inner-python .venv/bin/python && cp inner-genie .venv/bin/genie
    echo venv >>{asked}
    exit 0
fi
exec {sys.executable} "$@"
""")
    return asked


def test_torch_comes_first_and_the_second_run_does_nothing(checkout: Path, recorded: Path) -> None:
    python = str(checkout / "bin" / "python3")
    first = setup(checkout, PYTHON=python)
    assert first.returncode == 0, first.stderr
    venv, torch, build, project = recorded.read_text().splitlines()
    assert venv == "venv"
    assert torch.endswith(" torch==2.13.0")
    assert "scikit_build_core==" in build
    assert project.endswith("-e .[solver,demo,test,dev]")
    assert "--no-build-isolation" in project
    second = setup(checkout, PYTHON=python)
    assert second.returncode == 0
    assert second.stdout == second.stderr == ""
    assert len(recorded.read_text().splitlines()) == 4


@pytest.mark.heavy
def test_another_torch_replaces_the_pin(checkout: Path, recorded: Path) -> None:
    python = str(checkout / "bin" / "python3")
    assert setup(checkout, PYTHON=python, TORCH_SPEC="torch==2.12.0").returncode == 0
    assert recorded.read_text().splitlines()[1].endswith(" torch==2.12.0")
    constraints = (checkout / ".venv" / "constraints.txt").read_text()
    assert re.findall(r"^torch==.*$", constraints, re.MULTILINE) == ["torch==9.9.9+cpu"]   # what was installed


@pytest.mark.heavy
def test_a_changed_pin_is_installed(checkout: Path, recorded: Path) -> None:
    python = str(checkout / "bin" / "python3")
    assert setup(checkout, PYTHON=python).returncode == 0
    with (checkout / "constraints.txt").open("a") as file:
        file.write("another==1.0\n")
    assert setup(checkout, PYTHON=python).returncode == 0
    assert len(recorded.read_text().splitlines()) > 4


@pytest.mark.heavy
def test_a_failed_installation_is_not_taken_for_done(checkout: Path, recorded: Path) -> None:
    inner = checkout / "inner-python"
    inner.write_text(inner.read_text().replace(f'echo "$*" >>{recorded}', "exit 1"))
    python = str(checkout / "bin" / "python3")
    assert setup(checkout, PYTHON=python).returncode != 0
    assert not (checkout / ".venv" / ".setup-stamp").exists()


def test_system_wide_changes_are_announced(checkout: Path, recorded: Path) -> None:
    """dpkg-query, apt-get and id are stand-ins: nothing is installed here."""
    tools, asked = checkout / "tools-of-the-system", checkout / "apt.txt"
    program(tools / "dpkg-query", '#!/bin/sh\n[ "$3" = libdpdk-dev ] || echo "install ok installed"\n')
    program(tools / "apt-get", f'#!/bin/sh\necho "$*" >>{asked}\n')
    program(tools / "id", "#!/bin/sh\necho 0\n")
    environment = {"PYTHON": str(checkout / "bin" / "python3"), "PATH": f"{tools}:{os.environ['PATH']}"}
    off = setup(checkout, **environment, GENIE_SYSTEM="0")
    assert "GENIE_SYSTEM=0" in off.stdout
    assert "libdpdk-dev" in off.stdout
    assert not asked.exists()
    shutil.rmtree(checkout / ".venv")
    on = setup(checkout, **environment, GENIE_SYSTEM="1")
    assert "apt-get install libdpdk-dev" in on.stdout
    assert asked.read_text().split()[-1] == "libdpdk-dev"
    shutil.rmtree(checkout / ".venv")
    program(tools / "dpkg-query", '#!/bin/sh\necho "install ok installed"\n')
    assert "no system-wide changes are needed" in setup(checkout, **environment, GENIE_SYSTEM="1").stdout


@pytest.mark.heavy
def test_a_changed_source_of_the_extension_is_built(checkout: Path, recorded: Path) -> None:
    python = str(checkout / "bin" / "python3")
    (checkout / "native").mkdir()
    (checkout / "native" / "one.cc").write_text("int one;\n")
    assert setup(checkout, PYTHON=python, GENIE_SYSTEM="0").returncode == 0
    before = len(recorded.read_text().splitlines())
    assert setup(checkout, PYTHON=python, GENIE_SYSTEM="0").stdout == ""
    (checkout / "native" / "one.cc").write_text("int two;\n")
    assert setup(checkout, PYTHON=python, GENIE_SYSTEM="0").returncode == 0
    assert len(recorded.read_text().splitlines()) > before


def test_the_makefile_has_the_targets_and_lists_them() -> None:
    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    listed = [line.split()[1] for line in done.stdout.splitlines()]
    assert set(TARGETS) <= set(listed)


def test_ci_runs_the_tests() -> None:
    path = ROOT / ".ci" / "run"
    assert path.stat().st_mode & stat.S_IXUSR
    assert "make test" in path.read_text()
    subprocess.run(["bash", "-n", path], check=True, timeout=60)


@pytest.mark.heavy
@pytest.mark.parametrize(("budget_s", "body", "status", "says"), [
    ("100", "pass", 0, "of the budget of 100 s"),
    ("100", "assert False", 1, "of the budget of 100 s"),
    ("2", "import threading; threading.Event().wait()", 124, "stopped after"),
])
def test_the_runner_of_tests_keeps_status_and_budget(
        tmp_path: Path, budget_s: str, body: str, status: int, says: str) -> None:
    """The last one hangs; the runner ends it after three times the budget."""
    test = tmp_path / "test_one.py"
    test.write_text(f"def test_one():\n    {body}\n")
    done = subprocess.run([ROOT / "tools" / "run_tests.sh", budget_s, "-p", "no:cacheprovider", "-q", "--rootdir",
                           tmp_path, "-c", os.devnull, test], capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == status, done.stdout + done.stderr
    assert says in done.stdout + done.stderr
