"""State that lies on a worker already, as placement sees it: to run elsewhere costs its move.

    cache on w0  ->  a node that takes no time and that w0 alone can run, read by the cache's readers

What moves stays where it went. In decode a cache moves once and is then read by every token, so that a token is charged
with a part of the move: prefill and decode are placed each where it is cheapest, and a short gain moves nothing.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import fx

from genie_dynamo.core.cost_graph import CostEdge, CostGraph, CostNode, Device
from genie_dynamo.passes.costs.sizes import hinted_bytes
from genie_dynamo.passes.semantics.carry import marked

TOKENS_PER_MOVE = 32
"""Tokens that are expected to follow a move: a supposition, of the order of a short answer."""


@dataclass(frozen=True, slots=True)
class Held:
    """Inputs that lie on workers: input -> worker, and the bytes that a call is charged with for moving it."""

    worker_of: Mapping[str, str]
    charged_bytes: Mapping[str, int]

    def moving_s(self, device: Device) -> float:
        """Seconds that a call is charged with where all of it runs on this device."""
        far = [size for name, size in self.charged_bytes.items() if self.worker_of[name] != device.id]
        rate = (device.network_gbps or 0.0) * 1e9 / 8
        return sum(far) / rate if rate else 0.0


def held_inputs(gm: fx.GraphModule, worker_of: Mapping[str, str], phase: str = "") -> Held:
    """The charges for the inputs that lie on workers.

    Args: worker_of: input -> worker.  phase: "decode" where a cache is read by calls to come.
    """
    semantics = marked(gm)
    cache = {name for region in (semantics.of_kind("kv_cache") if semantics is not None else ())
             if region.trusted for name in region.nodes}
    charged: dict[str, int] = {}
    for node in gm.graph.nodes:
        value = node.meta.get("val")
        if node.op == "placeholder" and node.name in worker_of and node.users and isinstance(value, torch.Tensor):
            stays = phase == "decode" and any(user.name in cache for user in node.users)
            charged[node.name] = hinted_bytes(value) // (TOKENS_PER_MOVE if stays else 1)
    return Held({name: worker_of[name] for name in charged}, charged)


def with_held(graph: CostGraph, gm: fx.GraphModule, held: Held, devices: Sequence[Device]) -> CostGraph:
    """The cost graph with a node for each input that lies on one of the devices. Latency is left to the transfer."""
    ids = {device.id for device in devices}
    nodes, edges = list(graph.nodes), list(graph.edges)
    for node in gm.graph.nodes:
        home = held.worker_of.get(node.name)
        readers = [user.name for user in node.users if user.name in graph.index]
        if home not in ids or not readers:
            continue
        nodes.append(CostNode(id=node.name, seconds={d.kind: 0.0 if d.id == home else None for d in devices}))
        edges += [CostEdge(src=node.name, dst=reader, size_bytes=held.charged_bytes[node.name]) for reader in readers]
    return replace(graph, nodes=tuple(nodes), edges=tuple(edges)) if len(nodes) > len(graph.nodes) else graph
