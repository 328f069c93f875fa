"""Execute notebooks from scratch and keep their outputs: `python tools/notebooks.py FILE...`

Progress bars leave one line each: what a terminal would have overwritten is dropped.
"""
from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

TIMEOUT_S = 600


def execute(source: Path, target: Path | None = None, *, parameters: dict[str, Any] | None = None) -> Any:
    """Run every cell in a fresh kernel, in the notebook's folder.

    Args:    target: where to write the result; None: nowhere.
             parameters: names set after the cell tagged "parameters".
    Returns: the executed notebook.
    Raises:  nbclient.exceptions.CellExecutionError with the traceback of the cell that failed.
    """
    notebook = nbformat.read(source, as_version=4)
    if parameters:
        cell = next(cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
        cell.source += "".join(f"\n{name} = {value!r}" for name, value in parameters.items())
    NotebookClient(notebook, timeout=TIMEOUT_S, kernel_name="python3",
                   resources={"metadata": {"path": str(source.parent)}}).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)   # times of day: a diff in every run
        _tidy_outputs(cell)
    notebook.metadata.pop("widgets", None)
    if target is not None:
        nbformat.write(notebook, target)
    return notebook


def _tidy_outputs(cell: Any) -> None:
    """Join the pieces of each stream, and keep what a terminal would show of them."""
    outputs: list[Any] = []
    for output in cell.get("outputs", []):
        last = outputs[-1] if outputs else None
        if last is not None and output.output_type == last.output_type == "stream" and output.name == last.name:
            last.text += output.text
        else:
            outputs.append(output)
    for output in outputs:
        if output.output_type == "stream":
            output.text = "\n".join(line.rstrip("\r").split("\r")[-1] for line in output.text.split("\n"))
    if outputs:
        cell.outputs = outputs


def main(names: list[str]) -> int:
    if not names:
        print("usage: python tools/notebooks.py FILE...", file=sys.stderr)
        return 2
    for name in names:
        print(f"executing {name}", flush=True)
        execute(Path(name), Path(name))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
