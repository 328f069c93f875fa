"""Cost graphs and devices: what placement is decided from. Plain data, no torch.

A node is a piece of work with its seconds on each kind of device; an edge is a data dependency. A node has one output,
so all its out-edges carry the same tensor and say the same of it: its bytes, or the seconds that moving it takes.
"""
from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from genie_dynamo.core.errors import CostGraphError

_SHOWN = 12     # ids that a message lists before it breaks off


@dataclass(frozen=True, slots=True, kw_only=True)
class CostNode:
    """Work that runs as one, on one device.

    seconds           by device kind; None, or no entry, where the kind cannot run it
    memory_bytes      what it holds on its device: weights, state, buffers
    colocation_group  nodes of one group run on one device
    """

    id: str
    seconds: Mapping[str, float | None]
    memory_bytes: int = 0
    colocation_group: str | None = None
    backward: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CostEdge:
    """`dst` reads the output of `src`. Exactly one of `size_bytes` (JSON: "bytes") and `seconds` is given."""

    src: str
    dst: str
    size_bytes: int | None = None
    seconds: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """Something that runs nodes one at a time; the client itself may be one.

    kind               key into `CostNode.seconds`
    memory_bytes       None: no limit
    compute_tflops, memory_gb_per_s  facts for cost models; placement reads seconds
    network_gbps       gigabits per second, None: no limit
    network_latency_s  None: 0
    price_per_hour     any currency, the same for all devices; needed by the policy min_cost
    pays_transfers     False (a processor beside its own memory): `max_throughput` charges it for no transfer

    Raises: CostGraphError where a number is negative or not finite.
    """

    id: str
    kind: str
    memory_bytes: int | None = None
    compute_tflops: float | None = None
    memory_gb_per_s: float | None = None
    network_gbps: float | None = None
    network_latency_s: float | None = None
    price_per_hour: float | None = None
    pays_transfers: bool = True

    def __post_init__(self) -> None:
        where = f"device {self.id!r}"
        for name in ("memory_bytes", "network_latency_s", "price_per_hour"):
            _check_amount(getattr(self, name), f"{where}: {name}", none=True)
        for name in ("compute_tflops", "memory_gb_per_s", "network_gbps"):
            _check_amount(getattr(self, name), f"{where}: {name}", none=True)
            if getattr(self, name) == 0:
                raise CostGraphError(f"{where}: {name} is 0; leave it None where it is not known or not a limit")


