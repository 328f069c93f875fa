"""What tools see without running anything: style and types of the whole tree."""
from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def complaints(*command: str) -> str:
    """What a command prints where it fails."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def test_ruff_has_nothing_to_say() -> None:
    pytest.importorskip("ruff", reason="ruff is not installed")
    assert complaints(sys.executable, "-m", "ruff", "check", ".") == ""


@pytest.mark.heavy
def test_every_type_is_right() -> None:
    pytest.importorskip("mypy", reason="mypy is not installed")
    assert complaints("tools/typecheck.sh") == ""
