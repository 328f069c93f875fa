"""Tables for people, JSON for everything else."""
from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from bench.harness import ROOT, Case, Series, Settings, Target

FORMAT = 1
_PACKAGES = ("torch", "pyzmq", "msgpack", "numpy", "transformers")


def host_facts() -> dict[str, Any]:
    """What numbers depend on besides the code."""
    model = next((line.partition(":")[2].strip() for line in Path("/proc/cpuinfo").read_text().splitlines()
                  if line.startswith("model name")), platform.processor())
    versions: dict[str, str | None] = {}
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {
        "cpu_model": model, "cores": os.cpu_count(), "cores_usable": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "kernel": platform.release(), "machine": platform.machine(), "python": platform.python_version(),
        "versions": versions, "load_average": os.getloadavg(),
        "time_utc": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def commit() -> dict[str, Any]:
    """The commit that was measured, and whether files differ from it."""
    def git(*words: str) -> str:
        return subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True).stdout.strip()

    return {"commit": git("rev-parse", "HEAD") or None, "changed_files": len(git("status", "--porcelain").splitlines())}


# ---------------------------------------------------------------- JSON
def to_json(cases: list[Case], failures: Mapping[str, str], settings: Settings, host: Mapping[str, Any]) -> Any:
    """The whole run. Times in seconds, sizes in bytes."""
    return {
        "format": FORMAT, "host": dict(host), **commit(), "settings": asdict(settings),
        "load_average_at_end": os.getloadavg(), "failures": dict(failures),
        "cases": [_case_json(case) for case in cases],
    }


def _case_json(case: Case) -> dict[str, Any]:
    return {
        "bench": case.bench, "title": case.title, "threads": case.threads, "pinned_to_one_core": case.pinned,
        "sides": {label: _series_json(series) for label, series in case.series.items()},
        "ratios": [asdict(ratio) for ratio in case.ratios],
        "targets": [{**asdict(target), "reached": target.reached} for target in case.targets],
        "skipped": dict(case.skipped), "per_call": {k: dict(v) for k, v in case.per_call.items()},
        "notes": list(case.notes),
    }


def _series_json(series: Series) -> dict[str, Any]:
    return {"unit": series.unit, "num_samples": series.num_samples, "median": series.median,
            "p99": series.percentile(99), "round_medians": list(series.medians),
            "samples": [[float(f"{x:.5g}") for x in r] for r in series.rounds]}


# ---------------------------------------------------------------- tables
def table(case: Case) -> str:
    where = "both ends on one core" if case.pinned else f"{case.threads} thread{'s' if case.threads > 1 else ''}"
    lines = [f"\n{case.bench}: {case.title} [{where}]",
             f"  {'':34} {'median':>11} {'p99':>11}  samples"]
    for label, series in case.series.items():
        lines.append(f"  {label:34} {quantity(series.median, series.unit):>11} "
                     f"{quantity(series.percentile(99), series.unit):>11}  {series.num_samples}")
    lines += [f"  {label:34} {why}" for label, why in case.skipped.items()]
    for ratio in case.ratios:
        rounds = " ".join(f"{x:.2f}" for x in ratio.rounds)
        lines.append(f"  {ratio.name:34} {ratio.value:>10.2f}x  (rounds: {rounds})")
    lines += [f"  {note}" for note in case.notes]
    lines += [f"  {target_line(target)}" for target in case.targets]
    return "\n".join(lines)


def target_line(target: Target) -> str:
    mark = "reached" if target.reached else "MISSED "
    return (f"{mark}  {target.name}: {quantity(target.value, target.unit)}, "
            f"to reach: <= {quantity(target.limit, target.unit)}")


def summary(cases: list[Case]) -> str:
    """All targets in one list."""
    lines = ["\nTargets"]
    for case in cases:
        where = "one core" if case.pinned else f"{case.threads} thr"
        lines += [f"  [{where:8}] {target_line(target)}" for target in case.targets]
    return "\n".join(lines)


def quantity(value: float, unit: str) -> str:
    """12.3e-6, "s" -> "12.3 us"."""
    if unit == "x":
        return f"{value:.2f}x"
    if unit == "share":
        return f"{100 * value:.2f} %"
    if unit == "bytes":
        return f"{value / 1e6:.1f} MB" if abs(value) >= 1e5 else f"{value:.0f} B"
    for factor, name in ((1e-3, "s"), (1e-6, "ms")):
        if abs(value) >= 1000 * factor:
            return f"{value / (1000 * factor):.3g} {name}"
    return f"{value * 1e6:.1f} us"
