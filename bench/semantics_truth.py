"""Ground truth of regions, from module structure: class names, module paths, names of functions, lines of source.

This is independent of the matchers, which read ops. `Origin` says of a node which modules and functions it was made
in; `truths_of` says which region a person would put it in, in four layers, since some regions lie across others.
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a node comes from. modules: (path, class name), outermost first. frames: (function, source line),
    innermost last. shape: of its value."""

    name: str
    modules: tuple[tuple[str, str], ...]
    frames: tuple[tuple[str, str], ...]
    shape: tuple[int, ...] = ()

    @property
    def line(self) -> str:
        return self.frames[-1][1] if self.frames else ""

    @property
    def functions(self) -> tuple[str, ...]:
        return tuple(function for function, _ in self.frames)


Key = tuple[str, str]       # (kind, instance)
Truth = Mapping[str, Key]   # by node name
_TOKENS = "(tokens)"        # noted among the children of a module that makes a sequence
_HALVED = "(halved)"        # of a module that makes a gate and what it gates, by one layer or by a part of its own
LAYERS: dict[str, frozenset[str]] = {
    "leaf": frozenset({
        "attention", "kv_cache", "mlp", "gated_mlp", "moe_router", "moe_experts", "embedding", "norm", "positional",
        "logits_head", "patch_embedding", "pooling", "state_space", "recurrent", "loss", "optimizer_update"}),
    "stage": frozenset({"conv_stage"}), "fusion": frozenset({"fusion"}), "encoder": frozenset({"modality_encoder"})}

_ROTATES = re.compile(r"apply_(multimodal_)?rotary|rotate_half|_apply_rotary_emb|apply_rotary")
_SINES = re.compile(r"sine_position|sinusoid|get_position_embeds")      # functions that make a table of positions
_ADDS_POSITIONS = re.compile(r"= .*\+ .*(pos_embed|position_embedding|embed_pos|positional|pos_encoding|time_embed)")
_TABLE_LINE = re.compile(r"sincos = |sinusoid_inp")
_MEAN = re.compile(r"mean\(.*dim=(?!\[?0)|\.mean\(|mean\(\[-2")
_NORM = re.compile(r"((?<!Pre)(?<!Stable)(LayerNorm|RMSNorm|BatchNorm|GroupNorm)\w{0,12}|GRN|L2Norm)$")
_RESCALES = re.compile(r"(new|target)_magnitude")              # to the root mean square of another value: a norm
_POOLS_VALUES = re.compile(r"^pool_tensor$")
_ATTENTION = re.compile(r"Attention(?!Pooling|DecoderLayer)|MultiheadAttention|SelfAttention|CrossAttention|SelfAttn")
_MLP = re.compile(r"(MLP|Mlp|FFN|FeedForward|DenseReluDense|DenseActDense|DenseGatedActDense|MixFFN|Projector|"
                  r"FeedForwardNetwork|MLPPredictionHead)$")
_ROUTER = re.compile(r"(Router|TopKGate|TopKGating|MoE\w*Gate)$")
_RECURRENT = re.compile(r"^(LSTM|GRU|RNN|LSTMCell|GRUCell|RNNCell)$")
_STATE_SPACE = re.compile(r"(Mamba\d?Mixer|MambaLayer|BambaMixer|H1Mixer|RgLru|RecurrentBlock|S4|S6|GatedDeltaNet|"
                          r"RwkvSelfAttention)")
_POSITIONS = re.compile(r"(Rotary|Position(?!wise)|Sinusoid|Sine|RelativeP)")
_TABLE_PATH = re.compile(r"pos|wpe|relative_attention_bias|rel_attn|distance_embedding")
_PATCHES = re.compile(r"(TubeletEmbed|PatchEmbed|PatchEmbeddings|Patches|OverlapPatchEmbeddings)")
_OF_TOKENS = re.compile(r"Embeddings$")
_HEADS = re.compile(r"(^|\.)(lm_head|classifier|score|proj_out|embed_out|output_projection|predictions\.decoder|"
                    r"pred_layer\.proj|vocab_projector|generator_lm_head|decoder)(\.decoder|\.\d+|\.out_proj)?$|"
                    r"(^|\.)classifier\.dense$|^(output|head|\w+_head|fc|lm_loss)$")
_HEAD_LINE = re.compile(r"LM(Prediction)?Head$")
_STAGE = re.compile(r"(^Conv|ResNet|RegNet|Bit|ConvNext|ConvNextV2|HGNetV2|TextNet)Stage$|ResNetEmbeddings$")
_ONE_OP = re.compile(r"^(Linear|Conv\dd|Dropout)$|(Activation|GELU|SiLU|ReLU|Tanh|Sigmoid|Softmax)$")
_POOLS = re.compile(r"(Pooler|Pool2d|Pool1d|Pooling)$")
_FF_FIRST = {"fc1", "lin1", "linear1", "pwconv1", "ffn"}
_FF_LEAF = re.compile(r"^(fc1|fc2|lin1|lin2|linear1|linear2|ff|ffn|ffn_output|activation|activation_fn|pwconv1|pwconv2|"
                      r"act)$")
