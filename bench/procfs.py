"""CPU time and memory of processes, read from /proc."""
from __future__ import annotations

import os
from pathlib import Path

_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def cpu_s(pid: int) -> float:
    """CPU seconds of a process, all its living threads.

    From schedstat (nanoseconds, exact for threads that sleep) where the kernel has it, otherwise from stat (ticks).
    """
    try:
        return sum(int(task.joinpath("schedstat").read_text().split()[0])
                   for task in Path(f"/proc/{pid}/task").iterdir()) * 1e-9
    except FileNotFoundError:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS_PER_S


def descendants(pid: int) -> list[int]:
    """The process's children, their children and so on."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):        # gone meanwhile
                continue
    found: list[int] = []
    frontier = {pid}
    while frontier:
        frontier = {child for child, parent in parents.items() if parent in frontier}
        found += sorted(frontier)
    return found


def tree_cpu_s(pid: int) -> float:
    """CPU seconds of a process and its living descendants."""
    total = 0.0
    for each in [pid, *descendants(pid)]:
        try:
            total += cpu_s(each)
        except (OSError, IndexError):
            continue
    return total


def memory_bytes(pid: int, kind: str) -> int:
    """Memory of a process. `kind`: "Rss" (what it maps) or "Pss" (shared pages divided by their users)."""
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith(kind + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"no {kind} in /proc/{pid}/smaps_rollup")
