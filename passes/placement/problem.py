"""A cost graph and devices as arrays: atoms (what must stay together), tensors, and times of transfers.

Atoms are numbered in a topological order of their first nodes, so that neighbours in number are neighbours in time.
"""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from genie_dynamo.core.cost_graph import CostGraph, Device
from genie_dynamo.core.errors import CostGraphError, PlacementError

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_GIB = 2**30


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Problem:
    """N nodes in A atoms, D devices, T tensors that leave their atom.

    Moving tensor t from device p to q takes fixed_s[t] + size_bytes[t] * s_per_byte[p, q] + sized[t] * latency_s[p, q].
    """

    graph: CostGraph
    devices: tuple[Device, ...]
    node_seconds_ND: Floats        # inf where the device cannot run the node
    atom_of_N: Ints
    seconds_AD: Floats
    memory_A: Floats
    capacity_D: Floats             # inf: no limit
    pays_D: npt.NDArray[np.bool_]
    s_per_byte_DD: Floats
    latency_DD: Floats
    tensor_node_T: Ints            # the node that makes the tensor
    source_T: Ints                 # its atom
    fixed_s_T: Floats
    size_bytes_T: Floats
    sized_T: Floats                # 1 where the tensor is given in bytes
    pin_tensor_P: Ints             # (tensor, atom that reads it), each pair once, without the source; by tensor
    pin_atom_P: Ints
    classes: tuple[tuple[int, ...], ...]    # devices that cannot be told apart

    @property
    def num_atoms(self) -> int:
        return len(self.memory_A)

    @property
    def num_devices(self) -> int:
        return len(self.devices)

    @property
    def num_tensors(self) -> int:
        return len(self.source_T)

    @property
    def graph_size(self) -> int:
        """Nodes and edges."""
        return len(self.graph.nodes) + len(self.graph.pairs)

    @property
    def uniform(self) -> bool:
        """Whether a transfer takes the same time between every pair of devices."""
        if not self.sized_T.any() or self.num_devices < 2:
            return True
        apart = ~np.eye(self.num_devices, dtype=bool)
        return bool(np.ptp(self.s_per_byte_DD[apart]) == 0 and np.ptp(self.latency_DD[apart]) == 0)

    def transfer_s(self, tensors: Ints, src: Ints, dst: Ints) -> Floats:
        """Seconds of each transfer; 0 within a device."""
        times = (self.fixed_s_T[tensors] + self.size_bytes_T[tensors] * self.s_per_byte_DD[src, dst]
                 + self.sized_T[tensors] * self.latency_DD[src, dst])
        return np.where(src == dst, 0.0, times)

    def transfer_times_TDD(self) -> Floats:
        """Seconds of every transfer there could be. Large: for models that have a variable for each anyway."""
        times = (self.fixed_s_T[:, None, None] + self.size_bytes_T[:, None, None] * self.s_per_byte_DD
                 + self.sized_T[:, None, None] * self.latency_DD)
        times[:, np.arange(self.num_devices), np.arange(self.num_devices)] = 0.0
        return times

    def least_transfer_s_T(self) -> Floats:
        """No transfer of the tensor between two devices takes less."""
        if self.num_devices < 2:
            return np.zeros(self.num_tensors)
        apart = ~np.eye(self.num_devices, dtype=bool)
        return np.asarray(self.fixed_s_T + self.size_bytes_T * self.s_per_byte_DD[apart].min()
                          + self.sized_T * self.latency_DD[apart].min())

    def transfer_function(self) -> Callable[[int, int, int], float]:
        """Seconds of one transfer (tensor, from, to) between devices, for loops that ask for few of all T x D x D."""
        fixed: list[float] = self.fixed_s_T.tolist()
        size: list[float] = self.size_bytes_T.tolist()
        sized: list[float] = self.sized_T.tolist()
        pace: list[list[float]] = self.s_per_byte_DD.tolist()
        latency: list[list[float]] = self.latency_DD.tolist()

        def seconds(tensor: int, src: int, dst: int) -> float:
            return fixed[tensor] + size[tensor] * pace[src][dst] + sized[tensor] * latency[src][dst]

        return seconds

    def contract(self, label_A: Ints) -> Problem:
        """The same with atoms of one label as one atom. Labels are 0, 1, ... in the order of their first atoms."""
        return _assemble(self.graph, self.devices, self.node_seconds_ND, label_A[self.atom_of_N])

    def only(self, devices: Sequence[int]) -> Problem:
        """The same on some of the devices."""
        chosen = np.asarray(devices)
        return _assemble(self.graph, tuple(self.devices[d] for d in devices), self.node_seconds_ND[:, chosen],
                         self.atom_of_N)

    def supported(self) -> bool:
        """Whether every atom has a device that can run and hold it."""
        fits = np.isfinite(self.seconds_AD) & (self.memory_A[:, None] <= self.capacity_D)
        return bool(fits.any(axis=1).all())


def build_problem(graph: CostGraph, devices: Sequence[Device]) -> Problem:
    """The problem behind a graph and devices.

    Raises: CostGraphError where device ids repeat or there is no device; PlacementError, with the numbers, where
            a node has no device that can run it or memory cannot do.
    """
    devices = tuple(devices)
    if not devices:
        raise CostGraphError("placement needs at least one device")
    ids = [d.id for d in devices]
    if len(set(ids)) < len(ids):
        raise CostGraphError(f"device id {next(i for i in ids if ids.count(i) > 1)!r} is given twice")
    kinds = {kind: np.array([n.seconds.get(kind) for n in graph.nodes], dtype=np.float64)
             for kind in dict.fromkeys(d.kind for d in devices)}
    node_seconds = np.stack([kinds[d.kind] for d in devices], axis=1)
    node_seconds[np.isnan(node_seconds)] = np.inf
    problem = _assemble(graph, devices, node_seconds, _colocate(graph))
    _check_support(problem)
    _check_memory(problem)
    return problem


