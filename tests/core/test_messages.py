"""Messages survive the wire, and nothing else is taken for one."""
from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from genie_dynamo.core import messages as m
from genie_dynamo.core.errors import ProtocolError
from genie_dynamo.core.wire import pack, unpack

scalars = (st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False)
           | st.text(max_size=9))
anything = st.recursive(scalars | st.binary(max_size=9), lambda inner: st.lists(inner, max_size=4).map(tuple),
                        max_leaves=9)
pairs = st.lists(st.tuples(st.integers(0, 99), st.integers(0, 99)), max_size=3).map(tuple)
requests = st.integers(0, 2**32)
templates = st.integers(-(2**31), 2**31)
messages = st.one_of(
    st.builds(m.Run, requests, requests, requests, st.lists(anything, max_size=3).map(tuple), pairs, pairs, pairs,
              templates, pairs),
    st.builds(m.Result, requests, st.lists(anything, max_size=3).map(tuple), st.just(()), st.floats(0, 9),
              st.floats(0, 9), requests, st.lists(anything, max_size=3).map(tuple), pairs),
    st.builds(m.Hello, requests, st.binary(max_size=16), st.floats(0, 9),
              st.dictionaries(st.text(max_size=5), scalars, max_size=3), st.binary(max_size=16)),
    st.builds(m.Push, st.binary(max_size=16), requests, requests, anything),
    st.builds(m.Free, pairs),
    st.just(m.Ping()),
)


@given(messages)
def test_round_trip(message: m.Message) -> None:
    assert m.from_wire(unpack(pack(m.to_wire(message)))) == message


@given(anything)
def test_only_messages_are_messages(data: Any) -> None:
    try:
        message = m.from_wire(data)
    except ProtocolError:
        return
    assert m.to_wire(message) == data


@pytest.mark.parametrize("data", [None, (), (99,), ("Run",), (True,), (0, 1), (10, 1, 1, 1, (), ((1,),), (), (), 0),
                                  (10, 1, 1, 1, (), (), ((1, "x"),), (), 0), (10, "1", 1, 1, (), (), (), (), 0),
                                  (10, 1, 1, 1, (), (), (), (), "0")])
def test_wrong_tags_arities_and_types(data: Any) -> None:
    with pytest.raises(ProtocolError):
        m.from_wire(data)
