"""The bench's harness: what it writes is complete, and its sums are right."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.harness import BenchError, Measurement, Series, Settings, Side, Target, measure

ROOT = Path(__file__).resolve().parent.parent.parent


def _series(*rounds: tuple[float, ...]) -> Series:
    return Series(unit="s", rounds=rounds)


def test_quick_run_writes_both_sides(tmp_path: Path) -> None:
    """The whole way: processes, samples, table, JSON. The backend is genie itself, over a worker."""
    out = tmp_path / "results.json"
    done = subprocess.run(
        [sys.executable, "-m", "bench", "tiny_call", "--quick", "--threads", "1", "--out", str(out)],
        cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "genie ipc / pyzmq ipc" in done.stdout
    run = json.loads(out.read_text())
    assert not run["failures"] and run["host"]["cpu_model"] and run["host"]["versions"]["torch"]
    (case,) = run["cases"]
    sides = case["sides"]
    assert set(sides) == {"local eager", "local empty", "pyzmq ipc", "genie ipc", "genie ipc, busy polling"}
    for side in sides.values():
        assert side["num_samples"] == sum(map(len, side["samples"])) > 0
        assert 0 < side["median"] <= side["p99"]
    _check_ratios(case)
    assert case["per_call"]["genie ipc"]["calls"] == pytest.approx(1.0)      # nothing was answered without a call
    assert case["per_call"]["genie ipc"]["fallbacks"] == 0


def _check_ratios(case: dict[str, Any]) -> None:
    ratio = next(r for r in case["ratios"] if r["name"] == "genie ipc / pyzmq ipc")
    assert ratio["numerator"] == case["sides"]["genie ipc"]["median"]
    assert ratio["denominator"] == case["sides"]["pyzmq ipc"]["median"]
    (target,) = case["targets"]
    assert target["value"] == ratio["value"] and target["reached"] is (ratio["value"] <= target["limit"])
    assert set(target["terms"]) == {"genie ipc", "pyzmq ipc"}


def test_a_ratio_is_the_median_of_the_rounds_ratios() -> None:
    slow_round = (10.0, 10.0, 90.0)        # the machine was slow for both in round 2
    seen = Measurement({"a": _series((2.0,), (30.0,), (2.2,)), "b": _series((1.0,), slow_round, (1.0,))}, {}, {})
    ratio = seen.ratio("a", "b")
    assert ratio.rounds == (2.0, 3.0, 2.2)
    assert ratio.value == 2.2
    assert seen.difference("a", "b") == pytest.approx(1.2)
    assert seen.fastest("a", "b") == "b"


def test_percentile_is_the_nearest_rank() -> None:
    series = _series(tuple(float(x) for x in range(1, 51)), tuple(float(x) for x in range(51, 101)))
    assert series.percentile(99) == 99.0
    assert series.percentile(95) == 95.0
    assert _series((3.0,)).percentile(99) == 3.0


def test_a_target_says_whether_it_is_reached() -> None:
    limits = {limit: Target(name="t", value=1.5, limit=limit, unit="x", terms={}).reached for limit in (1.4, 1.5, 1.6)}
    assert limits == {1.4: False, 1.5: True, 1.6: True}


def test_a_side_that_cannot_be_built_names_itself() -> None:
    side = Side(module="bench.tiny_call", factory="local", name="local wrong", params={"how": "no_such_backend"})
    with pytest.raises(BenchError, match=r"local wrong: failed: .*no_such_backend"):
        measure(Settings(rounds=1), [side], blocks=1, samples=1)
