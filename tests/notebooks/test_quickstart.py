"""The quickstart notebook runs from scratch, and is committed with its outputs."""
from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "01_quickstart.ipynb"

sys.path.insert(0, str(ROOT / "tools"))
try:
    import notebooks as tool
finally:
    sys.path.pop(0)


def printed(notebook: Any) -> str:
    return "".join(output.text for cell in notebook.cells for output in cell.get("outputs", [])
                   if output.output_type == "stream")


def pictures(notebook: Any) -> int:
    return sum("image/png" in output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", []))


def check(notebook: Any, num_docstrings: int) -> None:
    text = printed(notebook)
    assert re.search(rf"local eager: 100%.* {num_docstrings}/{num_docstrings} ", text)
    assert re.search(rf"2 workers: 100%.* {num_docstrings}/{num_docstrings} ", text)
    difference = re.search(r"largest difference +(\S+)", text)
    assert difference is not None
    assert float(difference[1]) <= 1e-5
    assert re.search(r"calls that fell back to local +0\n", text)
    assert re.search(r"moved: weights +\S+ MB up", text)
    assert len(re.findall(r"runs on \w+ +[1-9]\d*\n", text)) == 2
    assert pictures(notebook) == 1
    assert "Warning" not in text


@pytest.mark.heavy
def test_it_runs_from_scratch() -> None:
    check(tool.execute(NOTEBOOK, parameters={"NUM_DOCSTRINGS": 150}), 150)


def test_it_is_committed_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    count = re.search(r"NUM_DOCSTRINGS = (\d+)", code[0].source)
    assert count is not None
    check(notebook, int(count[1]))
    assert "/site-packages/" not in NOTEBOOK.read_text()   # no paths of the machine it ran on


def test_a_progress_bar_leaves_one_line() -> None:
    cell = nbformat.v4.new_code_cell(outputs=[
        nbformat.v4.new_output("stream", name="stderr", text="a:  0%\ra: 50%"),
        nbformat.v4.new_output("stream", name="stderr", text="\ra: 100%\nend\n"),
        nbformat.v4.new_output("stream", name="stdout", text="out\n"),
    ])
    tool._tidy_outputs(cell)
    kept = [(output.name, output.text) for output in cell.outputs]
    assert kept == [("stderr", "a: 100%\nend\n"), ("stdout", "out\n")]
