"""How `genie` parses: help with examples that work, and the nearest right name for what does not parse."""
from __future__ import annotations

import shlex
import subprocess
import sys

import pytest

from genie_dynamo.cli.main import build_parser, main

COMMANDS = ("demo", "doctor", "worker", "workers", "keygen", "patterns", "explain", "lanes")


def run(*argv: str) -> int:
    """The status of `genie argv`, also where argparse exits."""
    try:
        return main(argv)
    except SystemExit as exc:
        assert isinstance(exc.code, int)
        return exc.code


def test_the_commands_are_these() -> None:
    assert tuple(sorted(build_parser().commands)) == tuple(sorted(COMMANDS))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_has_examples_that_parse(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(command, "--help") == 0
    _, _, examples = capsys.readouterr().out.partition("\nexample:\n")
    lines = examples.strip().splitlines()
    assert lines
    for line in lines:
        program, *argv = shlex.split(line)
        assert program == "genie"
        assert build_parser().parse(argv).command == command


@pytest.mark.parametrize(("argv", "hint"), [
    (["demoo"], "did you mean demo?"),
    (["dcotor"], "did you mean doctor?"),
    (["worker", "--bind", "tcp://127.0.0.1:1", "--devcie", "cpu"], "did you mean --device?"),
    (["demo", "--qiuck"], "did you mean --quick?"),
    (["doctor", "--jsn=1"], "did you mean --json?"),
    (["worker", "--bind", "tcp://127.0.0.1:1", "--log-level", "inof"], "did you mean INFO?"),
    (["worker", "--bnd", "tcp://127.0.0.1:1"], "did you mean --bind?"),
    (["worker", "--bnd=tcp://127.0.0.1:1", "--threads", "2"], "did you mean --bind?"),
    (["worker", "--bind", "tcp://127.0.0.1:1", "--device", "gpu"], "neither cpu nor cuda:N"),
])
def test_a_misspelt_word_names_the_nearest_right_one(
        argv: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(*argv) == 2
    assert hint in capsys.readouterr().err


def test_options_are_not_abbreviated(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("demo", "--qui") == 2
    assert "unrecognized arguments: --qui" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [
    [], ["worker"], ["keygen"], ["demo", "--docstrings", "0"], ["demo", "--tokens", "many"],
    ["worker", "--bind", "tcp://127.0.0.1:1", "--threads", "-1"],
    ["worker", "--bind", "tcp://127.0.0.1:1", "--memory-limit-gib", "nan"],
])
def test_what_does_not_parse_exits_with_2(argv: list[str]) -> None:
    assert run(*argv) == 2


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    from importlib.metadata import version

    assert run("--version") == 0
    assert capsys.readouterr().out == f"genie-dynamo {version('genie-dynamo')}\n"


def test_help_does_not_import_torch() -> None:
    program = ("import sys\nfrom genie_dynamo.cli import main\n"
               "try:\n    main(['worker', '--help'])\nexcept SystemExit:\n    pass\n"
               "sys.exit('torch' in sys.modules)")
    subprocess.run([sys.executable, "-c", program], check=True, timeout=60, stdout=subprocess.DEVNULL)
