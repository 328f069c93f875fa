"""What the README says is what the code says."""
from __future__ import annotations

import re
import runpy
import subprocess
import sys
import tomllib
from pathlib import Path

import genie_dynamo
from genie_dynamo.core.config import ENV_TABLE, SETUP_TABLE

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()
OPTIONS = ROOT / "docs" / "options.md"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def normal(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def requirements() -> list[str]:
    return [normal(re.split(r"[^A-Za-z0-9._-]", text)[0])
            for group in (PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()) for text in group]


def test_tables_links_and_examples() -> None:
    done = subprocess.run([sys.executable, "tools/docs.py"], cwd=ROOT, capture_output=True, text=True, timeout=60,
                          check=False)
    assert done.returncode == 0, done.stderr


def test_the_tool_that_checks_them_finds_what_is_wrong(tmp_path: Path) -> None:
    tool = runpy.run_path(str(ROOT / "tools" / "docs.py"), run_name="docs")
    bad = ROOT / "build" / "bad-document-of-a-test.md"
    bad.parent.mkdir(exist_ok=True)
    bad.write_text("[a](no-such-file.md) [b](https://example.org) [c](#here)\n```python\nx = = 1\n```\n")
    try:
        problems = tool["problems_of"](bad)
    finally:
        bad.unlink()
    assert len(problems) == 2
    assert "no-such-file.md" in problems[0]
    right = OPTIONS.read_text()
    stale = right.replace("`GENIE_STRICT`", "`GENIE_STRICTER`", 1)
    assert stale != right
    assert tool["with_tables"](OPTIONS, stale) == right


def test_every_variable_of_the_configuration_is_in_the_table() -> None:
    in_tables = set(re.findall(r"^\|.*`(GENIE_[A-Z_]+)`.*\|$", OPTIONS.read_text(), re.MULTILINE))
    assert in_tables == set(ENV_TABLE) | set(SETUP_TABLE)


def test_every_variable_in_the_code_is_one_of_the_table() -> None:
    known = set(ENV_TABLE) | set(SETUP_TABLE)
    places = [*(ROOT / "genie_dynamo").rglob("*.py"), *(ROOT / "passes").rglob("*.py"),
              *(ROOT / "runtime").rglob("*.py"), ROOT / "Makefile", *(ROOT / "tools").iterdir(), ROOT / ".ci" / "run"]
    unknown = {f"{path.relative_to(ROOT)}: {name}" for path in places if path.is_file()
               for name in re.findall(r"\bGENIE_[A-Z][A-Z_]*[A-Z]\b", path.read_text()) if name not in known}
    assert not unknown


def test_every_dependency_has_its_purpose_and_its_pin() -> None:
    section = README.partition("## Dependencies")[2].partition("\n## ")[0]
    words = {normal(word) for word in re.findall(r"[A-Za-z0-9._-]+", section)}
    pinned = {normal(line.split("==")[0]) for line in (ROOT / "constraints.txt").read_text().splitlines()
              if line and not line.startswith("#")}
    for name in requirements():
        assert name in words, f"{name} has no purpose in the README"
        assert name in pinned, f"{name} is not pinned in constraints.txt"


def test_constraints_are_exact_and_the_torch_is_the_pinned_one() -> None:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", line) for line in lines)
    assert "torch==2.13.0" in lines
    assert "torch>=2.11" in PROJECT["dependencies"]
    assert len({line.split("==")[0] for line in lines}) == len(lines)


def test_every_public_name_is_documented() -> None:
    api = (ROOT / "docs" / "api.md").read_text()
    errors = (ROOT / "genie_dynamo" / "core" / "errors.py").read_text()
    for name in genie_dynamo.__all__:
        if name == "__version__":
            continue
        assert f"genie.{name}" in api or f"class {name}(" in errors, f"{name} is public and not in docs/api.md"


def test_versions_agree() -> None:
    assert genie_dynamo.__version__ == PROJECT["version"]
    assert f": {PROJECT['version']}" in (ROOT / "CHANGELOG.md").read_text()
