"""How long all patterns take: on GPT-2 small, and how it grows with a graph. CPU time of the thread.

A bench of its own: what `semantics` keeps in memory makes each collection of garbage, and so each size, slower.
"""
from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from bench.harness import Case, Series, Settings, Target
from genie_dynamo.passes.semantics.annotate import Annotator
from genie_dynamo.passes.semantics.view import GraphView, ViewNode
from tests.models.captures import compiled_captures

LIMIT_GPT2_S = 0.1
LIMIT_JSON_S = 1e-3


def synthetic(num_nodes: int) -> GraphView:
    """Decoder layers in ATen form, until the graph has so many nodes."""
    nodes: list[ViewNode] = []

    def add(op: str, *inputs: ViewNode, kind: str = "call", shape: tuple[int, ...] = (2, 12, 32),
            args: tuple[Any, ...] = ()) -> ViewNode:
        node = ViewNode(index=len(nodes), name=f"n{len(nodes)}", kind=kind, op=op, target=op, args=(*inputs, *args),
                        shape=shape, hint=shape, dtype="float32")
        nodes.append(node)
        return node

    x = add("input", kind="input")
    while len(nodes) < num_nodes:
        x = _layer(add, x)
    return GraphView(nodes)


def _layer(add: Callable[..., ViewNode], x: ViewNode) -> ViewNode:
    def linear(value: ViewNode) -> ViewNode:
        weight = add("parameter", kind="input", shape=(32, 32))
        return add("view", add("matmul", add("view", value), add("transpose", weight)))

    normed = add("layer_norm", x)
    q, k, v = (add("transpose", add("view", linear(normed), shape=(2, 12, 4, 8)), shape=(2, 4, 12, 8))
               for _ in range(3))
    scores = add("mul", add("matmul", q, add("transpose", k), shape=(2, 4, 12, 12)), shape=(2, 4, 12, 12))
    out = add("matmul", add("softmax", scores, shape=(2, 4, 12, 12)), v, shape=(2, 4, 12, 8))
    x = add("add", x, linear(add("view", add("transpose", out))))
    return add("add", x, linear(add("gelu", linear(add("layer_norm", x)))))


def _timed(call: Callable[[], object], samples: int) -> Series:
    call()
    times = []
    for _ in range(samples):
        started = time.thread_time()
        call()
        times.append(time.thread_time() - started)
    return Series(unit="s", rounds=(tuple(times),))


def run(settings: Settings) -> Iterator[Case]:
    from bench.workloads import gpt2
    from genie_dynamo.analysis import analyze

    torch.set_num_threads(1)
    model = gpt2()
    ids = torch.zeros(1, 128, dtype=torch.long)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        captures = compiled_captures(model, {"input_ids": ids})
    samples = 3 if settings.quick else 10
    series = {}
    annotator = Annotator()
    for capture in captures:
        num_nodes = len(capture.gm.graph.nodes)
        series[f"GPT-2 small, {capture.kind}, {num_nodes} nodes"] = _timed(
            lambda capture=capture: annotator.annotate(capture.gm, roles=capture.roles), samples)
    slowest = max(s.median for s in series.values())
    series["to_json, with the guards of genie.analyze"] = to_json = _timed(analyze(model, input_ids=ids).to_json, 50)
    sizes = (1_000, 10_000) if settings.quick else (1_000, 10_000, 30_000, 100_000)
    per_node = []
    for size in sizes:
        samples = 1 if size > 10_000 else 3
        views = [synthetic(size) for _ in range(samples + 1)]
        curve = _timed(lambda views=views: annotator.annotate_view(views.pop()), samples)
        series[f"synthetic decoder, {size} nodes"] = curve
        per_node.append(curve.median / size)
    growth = per_node[-1] / per_node[0]
    yield Case(
        bench="semantics_time", title="time of all patterns (CPU time of the thread)", threads=1, pinned=False,
        series=series, targets=(
            Target(name="GPT-2 small, all patterns", value=slowest, limit=LIMIT_GPT2_S, unit="s", terms={}),
            Target(name="GPT-2 small, to_json", value=to_json.median, limit=LIMIT_JSON_S, unit="s", terms={}),
            Target(name=f"time per node, {sizes[-1]} against {sizes[0]} nodes", value=growth, limit=2.0, unit="x",
                   terms={"first": per_node[0], "last": per_node[-1]})))
