"""Micro-batches: the graph over parts of its batch, or why there is none."""
from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx

from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.passes.facts import GraphFacts
from genie_dynamo.passes.rows.flow import NotPipelined
from genie_dynamo.passes.rows.split import SplitGraph, split_batch

log = logging.getLogger(__name__)

_said: set[str] = set()


@dataclass(frozen=True, slots=True)
class Parts:
    """`split` where micro-batches are wanted and possible; `refusal` where they are wanted and not."""

    split: SplitGraph | None = None
    refusal: str = ""

    @classmethod
    def of(cls, gm: fx.GraphModule, facts: GraphFacts, config: Config, label: str) -> Parts:
        """Cut the batch of a forward or inference graph. A backward graph follows its forward (`of_backward`).

        Raises: UnsupportedGraphError in strict mode, with the reason.
        """
        if config.microbatches == 1 or facts.kind == "backward":
            return cls()
        try:
            return cls(split_batch(gm, facts, config.microbatches))
        except NotPipelined as reason:
            if reason.small:
                return cls()
            if config.strict:
                raise UnsupportedGraphError(f"{label} with microbatches={config.microbatches}: {reason}") from reason
            if str(reason) not in _said:
                _said.add(str(reason))
                log.warning("%s runs without microbatches=%d: %s", label, config.microbatches, reason)
            return cls(refusal=str(reason))

    def of_backward(self, gm: fx.GraphModule, facts: GraphFacts, rows: Mapping[str, int],
                    num_parts: int) -> SplitGraph | None:
        """The backward over parts, where the forward ran so. Parameters' gradients are added up part by part."""
        names = [node.name for node in gm.graph.nodes if node.op == "placeholder"]
        known = {name: rows[name] for name in names if name in rows}
        if not known:
            return None
        try:
            return split_batch(gm, facts, num_parts, known)
        except NotPipelined as reason:
            log.info("the backward runs without microbatches: %s", reason)
            return None


def rows_for_backward(split: SplitGraph, facts: GraphFacts) -> dict[str, int]:
    """Rows of what a backward graph reads: saved values by name, and the gradients of the forward's outputs."""
    gradients = {f"tangents_{number}": dim for number, dim in enumerate(split.result_dims[:facts.num_outputs], 1)
                 if dim is not None}
    return {**split.output_dims, **gradients}
