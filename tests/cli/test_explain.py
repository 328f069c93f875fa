"""`genie explain script.py`: the script runs as it would alone, and its graphs are explained."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SCRIPT = """
import sys
import torch
import genie_dynamo as genie

genie.init(workers=1, num_threads=1)
step = torch.compile(torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.ReLU()), backend="genie")
with torch.no_grad():
    print("rows", len(step(torch.randn(int(sys.argv[1]), 64))))
"""


def genie(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "genie_dynamo.cli", *argv], capture_output=True, text=True,
                          timeout=200)


@pytest.mark.heavy
def test_a_script_is_explained_in_json_and_as_a_page(tmp_path: Path) -> None:
    script, page = tmp_path / "script.py", tmp_path / "plan.html"
    script.write_text(SCRIPT)
    done = genie("explain", "--json", "--html", str(page), str(script), "7")
    assert done.returncode == 0, done.stderr
    assert "rows 7" in done.stderr
    document: dict[str, Any] = json.loads(done.stdout)
    (graph,) = document["graphs"]
    assert document["workers"] == ["w0"]
    assert graph["measured_s"] > 0 and graph["est_s"] > 0
    assert "the graph stays whole" in page.read_text()


TWO_WORKERS = """
import torch
import genie_dynamo as genie
from genie_dynamo import worker_facts
from tests.passes.test_partition import Towers

session = genie.init(workers=2, num_threads=1)
worker_facts.facts_of(session, wait=True)
step = torch.compile(Towers(1024).eval(), backend="genie")
with torch.no_grad():
    for _ in range(4):
        step(torch.randn(512, 1024), torch.randn(512, 1024))
"""


@pytest.mark.heavy
def test_a_plan_over_two_workers_says_what_was_estimated_measured_and_rejected(tmp_path: Path) -> None:
    script, page = tmp_path / "script.py", tmp_path / "plan.html"
    script.write_text(TWO_WORKERS)
    done = subprocess.run([sys.executable, "-m", "genie_dynamo.cli", "explain", "--json", "--html", str(page),
                           str(script)], capture_output=True, text=True, timeout=200,
                          env={**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])})
    assert done.returncode == 0, done.stderr
    (graph,) = json.loads(done.stdout)["graphs"]
    rows, rejected = graph["fragments"], [a for a in graph["alternatives"] if not a["chosen"]]
    assert {row["worker"] for row in rows} <= {"w0", "w1"}
    assert all(row["est_s"] > 0 for row in rows if row["num_nodes"] > 9)
    assert graph["measured_s"] > 0 and all(row["measured_s"] is not None for row in rows)
    # With real measurements either may win; what did not is there with its numbers.
    assert len(rejected) == len(graph["alternatives"]) - 1 and all(" ms against " in a["reason"] for a in rejected)
    assert {"w0", "w1"} <= {a["name"] for a in graph["alternatives"]}
    text = page.read_text()
    assert "<svg" in text and "Considered" in text and all(a["name"] in text for a in graph["alternatives"])


def test_a_script_that_is_not_there_or_compiles_nothing_says_so(tmp_path: Path) -> None:
    assert "is no file" in genie("explain", "nowhere.py").stderr
    page = genie("explain", "--html", str(tmp_path / "nowhere" / "page.html"), __file__)
    assert page.returncode == 1 and "its folder does not exist" in page.stderr and "Traceback" not in page.stderr
    idle = tmp_path / "idle.py"
    idle.write_text("print('nothing to do')\n")
    done = genie("explain", str(idle))
    assert done.returncode == 1
    assert 'backend="genie"' in done.stderr
