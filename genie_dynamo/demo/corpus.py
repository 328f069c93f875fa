"""Docstrings of the standard library: real English text that every Python installation brings along.

Nothing is imported or run: the source files are read and parsed with `ast`, in sorted order, so that the same
Python gives the same list every time.
"""
from __future__ import annotations

import ast
import sysconfig
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from genie_dynamo.demo.errors import DemoError

# Not the library's own prose: tests, vendored packages, an editor, tables made by programs.
SKIPPED_FOLDERS = frozenset({
    "site-packages", "dist-packages", "distutils", "test", "tests", "idlelib", "lib2to3", "ensurepip", "encodings",
    "pydoc_data", "turtledemo", "__phello__", "config", "lib-dynload", "__pycache__",
})
MIN_CHARACTERS = 25


@dataclass(frozen=True, slots=True)
class Docstring:
    """One documented function, method or class."""

    name: str   # as a user would write it: shutil.copytree
    text: str   # its first paragraph on one line


def collect_docstrings(limit: int, folder: Path | None = None) -> tuple[Docstring, ...]:
    """Docstrings of public functions, methods and classes, evenly drawn from all of them.

    Args:    limit: how many at most.  folder: where the sources are; None: this Python's standard library.
    Returns: in the order of files and lines.
    Raises:  DemoError when the sources are not there (some installations ship only compiled files).
    """
    folder = folder or Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, Docstring] = {}   # by text: an override that repeats its base's docstring counts once
    for path in _source_files(folder):
        for docstring in _docstrings_of(path, _module_name(path.relative_to(folder))):
            found.setdefault(docstring.text, docstring)
    if not found:
        raise DemoError(
            f"no docstrings found under {folder}: this Python comes without its library's sources; "
            "run the demo with a Python that has them (python.org, a distribution's full python3 package)")
    every = tuple(found.values())
    if len(every) <= limit:
        return every
    return tuple(every[index * len(every) // limit] for index in range(limit))


def _source_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*.py")):
        *folders, name = path.relative_to(folder).parts
        private = name.startswith("_") and name != "__init__.py"
        if not private and not any(f in SKIPPED_FOLDERS or f.startswith(("_", "config-")) for f in folders):
            yield path


def _module_name(relative: Path) -> str:
    parts = relative.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _docstrings_of(path: Path, module: str) -> Iterator[Docstring]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")   # a SyntaxWarning about somebody else's file
            tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError, OSError):
        return   # a template or a file of another Python: not prose that we need
    yield from _walk(tree, module)


def _walk(parent: ast.AST, prefix: str) -> Iterator[Docstring]:
    for node in ast.iter_child_nodes(parent):
        if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            continue
        if node.name.startswith("_"):
            continue
        name = f"{prefix}.{node.name}"
        text = _first_paragraph(ast.get_docstring(node) or "")
        if len(text) >= MIN_CHARACTERS:
            yield Docstring(name, text)
        if isinstance(node, ast.ClassDef):
            yield from _walk(node, name)


def _first_paragraph(docstring: str) -> str:
    return " ".join(docstring.strip().split("\n\n")[0].split())
