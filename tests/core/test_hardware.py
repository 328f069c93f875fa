"""Facts about hardware: rates, JSON from strangers, datasheets."""
from __future__ import annotations

import json
from typing import Any

import pytest

from genie_dynamo.core.datasheets import DATASHEETS, datasheet
from genie_dynamo.core.errors import CostError
from genie_dynamo.core.hardware import HardwareFacts, LinkFacts

FACTS = HardwareFacts(
    name="box", kind="cpu", source="a test", matmul_flops_per_s=(("float32", 1e11), ("float64", 5e10)),
    elementwise_ops_per_s=(("float32", 1e10),), memory_bytes_per_s=((1000, 4e9), (100_000, 2e9)), op_overhead_s=1e-6)


def test_rates() -> None:
    assert FACTS.matmul_rate("float64") == 5e10
    assert FACTS.elementwise_rate("int64") == FACTS.elementwise_rate("complex64") == 1e10
    assert [FACTS.memory_rate(n) for n in (1, 1000, 10_000, 100_000, 1e9)] == [4e9, 4e9, pytest.approx(3e9), 2e9, 2e9]


def test_a_dtype_without_number_is_named() -> None:
    with pytest.raises(CostError, match="box has no rate for matrix products in bfloat16"):
        FACTS.matmul_rate("bfloat16")


def test_round_trip() -> None:
    assert HardwareFacts.from_json(json.loads(json.dumps(FACTS.to_json()))) == FACTS


@pytest.mark.parametrize("change", [
    {"name": 3}, {"name": "x" * 2000}, {"op_overhead_s": float("nan")}, {"op_overhead_s": -1.0},
    {"op_overhead_s": "1"}, {"op_overhead_s": True}, {"matmul_flops_per_s": []}, {"matmul_flops_per_s": [[1, 2.0]]},
    {"matmul_flops_per_s": [["float32", float("inf")]]}, {"matmul_flops_per_s": [["float32", 1.0, 2.0]]},
    {"memory_bytes_per_s": [["1", 2.0]]}, {"memory_bytes_per_s": [[9, 1.0], [3, 1.0]]},
    {"memory_bytes_per_s": [[i, 1.0] for i in range(1000)]}, {"memory_bytes": 0}, {"num_threads": 1.5}, {"more": 1},
])
def test_facts_of_strangers_are_checked(change: dict[str, Any]) -> None:
    with pytest.raises(CostError):
        HardwareFacts.from_json(FACTS.to_json() | change)


def test_datasheets_name_their_sources() -> None:
    assert {"CPU core", "A100", "H100", "H200", "L4", "T4", "RTX 4090"} <= set(DATASHEETS)
    for facts in DATASHEETS.values():
        assert ("datasheet" in facts.source or "whitepaper" in facts.source or "derived" in facts.source)
        assert "supposed" in facts.source                       # the overhead of an op is on no datasheet
        assert facts.elementwise_rate("float32") < facts.matmul_rate("float32")
    with pytest.raises(CostError, match="known are CPU core"):
        datasheet("H300")


def test_a_link_without_speed_is_refused() -> None:
    assert LinkFacts(start="a", end="b", latency_s=1e-3, bytes_per_s=1e6, source="").transfer_s(1e6) == 1.001
    with pytest.raises(CostError, match="link a to b"):
        LinkFacts(start="a", end="b", latency_s=1e-3, bytes_per_s=0.0, source="")
