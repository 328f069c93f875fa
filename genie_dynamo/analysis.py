"""`genie.analyze`: what a model or function means, without running it on a worker."""
from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from genie_dynamo.core.errors import UnsupportedGraphError
from genie_dynamo.core.semantics import SemanticGraph
from genie_dynamo.passes.facts import read_guards
from genie_dynamo.passes.semantics.annotate import annotate

_LOCK = threading.Lock()


class _Captured(BaseException):
    """Leaves the user's frame before anything of its graph runs. Not an Exception: user code may catch those."""


def analyze(model_or_fn: Callable[..., Any], *args: Any, **kwargs: Any) -> SemanticGraph:
    """The meaning of one call: workload, phase, modalities, regions, guards.

    Nothing is computed, and caches or buffers that the call would change stay as they are: the graph is captured as
    torch.compile would, and dropped. Symbolic sizes stay symbolic where Dynamo finds them so (a second call with
    another length), and `.phase_at` answers for other sizes.

    Args:    model_or_fn: an nn.Module or a function.  args, kwargs: of the call.
    Raises:  UnsupportedGraphError where the call cannot be one graph; the message says where it breaks.
    """
    found: list[SemanticGraph] = []

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        found.append(annotate(gm, guards=read_guards(gm)))

        def leave(*_: Any) -> Any:
            raise _Captured

        return leave

    with _LOCK:
        target = _uncompiled(model_or_fn)
        try:
            with torch._dynamo.config.patch(allow_rnn=True):
                torch.compile(_fresh(target), backend=backend, fullgraph=True)(*args, **kwargs)
        except _Captured:
            pass
        except torch._dynamo.exc.Unsupported as exc:
            raise UnsupportedGraphError(
                f"{_name(target)} cannot be captured as one graph: {str(exc).strip().splitlines()[0]}; analyze a "
                "submodule, or find the break with torch._dynamo.explain", reasons=(str(exc),)) from exc
    if not found:
        return SemanticGraph(reason="the call computes nothing on tensors",
                             warnings=("the call computes nothing on tensors",))
    return found[-1]


def _fresh(target: Callable[..., Any]) -> Callable[..., Any]:
    """A function of its own, so that code compiled elsewhere for this module is neither used nor kept."""
    def call(*args: Any, **kwargs: Any) -> Any:
        return target(*args, **kwargs)

    return call


def _uncompiled(target: Any) -> Callable[..., Any]:
    original = getattr(target, "_orig_mod", None)
    return original if isinstance(original, torch.nn.Module) else target


def _name(target: Any) -> str:
    return getattr(target, "__name__", type(target).__name__)