_LOSS = re.compile(r"(^|_)loss($|_)|Loss$|cross_entropy$")
_LOSS_LINE = re.compile(r"\b\w*loss\w* = |\bloss_fct\(|cross_entropy\(")
_CROSS = re.compile(r"(^|[._])(encoder_attn|cross_?attn|crossattention|cross_attention|encdecattention)([._]|$)|"
                    r"Cross_?Attention", re.IGNORECASE)
_INTO_SEQUENCE = re.compile(r"masked_scatter\(|torch\.cat\((?!.*mask).*(image|visual|vision|pixel|audio)")
_WRITES_INTO = re.compile(r"\w\[.*(image|img|audio).*\] = ")
_LATE = re.compile(r"(matmul\(|mm\(|einsum\(|@).*(image|text|audio|video)_(embeds|features)|"
                   r"(image|text|audio)_(embeds|features).* @ ")
_FEATURES = re.compile(r"products = features @|pairs = ")
_TOWERS = frozenset({
    "vision_model", "vision_tower", "text_model", "audio_model", "image_encoder", "image_model", "visual"})


def truths_of(origins: Sequence[Origin], modalities: frozenset[str] | None) -> dict[str, Truth]:
    """Layer -> node -> (kind, instance). Layers that need to know the modalities are empty without them."""
    children: dict[str, set[str]] = defaultdict(set)
    for origin in origins:
        for path, kind in origin.modules:
            parent, _, leaf = path.rpartition(".")
            children[parent].add(leaf)
            if "Gated" in kind:
                children[parent].add(_HALVED)
                children[path].add(_HALVED)
        if len(origin.shape) == 3 and origin.modules:
            children[origin.modules[-1][0]].add(_TOKENS)
        if origin.modules and ".chunk(2, dim=-1)" in origin.line:
            children[origin.modules[-1][0]].add(_HALVED)
    known = {path: sorted(names) for path, names in children.items()}
    found: dict[str, Truth] = {
        "leaf": _keep((o.name, _leaf(o, known)) for o in origins),
        "stage": _keep((o.name, _stage(o)) for o in origins), "fusion": {}, "encoder": {}}
    if modalities is not None:
        several = len(modalities) > 1
        found["fusion"] = _keep((o.name, _fusion(o, several)) for o in origins)
        if several:
            # A tower that another modality is put into is what is encoded for, not an encoder.
            into = {path for o in origins if found["fusion"].get(o.name, ("", ""))[1].startswith("sequence:")
                    for path, _ in o.modules}
            found["encoder"] = _keep((o.name, None if key is None or key[1] in into else key)
                                     for o in origins for key in [_encoder(o, known)])
    return found


def optimizer_truth(origins: Iterable[Origin]) -> dict[str, Truth]:
    """Of one step of an optimizer: everything in it is the update."""
    return {"leaf": {o.name: ("optimizer_update", "step") for o in origins}, "stage": {}, "fusion": {}, "encoder": {}}


def _keep(pairs: Iterable[tuple[str, Key | None]]) -> Truth:
    return {name: key for name, key in pairs if key is not None}


def _stage(origin: Origin) -> Key | None:
    """Stages of networks whose classes say where one begins; a level of a neck or head is one by its size."""
    found: Key | None = None
    for path, name in origin.modules:
        if _STAGE.search(name):
            found = "conv_stage", path
        elif name in ("Neck", "DetectionHead") and origin.shape:
            found = "conv_stage", f"{path} {origin.shape[2:]}"
    return found


def _fusion(origin: Origin, several: bool) -> Key | None:
    """Where values of several modalities, or a table's features, meet."""
    if _FEATURES.search(origin.line):
        return "fusion", f"features:{origin.modules[-1][0] if origin.modules else ''}"
    if not several:
        return None
    if _WRITES_INTO.search(origin.line):
        return "fusion", f"sequence:{origin.modules[-1][0] if origin.modules else ''}"
    for path, name in reversed(origin.modules):
        if _TOWERS & set(path.split(".")):
            return None                    # queries and keys of one modality
        if _ATTENTION.search(name) and (_CROSS.search(name) or _CROSS.search(path)):
            return "fusion", f"cross:{_attention(origin)}"
    if _INTO_SEQUENCE.search(origin.line):
        return "fusion", f"sequence:{origin.modules[-1][0] if origin.modules else ''}"
    return ("fusion", "late") if _LATE.search(origin.line) else None


def _encoder(origin: Origin, children: Mapping[str, Sequence[str]]) -> Key | None:
    """The outermost module that is called the tower of a modality, or an encoder beside a decoder."""
    for path, _ in origin.modules:
        parent, _, leaf = path.rpartition(".")
        if leaf in _TOWERS or (leaf == "encoder" and "decoder" in children.get(parent, ())):
            return "modality_encoder", path
    return None


