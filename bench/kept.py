"""Results that are published: `python -m bench.kept run.json [run.json ...] --machine NAME`.

Takes what `python -m bench ... --out run.json` has written, leaves the single samples out, and keeps it in
`results/NAME.json`, bench by bench: a later run of a bench replaces an earlier one. `make docs` writes the tables of
`results/README.md` from these files, so that no published number was ever typed.

Refused: quick runs, runs of another backend than genie, and runs of files that no commit has.
"""
from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from bench.report import FORMAT, quantity

FOLDER = Path(__file__).resolve().parent / "results"


class RefusedError(ValueError):
    """A run that is not to be published, and why."""


def published(run: dict[str, Any]) -> dict[str, Any]:
    """bench -> what is kept of it: where and when it was measured, and its cases without samples.

    Raises: RefusedError.
    """
    settings = run["settings"]
    if run.get("format") != FORMAT:
        raise RefusedError(f"its format is {run.get('format')}, this bench writes {FORMAT}: measure again")
    if settings["quick"]:
        raise RefusedError("it is a --quick run, whose few samples say that a bench works and no more")
    if settings["backend"] != "genie":
        raise RefusedError(f"backend {settings['backend']!r} ran in genie's place")
    if not run["commit"] or run["changed_files"]:
        raise RefusedError(f"{run['changed_files']} files differ from commit {run['commit']}: commit, measure again")
    kept: dict[str, Any] = {}
    for case in run["cases"]:
        sides = {label: {k: v for k, v in side.items() if k != "samples"} for label, side in case["sides"].items()}
        row = kept.setdefault(case["bench"], {
            "commit": run["commit"], "host": run["host"], "load_average_at_end": run["load_average_at_end"],
            "cases": []})
        row["cases"].append({**case, "sides": sides})
    return kept


def keep(runs: list[Path], machine: str, folder: Path = FOLDER) -> Path:
    """Put runs into the machine's file. Raises: RefusedError; nothing is written then."""
    path = folder / f"{machine}.json"
    benches = json.loads(path.read_text())["benches"] if path.exists() else {}
    for run in runs:
        try:
            benches.update(published(json.loads(run.read_text())))
        except RefusedError as error:
            raise RefusedError(f"{run}: {error}") from None
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"format": FORMAT, "benches": dict(sorted(benches.items()))}, indent=1) + "\n")
    return path


_MANY = 8
"""Of more targets a case has one row, which names those that were missed."""


def table(path: Path) -> str:
    """A machine's targets as Markdown: what was measured, beside what is to be reached."""
    benches = json.loads(path.read_text())["benches"]
    rows = ["| bench | case | measured | to reach | | load | commit |", "|---|---|---|---|---|---|---|"]
    for name, bench in benches.items():
        run = f"{bench['host']['load_average'][0]:.1f} | {bench['commit'][:8]} |"
        for case in bench["cases"]:
            where = "one core" if case["pinned_to_one_core"] else f"{case['threads']} thr."
            measured = [(target["name"], quantity(target["value"], target["unit"]),
                         f"<= {quantity(target['limit'], target['unit'])}", target["reached"])
                        for target in case["targets"]]
            if len(measured) > _MANY:
                missed = [f"{name} {value} ({limit})" for name, value, limit, reached in measured if not reached]
                reached = f"{len(measured) - len(missed)} of {len(measured)} reached"
                measured = [(case["title"], "; not: ".join([reached, ", ".join(missed)][:1 + bool(missed)]), "all",
                             not missed)]
            for title, value, limit, reached in measured:
                rows.append(f"| `{name}` | {title} [{where}] | {value} | {limit} | {'' if reached else '**missed**'} "
                            f"| {run}")
    return "\n".join(rows)


def machine_line(path: Path) -> str:
    """What the numbers were measured on, in words."""
    benches = json.loads(path.read_text())["benches"]
    lines = {f"{h['cpu_model']}, {h['cores_usable']} cores, {h['memory_bytes'] / 2**30:.0f} GiB, Linux {h['kernel']}, "
             f"Python {h['python']}, torch {h['versions']['torch']}" for h in (b["host"] for b in benches.values())}
    return "; ".join(sorted(lines))


def page(folder: Path = FOLDER) -> str:
    """The whole of `results/README.md`."""
    parts = ["# Measured", "",
             "Written by `make docs` from the files beside it; `python -m bench.kept` puts runs into them. What each "
             "bench does is", "said in [its README](../README.md); \"load\" is the machine's load average when the run "
             "began.", ""]
    for path in sorted(folder.glob("*.json")):
        parts += [f"## {path.stem}", "", machine_line(path), "", table(path), ""]
    return "\n".join(parts)


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.kept", description="Keep results for publication.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN.json")
    parser.add_argument("--machine", required=True, help="the file's name: what kind of machine it was")
    args = parser.parse_args(argv)
    try:
        path = keep(args.runs, args.machine)
    except (RefusedError, OSError, json.JSONDecodeError, KeyError) as error:
        print(f"bench.kept: error: {error}", file=sys.stderr)
        return 1
    (FOLDER / "README.md").write_text(page())
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
