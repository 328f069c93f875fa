"""`genie.compile`: the backend as a decorator for functions, methods, modules and module classes."""
from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, TypeVar, overload

import torch

from genie_dynamo import sessions
from genie_dynamo.core.errors import ConfigError

T = TypeVar("T")


@overload
def compile(target: T, *, workers: int | str | Sequence[str] | None = None, dynamic: bool | None = None,
            fullgraph: bool = False, **options: Any) -> T: ...


@overload
def compile(target: None = None, *, workers: int | str | Sequence[str] | None = None, dynamic: bool | None = None,
            fullgraph: bool = False, **options: Any) -> Any: ...


def compile(target: Any = None, *, workers: int | str | Sequence[str] | None = None, dynamic: bool | None = None,
            fullgraph: bool = False, **options: Any) -> Any:
    """Compile a function, method, module or module class with the genie backend.

    Args:
        target:    what to compile; left out, a decorator is returned: `@genie.compile(fullgraph=True)`.
        workers:   as for genie.init; opens the default session unless one with these workers is open.
        dynamic, fullgraph: as for torch.compile.
        options:   compile options of core/config.py, such as strict=True.
    Returns: the same kind of thing. A class is changed in place: the forward of its instances is compiled.
    Raises:  ConfigError for a wrong option or a target that is none of these.
    """
    if target is None:
        return functools.partial(compile, workers=workers, dynamic=dynamic, fullgraph=fullgraph, **options)
    if workers is not None:
        sessions.ensure(workers)
    sessions.default_config().for_compile(options)
    wrap = functools.partial(torch.compile, backend="genie", dynamic=dynamic, fullgraph=fullgraph, options=options)
    if isinstance(target, type):
        if not issubclass(target, torch.nn.Module):
            raise ConfigError(f"genie.compile takes classes of modules, {target.__name__} is not an nn.Module")
        if target.__module__.split(".")[0] == "torch":
            raise ConfigError(f"genie.compile would change {target.__name__} for everybody: compile an instance, "
                              "or a subclass of your own")
        target.forward = wrap(target.forward)
        return target
    if not callable(target):
        raise ConfigError(f"genie.compile takes a function, a method, a module or a module class, got {target!r:.80}")
    return wrap(target)
