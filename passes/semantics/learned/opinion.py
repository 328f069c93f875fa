"""What the network says of nodes that no rule claims.

Its answers are hints for people: they get a region with a warning, below the confidence that anything acts on, since
on architectures of a kind that it never saw about one of four is wrong (bench/README.md has the numbers).
"""
from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from pathlib import Path

import numpy as np

from genie_dynamo.core import user_cache
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.passes.semantics.learned.features import describe
from genie_dynamo.passes.semantics.learned.network import MAX_FILE_BYTES, Network, remember
from genie_dynamo.passes.semantics.patterns.search import FLOW
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

ASKED = frozenset({
    "matmul", "grouped_matmul", "attention", "softmax", "conv", "embedding", "embedding_bag", "lstm", "gru", "rnn",
    "layer_norm", "group_norm", "batch_norm", "rms_norm", "topk", "softplus"})
"""Ops that make a region what it is. Others follow from where they lie."""
SURE = 0.9
HINT_CONFIDENCE = 0.65
_MOST_NODES = 512
_NEAR = 24
USER_FILE = "classifier.npz"
log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Hint:
    """Nodes that look like one region of a kind, and how sure the network is of them on average."""

    kind: str
    nodes: tuple[ViewNode, ...]
    probability: float


def hints(view: GraphView, claimed: set[ViewNode], network: Network | None = None) -> tuple[Hint, ...]:
    """What nobody claimed and the network is sure of.

    Args:   network: the one to ask; None: the user's, else the shipped one, loaded when it is first needed.
    """
    asked = [n for op in sorted(ASKED) for n in view.by_op.get(op, ()) if n not in claimed and not n.static]
    asked = sorted(asked, key=lambda n: n.index)[:_MOST_NODES]
    if not asked:
        return ()
    network = network or current()
    table = network.probabilities(describe(view, asked))
    best = table.argmax(axis=1)
    sure = {node: (network.kinds[kind], float(row[kind])) for node, kind, row in zip(asked, best, table, strict=True)
            if network.kinds[kind] and row[kind] >= SURE}
    return tuple(_gathered(view, sure))


def _gathered(view: GraphView, sure: Mapping[ViewNode, tuple[str, float]]) -> list[Hint]:
    """Nodes of one kind that are near each other are one region."""
    group: dict[ViewNode, list[ViewNode]] = {}
    for node, (kind, _) in sure.items():
        near = next((n for n in view.backward(node, FLOW, _NEAR) if n in group and sure[n][0] == kind), None)
        group[node] = group[near] if near is not None else []
        group[node].append(node)
    return [Hint(sure[nodes[0]][0], tuple(nodes), float(np.mean([sure[n][1] for n in nodes])))
            for nodes in {id(nodes): nodes for nodes in group.values()}.values()]


@cache
def shipped() -> Network:
    """The network of this release."""
    return Network.from_bytes(Path(__file__).with_name("weights.npz").read_bytes())


def current() -> Network:
    """The user's network where labels were confirmed, else the shipped one. A broken file is said and not used."""
    content = user_cache.read(USER_FILE, MAX_FILE_BYTES)
    if content is None:
        return shipped()
    try:
        return _parsed(content)
    except ConfigError as exc:
        log.warning("%s in %s is not used: %s", USER_FILE, user_cache.cache_dir(), exc)
        return shipped()


@lru_cache(maxsize=2)
def _parsed(content: bytes) -> Network:
    return Network.from_bytes(content)


def confirm(view: GraphView, labels: Mapping[str, str]) -> Network:
    """Learn what nodes are, for the next graphs of this user: the network in the cache folder changes.

    Args:    labels: node name -> region kind, or "" for none.
    Returns: the network that was written.
    Raises:  ConfigError for a node that the graph lacks, a kind that the network does not know, or a cache folder that
             cannot be written.
    """
    before = current()
    nodes = [_known(view, name) for name in labels]
    kinds = [_number(before.kinds, kind) for kind in labels.values()]
    after = remember(before, describe(view, nodes), np.array(kinds, dtype=np.int64))
    if not user_cache.write(USER_FILE, after.to_bytes()):
        raise ConfigError(f"{USER_FILE} cannot be written in {user_cache.cache_dir()}; the log has the reason")
    return after


def _known(view: GraphView, name: str) -> ViewNode:
    node = view.by_name.get(name)
    if node is None:
        raise ConfigError(f"the graph has no node {name!r}; a region's `nodes` are names that it has")
    return node


def _number(kinds: Sequence[str], kind: str) -> int:
    if kind not in kinds:
        raise ConfigError(f"the classifier knows no {kind!r}; it knows {', '.join(filter(None, kinds))}, and '' for "
                          "none of them")
    return kinds.index(kind)
