"""The definitions of docs/placement.md once more, slow and plain: what placements are judged by in these tests."""
from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence

from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device
from genie_dynamo.core.placement import Placement


def transfer_s(edge: CostEdge, src: Device, dst: Device) -> float:
    if src.id == dst.id:
        return 0.0
    if edge.seconds is not None:
        return edge.seconds
    assert edge.size_bytes is not None
    gbps = min(math.inf if d.network_gbps is None else d.network_gbps for d in (src, dst))
    return edge.size_bytes / (gbps * 1e9 / 8) + max(d.network_latency_s or 0.0 for d in (src, dst))


def loads(graph: CostGraph, devices: Sequence[Device], device_of: Mapping[str, str]) -> dict[str, float]:
    by_id = {d.id: d for d in devices}
    load = dict.fromkeys(by_id, 0.0)
    for node in graph.nodes:
        seconds = node.seconds[by_id[device_of[node.id]].kind]
        assert seconds is not None
        load[device_of[node.id]] += seconds
        src = by_id[device_of[node.id]]
        out = [e for e in graph.edges if e.src == node.id and device_of[e.dst] != src.id]
        targets = {device_of[e.dst] for e in out}
        for target in targets:
            if by_id[target].pays_transfers:
                load[target] += transfer_s(out[0], src, by_id[target])
        if targets and src.pays_transfers:
            load[src.id] += max(transfer_s(out[0], src, by_id[t]) for t in targets)
    return load


def obeys_limits(graph: CostGraph, devices: Sequence[Device], device_of: Mapping[str, str]) -> bool:
    by_id = {d.id: d for d in devices}
    if set(device_of) != {n.id for n in graph.nodes}:
        return False
    if any(n.seconds.get(by_id[device_of[n.id]].kind) is None for n in graph.nodes):
        return False
    groups: dict[str, set[str]] = {}
    for n in graph.nodes:
        if n.colocation_group is not None:
            groups.setdefault(n.colocation_group, set()).add(device_of[n.id])
    if any(len(g) > 1 for g in groups.values()):
        return False
    return all(d.memory_bytes is None or d.memory_bytes >= sum(
        n.memory_bytes for n in graph.nodes if device_of[n.id] == d.id) for d in devices)


def placements(graph: CostGraph, devices: Sequence[Device]) -> Iterator[dict[str, str]]:
    """All that obey the limits."""
    for choice in itertools.product(devices, repeat=len(graph.nodes)):
        device_of = {n.id: d.id for n, d in zip(graph.nodes, choice, strict=True)}
        if obeys_limits(graph, devices, device_of):
            yield device_of


def best_load(graph: CostGraph, devices: Sequence[Device]) -> float | None:
    return min((max(loads(graph, devices, p).values()) for p in placements(graph, devices)), default=None)


def schedule_problems(graph: CostGraph, devices: Sequence[Device], placed: Placement) -> list[str]:
    """Every rule of one call on a clock that the schedule of a placement breaks."""
    by_id, nodes = {d.id: d for d in devices}, {n.id: n for n in graph.nodes}
    slack = 1e-9 * (1 + (placed.makespan_s or 0.0))
    end = {}
    for name, start in placed.start_s.items():
        seconds = nodes[name].seconds[by_id[placed.device[name]].kind]
        assert seconds is not None
        end[name] = start + seconds
    problems = []
    for d in devices:
        problems += _overlaps(d.id, [(placed.start_s[n], end[n]) for n in end if placed.device[n] == d.id], slack)
    links: dict[tuple[str, str], list[tuple[float, float]]] = {}
    arrival: dict[tuple[str, str], float] = {}
    for t in placed.transfers:
        links.setdefault((t.src, t.dst), []).append((t.start_s, t.end_s))
        if (t.node, t.dst) in arrival:
            problems.append(f"{t.node} goes to {t.dst} twice")
        arrival[t.node, t.dst] = t.end_s
        edge = next(e for e in graph.edges if e.src == t.node)
        if abs(t.end_s - t.start_s - transfer_s(edge, by_id[t.src], by_id[t.dst])) > slack:
            problems.append(f"{t.node} to {t.dst} takes another time")
        if placed.device[t.node] != t.src or t.start_s < end[t.node] - slack:
            problems.append(f"{t.node} is sent before it is there")
    for link, times in links.items():
        problems += _overlaps(str(link), times, slack)
    for e in graph.edges:
        same = placed.device[e.src] == placed.device[e.dst]
        there = end[e.src] if same else arrival.get((e.src, placed.device[e.dst]), math.inf)
        if placed.start_s[e.dst] < there - slack:
            problems.append(f"{e.dst} starts before {e.src} is there")
    if placed.makespan_s is None or abs(max(end.values(), default=0.0) - placed.makespan_s) > slack:
        problems.append(f"the makespan is {max(end.values(), default=0.0)}, not {placed.makespan_s}")
    return problems


def _overlaps(where: str, times: list[tuple[float, float]], slack: float) -> list[str]:
    busy = sorted(t for t in times if t[1] > t[0])
    return [f"{where} does two things at {b[0]}" for a, b in itertools.pairwise(busy) if b[0] < a[1] - slack]


def best_makespan(graph: CostGraph, devices: Sequence[Device]) -> float:
    """The shortest makespan of all placements and all orders of their nodes and transfers. For very small graphs."""
    return min(_best_order(graph, devices, p) for p in placements(graph, devices))


def _best_order(graph: CostGraph, devices: Sequence[Device], device_of: Mapping[str, str]) -> float:
    by_id = {d.id: d for d in devices}
    nodes = {n.id: n for n in graph.nodes}
    tasks: dict[tuple[str, str], tuple[str, float, list[tuple[str, str]]]] = {}     # (node, to) -> resource, s, before
    for n in graph.nodes:
        needs = [(e.src, device_of[n.id] if device_of[e.src] != device_of[n.id] else "")
                 for e in graph.edges if e.dst == n.id]
        seconds = n.seconds[by_id[device_of[n.id]].kind]
        assert seconds is not None
        tasks[n.id, ""] = (device_of[n.id], seconds, needs)
        for src, to in needs:
            if to:
                edge = next(e for e in graph.edges if e.src == src)
                time = transfer_s(edge, by_id[device_of[src]], by_id[to])
                tasks[src, to] = (f"{device_of[src]}>{to}", time, [(src, "")])
    assert set(nodes) == {name for name, to in tasks if not to}

    def walk(ends: dict[tuple[str, str], float], free: dict[str, float]) -> float:
        if len(ends) == len(tasks):
            return max(ends.values(), default=0.0)
        best = math.inf
        for task, (resource, seconds, needs) in tasks.items():
            if task in ends or any(n not in ends for n in needs):
                continue
            start = max([ends[n] for n in needs] + ([free.get(resource, 0.0)] if seconds else []), default=0.0)
            best = min(best, walk(ends | {task: start + seconds},
                                  free | ({resource: start + seconds} if seconds else {})))
        return best

    return walk({}, {})


def chain(*seconds: float, size_bytes: int = 0, edge_s: float | None = None) -> CostGraph:
    """n0 -> n1 -> ... on kind "gpu"."""
    nodes = tuple(CostNode(id=f"n{i}", seconds={"gpu": s}) for i, s in enumerate(seconds))
    edges = tuple(CostEdge(src=f"n{i}", dst=f"n{i + 1}", seconds=edge_s, size_bytes=None if edge_s is not None
                           else size_bytes) for i in range(len(seconds) - 1))
    return CostGraph(nodes, edges)
