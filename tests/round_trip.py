"""Each graph that a test compiles is compared with what its bytes decode to: same types, same bits, same order.

Graphs are equal when their bytes are (GraphSpec.__eq__), which cannot see what the codec itself drops or confuses.
This comparison goes by the values.
"""
from __future__ import annotations

import struct
from typing import Any

from genie_dynamo.core import fragment
from genie_dynamo.core.graph_spec import GraphSpec


def checked_encode(spec: GraphSpec) -> bytes:
    """What `fragment.encode` gives. Raises: AssertionError where decoding it gives another graph."""
    data = fragment.encode(spec)
    assert_same_graph(fragment.decode(data), spec)
    return data


def assert_same_graph(actual: GraphSpec, expected: GraphSpec) -> None:
    """Raises: AssertionError at the first difference."""
    for field in ("num_inputs", "constants", "returns"):
        got, want = getattr(actual, field), getattr(expected, field)
        assert exact(got) == exact(want), f"round trip: {field} {got!r:.200}, lowered as {want!r:.200}"
    for got, want in zip(actual.nodes, expected.nodes, strict=True):
        same = (got.name, got.target, exact(got.args), exact(got.kwargs)) == (
            want.name, want.target, exact(want.args), exact(want.kwargs))
        assert same, f"round trip: node {got!r:.200}, lowered as {want!r:.200}"
    assert exact(actual.outputs) == exact(expected.outputs), f"round trip: outputs {actual.outputs!r:.200}"
    for got_sub, want_sub in zip(actual.subgraphs, expected.subgraphs, strict=True):
        assert_same_graph(got_sub, want_sub)


def exact(arg: Any) -> Any:
    """An argument as something that is equal only where types, order and bits are."""
    if isinstance(arg, (list, tuple)):
        return (type(arg).__name__, *map(exact, arg))
    if isinstance(arg, dict):
        return ("dict", *((key, exact(value)) for key, value in arg.items()))
    if isinstance(arg, slice):
        return ("slice", exact(arg.start), exact(arg.stop), exact(arg.step))
    if isinstance(arg, float):
        return ("float", struct.pack("<d", arg))
    if isinstance(arg, complex):
        return ("complex", exact(arg.real), exact(arg.imag))
    return (type(arg).__name__, arg)
