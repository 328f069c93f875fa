"""Between forward and backward: what a worker keeps, and what it computes again, where it has no room for all.

AOTAutograd's partition function. As long as everything fits, everything is kept: on the worker that runs both, keeping
costs nothing. Beyond that the price of a kept byte rises until what is kept fits (passes/costs/recompute.py).
"""
from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch
from functorch.compile import default_partition
from torch import fx

from genie_dynamo import sessions, worker_facts
from genie_dynamo.core.config import Config
from genie_dynamo.core.datasheets import datasheet
from genie_dynamo.core.errors import CostError
from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.core.limits import QUOTA_SHARE
from genie_dynamo.passes.costs.recompute import CostPartition
from genie_dynamo.passes.costs.shipped import shipped_fit
from genie_dynamo.passes.costs.sizes import hinted_bytes, tensors_in
from genie_dynamo.runtime import calibration

log = logging.getLogger(__name__)

HEADROOM = 0.9
"""Of what a session may keep on a worker, this is planned with."""

_UNKNOWN_HARDWARE = "A10"
"""Under a budget only relative costs of ops count, so that any device's will do where none has been measured."""

PartitionFn = Callable[..., tuple[fx.GraphModule, fx.GraphModule]]


def partition_fn(config: Config) -> PartitionFn:
    """The partition function of one compile."""
    def partition(joint: fx.GraphModule, inputs: Any, **options: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        by_cost = _by_cost(config, joint) if config.awareness == "full" else None
        chosen: PartitionFn = default_partition if by_cost is None else by_cost
        return chosen(joint, inputs, **options)

    return partition


def _by_cost(config: Config, joint: fx.GraphModule) -> CostPartition | None:
    """None where nothing limits what may be kept, as far as is known now: compiling asks no worker."""
    session = sessions.opened()
    facts = worker_facts.known(session) if session is not None else None
    # The worker with the least room: which one it will be is decided later.
    worker = min(facts.workers, key=lambda w: w.memory_bytes or 1 << 62) if facts is not None else None
    limits = [int(config.resident_quota_gib * 2**30)] if config.resident_quota_gib is not None else []
    if worker is not None and worker.memory_bytes is not None:
        limits.append(int(worker.memory_bytes * QUOTA_SHARE))
    if not limits:
        return None
    held = sum(hinted_bytes(value) for node in joint.graph.nodes
               if node.op == "placeholder" and not str(node.target).startswith("tangents")
               for value in tensors_in(node.meta.get("val")))
    hardware = worker.hardware if worker is not None else _local_hardware(config)
    chosen = CostPartition(
        hardware=hardware, fit=(worker.fit if worker is not None else None) or shipped_fit(hardware.kind),
        budget_bytes=max(0, int(HEADROOM * min(limits)) - held), symbol_values=_hints(joint))
    try:
        again = chosen.recomputed(joint)
    except CostError as error:
        log.info("what the backward keeps is not decided by cost: %s", error)
        return None
    if not again:
        return None
    log.info("%d ops of the forward are computed again in the backward: to keep all, the %.3g MB that the session may "
             "have on a worker would not do", len(again), min(limits) / 1e6)
    return chosen


def _local_hardware(config: Config) -> HardwareFacts:
    """What embedded workers were measured to do on this machine before."""
    threads = config.num_threads or torch.get_num_threads()
    return calibration.cached(torch.device("cpu"), threads) or datasheet(_UNKNOWN_HARDWARE)


def _hints(joint: fx.GraphModule) -> dict[str, int]:
    """Values of the symbols in the call that is being compiled."""
    found: dict[str, int] = {}
    for node in joint.graph.nodes:
        value = node.meta.get("val")
        sizes: list[Any] = [value, *(size for tensor in tensors_in(value) for size in tensor.shape)]
        for size in sizes:
            if isinstance(size, torch.SymInt) and size.node.expr.is_Symbol and size.node.hint is not None:
                found[str(size.node.expr)] = int(size.node.hint)
    return found
