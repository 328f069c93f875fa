"""Rules by op: what becomes of rows. An op without a rule mixes them."""
from __future__ import annotations

from collections.abc import Callable

import torch

from genie_dynamo.passes.rows.call import Call, MixesRows, Parts

Rule = Callable[[Call], Parts]

_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops of these names, `aten::` left out."""

    def register(function: Rule) -> Rule:
        for name in names:
            full = name if "::" in name else f"aten::{name}"
            assert full not in _RULES, full
            _RULES[full] = function
        return function

    return register


def parts_of(call: Call) -> Parts:
    """What an op that reads rows does with them. Raises: MixesRows."""
    if torch.Tag.nondeterministic_seeded in call.op.tags:
        raise MixesRows(f"{call.node.name} draws random numbers for the whole batch at once; for parts they would "
                        "be others")
    if call.op._schema.is_mutable:
        raise MixesRows(f"{call.node.name} ({call.name}) writes to its arguments")
    found = _RULES.get(call.name)
    if found is None and torch.Tag.pointwise in call.op.tags:
        found = _RULES["pointwise"]
    if found is None:
        raise MixesRows(f"nothing is known about rows in {call.node.name} ({call.name})")
    return found(call)


def known_ops() -> frozenset[str]:
    """Names of ops that have a rule of their own."""
    return frozenset(name for name in _RULES if name != "pointwise")


def register_pointwise(function: Rule) -> Rule:
    """The rule of every op that torch tags as pointwise."""
    _RULES["pointwise"] = function
    return function
