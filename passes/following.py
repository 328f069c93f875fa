"""A backward graph -> workers, by where its forward has left what it reads."""
from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from genie_dynamo.passes.costs.sizes import hinted_bytes
from genie_dynamo.passes.partition import Partition


@dataclass(slots=True)
class Homes:
    """Where the values of a forward graph are made: what its backward graph goes by.

    of_op     autograd's number of an op -> worker; empty: placement is unaware of what belongs together
    rows      value -> dim of its rows, where the batch is cut
    found     the placement that this speaks of; None: the forward runs whole
    forward   what runs under it now, by identity: activations say which of them has left them
    backward  the backward graph, as soon as it is compiled
    """

    workers: tuple[str, ...] = ()
    of_value: Mapping[str, int] = field(default_factory=dict)
    of_op: Mapping[int, int] = field(default_factory=dict)
    rows: Mapping[str, int] = field(default_factory=dict)
    found: Partition | None = None
    forward: object = None
    backward: fx.GraphModule | None = None

    def clear(self) -> None:
        """The forward runs whole from now on."""
        self.workers, self.of_value, self.of_op, self.rows, self.found, self.forward = (), {}, {}, {}, None, None

    def settle(self, found: Partition, gm: fx.GraphModule, *, aware: bool) -> None:
        """The forward goes by this placement from now on."""
        self.workers, self.found = found.workers, found
        kept = found.twice.kept if found.twice is not None else {}
        self.of_value = {**found.assign, **kept}
        self.of_op = {node.meta["seq_nr"]: found.assign[node.name] for node in gm.graph.nodes
                      if "seq_nr" in node.meta and node.name in found.assign} if aware else {}
        self.rows = {}


def follow(gm: fx.GraphModule, homes: Homes,
           copies: Mapping[str, Collection[int]] | None = None) -> dict[str, int]:
    """Each node where most bytes of what it reads are, else with the op of the forward that it differentiates.

    What reads nothing with a home goes to the first worker. A tuple's elements are taken where it is made. An
    activation that is read elsewhere counts twice: unless something is done about it, it goes through the client.

    Args:    copies: activation -> workers that have it too.
    """
    copies = copies or {}
    chosen: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node.op == "placeholder":
            if node.name in homes.of_value:
                chosen[node] = homes.of_value[node.name]
            continue
        if node.target is operator.getitem and node.all_input_nodes[0] in chosen:
            chosen[node] = chosen[node.all_input_nodes[0]]
            continue
        home = homes.of_op.get(node.meta.get("seq_nr", -1), 0)
        weight: dict[int, float] = {home: 0.0}
        for source in node.all_input_nodes:
            if source in chosen:
                moved = _bytes(source) * (2 if source.op == "placeholder" else 1)
                for worker in {chosen[source], *copies.get(source.name, ())}:
                    weight[worker] = weight.get(worker, 0.0) + moved
        chosen[node] = max(weight, key=lambda worker: (weight[worker], worker == home, -worker))
    return {node.name: worker for node, worker in chosen.items()}


def _bytes(node: fx.Node) -> float:
    value = node.meta.get("val")
    return float(hinted_bytes(value) + 1) if isinstance(value, torch.Tensor) else 1.0
