"""Ground truth of regions, from module structure: class names, module paths and names of functions.

This is independent of the matchers, which read ops: nothing here looks at an op but to leave out views. `TruthNode`
says of a node which modules and functions it was made in; `truth_of` says which region a person would put it in.
"""
from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TruthNode:
    """Where a node comes from. modules: (path, class name), outermost first. functions: innermost last."""

    name: str
    modules: tuple[tuple[str, str], ...]
    functions: tuple[str, ...]
    line: str = ""


Key = tuple[str, str]       # (kind, instance)

_ROTATES = re.compile(r"apply_(multimodal_)?rotary|rotate_half|_apply_rotary_emb|apply_rotary")
_ADDS_POSITIONS = re.compile(r"= .*\+ .*(pos_embed|position_embedding|embed_pos|positional|pos_encoding)")
_MEAN = re.compile(r"mean\(.*dim=|\.mean\(|mean\(\[-2")
_NORM = re.compile(r"(LayerNorm|RMSNorm|RMSNormGated|BatchNorm\dd|GroupNorm|FrozenBatchNorm2d|BatchNorm|LayerNorm2d)$")
_ATTENTION = re.compile(r"Attention(?!Pooling)|MultiheadAttention|SelfAttention|CrossAttention|SelfAttn")
_MLP = re.compile(r"(MLP|Mlp|FFN|FeedForward|DenseReluDense|DenseActDense|DenseGatedActDense|MixFFN|Projector)$")
_RECURRENT = re.compile(r"^(LSTM|GRU|RNN|LSTMCell|GRUCell|RNNCell)$")
_STATE_SPACE = re.compile(r"(MambaMixer|Mamba2Mixer|RgLru|RecurrentBlock|S4|S6)")
_POSITIONS = re.compile(r"(Rotary|Position|Sinusoid|Sine|RelativeP)")
_PATCHES = re.compile(r"(PatchEmbed|PatchEmbeddings|Patches|OverlapPatchEmbeddings)")
_HEADS = re.compile(r"(^|\.)(lm_head|classifier|score|proj_out|embed_out|output_projection|predictions\.decoder|"
                    r"vocab_projector|generator_lm_head|decoder)(\.decoder|\.\d+|\.out_proj)?$|(^|\.)classifier\.dense$")
_FF_FIRST = {"fc1", "lin1", "linear1", "pwconv1", "ffn"}
_FF_LEAF = re.compile(r"^(fc1|fc2|lin1|lin2|linear1|linear2|ff|ffn|ffn_output|activation|activation_fn|pwconv1|pwconv2|"
                      r"act)$")


def truth_of(node: TruthNode, children: Mapping[str, Sequence[str]]) -> Key | None:
    """(kind, instance) of the innermost region that holds the node, or None."""
    path, kind = node.modules[-1] if node.modules else ("", "")
    leaf = path.rsplit(".", 1)[-1]
    outer = _attention(node)
    if any(map(_ROTATES.search, node.functions)):
        return "positional", f"{path}:rotation"
    if outer and "update" in node.functions and "lazy_initialization" not in node.functions:
        return "kv_cache", outer
    own_table = not any("pos" in name for name in children.get(path, ()))
    if _ADDS_POSITIONS.search(node.line) and kind.endswith("Embeddings") and own_table:
        return "positional", f"{path}:positions"
    if "relative_position_bias_table[" in node.line:
        return "positional", f"{path}:table"
    if _MEAN.search(node.line) and not _NORM.search(kind):
        return "pooling", path
    if _NORM.search(kind):
        return "norm", path
    if kind in ("Embedding", "EmbeddingBag") or kind.endswith(("Embedding", "EmbeddingBag")):
        positional = _POSITIONS.search(kind) or re.search(r"pos|wpe|relative_attention_bias", path.lower())
        return ("positional" if positional else "embedding"), path
    if _POSITIONS.search(kind):
        return "positional", path
    for where, what in reversed(node.modules):
        found = _module_kind(where, what, leaf, path, children, node)
        if found is not None:
            return found
    return None


def _attention(node: TruthNode) -> str:
    """The outermost module of the innermost run of attention classes."""
    found = ""
    for where, what in reversed(node.modules):
        if _ATTENTION.search(what) and not _PATCHES.search(what):
            found = where
        elif found:
            break
    return found


def _module_kind(where: str, what: str, leaf: str, path: str, children: Mapping[str, Sequence[str]],
                 node: TruthNode) -> Key | None:
    if what.endswith(("TopKRouter", "Router", "TopKGate")):
        return "moe_router", where
    if what == "Neck":
        return "conv_stage", f"neck:{where}"
    if what == "DetectionHead":
        return "conv_stage", f"head:{where}"
    if re.search(r"(ConvStage|ResNetStage|ResNetEmbeddings)$", what):
        return "conv_stage", where
    if what.endswith("Experts"):
        return "moe_experts", where
    if _STATE_SPACE.search(what):
        outer = next((p for p, k in node.modules if k.endswith(("Mixer", "RecurrentBlock"))), where)
        return "state_space", outer
    if _RECURRENT.match(what):
        return "recurrent", where
    if _ATTENTION.search(what) and not _PATCHES.search(what):
        return "attention", _attention(node)
    if _MLP.search(what) and not (what.endswith("Projector") and "linear" in children.get(where, ())):
        names = set(children.get(where, ()))
        gated = names & {"gate_proj", "gate_up_proj", "wi_0", "Wi", "gate", "w3"}
        return ("gated_mlp" if gated else "mlp"), where
    if what.endswith("PositionalConvEmbedding"):
        return "positional", where
    if any(name == "ConvNextEmbeddings" for _, name in node.modules):
        return None                      # patches that stay an image: either reading is right
    if _PATCHES.search(what) or (what.startswith("Conv") and re.search(r"patch", leaf)):
        return "patch_embedding", where
    if what.endswith(("Intermediate", "Output")) and not what.endswith(("SelfOutput", "AttentionOutput")):
        return "mlp", where.rsplit(".", 1)[0]
    if what.endswith(("Pooler", "Pool2d", "Pool1d", "Pooling")):
        return "pooling", where
    if where == path and what == "Linear" and _HEADS.search(path) and not re.search(r"layers?\.\d", path):
        return "logits_head", path
    if _FF_LEAF.match(leaf) and where == path.rsplit(".", 1)[0] and _FF_FIRST & set(children.get(where, ())):
        return "mlp", where
    return None
