"""Ops that are given a `torch.Generator`, of the CPU or of the device (generators.py): they draw here.

The op runs on the CPU with the generator and what its arguments hold now, and its result goes up: the numbers are the
CPU's, whatever the worker's device is.
"""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch._ops import OpOverload
from torch.utils import _pytree as pytree

from genie_dynamo.device.foreign import NAME
from genie_dynamo.device.memory import is_ours
from genie_dynamo.device.special import value_of


def drawing(target: OpOverload, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """The kernel of an op that takes a generator: the given one where it gets none."""
    names = [argument.name for argument in target._schema.arguments]
    changed = [argument.name for argument in target._schema.arguments
               if argument.alias_info is not None and argument.alias_info.is_write]

    place = names.index("generator")               # some schemas let it come by position

    def with_generator(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("generator") is None and (len(args) <= place or args[place] is None):
            return kernel(*args, **kwargs)
        here_args, here_kwargs = pytree.tree_map(_here, (args, kwargs))
        result = target(*here_args, **here_kwargs)
        if not changed:
            return pytree.tree_map_only(torch.Tensor, lambda tensor: tensor.to(NAME), result)
        given, here = ({**dict(zip(names, a, strict=False)), **k} for a, k in ((args, kwargs),
                                                                              (here_args, here_kwargs)))
        for name in changed:
            if given[name].shape != here[name].shape:
                given[name].resize_(here[name].shape)
            given[name].copy_(here[name])
        return given[changed[0]]

    return with_generator


def _here(value: Any) -> Any:
    if is_ours(value):
        return value_of(value)
    return torch.device("cpu") if isinstance(value, torch.device) else value