@dataclass(frozen=True, slots=True)
class CostGraph:
    """Nodes and the tensors between them.

    Args:    nodes, edges: any iterables; kept as tuples. The same edge may be given more than once.
    Raises:  CostGraphError that names the node or edge: a repeated id, an edge to an unknown node, a cost that is
             negative or not finite, out-edges of one node that differ, a cycle.
    """

    nodes: tuple[CostNode, ...]
    edges: tuple[CostEdge, ...] = ()
    # Positions of nodes, an order in which they may run, and edges as pairs of positions: made once, when checked.
    index: Mapping[str, int] = field(init=False, repr=False, compare=False)
    order: tuple[int, ...] = field(init=False, repr=False, compare=False)
    pairs: tuple[tuple[int, int], ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        nodes, edges = tuple(self.nodes), tuple(self.edges)
        object.__setattr__(self, "nodes", nodes)
        object.__setattr__(self, "edges", edges)
        object.__setattr__(self, "index", _checked_nodes(nodes))
        object.__setattr__(self, "pairs", _checked_edges(edges, self.index))
        object.__setattr__(self, "order", _topological_order(nodes, self.pairs))

    def to_json(self) -> str:
        """`{"nodes": [...], "edges": [...]}`; `from_json` gives an equal graph."""
        nodes = [{"id": n.id, "seconds": dict(n.seconds), "memory_bytes": n.memory_bytes,
                  "colocation_group": n.colocation_group, "backward": n.backward} for n in self.nodes]
        edges = [{"src": e.src, "dst": e.dst} | ({"bytes": e.size_bytes} if e.seconds is None else
                                                 {"seconds": e.seconds}) for e in self.edges]
        return json.dumps({"nodes": nodes, "edges": edges})

    @classmethod
    def from_json(cls, data: str | bytes | Mapping[str, Any]) -> CostGraph:
        """The graph behind `to_json`, from text or from what a JSON parser made of it.

        Raises: CostGraphError where it is no such thing, or the graph contradicts itself.
        """
        try:
            parsed = json.loads(data) if isinstance(data, str | bytes) else data
            _check_fields(parsed, {"nodes", "edges"}, {"nodes"}, "a cost graph")
            nodes = [_node(n) for n in parsed["nodes"]]
            edges = [_edge(e) for e in parsed.get("edges", ())]
        except CostGraphError:
            raise
        except (TypeError, ValueError, AttributeError, OverflowError) as exc:
            raise CostGraphError(f"not a cost graph: {exc}") from exc
        return cls(nodes, edges)    # type: ignore[arg-type]  # __post_init__ makes tuples of them


def _node(data: Mapping[str, Any]) -> CostNode:
    _check_fields(data, {"id", "seconds", "memory_bytes", "colocation_group", "backward"}, {"id", "seconds"}, "node")
    memory_bytes = data.get("memory_bytes", 0)
    if isinstance(memory_bytes, float) and memory_bytes.is_integer():
        memory_bytes = int(memory_bytes)
    return CostNode(id=data["id"], seconds=dict(data["seconds"]), memory_bytes=memory_bytes,
                    colocation_group=data.get("colocation_group"), backward=data.get("backward", False))


def _edge(data: Mapping[str, Any]) -> CostEdge:
    _check_fields(data, {"src", "dst", "bytes", "seconds"}, {"src", "dst"}, "edge")
    return CostEdge(src=data["src"], dst=data["dst"], size_bytes=data.get("bytes"), seconds=data.get("seconds"))


def _check_fields(data: Any, known: set[str], needed: set[str], what: str) -> None:
    if not isinstance(data, Mapping):
        raise CostGraphError(f"{what} must be an object, got {type(data).__name__}")
    name = f"{what} {data['id']!r}" if "id" in data else what
    if missing := sorted(needed - set(data)):
        raise CostGraphError(f"{name}: {', '.join(missing)} missing in {str(dict(data))[:120]}")
    if unknown := sorted(set(data) - known):
        raise CostGraphError(f"{name}: unknown field(s) {', '.join(unknown)}; known are {', '.join(sorted(known))}")


def _check_amount(value: Any, what: str, *, none: bool = False) -> None:
    if value is None and none:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CostGraphError(f"{what} must be a number, got {value!r}")
    if not (math.isfinite(value) and value >= 0):
        raise CostGraphError(f"{what} must be finite and not negative, got {value!r}")


def _checked_nodes(nodes: Iterable[CostNode]) -> dict[str, int]:
    index: dict[str, int] = {}
    for node in nodes:
        if not isinstance(node.id, str):
            raise CostGraphError(f"node id {node.id!r} must be a string")
        if node.id in index:
            raise CostGraphError(f"node id {node.id!r} is given twice", node=node.id)
        index[node.id] = len(index)
        for kind, seconds in node.seconds.items():
            _check_amount(seconds, f"node {node.id!r}: seconds on {kind!r}", none=True)
        _check_amount(node.memory_bytes, f"node {node.id!r}: memory_bytes")
    return index


def _checked_edges(edges: Iterable[CostEdge], index: Mapping[str, int]) -> tuple[tuple[int, int], ...]:
    tensor: dict[str, CostEdge] = {}
    pairs = []
    for edge in edges:
        where = f"edge {edge.src!r} -> {edge.dst!r}"
        for end in (edge.src, edge.dst):
            if end not in index:
                raise CostGraphError(f"{where}: there is no node {end!r}", node=end)
        if (edge.size_bytes is None) == (edge.seconds is None):
            given = "neither" if edge.seconds is None else "both"
            raise CostGraphError(f"{where} needs bytes or seconds; {given} is given")
        _check_amount(edge.size_bytes, f"{where}: bytes", none=True)
        _check_amount(edge.seconds, f"{where}: seconds", none=True)
        first = tensor.setdefault(edge.src, edge)
        if (first.size_bytes, first.seconds) != (edge.size_bytes, edge.seconds):
            raise CostGraphError(
                f"node {edge.src!r} has one output, but its out-edges differ: {_tensor(first)} to {first.dst!r}, "
                f"{_tensor(edge)} to {edge.dst!r}; split the node or make them equal", node=edge.src)
        pairs.append((index[edge.src], index[edge.dst]))
    return tuple(pairs)


def _tensor(edge: CostEdge) -> str:
    return f"{edge.size_bytes} bytes" if edge.seconds is None else f"{edge.seconds} seconds"


def _topological_order(nodes: tuple[CostNode, ...], pairs: tuple[tuple[int, int], ...]) -> tuple[int, ...]:
    """Depth first where there is a choice, so that a chain of nodes stays together."""
    users: list[list[int]] = [[] for _ in nodes]
    missing = [0] * len(nodes)
    for src, dst in pairs:
        users[src].append(dst)
        missing[dst] += 1
    ready = [i for i in range(len(nodes) - 1, -1, -1) if not missing[i]]
    order = []
    while ready:
        node = ready.pop()
        order.append(node)
        for user in reversed(users[node]):
            missing[user] -= 1
            if not missing[user]:
                ready.append(user)
    if len(order) < len(nodes):
        cycle = [nodes[i].id for i in _find_cycle(users, missing)]
        shown = cycle if len(cycle) <= _SHOWN else [*cycle[:_SHOWN], f"... ({len(cycle) - 1} nodes)"]
        raise CostGraphError(f"the cost graph has a cycle: {' -> '.join(shown)}", cycle=tuple(cycle))
    return tuple(order)


def _find_cycle(users: list[list[int]], missing: list[int]) -> list[int]:
    """Walk backwards among nodes that wait for each other until one is met again."""
    maker = {user: node for node, targets in enumerate(users) if missing[node] for user in targets if missing[user]}
    node = next(i for i, count in enumerate(missing) if count)
    seen: dict[int, int] = {}
    path: list[int] = []
    while node not in seen:
        seen[node] = len(path)
        path.append(node)
        node = maker[node]
    cycle = path[seen[node]:][::-1]
    return [*cycle, cycle[0]]
