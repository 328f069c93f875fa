"""Phase and workload, from regions and modalities."""
from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from genie_dynamo.core.semantics import Dim, PhaseRule
from genie_dynamo.passes.semantics.engine import Found

_SEQUENCE = ("attention", "state_space", "recurrent")


def find_phase_rule(found: Sequence[Found]) -> PhaseRule | None:
    """How a call's phase follows from its sizes: from the caches that the graph fills; None where it fills none."""
    kept = [f.match.annotations for f in found
            if f.match.kind == "kv_cache" and f.match.annotations["operation"] in ("append", "write")
            and f.match.annotations["kept"]]
    if kept:
        caches = Counter((c["query_length"], c["past_length"], c["storage"] == "static") for c in kept)
        (query, past, static), _ = caches.most_common(1)[0]
        return PhaseRule(query_length=_dim(query), past_length=_dim(past), static_cache=static)
    states = [f.match.annotations for f in found if f.match.kind in ("state_space", "recurrent") and
              (f.match.annotations.get("kept") or f.match.annotations.get("past"))]
    if states:
        # A state has one size, like a static cache; one that this call makes anew holds no earlier tokens.
        return PhaseRule(query_length=_dim(states[0].get("query_length", 1)), static_cache=bool(states[0].get("past")))
    return None


def _dim(value: object) -> Dim:
    return value if isinstance(value, int | str) else 0


def find_workload(found: Sequence[Found], modalities: Sequence[str], variants: Sequence[str],
                  kinds: Sequence[str]) -> tuple[str, float, str]:
    """(workload, confidence, why)."""
    have = Counter(f.match.kind for f in found) + Counter(kinds)
    real = [m for m in modalities if m != "other"]
    sequences = [kind for kind in _SEQUENCE if have[kind]]
    if "text" in real and ("vision" in real):
        return "multimodal", 0.95, "text and images in one graph"
    if "audio" in real:
        return "audio", 0.9, "sound goes in"
    if "other" in modalities and real and have["attention"]:
        return "multimodal", 0.6, f"{real[0]}, and vectors of an unknown kind in one sequence"
    if "vision" in real:
        return "vision", 0.95, "images go in"
    if real == ["tabular"]:
        return _of_tables(found, have, variants)
    if "text" in real and sequences:
        sure = 0.95 if have["attention"] or have["state_space"] else 0.8
        return "llm", sure, f"tokens, and {' and '.join(sequences)} over them"
    if have["kv_cache"]:
        return "llm", 0.8, "a cache of keys and values is kept"
    return "unknown", 0.3, "no known kind of input reaches a known kind of region"


def _of_tables(found: Sequence[Found], have: Counter[str], variants: Sequence[str]) -> tuple[str, float, str]:
    """Rows of values and ids that no known region mixes along a sequence."""
    if not have["embedding"]:
        return "unknown", 0.5, "rows of values and dense layers alone"
    rows = {f.match.annotations.get("rows") for f in found if f.match.kind == "embedding"}
    scored = {f.match.core[0].shape[-1] for f in found if f.match.kind == "logits_head" and f.match.core[0].shape}
    if have["embedding"] == 1 and rows & scored:
        return "llm", 0.65, ("a table's rows go in and scores of its rows come out, but nothing known mixes positions: "
                             "a state that it keeps is not seen, and the phase may be another")
    if any(f.match.kind in ("norm", "mlp", "gated_mlp") and f.match.core[0].rank >= 3 for f in found):
        return "recsys", 0.6, ("lookups in tables, but their rows stay apart as positions of a sequence do, and "
                               "nothing known mixes them: it may be text")
    sure = 0.95 if "feature_interaction" in variants or have["embedding"] >= 2 else 0.65
    return "recsys", sure, f"{have['embedding']} lookups in tables against dense layers, and no sequence"
