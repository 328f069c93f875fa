"""Which nodes of a graph stay together wherever they go: an atom for placement, as a colocation group.

    outputs that share memory        must be made on one worker, or they would not share it
    a KV cache and its attention     the cache is read whole for a few rows of query: whoever attends, holds it

A region that is not trusted binds nothing: its nodes are placed as ordinary ones.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import fx

from genie_dynamo.core.semantics import SemanticGraph

_COPYING_VIEWS = (torch.ops.aten._unsafe_view.default, torch.ops.aten.clone.default)


def together(gm: fx.GraphModule, data: Mapping[str, Any], semantics: SemanticGraph | None) -> dict[str, Any]:
    """A cost graph's data with the groups that outputs and regions ask for, joined with those that it has.

    Args:    data: of passes/costs/cost_graph.py.  semantics: of this graph; None: costs alone decide.
    """
    leader: dict[str, str] = {}

    def find(name: str) -> str:
        while leader.setdefault(name, name) != name:
            name = leader[name]
        return name

    names = {node["id"] for node in data["nodes"]}
    groups: dict[str, list[str]] = {}
    for node in data["nodes"]:
        if node["colocation_group"] is not None:
            groups.setdefault(node["colocation_group"], []).append(node["id"])
    for members in (*groups.values(), *_sharing_outputs(gm), *_caches(gm, semantics)):
        inside = [name for name in members if name in names]
        for name in inside[1:]:
            leader[find(name)] = find(inside[0])
    sizes: dict[str, int] = {}
    for name in list(leader):
        sizes[find(name)] = sizes.get(find(name), 0) + 1
    nodes = [{**node, "colocation_group": find(node["id"]) if sizes.get(find(node["id"]), 1) > 1 else None}
             for node in data["nodes"]]
    return {**data, "nodes": nodes}


def _sharing_outputs(gm: fx.GraphModule) -> Iterable[list[str]]:
    (raw,) = gm.graph.output_node().args
    shared: dict[int, list[str]] = {}
    for item in raw if isinstance(raw, list | tuple) else (raw,):
        if not isinstance(item, fx.Node):
            continue
        value = item.meta.get("val")
        if isinstance(value, torch.Tensor) and value.layout is torch.strided:
            shared.setdefault(int(value.untyped_storage()._cdata), []).append(item.name)
    return [members for members in shared.values() if len(members) > 1]


def _caches(gm: fx.GraphModule, semantics: SemanticGraph | None) -> Iterable[list[str]]:
    if semantics is None:
        return []
    by_name = {node.name: node for node in gm.graph.nodes}
    attentions = [set(region.nodes) for region in semantics.of_kind("attention") if region.trusted]
    found = []
    for region in semantics.of_kind("kv_cache"):
        if not region.trusted:
            continue
        inside = set(region.nodes)
        read = inside | _readers([by_name[name] for name in region.nodes if name in by_name])
        readers = next((nodes for nodes in attentions if nodes & read), set())
        found.append([name for name in by_name if name in inside | readers])
    return found


def _readers(nodes: list[fx.Node]) -> set[str]:
    """Who reads these values, also as views of them."""
    found: set[str] = set()
    while nodes:
        for user in nodes.pop().users:
            if user.name not in found:
                found.add(user.name)
                target = user.target
                if isinstance(target, torch._ops.OpOverload) and (target.is_view or target in _COPYING_VIEWS):
                    nodes.append(user)
    return found
