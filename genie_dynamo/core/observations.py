"""What ops were seen to cost: rows that are kept as Parquet and that refinement reads.

Parquet needs pyarrow (`pip install 'genie-dynamo[costs]'`); without it nothing is kept, and asking for it says so.
"""
from __future__ import annotations

import io
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from genie_dynamo.core.errors import ConfigError, CostError

MAX_ROWS = 1_000_000
_VERSION = b"1"
_TYPES: dict[str, Any] = {
    "model": str, "machine": str, "kind": str, "num_threads": int, "op": str, "family": str, "dtype": str,
    "flops": float, "bytes_moved": float, "seconds": float, "count": int,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Observation:
    """One op at one size on one device. Seconds are the median over the runs of a node."""

    model: str               # what was run: a name for people, and what cross-validation leaves out
    machine: str             # HardwareFacts.name
    kind: str
    num_threads: int
    op: str
    family: str
    dtype: str
    flops: float
    bytes_moved: float       # read and written
    seconds: float
    count: int = 1           # nodes that this row stands for


def to_parquet(observations: Sequence[Observation]) -> bytes:
    """Rows as the content of a file. Raises: ConfigError without pyarrow."""
    arrow, parquet = _pyarrow()
    kinds = {str: arrow.string(), int: arrow.int64(), float: arrow.float64()}
    schema = arrow.schema([(name, kinds[kind]) for name, kind in _TYPES.items()], {b"genie_observations": _VERSION})
    content = io.BytesIO()
    parquet.write_table(arrow.Table.from_pylist([asdict(row) for row in observations], schema=schema), content)
    return content.getvalue()


def write_parquet(path: Path, observations: Sequence[Observation]) -> None:
    """Write rows to a file, replacing it in one step.

    Raises: ConfigError without pyarrow.
    """
    content = to_parquet(observations)
    temporary = path.with_name(f".{path.name}.part")
    temporary.touch(mode=0o600)
    temporary.write_bytes(content)
    temporary.chmod(0o600)
    temporary.replace(path)


def read_parquet(path: Path | bytes) -> tuple[Observation, ...]:
    """Rows of a file of any origin, or of its content.

    Raises: ConfigError without pyarrow; CostError where the file is not what write_parquet writes, names the column.
    """
    arrow, parquet = _pyarrow()
    name = path if isinstance(path, Path) else Path("kept observations")
    try:
        source = path if isinstance(path, Path) else arrow.BufferReader(path)
        file = parquet.ParquetFile(source, memory_map=False, thrift_string_size_limit=1 << 20)
        _check_schema(name, file)
        rows = file.read(use_threads=False).to_pylist()
    except (arrow.ArrowException, OSError) as error:
        raise CostError(f"{name} cannot be read as Parquet: {error}", path=str(name)) from error
    return tuple(Observation(**_checked(name, row)) for row in rows)


def _check_schema(path: Path, file: Any) -> None:
    if file.metadata.num_rows > MAX_ROWS:
        raise CostError(f"{path} has {file.metadata.num_rows} rows, at most {MAX_ROWS} are read", path=str(path))
    names = [field.name for field in fields(Observation)]
    if (file.schema_arrow.metadata or {}).get(b"genie_observations") != _VERSION or file.schema_arrow.names != names:
        raise CostError(f"{path} does not hold observations of this release: its columns are "
                        f"{', '.join(file.schema_arrow.names)[:200]}", path=str(path))


def _checked(path: Path, row: dict[str, Any]) -> dict[str, Any]:
    for name, kind in _TYPES.items():
        value: Any = row[name]
        if type(value) is not kind or (kind is float and not (math.isfinite(value) and value >= 0)):
            raise CostError(f"{path}: column {name} holds {value!r:.60}, not a {kind.__name__} of at least zero",
                            path=str(path), column=name)
    return row


def _pyarrow() -> tuple[Any, Any]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise ConfigError("observed costs are kept as Parquet, which needs pyarrow, and it is not installed: "
                          "pip install 'genie-dynamo[costs]'") from error
    return pyarrow, pyarrow.parquet


def merge(old: Iterable[Observation], new: Iterable[Observation],
          max_rows: int = MAX_ROWS) -> tuple[Observation, ...]:
    """Old and new rows; of rows about the same op, size and device the newer stays. At most max_rows, the newest."""
    rows: dict[Any, Observation] = {}
    for row in (*old, *new):
        key = (row.model, row.machine, row.num_threads, row.op, row.dtype, row.flops, row.bytes_moved)
        rows.pop(key, None)
        rows[key] = row
    return tuple(rows.values())[-max_rows:]
