"""Measure which entries fail with torch's own `aot_eager`, and write them to `known_failures.py`.

    python -m tests.yardsticks.regenerate            # measure everything (some minutes), write the list
    python -m tests.yardsticks.regenerate hop_db     # measure again only the keys that start so; keep the others

An entry that passes with `aot_eager` is expected of this backend, so it never enters the list.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import re
import tempfile
import textwrap
from pathlib import Path

import torch

from tests.yardsticks.harness import REFERENCE_BACKEND, Case, first_line
from tests.yardsticks.known_failures import KNOWN_FAILURES

TEST_MODULES = ("test_op_db", "test_module_db", "test_optim_db", "test_hop_db", "test_architectures")
LIST = Path(__file__).with_name("known_failures.py")

HEADER = '''"""Entries that fail with torch's own `aot_eager` under the same harness, each with its reason.

Written by `python -m tests.yardsticks.regenerate`; do not edit. Each is a strict expected failure: one that passes
fails the suite. What is not in this list and fails is a defect of this backend.
"""

# ruff: noqa: E501

from __future__ import annotations

'''


def main() -> None:
    """Measure the entries asked for and rewrite the list."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prefix", nargs="?", default="", help="measure only keys that start so")
    prefix = parser.parse_args().prefix
    torch.set_num_threads(1)
    cases = [case for module in TEST_MODULES for case in importlib.import_module(f"tests.yardsticks.{module}").cases()]
    chosen = [case for case in cases if case.key.startswith(prefix)]
    kept = {case.key for case in cases} - {case.key for case in chosen}
    failures = {key: reason for key, reason in KNOWN_FAILURES.items() if key in kept} | measure(chosen)
    LIST.write_text(_as_module(failures))
    print(f"{len(chosen)} of {len(cases)} entries measured, {len(failures)} known failures in {LIST}")


def measure(cases: list[Case]) -> dict[str, str]:
    """The reason of each case that fails with the reference backend.

    Raises: RuntimeError naming a case that fails only sometimes; such a one cannot be listed.
    """
    failures: dict[str, str] = {}
    home = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # torch's partitioner writes a graph that it fails on to the current folder
        try:
            for case in cases:
                reason = _reason(case)
                if reason is None:
                    continue
                if _reason(case) is None:
                    raise RuntimeError(f"{case.key} failed once ({reason}) and passed the second time")
                failures[case.key] = reason
        finally:
            os.chdir(home)
    return failures


def _reason(case: Case) -> str | None:
    """Why the case fails, in one line; None where it passes."""
    try:
        case.run(REFERENCE_BACKEND)
    except Exception as error:
        cause = getattr(error, "inner_exception", error)  # Dynamo wraps what a backend raises
        reason = first_line(cause).replace(case.key, "")
        context = re.search(
            r"^ *Exception: *(\S.*)|Developer debug context: (?!Backend: )(\S.*)", str(error), re.MULTILINE
        )
        if context is None:
            return reason
        return f"{reason} ({textwrap.shorten(context[1] or context[2], 100, placeholder=' ...')})"
    return None


def _as_module(failures: dict[str, str]) -> str:
    lines = [f"    {json.dumps(key)}: {json.dumps(failures[key])}," for key in sorted(failures)]
    version = torch.__version__.split("+")[0]
    body = "\n".join(lines)
    return (
        f'{HEADER}MEASURED_WITH_TORCH = "{version}"\n\nKNOWN_FAILURES: dict[str, str] = {{\n{body}\n}}  # fmt: skip\n'
    )


if __name__ == "__main__":
    main()
