"""Which inputs are text, images, sound or tables, and how far each reaches.

An input is what its first consumers make of it: ids read an embedding, an image goes into a convolution over space,
sound into one over time. Names count only where structure says nothing.
"""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from genie_dynamo.passes.semantics.engine import Found
from genie_dynamo.passes.semantics.ops import ELEMENTWISE, VIEWS
from genie_dynamo.passes.semantics.view import GraphView, ViewNode

MODALITIES = ("text", "vision", "audio", "tabular", "other")
_BIT = {name: 1 << index for index, name in enumerate(MODALITIES)}
_FIRST = ELEMENTWISE | VIEWS | {"cat", "stack", "batch_norm", "layer_norm", "item", "as_strided", "unfold", "stft"}
_HASHES = frozenset({"mod", "remainder", "floor_divide", "floordiv", "bitwise_xor", "xor"})
_LOOKUPS = frozenset({"embedding", "embedding_bag"})
_MIXING = frozenset({"attention", "state_space", "recurrent"})
_HINTS = (("vision", ("pixel", "image", "vision", "visual", "frames")),
          ("audio", ("audio", "speech", "wave", "mel", "spect")),
          ("text", ("input_ids", "inputs_embeds", "token", "text")))


@dataclass(frozen=True, slots=True)
class Reading:
    """What an input carries, and why. doubt: what else it may be, or ""."""

    modality: str
    why: str
    doubt: str = ""


def classify_inputs(view: GraphView, found: Sequence[Found]) -> dict[ViewNode, Reading]:
    """What each input carries, for those that carry a modality."""
    mixed = 0
    for region in found:
        if region.match.kind in _MIXING:
            mixed |= region.match.core[-1 if region.match.kind == "recurrent" else 0].taint
    states = _states(view, found)
    return {node: guess for node in view.data_inputs if node not in states and
            (guess := _classify(view, node, mixed)) is not None}


def _states(view: GraphView, found: Sequence[Found]) -> set[ViewNode]:
    """Inputs that hold what earlier calls left: read first within a block that carries a state, beside its values."""
    states: set[ViewNode] = set(view.memo.get("states", ()))
    for region in found:
        if region.match.kind == "recurrent" and region.match.annotations["variant"] != "cell":
            states |= {view.through_views(p) for node in region.match.core for p in node.inputs[1:] if not p.weighted}
        elif region.match.kind == "state_space" and region.match.annotations.get("past"):
            inside = set(region.nodes)
            states |= {p for node in region.nodes for p in node.inputs
                       if p.kind == "input" and p.is_float and all(u in inside or u.op == "copy" for u in p.users)}
    return states


def _classify(view: GraphView, node: ViewNode, mixed: int) -> Reading | None:
    reached = list(view.forward(node, _FIRST | _HASHES if node.is_int else _FIRST, 160))
    if node.is_int:
        if any(n.op == "embedding_bag" for n in reached):
            return Reading("tabular", "ids of a sparse bag")
        reads = [n for n in reached if n.op == "embedding" and not _is_position(view, n)]
        if not reads:
            return None
        if mixed & node.taint and node.rank >= 2:
            return Reading("text", "ids of an embedding that a sequence is made of")
        return Reading("tabular", "ids of an embedding, and no sequence is mixed")
    if not node.is_float:
        return None
    return _classify_values(view, node, reached)


def _is_position(view: GraphView, node: ViewNode) -> bool:
    """A lookup that something already called positional, or a table of few rows (segments)."""
    table = next((n for n in node.inputs if n.is_float), None)
    return table is not None and table.hint is not None and table.hint[0] <= 4


def _classify_values(view: GraphView, node: ViewNode, reached: Sequence[ViewNode]) -> Reading | None:
    convolution = next((n for n in sorted(reached, key=lambda n: n.index) if n.op == "conv"), None)
    if convolution is not None:
        if convolution.rank < 4 or node.rank < 4:
            return Reading("audio", "values over time go into a convolution")
        if node.hint is None or node.hint[1] != 1:
            return Reading("vision", "values of an image go into a convolution over space")
        named = _named(node)
        return named or Reading("vision", "values in one channel go into a convolution over space",
                                "one channel may be a spectrogram as well as an image")
    if any(n.op == "attention" for n in reached) and node.rank == 4:
        return None            # a cache
    named = _named(node)
    if named is not None:
        return named
    linear = any(n.op == "matmul" for n in reached)
    if linear and node.rank <= 2:
        return Reading("tabular", "a row of values goes into a linear layer")
    if node.rank == 3 and linear and _convolved_over_time(view, node):
        return Reading("audio", "frames of values go through layers and convolutions over time",
                       "frames of sound are told from another series by nothing but these convolutions")
    if node.rank == 3 and (linear or any(n.op == "cat" for n in reached)):
        return Reading("other", "a sequence of vectors made elsewhere",
                       "vectors that were made elsewhere may hold anything")
    return None


def _convolved_over_time(view: GraphView, node: ViewNode) -> bool:
    """Whether what this input alone makes is convolved along its positions further down, over several at once."""
    for conv in view.by_op.get("conv", ()):
        kernel = conv.inputs[1].hint if len(conv.inputs) > 1 else None
        if conv.rank == 3 and conv.taint == node.taint and kernel is not None and kernel[-1] > 1:
            return True
    return False


def _named(node: ViewNode) -> Reading | None:
    source = node.source.lower()
    return next((Reading(modality, f"named {node.source}") for modality, words in _HINTS
                 if any(word in source for word in words)), None)


def flow(view: GraphView, inputs: Mapping[ViewNode, Reading], found: Iterable[Found]) -> list[int]:
    """For each node, the bits of the modalities whose values it holds.

    What only steers (masks, indices) does not count, and cross-attention passes on the modality of its queries.
    """
    steered: dict[int, frozenset[ViewNode]] = {}
    for region in found:
        match = region.match
        if match.kind == "attention" and match.annotations.get("variant") == "cross":
            _steer(region, steered)
    masks = [0] * len(view.nodes)
    position = {node: index for index, node in enumerate(view.nodes)}
    for index, node in enumerate(view.nodes):
        if node in inputs:
            masks[index] = _BIT[inputs[node].modality]
            continue
        skipped = steered.get(node.index, frozenset())
        for producer in node.inputs:
            if producer in skipped or (node.is_float and not producer.is_float and producer.shape is not None
                                       and node.op not in _LOOKUPS and producer.op != "item"):
                continue
            masks[index] |= masks[position[producer]]
    return masks


def _steer(region: Found, steered: dict[int, frozenset[ViewNode]]) -> None:
    core = set(region.match.core)
    fused = region.match.core[0].op != "matmul"
    query = region.match.core[0].inputs[0] if fused else None
    first = query if query is not None else next(
        (p for node in region.match.core for p in node.inputs if p not in core), None)
    if first is None or first.static:
        return                     # learned queries have no modality of their own: the keys' is passed on
    for node in core:
        outside = [p for p in node.inputs if p not in core]
        if query is not None:
            steered[node.index] = frozenset(p for p in outside if p is not query)
        elif node.op == "matmul" and len(outside) == 2:
            steered[node.index] = frozenset(outside[1:])
        else:
            steered[node.index] = frozenset(outside)


def names_of(mask: int) -> tuple[str, ...]:
    return tuple(name for name in MODALITIES if mask & _BIT[name])


def label(mask: int) -> str:
    """One word for a region: a modality, "multimodal", or ""."""
    names = names_of(mask)
    return "" if not names else names[0] if len(names) == 1 else "multimodal"
