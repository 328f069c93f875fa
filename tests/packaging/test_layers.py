"""Imports point one way, and what reads a network neither unpickles nor evaluates nor imports."""
from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Who may import whom; the face may import all of them.
LAYERS = {
    "genie_dynamo/core": {"core"},
    "passes": {"core", "passes"},
    "runtime": {"core", "runtime", "_native", "_dpdk"},
}
# Modules that turn bytes into code or objects, and calls that do.
FORBIDDEN_MODULES = {"pickle", "_pickle", "cloudpickle", "dill", "marshal", "shelve", "copyreg", "runpy", "code"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "import_module", "recv_pyobj", "send_pyobj", "unsafe_load",
                   "full_load", "torch.load", "torch.jit.load", "torch.export.load", "torch.package"}
# The worker imports the op libraries that its owner names on the command line, and fixed modules of torch.
ALLOWED_CALLS = {("runtime/worker/main.py", "import_module"), ("genie_dynamo/core/allowlist.py", "import_module")}


def sources(folder: str) -> list[Path]:
    return sorted((ROOT / folder).rglob("*.py"))


def imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def dangers(tree: ast.AST, file: str) -> list[str]:
    """What this file does that nothing which reads a network may do."""
    found = [name for name in imported(tree) if name.split(".")[0] in FORBIDDEN_MODULES]
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            for name in (called, called.rpartition(".")[2]):
                # `re.compile` and the like are calls of a method; the builtin has no dot.
                builtin = name in ("eval", "exec", "compile") and "." in called
                if name in FORBIDDEN_CALLS and not builtin and (file, called.rpartition(".")[2]) not in ALLOWED_CALLS:
                    found.append(called)
    return found


@pytest.mark.parametrize("folder", LAYERS)
def test_imports_point_one_way(folder: str) -> None:
    for path in sources(folder):
        for name in imported(ast.parse(path.read_text())):
            top, *rest = name.split(".")
            assert top not in ("passes", "runtime", "genie", "tests", "bench"), f"{path}: {name}"
            if top == "genie_dynamo":
                assert rest and rest[0] in LAYERS[folder], f"{path} imports {name}"


@pytest.mark.parametrize("folder", ["genie_dynamo/core", "runtime"])
def test_nothing_that_reads_a_network_makes_code_of_it(folder: str) -> None:
    for path in sources(folder):
        file = path.relative_to(ROOT).as_posix()
        assert dangers(ast.parse(path.read_text()), file) == [], file


@pytest.mark.parametrize("line", ["import pickle", "from pickle import loads", "torch.load(data)", "eval(text)",
                                  "socket.recv_pyobj()", "importlib.import_module(name)", "yaml.unsafe_load(text)"])
def test_the_check_finds_it(line: str) -> None:
    assert dangers(ast.parse(line), "runtime/flat.py")


def test_the_check_leaves_the_rest_alone() -> None:
    assert not dangers(ast.parse("re.compile('x'); model.eval(); yaml.safe_load(t)"), "runtime/flat.py")


def test_a_worker_starts_without_passes_and_face() -> None:
    program = ("import sys, genie_dynamo.runtime.worker.main\n"
               "print(*(n for n in sys.modules if n.startswith('genie_dynamo.')))")
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=True)
    # The package's import makes the device known by name; a process that is a worker leaves even that out.
    parts = ("", ".generators", ".guard", ".host", ".module", ".moving", ".refused", ".streams")
    by_name = {f"genie_dynamo.device{part}" for part in parts}
    for name in {*done.stdout.split()} - by_name:
        assert name.startswith(("genie_dynamo.core", "genie_dynamo.runtime", "genie_dynamo._native",
                                "genie_dynamo._dpdk")), name
        assert not name.startswith("genie_dynamo.runtime.client"), name
