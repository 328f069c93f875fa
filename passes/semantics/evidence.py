"""Names as evidence: a class that is called what the structure says makes it surer, one that is called otherwise less.

Names prove nothing: they move the confidence by a little and never make a region.
"""
from __future__ import annotations

import re
from collections.abc import Sequence

from genie_dynamo.passes.semantics.view import ViewNode

_AGREES = 0.02
_DISAGREES = 0.08
_SAYS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("attention", re.compile(r"Attention|SelfAttn|MHA")),
    ("gated_mlp", re.compile(r"MLP|FeedForward|FFN|GLU|Experts")),
    ("mlp", re.compile(r"MLP|Mlp|FeedForward|FFN|Intermediate")),
    ("norm", re.compile(r"Norm")),
    ("embedding", re.compile(r"Embedding")),
    ("positional", re.compile(r"Rotary|Position|Sinusoid|RelativeP")),
    ("moe_router", re.compile(r"Router|Gate")),
    ("moe_experts", re.compile(r"Experts")),
    ("state_space", re.compile(r"Mamba|SSM|RgLru|RecurrentBlock")),
    ("recurrent", re.compile(r"LSTM|GRU|RNN")),
    ("patch_embedding", re.compile(r"Patch")),
)
_BY_KIND: dict[str, re.Pattern[str]] = dict(_SAYS)


def weigh_names(kind: str, confidence: float, reason: str, nodes: Sequence[ViewNode]) -> tuple[float, str]:
    """(confidence, reason) after looking at the classes that the nodes were made in."""
    classes = {node.class_name for node in nodes if node.class_name}
    own = _BY_KIND.get(kind)
    if not classes or own is None:
        return confidence, reason
    agreeing = sorted(name for name in classes if own.search(name))
    if agreeing:
        return min(0.99, confidence + _AGREES), f"{reason}; in a {agreeing[0]}"
    named = {other for name in classes for other, says in _SAYS if says.search(name)}
    if named and kind not in ("positional", "kv_cache", "norm"):
        return confidence - _DISAGREES, f"{reason}; but made in a {sorted(classes)[0]}"
    return confidence, reason
