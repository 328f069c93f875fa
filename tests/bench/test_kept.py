"""What is published of a run, and what is refused."""
from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from bench import kept
from bench.harness import Case, Ratio, Series, Settings, Target
from bench.report import to_json

HOST = {"cpu_model": "Some CPU", "cores_usable": 2, "memory_bytes": 8 << 30, "kernel": "6.1", "python": "3.11",
        "versions": {"torch": "2.13.0"}, "load_average": [0.1, 0.1, 0.1]}


def run_of(value: float = 1.5, bench: str = "tiny_call", **changes: Any) -> dict[str, Any]:
    series = {"genie": Series(unit="s", rounds=((3e-4, 3.1e-4),) * 3), "floor": Series(unit="s", rounds=((2e-4,),) * 3)}
    case = Case(bench=bench, title="t", threads=1, pinned=False, series=series,
                ratios=(Ratio(name="genie / floor", value=value, rounds=(value,) * 3, numerator=3e-4,
                              denominator=2e-4, unit="s"),),
                targets=(Target(name="over the floor", value=value, limit=1.6, unit="x", terms={"genie": 3e-4}),))
    run = to_json([case], {}, Settings(quick=False, threads=(1,), cores="free", backend="genie",
                                       peers_python="/somewhere/python"), HOST)
    return {**json.loads(json.dumps(run)), "commit": "0123456789abcdef", "changed_files": 0, **changes}


def write(folder: Path, name: str, run: dict[str, Any]) -> Path:
    path = folder / name
    path.write_text(json.dumps(run))
    return path


def test_a_run_is_kept_without_samples_and_paths_and_shown_with_its_targets(tmp_path: Path) -> None:
    path = kept.keep([write(tmp_path, "run.json", run_of())], "some-machine", tmp_path / "results")
    text = path.read_text()
    assert "samples\"" not in text.replace("num_samples", "") and "/somewhere" not in text
    assert json.loads(text)["benches"]["tiny_call"]["cases"][0]["sides"]["genie"]["median"] == pytest.approx(3.05e-4)
    page = kept.page(tmp_path / "results")
    assert "| `tiny_call` | over the floor [1 thr.] | 1.50x | <= 1.60x |  | 0.1 | 01234567 |" in page
    assert "Some CPU, 2 cores, 8 GiB" in page


def test_a_missed_target_says_so(tmp_path: Path) -> None:
    path = kept.keep([write(tmp_path, "run.json", run_of(2.0))], "m", tmp_path / "results")
    assert "| 2.00x | <= 1.60x | **missed** |" in kept.table(path)


def test_many_targets_are_one_row_that_names_those_that_were_missed(tmp_path: Path) -> None:
    run = run_of(1.0)
    [target] = run["cases"][0]["targets"]
    run["cases"][0]["targets"] = [{**target, "name": f"kind {k}", "reached": k != 7} for k in range(12)]
    table = kept.table(kept.keep([write(tmp_path, "run.json", run)], "m", tmp_path / "results"))
    assert "| t [1 thr.] | 11 of 12 reached; not: kind 7 1.00x (<= 1.60x) | all | **missed** |" in table
    assert "kind 6" not in table


def test_a_later_run_replaces_its_bench_and_leaves_the_others(tmp_path: Path) -> None:
    runs = [write(tmp_path, "1.json", run_of(1.5)), write(tmp_path, "2.json", run_of(1.1, "resident_mlp"))]
    kept.keep(runs, "m", tmp_path / "results")
    path = kept.keep([write(tmp_path, "3.json", run_of(1.2))], "m", tmp_path / "results")
    assert "1.50x" not in kept.table(path) and "1.20x" in kept.table(path) and "1.10x" in kept.table(path)


@pytest.mark.parametrize(("changes", "why"), [
    ({"changed_files": 3}, "3 files differ"),
    ({"commit": None}, "differ from commit None"),
    ({"format": 0}, "format is 0"),
])
def test_what_no_commit_has_is_refused(tmp_path: Path, changes: dict[str, Any], why: str) -> None:
    with pytest.raises(kept.RefusedError, match=why):
        kept.keep([write(tmp_path, "run.json", run_of(**changes))], "m", tmp_path / "results")
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize(("setting", "why"), [({"quick": True}, "--quick"), ({"backend": "eager"}, "'eager' ran")])
def test_quick_runs_and_other_backends_are_refused(tmp_path: Path, setting: dict[str, Any], why: str) -> None:
    run = copy.deepcopy(run_of())
    run["settings"].update(setting)
    with pytest.raises(kept.RefusedError, match=why):
        kept.keep([write(tmp_path, "run.json", run)], "m", tmp_path / "results")


def test_the_published_page_is_what_the_kept_runs_say() -> None:
    assert (kept.FOLDER / "README.md").read_text() == kept.page()