def _leaf(node: Origin, children: Mapping[str, Sequence[str]]) -> Key | None:
    """(kind, instance) of the innermost region that holds the node, or None."""
    path, kind = node.modules[-1] if node.modules else ("", "")
    leaf = path.rsplit(".", 1)[-1]
    loss = next((f"{function}: {line}" for function, line in node.frames
                 if _LOSS.search(function) or _LOSS_LINE.search(line)), None)
    if loss is not None:
        return "loss", loss
    outer = _attention(node)
    if any(map(_ROTATES.search, node.functions)):
        return "positional", f"{path}:rotation"
    if any(map(_SINES.search, node.functions)):
        return "positional", f"{path}:sines"
    if any("interpolate_pos" in function for function in node.functions):
        return "positional", f"{path}:positions"
    if outer and "update" in node.functions and "lazy_initialization" not in node.functions:
        return "kv_cache", outer
    own_table = not any("pos" in name and "drop" not in name for name in children.get(path, ()))
    if _ADDS_POSITIONS.search(node.line) and kind.endswith(("Embeddings", "Encoder", "Transformer")) and own_table:
        return "positional", f"{path}:positions"
    if _TABLE_LINE.search(node.line):
        return "positional", f"{path}:sines"
    if "relative_position_bias_table[" in node.line:
        return "positional", f"{path}:table"
    # The line of a mean may hold a layer or an activation too, whose nodes are not the mean's.
    if _RESCALES.search(node.line):
        return "norm", f"{path}:magnitude"
    if any(map(_POOLS_VALUES.search, node.functions)):
        return "pooling", f"{path}:pool"
    if _MEAN.search(node.line) and not _NORM.search(kind) and not _ONE_OP.search(kind):
        return "pooling", path
    if _NORM.search(kind):
        return "norm", path
    if kind in ("Embedding", "EmbeddingBag") or kind.endswith(("Embedding", "EmbeddingBag")):
        positional = _POSITIONS.search(kind) or _TABLE_PATH.search(path.lower())
        return ("positional" if positional else "embedding"), path
    if _POSITIONS.search(kind):
        return "positional", path
    for where, what in reversed(node.modules):
        found = _module_kind(where, what, leaf, path, children, node)
        if found is not None:
            return found
    return None


def _class_of(node: Origin, where: str) -> str:
    """Class of the module that holds the module at a path."""
    return next((what for path, what in node.modules if path == where.rpartition(".")[0]), "")


def _attention(node: Origin) -> str:
    """The outermost module of the innermost run of attention classes."""
    found = ""
    for where, what in reversed(node.modules):
        if _ATTENTION.search(what) and not _PATCHES.search(what):
            found = where
        elif found:
            break
    return found


def _module_kind(where: str, what: str, leaf: str, path: str, children: Mapping[str, Sequence[str]],
                 node: Origin) -> Key | None:
    if what.endswith("AttentionPoolingHead") and "k_proj" in children.get(where, ()):
        return "attention", where          # of learned queries
    if what.endswith("ConvNextLayer") and re.match(r"(pointwise_conv\d|activation_fn)$", leaf):
        return "mlp", where
    if _ROUTER.search(what):
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
        # Within a decoder such a net makes reference points of queries, which no caller gets.
        inner = "decoder" in where.split(".")
        if what.endswith("PredictionHead") and not inner and leaf == max(children.get(path.rsplit(".", 1)[0], ("",))):
            return "logits_head", path
        gated = names & {"gate_proj", "gate_up_proj", "wi_0", "Wi", "gate", "w3", _HALVED}
        return ("gated_mlp" if gated else "mlp"), where
    if what.endswith("PositionalConvEmbedding"):
        return "positional", where
    if _PATCHES.search(what) or (what.startswith("Conv") and (
            re.search(r"patch", leaf) or (leaf == "proj" and _OF_TOKENS.search(_class_of(node, where))))):
        if what.startswith("Swin2SR"):
            return None                    # its patches are single pixels: a projection
        # Patches that stay an image are a stem or a stage as much: either reading is right.
        inside = (*children.get(where, ()), *children.get(where.rpartition(".")[0], ()))
        return ("patch_embedding", where) if _TOKENS in inside else None
    if what.endswith(("Intermediate", "Output")) and not what.endswith(("SelfOutput", "AttentionOutput")):
        return "mlp", where.rsplit(".", 1)[0]
    if where == path and what == "Linear" and leaf == "pooler":
        return "pooling", where
    if what == "Sequential" and where.rpartition(".")[2] == "mlp":
        return "mlp", where
    if _POOLS.search(what):
        return "pooling", next(p for p, k in node.modules if _POOLS.search(k))
    if where == path and _HEAD_LINE.search(what) and "matmul(" in node.line:
        return "logits_head", path
    if where == path and what == "Linear" and _HEADS.search(path) and not re.search(r"layers?\.\d", path):
        return "logits_head", path
    inner_modules = any(not name.startswith("(") for name in children.get(path, ()))
    inside = where == path.rsplit(".", 1)[0] and not inner_modules
    if inside and _FF_LEAF.match(leaf) and _FF_FIRST & set(children.get(where, ())):
        return "mlp", where
    return None
