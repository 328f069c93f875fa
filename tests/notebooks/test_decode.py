"""The decode notebook runs from scratch in small, and is committed with its outputs."""
from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import nbformat
import pytest

from tests.notebooks.test_quickstart import pictures, printed, tool

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOK = ROOT / "notebooks" / "02_decode.ipynb"
WAYS = ("local eager", "driver-level", "blind", "weights", "full")


def check(notebook: Any, models: list[str], num_tokens: int) -> None:
    text = printed(notebook)
    for model in models:
        assert f"decode: {model}, {num_tokens} tokens after 72" in text
        assert re.search(rf"(reached|MISSED) +{model}: full over local eager, per token: \S+x, to reach", text)
        assert re.search(rf"{model}: bytes of full over token id \+ logits \+ new cache rows: \S+x", text)
    for way in WAYS:
        medians = re.findall(rf"^  {way} +(\S+) (us|ms|s) ", text, re.MULTILINE)
        assert len(medians) == len(models) and all(float(value) > 0 for value, _ in medians)
    assert len(re.findall(r"full / local eager", text)) == len(models)
    assert pictures(notebook) == 2
    assert "Warning" not in text


@pytest.mark.heavy
def test_it_runs_from_scratch() -> None:
    check(tool.execute(NOTEBOOK, parameters={"MODELS": ["tiny"], "NUM_TOKENS": 6, "NUM_ROUNDS": 1}), ["tiny"], 6)


def test_it_is_committed_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert not [output for cell in code for output in cell.outputs if output.output_type == "error"]
    models = re.search(r"MODELS = \[(.+)\]", code[0].source)
    count = re.search(r"NUM_TOKENS = (\d+)", code[0].source)
    assert models is not None and count is not None
    check(notebook, [name.strip(' "') for name in models[1].split(",")], int(count[1]))
    assert "/site-packages/" not in NOTEBOOK.read_text()   # no paths of the machine it ran on
