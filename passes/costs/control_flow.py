"""Costs of higher-order ops: what their subgraphs cost, as often as they run."""
from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import sympy
from torch import fx

from genie_dynamo.passes.costs.graph_costs import GraphCosts
from genie_dynamo.passes.costs.registry import Call, Work
from genie_dynamo.passes.costs.sizes import Size, shape_of, tensors_in

Analyze = Callable[[fx.GraphModule], GraphCosts]

_ONCE = frozenset({"invoke_subgraph", "wrap", "wrap_with_set_grad_enabled", "wrap_with_autocast",
                   "tag_activation_checkpoint", "run_with_rng_state", "run_and_save_rng_state", "invoke_quant",
                   "invoke_quant_packed", "wrap_activation_checkpoint", "hints_wrapper", "strict_mode"})
_PER_ROW = frozenset({"map_impl", "map", "scan", "associative_scan"})


def control_flow(call: Call, analyze: Analyze) -> Work | None:
    """Work of a higher-order op with subgraphs; None for one that is not known here."""
    bodies = [value for value in call.args if isinstance(value, fx.GraphModule)]
    name = call.name.rpartition("::")[2]
    if not bodies:
        return None
    works = [_body_work(body, analyze) for body in bodies]
    if name == "cond":
        return _dearest(works)
    if name == "while_loop":
        return _sum(works, "while_loop: one trip is counted, its number is not known before it runs")
    if name in _PER_ROW:
        return _times(_sum(works), _num_rows(call, name))
    if name in _ONCE:
        return _sum(works)
    return None


def _body_work(body: fx.GraphModule, analyze: Analyze) -> Work:
    costs = analyze(body)
    return Work(sum(c.flops for c in costs), sum(c.bytes_read for c in costs), sum(c.bytes_written for c in costs),
                sum(c.allocated_bytes for c in costs), _said(c.assumption for c in costs))


def _said(assumptions: Iterable[str]) -> str:
    return "; ".join(dict.fromkeys(filter(None, assumptions)))


def _num_rows(call: Call, name: str) -> Size:
    """How often the body runs: the leading size of what is mapped or scanned over."""
    mapped: Any = call.args[2] if name == "scan" else call.args[1]
    for tensor in tensors_in(mapped):
        return shape_of(tensor)[0]
    return 1


def _sum(works: list[Work], assumption: str = "") -> Work:
    return Work(sum(w.flops for w in works), sum(w.bytes_read for w in works), sum(w.bytes_written for w in works),
                sum(w.workspace_bytes for w in works), _said([assumption, *(w.assumption for w in works)]))


def _times(work: Work, count: Size) -> Work:
    return Work(work.flops * count, work.bytes_read * count, work.bytes_written * count, work.workspace_bytes,
                work.assumption)


def _dearest(works: list[Work]) -> Work:
    """An upper bound of each quantity: which branch is taken is not known before it runs."""
    return Work(_max(w.flops for w in works), _max(w.bytes_read for w in works), _max(w.bytes_written for w in works),
                _max(w.workspace_bytes for w in works), "cond: the dearer branch is counted")


def _max(values: Any) -> Size:
    found = list(values)
    return max(found) if all(isinstance(v, int | float) for v in found) else sympy.Max(*found)
