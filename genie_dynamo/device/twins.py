"""For an op that changes its arguments, the op that gives the new contents instead."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload

_OTHER_NAMES = {
    "_native_batch_norm_legit": "_native_batch_norm_legit_functional",
    "_batch_norm_with_update": "_batch_norm_with_update_functional",
    "rrelu_with_noise": "rrelu_with_noise_functional",
    "normal": "normal_functional",
}


_OPTIONS = frozenset({"dtype", "layout", "device", "pin_memory", "requires_grad"})


@dataclass(frozen=True, slots=True)
class Twin:
    """`target` takes the arguments of the changing op but `drops`, and returns first what that returns anew, then the
    new contents of its arguments `changed`, in order."""

    target: OpOverload
    changed: tuple[str, ...]
    drops: frozenset[str]
    positional: tuple[str, ...]
    returns: tuple[str | None, ...]        # for each return of the changing op: the argument that it is, or None
    options: tuple[str, ...] = ()          # of a factory: options that out= decides

    def result(self, given: dict[str, Any], others: Sequence[Any]) -> Any:
        """What the changing op returns."""
        rest = iter(others)
        results = [next(rest) if name is None else given[name] for name in self.returns]
        if not results:
            return None
        return results[0] if len(results) == 1 else tuple(results)


def twin_of(target: OpOverload) -> Twin | None:
    """The functional twin of a changing op, found by its schema."""
    schema = target._schema
    changed = tuple(a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write)
    outs = frozenset(a.name for a in schema.arguments if a.is_out)
    by_alias = {frozenset(a.alias_info.before_set): a.name for a in schema.arguments if a.alias_info is not None}
    returns = tuple(by_alias.get(frozenset(r.alias_info.before_set)) if r.alias_info is not None else None
                    for r in schema.returns)
    wanted = [(a.name, str(a.type)) for a in schema.arguments if a.name not in outs]
    num_returns = sum(name is None for name in returns) + len(changed)
    namespace, _, name = schema.name.partition("::")
    base = name[:-1] if name.endswith("_") and not name.endswith("__") else name
    if name.startswith("__i"):
        base = "__" + name[3:]
    for packet_name in (_OTHER_NAMES.get(base), base, f"{base}_copy", f"{base}_functional"):
        packet = getattr(getattr(torch.ops, namespace), packet_name, None) if packet_name else None
        if packet is None:
            continue
        for overload in packet.overloads():
            found = getattr(packet, overload)
            other = found._schema
            if found is target or other.is_mutable or len(other.returns) != num_returns:
                continue
            positional = tuple(a.name for a in other.arguments if not a.kwarg_only)
            takes = [(a.name, str(a.type)) for a in other.arguments]
            if sorted(takes) == sorted(wanted):
                return Twin(found, changed, outs, positional, returns)
            plain = [take for take in takes if take[0] not in _OPTIONS]
            if outs and plain == [want for want in wanted if want[0] not in _OPTIONS] and len(plain) < len(takes):
                options = tuple(name for name, _ in takes if name in ("dtype", "device"))
                return Twin(found, changed, outs, positional, returns, options)
    return None
