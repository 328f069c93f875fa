"""Keep the documentation true: `python tools/docs.py [--write]`.

Tables that the code knows better (of commands in README.md, of options and set-up variables in docs/options.md) stand
between two comments and are written from the code; bench/results/README.md is written from the results beside it. Then
every Markdown file is checked: relative links lead somewhere, Python examples parse.

Without --write, a table that is out of date is an error and nothing is changed.
"""
from __future__ import annotations

import argparse
import ast
import re
import sys
import textwrap
import typing
from pathlib import Path
from typing import Any

from genie_dynamo.cli.main import build_parser
from genie_dynamo.core.config import COMPILE_OPTIONS, ENV_TABLE, SETUP_TABLE, Config

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bench import kept  # noqa: E402 - bench is no part of what is installed

_LINK = re.compile(r"\]\(([^)\s]+)\)")
_EXAMPLE = re.compile(r"```python\n(.*?)```", re.DOTALL)


def tables() -> dict[Path, dict[str, str]]:
    """The generated tables by document and name, as Markdown."""
    return {ROOT / "README.md": {"commands": _commands()},
            ROOT / "docs" / "options.md": {"options": _options(), "setup": _setup()}}


def _options() -> str:
    rows = ["| option | variable | may be | default | of a | what it says |", "|---|---|---|---|---|---|"]
    types = typing.get_type_hints(Config)
    for variable, row in ENV_TABLE.items():
        scope = "compile" if row.field in COMPILE_OPTIONS else "session"
        rows.append(f"| `{row.field}` | `{variable}` | {_may_be(types[row.field])} | `{row.default!r}` | {scope} "
                    f"| {row.doc} |")
    return "\n".join(rows)


def _may_be(kind: Any) -> str:
    """A type for people: the choices of a Literal, else its name."""
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(f"`{choice!r}`" for choice in typing.get_args(kind))
    return str(getattr(kind, "__name__", kind) if not typing.get_args(kind) else kind).replace("|", "or")


def _setup() -> str:
    return "\n".join(["| variable | what it says |", "|---|---|",
                      *(f"| `{name}` | {doc} |" for name, doc in SETUP_TABLE.items())])


def _commands() -> str:
    parser = build_parser()
    return "\n".join(["| command | what it does |", "|---|---|",
                      *(f"| `genie {name}` | {command.description} |" for name, command in parser.commands.items())])


def with_tables(path: Path, text: str) -> str:
    """A document's text with its generated tables as they should be.

    Raises: ValueError for a missing pair of comments.
    """
    for name, table in tables()[path].items():
        pattern = re.compile(rf"(<!-- {name}: [^>]*-->\n).*?(<!-- end of {name} -->)", re.DOTALL)
        text, found = pattern.subn(lambda match, table=table: f"{match[1]}{table}\n{match[2]}", text)
        if found != 1:
            raise ValueError(f"{path.relative_to(ROOT)}: {found} places for the table {name!r}, expected one")
    return text


def problems_of(path: Path) -> list[str]:
    """Dead relative links and Python examples that do not parse."""
    text = path.read_text()
    problems = []
    for target in _LINK.findall(text):
        if "://" not in target and not target.startswith("#") and not (path.parent / target.split("#")[0]).exists():
            problems.append(f"{path.relative_to(ROOT)}: dead link {target}")
    for example in _EXAMPLE.findall(text):
        try:
            ast.parse(textwrap.dedent(example))
        except SyntaxError as exc:
            problems.append(f"{path.relative_to(ROOT)}: an example does not parse: {exc}")
    return problems


def documents() -> list[Path]:
    return sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "bench").rglob("*.md")])


def generated() -> dict[Path, str]:
    """The documents with generated parts, as they should be."""
    written = {path: with_tables(path, path.read_text()) for path in tables()}
    return {**written, kept.FOLDER / "README.md": kept.page()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="write the generated tables")
    arguments = parser.parse_args()
    problems = []
    for path, wanted in generated().items():
        if path.exists() and wanted == path.read_text():
            continue
        name = path.relative_to(ROOT)
        if arguments.write:
            path.write_text(wanted)
            print(f"{name}: tables written")
        else:
            problems.append(f"{name}: a generated table is out of date; run make docs")
    for path in documents():
        problems += problems_of(path)
    for problem in problems:
        print(problem, file=sys.stderr)
    if not problems:
        print(f"{len(documents())} documents: tables, links and examples are right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
