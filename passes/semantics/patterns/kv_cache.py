"""KV cache: keys and values that a call reads, appends to or writes into, beside the attention that uses them.

    append   cat([cache, k], -2), also of an empty cache        dynamic
    write    cache.index_copy(-2, positions, k), index_put,     static
             slice_scatter, and the same in place
    read     k is an input as it is: kept from earlier

What is kept may also be what keys and values are made of by one more linear layer (latent attention): then the cache
is upstream of that layer.
"""
from __future__ import annotations

from dataclasses import dataclass

from genie_dynamo.core.semantics import Scalar
from genie_dynamo.passes.semantics.ops import VIEWS
from genie_dynamo.passes.semantics.pattern import Match, NoMatch, Outcome, Pattern
from genie_dynamo.passes.semantics.patterns.attention import Core, find_core
from genie_dynamo.passes.semantics.view import Dim, GraphView, ViewNode, is_linear

_BUILDS = VIEWS | {"cat", "copy", "index_write", "add", "mul", "sub", "neg"}
_FRESH = frozenset({"zeros", "empty", "new_zeros", "new_empty", "zeros_like", "full", "tensor", "scalar_tensor"})


@dataclass(frozen=True, slots=True)
class _Use:
    operation: str                  # "read" | "append" | "write"
    nodes: tuple[ViewNode, ...]
    old: ViewNode
    past_length: Dim


def match_kv_cache(view: GraphView, node: ViewNode) -> Outcome:
    core = find_core(view, node)
    if isinstance(core, NoMatch):
        return NoMatch(f"not attention: {core.reason}")
    key, value = _use(view, core.key), _use(view, core.value)
    latent: Scalar = False
    if isinstance(key, NoMatch) or isinstance(value, NoMatch) or key.operation != value.operation:
        kept = _latent(view, core)
        if kept is None:
            return _why_not(key, value)
        key = value = kept
        latent = True
    nodes = tuple(dict.fromkeys((*key.nodes, *value.nodes)))
    query_length = core.query.shape[-2] if core.query.shape is not None and core.query.rank >= 2 else 0
    annotations: dict[str, Scalar] = {
        "operation": key.operation, "storage": "static" if key.operation == "write" else "dynamic",
        "past_length": key.past_length, "query_length": query_length, "kept": _kept(view, key)}
    if latent:
        annotations["latent"] = True
    sure = 0.95 if key.old.kind == "input" or key.operation == "write" else 0.9
    return Match(kind="kv_cache", core=nodes, confidence=sure, annotations=annotations,
                 reason=f"{key.operation}: attention reads keys and values that outlive the call")


def _why_not(key: _Use | NoMatch, value: _Use | NoMatch) -> NoMatch:
    if isinstance(key, NoMatch):
        return key
    if isinstance(value, NoMatch):
        return NoMatch(f"keys come from a cache, values do not: {value.reason}")
    return NoMatch(f"keys are {key.operation}, values {value.operation}")


def _latent(view: GraphView, core: Core) -> _Use | None:
    """What outlives the call upstream of the linear layers that make keys and values."""
    seen, queue, uses = {core.key, core.value}, [core.key, core.value], []
    limit = 96
    while queue and limit:
        node = queue.pop(0)
        limit -= 1
        use = _append(view, node) if node.op == "cat" else _write(view, node) if node.op in ("index_write", "copy") \
            else NoMatch("")
        if isinstance(use, _Use) and (use.old.kind != "call" or node.op == "cat"):
            uses.append(use)
            continue
        if is_linear(node) or node.op in _BUILDS:
            fresh = [p for p in dict.fromkeys(node.inputs) if p not in seen and not p.static]
            seen.update(fresh)
            queue.extend(fresh)
    if not uses or len({use.operation for use in uses}) > 1 or not _kept(view, uses[0]):
        return None
    first = min(uses, key=lambda use: use.nodes[0].index)
    return _Use(first.operation, tuple(node for use in uses for node in use.nodes), first.old, first.past_length)


def _kept(view: GraphView, use: _Use) -> bool:
    """Whether what the call adds outlives it: it is written into an input, or leaves the graph."""
    if use.operation == "read" or (use.operation == "write" and use.old.kind != "call"):
        return True
    return any(n.op in ("output", "copy") for n in view.forward(use.nodes[0], VIEWS, 32))


def _use(view: GraphView, operand: ViewNode) -> _Use | NoMatch:
    node, limit, steps = operand, 16, []
    while limit and node.inputs and (node.op in VIEWS or (node.op in ("mul", "div") and len(node.inputs) == 1)):
        steps.append(node)
        node, limit = node.inputs[0], limit - 1
    if node.op == "cat":
        return _append(view, node)
    if node.op in ("index_write", "copy"):
        return _write(view, node)
    if _given(node) and node.rank >= 3:
        if not steps:
            return NoMatch("keys or values are inputs, and no node reads them")
        return _Use("read", tuple(steps), node, _length(node))
    return NoMatch("keys and values are made by this call and not kept")


def _append(view: GraphView, node: ViewNode) -> _Use | NoMatch:
    if len(node.inputs) != 2:
        return NoMatch(f"a concatenation of {len(node.inputs)} values")
    old, new = view.through_views(node.inputs[0]), node.inputs[1]
    if new.static:
        return NoMatch("what is appended does not depend on the input: learned keys")
    if _given(old):
        return _Use("append", (node,), old, _length(node.inputs[0]))
    if old.static and not old.weighted and (node.inputs[0].hint == (0,) or 0 in (node.inputs[0].hint or ())):
        return _Use("append", (node,), old, 0)
    return NoMatch("what the keys are appended to is computed in this call")


def _write(view: GraphView, node: ViewNode) -> _Use | NoMatch:
    old = view.through_views(node.inputs[0])
    while old.op in ("index_write", "copy") and old.inputs:
        old = view.through_views(old.inputs[0])
    use = _Use("write", (node,), old, _length(node))
    if _given(old) or (old.op in _FRESH and _kept(view, use)):
        return use
    return NoMatch("what the keys are written into is computed in this call, or not kept")


def _given(node: ViewNode) -> bool:
    """Values from before the call that do not learn. Recorded eager ops know them as constants."""
    return node.kind in ("input", "constant") and node.op != "parameter" and node.is_float


def _length(node: ViewNode) -> Dim:
    return node.shape[-2] if node.shape is not None and node.rank >= 2 else 0


KV_CACHE = Pattern(
    name="kv_cache", matcher=match_kv_cache, kinds=("kv_cache",), priority=45, anchors=("attention", "softmax"))