def _colocate(graph: CostGraph) -> Ints:
    """Node -> atom; atoms in the order of the graph's topological order."""
    atoms: dict[str | int, int] = {}
    atom_of = np.empty(len(graph.nodes), dtype=np.int64)
    for i in graph.order:
        group = graph.nodes[i].colocation_group
        atom_of[i] = atoms.setdefault(i if group is None else group, len(atoms))
    return atom_of


def _assemble(graph: CostGraph, devices: tuple[Device, ...], node_seconds: Floats, atom_of: Ints) -> Problem:
    num_atoms = int(atom_of.max()) + 1 if len(atom_of) else 0
    seconds: Floats = np.stack([_sum_by(atom_of, node_seconds[:, d], num_atoms) for d in range(len(devices))], axis=1)
    node_memory = np.array([n.memory_bytes for n in graph.nodes], dtype=np.float64)
    pairs = np.array(graph.pairs, dtype=np.int64).reshape(-1, 2)
    fixed, size = np.full(len(graph.nodes), np.nan), np.full(len(graph.nodes), np.nan)
    fixed[pairs[:, 0]] = np.array([e.seconds for e in graph.edges], dtype=np.float64)
    size[pairs[:, 0]] = np.array([e.size_bytes for e in graph.edges], dtype=np.float64)
    keys = pairs[:, 0] * max(1, num_atoms) + atom_of[pairs[:, 1]]
    keys = np.unique(keys[atom_of[pairs[:, 0]] != atom_of[pairs[:, 1]]])
    tensor_node, pin_tensor = np.unique(keys // max(1, num_atoms), return_inverse=True)
    bandwidth = np.array([np.inf if d.network_gbps is None else d.network_gbps * 1e9 / 8 for d in devices])
    latency = np.array([d.network_latency_s or 0.0 for d in devices])
    return Problem(
        graph=graph, devices=devices, node_seconds_ND=node_seconds, atom_of_N=atom_of, seconds_AD=seconds,
        memory_A=_sum_by(atom_of, node_memory, num_atoms),
        capacity_D=np.array([np.inf if d.memory_bytes is None else d.memory_bytes for d in devices]),
        pays_D=np.array([d.pays_transfers for d in devices]),
        s_per_byte_DD=1.0 / np.minimum.outer(bandwidth, bandwidth), latency_DD=np.maximum.outer(latency, latency),
        tensor_node_T=tensor_node, source_T=atom_of[tensor_node], fixed_s_T=np.nan_to_num(fixed[tensor_node]),
        size_bytes_T=np.nan_to_num(size[tensor_node]), sized_T=np.isfinite(size[tensor_node]).astype(np.float64),
        pin_tensor_P=pin_tensor, pin_atom_P=keys % max(1, num_atoms), classes=_classes(devices))


def _sum_by(index: Ints, amount: Floats, size: int) -> Floats:
    return np.bincount(index, amount, size).astype(np.float64)


def _classes(devices: tuple[Device, ...]) -> tuple[tuple[int, ...], ...]:
    alike: dict[tuple[object, ...], list[int]] = {}
    for i, d in enumerate(devices):
        key = (d.kind, d.memory_bytes, d.network_gbps, d.network_latency_s or 0.0, d.price_per_hour, d.pays_transfers)
        alike.setdefault(key, []).append(i)
    return tuple(map(tuple, alike.values()))


def _name(problem: Problem, atom: int) -> str:
    nodes = [problem.graph.nodes[i] for i in np.flatnonzero(problem.atom_of_N == atom)]
    if len(nodes) == 1:
        return f"node {nodes[0].id!r}"
    return f"colocation group {nodes[0].colocation_group!r} ({len(nodes)} nodes, the first is {nodes[0].id!r})"


def _check_support(problem: Problem) -> None:
    runs = np.isfinite(problem.seconds_AD)
    for atom in np.flatnonzero(~runs.any(axis=1)):
        kinds = ", ".join(dict.fromkeys(d.kind for d in problem.devices))
        raise PlacementError(f"{_name(problem, int(atom))} runs on none of the devices (kinds: {kinds}); give its "
                             "seconds for one of these kinds, or a device of a kind that all of its nodes support")


def _check_memory(problem: Problem) -> None:
    usable = np.where(np.isfinite(problem.seconds_AD), problem.capacity_D, -1.0)
    too_large = np.flatnonzero(problem.memory_A > usable.max(axis=1, initial=-1.0))
    for atom in too_large:
        raise PlacementError(
            f"{_name(problem, int(atom))} needs {_gib(problem.memory_A[atom])}; the largest device that runs it has "
            f"{_gib(usable[atom].max())}; split it or add a larger device")
    needed, there = problem.memory_A.sum(), problem.capacity_D.sum()
    if needed > there:
        raise PlacementError(f"the graph needs {_gib(needed)}, all {problem.num_devices} devices together have "
                             f"{_gib(there)}; add devices or memory")


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / _GIB:.2f} GiB ({size_bytes:.0f} bytes)"
