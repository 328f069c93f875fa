"""Limits on everything that arrives from a network, in one place."""
from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Upper bounds; a peer that exceeds one gets MessageLimitError and keeps its connection."""

    message_bytes: int = 16 << 30      # one ZeroMQ message part
    header_bytes: int = 64 << 20       # the msgpack part of a message
    frames: int = 4096                 # payload frames of one message
    inflated_bytes: int = 256 << 20    # what the compressed frames of one message hold
    string_bytes: int = 1 << 20
    list_items: int = 1 << 20
    nesting: int = 64
    graph_nodes: int = 1_000_000
    subgraph_depth: int = 16
    tensor_dims: int = 64
    waiting_runs_per_session: int = 1024
    sessions: int = 256


DEFAULT_LIMITS = Limits()

QUOTA_SHARE = 0.6
"""How much of the memory limit one session may keep; the rest is for what runs need meanwhile."""
