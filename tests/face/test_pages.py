"""The pages that genie writes, in a real browser without a window: they render, alone, without an error."""
from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch import nn

import genie_dynamo as genie
from genie_dynamo.core.placement import Policy
from genie_dynamo.explanation import Explanation, FragmentRow, GraphPlan, Span
from genie_dynamo.passes.partition import Alternative

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
TIMEOUT_S = 60
POLICY: Policy = "min_latency"

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium here (Debian: apt-get install chromium)")


def plan() -> Explanation:
    """Two stages of two parts, and one thing that was considered."""
    rows = tuple(FragmentRow(
        fragment=n, worker=f"w{n}", regions=(f"attention.{n}", f"mlp.{n}"), num_nodes=12, est_s=4e-3, measured_s=5e-3,
        bytes_in=4096, bytes_out=8192, memory_bytes=1 << 20, why="0.5 MB come from w0 <&>") for n in range(2))
    spans = tuple(Span(lane=f"w{n}", label=f"part {p}", start_s=(n + p) * 2e-3, end_s=(n + p + 1) * 2e-3)
                  for n in range(2) for p in range(2))
    graph = GraphPlan(
        label="inference graph 0", kind="inference", workload="llm", phase="prefill", est_s=6e-3, measured_s=7e-3,
        fragments=rows, timeline=spans, unpriced="",
        alternatives=(Alternative(name="w0", est_s=8e-3, chosen=False, reason="8 ms against 6 ms"),
                      Alternative(name="2 parts", est_s=6e-3, chosen=True, reason="")))
    return Explanation(graphs=(graph,), workers=("w0", "w1"), policy=POLICY, fallbacks=())


def opened(page: Path, tmp_path: Path) -> tuple[str, Path]:
    """The document after the browser has made it, and a picture of it."""
    picture = tmp_path / "page.png"
    common = [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
              f"--user-data-dir={tmp_path / 'profile'}", "--enable-logging=stderr", "--window-size=1200,900"]
    shot = subprocess.run([*common, f"--screenshot={picture}", page.as_uri()], capture_output=True, text=True,
                          timeout=TIMEOUT_S, check=True)
    made = subprocess.run([*common, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=TIMEOUT_S,
                          check=True)
    errors = [line for line in (shot.stderr + made.stderr).splitlines() if "CONSOLE" in line]
    assert not errors, errors
    return made.stdout, picture


def check_picture(picture: Path) -> None:
    """A PNG with something on it."""
    content = picture.read_bytes()
    assert content.startswith(b"\x89PNG") and len(content) > 5000


def test_the_page_of_a_plan(tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    plan().to_html(page)
    document, picture = opened(page, tmp_path)
    check_picture(picture)
    text = re.sub(r"<[^>]+>", " ", document)
    assert "attention.1" in text and "8 ms against 6 ms" in text and "come from w0 &lt;&amp;&gt;" in text
    assert document.count("<rect") >= 4, "the timeline has a bar for each part on each worker"


def test_the_page_of_an_analysis(tmp_path: Path, fresh_dynamo: None) -> None:
    page = tmp_path / "graph.html"
    model = nn.Sequential(nn.Linear(8, 32), nn.GELU(), nn.Linear(32, 8)).eval()
    genie.analyze(model, torch.randn(2, 8)).to_html(page)
    document, picture = opened(page, tmp_path)
    check_picture(picture)
    assert "mlp" in document
