"""The suite's own check of the schema (tests/round_trip.py) is in place, and a codec that loses something fails it."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from genie_dynamo.core import fragment
from genie_dynamo.core.graph_spec import NodeSpec

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def program(x: torch.Tensor) -> torch.Tensor:
    """Has lists, a bool, floats, ints, a dtype and keyword arguments in its graph."""
    return torch.full((2,), 0.5, dtype=torch.float64) + x.sum([0], keepdim=True).add(x, alpha=3).amax()


def without_keywords(node: NodeSpec, targets: dict[str, int]) -> Any:
    return (node.name, targets.setdefault(node.target, len(targets)), tuple(map(fragment._arg_out, node.args)), (), ())


@pytest.mark.parametrize(("kind", "writer"), [
    (bool, int),
    (float, lambda value: value * (1 + 2e-16)),
    (list, lambda items: (fragment._TUPLE, *map(fragment._arg_out, items))),
    (torch.dtype, lambda dtype: (fragment._DTYPE, "float32")),
    (NodeSpec, without_keywords),
], ids=["bool as int", "float off by a bit", "list as tuple", "another dtype", "no keywords"])
def test_a_codec_that_loses_something_fails_the_test_that_compiles(
        kind: type, writer: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    if kind is NodeSpec:
        monkeypatch.setattr(fragment, "_node_out", writer)
    else:
        monkeypatch.setitem(fragment._WRITERS, kind, writer)
    with pytest.raises(Exception, match="round trip: node"):
        torch.compile(program, backend="genie", fullgraph=True)(torch.ones(3))
