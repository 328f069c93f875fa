"""What hardware can do, as numbers: read off a datasheet or measured by a worker. Plain frozen data with JSON."""
from __future__ import annotations

import itertools
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from genie_dynamo.core.errors import CostError

Rates = tuple[tuple[str, float], ...]

_MAX_TEXT, _MAX_ROWS = 1000, 64
_ALIASES = {
    # Integer and boolean arithmetic runs at the rate of the float of the same or the next smaller width.
    "int64": "float32", "int32": "float32", "int16": "float32", "int8": "float32", "uint8": "float32",
    "bool": "float32", "uint16": "float32", "uint32": "float32", "uint64": "float32",
    "complex32": "float16", "complex64": "float32", "complex128": "float64", "": "float32",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareFacts:
    """One device. Rates are per second; every number is from `source`.

    matmul_flops_per_s       by dtype name: a large product; a multiply and an add are two
    elementwise_ops_per_s    by dtype name: adds whose arguments are in cache (on a GPU: in registers)
    memory_bytes_per_s       (bytes touched, rate), ascending: what a simple op over so much memory reaches, read and
                             write together; the last rate also holds beyond
    op_overhead_s            one small op, from one end of dispatch to the other
    """

    name: str
    kind: str                                      # "cpu", "cuda"
    source: str
    matmul_flops_per_s: Rates
    elementwise_ops_per_s: Rates
    memory_bytes_per_s: tuple[tuple[int, float], ...]
    op_overhead_s: float
    memory_bytes: int | None = None
    num_threads: int | None = None

    def __post_init__(self) -> None:
        for field, rates in (("matmul_flops_per_s", self.matmul_flops_per_s),
                             ("elementwise_ops_per_s", self.elementwise_ops_per_s),
                             ("memory_bytes_per_s", self.memory_bytes_per_s)):
            if not rates or not all(_is_rate(rate) for _, rate in rates):
                raise CostError(f"{field} of {self.name}: at least one rate, all above zero, got {rates!r:.80}")
        if list(self.memory_bytes_per_s) != sorted(self.memory_bytes_per_s):
            raise CostError(f"memory_bytes_per_s of {self.name} has to ascend by bytes touched")
        if not _is_rate(self.op_overhead_s):
            raise CostError(f"op_overhead_s of {self.name} has to be above zero, got {self.op_overhead_s!r:.40}")

    def matmul_rate(self, dtype: str) -> float:
        """Flops per second of products in a dtype. Raises: CostError for a dtype that has no number."""
        return self._rate(self.matmul_flops_per_s, dtype, "matrix products")

    def elementwise_rate(self, dtype: str) -> float:
        """Adds per second in a dtype. Raises: CostError for a dtype that has no number."""
        return self._rate(self.elementwise_ops_per_s, dtype, "elementwise work")

    def memory_rate(self, touched_bytes: float) -> float:
        """Bytes per second of an op that touches so much memory: straight lines between what was measured."""
        known = self.memory_bytes_per_s
        if touched_bytes <= known[0][0]:
            return known[0][1]
        for (low, slow), (high, fast) in itertools.pairwise(known):
            if touched_bytes <= high:
                share = math.log(touched_bytes / low) / math.log(high / low)
                return slow + (fast - slow) * share
        return known[-1][1]

    def _rate(self, rates: Rates, dtype: str, what: str) -> float:
        known = dict(rates)
        found = known.get(dtype, known.get(_ALIASES.get(dtype, dtype)))
        if found is None:
            raise CostError(f"{self.name} has no rate for {what} in {dtype} (it has {', '.join(known)}); measure it, "
                            "or add a number with its source", dtype=dtype, device=self.name)
        return found

    def to_json(self) -> dict[str, Any]:
        """Lists, text and numbers, ready for json.dumps."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Any) -> HardwareFacts:
        """The inverse of to_json, for data of any origin. Raises: CostError where a field is not what it has to be."""
        names = {field.name for field in fields(cls)}
        if not isinstance(data, Mapping) or set(data) != names:
            raise CostError(f"hardware facts need exactly the fields {', '.join(sorted(names))}")
        for name in ("name", "kind", "source"):
            if type(data[name]) is not str or len(data[name]) > _MAX_TEXT:
                raise CostError(f"{name} of hardware facts has to be a text of at most {_MAX_TEXT} characters")
        for name in ("memory_bytes", "num_threads"):
            if data[name] is not None and (type(data[name]) is not int or data[name] <= 0):
                raise CostError(f"{name} of hardware facts has to be None or a number above zero")
        return cls(
            name=data["name"], kind=data["kind"], source=data["source"],
            matmul_flops_per_s=_rows(data["matmul_flops_per_s"], str),
            elementwise_ops_per_s=_rows(data["elementwise_ops_per_s"], str),
            memory_bytes_per_s=_rows(data["memory_bytes_per_s"], int),
            op_overhead_s=data["op_overhead_s"], memory_bytes=data["memory_bytes"], num_threads=data["num_threads"])


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    """The way from one end to another ("client" or a worker's name)."""

    start: str
    end: str
    latency_s: float             # half of the round trip of a small payload
    bytes_per_s: float           # of a large one, one way
    source: str

    def __post_init__(self) -> None:
        if not (_is_rate(self.latency_s) and _is_rate(self.bytes_per_s)):
            raise CostError(f"link {self.start} to {self.end}: latency_s and bytes_per_s have to be above zero, got "
                            f"{self.latency_s!r:.40} and {self.bytes_per_s!r:.40}")

    def transfer_s(self, size_bytes: float) -> float:
        return self.latency_s + size_bytes / self.bytes_per_s


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value > 0


def _rows(value: Any, key: type) -> Any:
    if not isinstance(value, list | tuple) or not 0 < len(value) <= _MAX_ROWS:
        raise CostError(f"rates of hardware facts have to be 1 to {_MAX_ROWS} rows")
    for row in value:
        if not isinstance(row, list | tuple) or len(row) != 2 or type(row[0]) is not key or not _is_rate(row[1]):
            raise CostError(f"a row of hardware rates is ({key.__name__}, rate above zero), got {row!r:.80}")
    return tuple((row[0], float(row[1])) for row in value)
