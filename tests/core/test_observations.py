"""Observed costs as Parquet: there and back, and files of strangers."""
from __future__ import annotations

import builtins
from pathlib import Path
from typing import Any

import pytest

from genie_dynamo.core.errors import ConfigError, CostError
from genie_dynamo.core.observations import Observation, merge, read_parquet, write_parquet


def row(**changes: Any) -> Observation:
    fields: dict[str, Any] = {
        "model": "m", "machine": "box", "kind": "cpu", "num_threads": 1, "op": "aten::mm", "family": "matmul",
        "dtype": "float32", "flops": 128.0, "bytes_moved": 192.0, "seconds": 1e-6}
    return Observation(**{**fields, **changes})


def test_round_trip(tmp_path: Path) -> None:
    rows = (row(), row(op="aten::add", flops=16.0, count=3), row(model="märchen", seconds=0.0))
    write_parquet(tmp_path / "o.parquet", rows)
    assert read_parquet(tmp_path / "o.parquet") == rows
    assert (tmp_path / "o.parquet").stat().st_mode & 0o777 == 0o600
    write_parquet(tmp_path / "o.parquet", ())
    assert read_parquet(tmp_path / "o.parquet") == ()
    assert [p.name for p in tmp_path.iterdir()] == ["o.parquet"]


def test_of_rows_about_the_same_the_newer_stays() -> None:
    old, new, other = row(seconds=1.0), row(seconds=2.0), row(op="aten::bmm")
    assert merge([old, other], [new]) == (other, new)


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1" + b"\xff" * 300 + b"PAR1", b"x" * 4096])
def test_a_file_that_is_not_parquet_is_named(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "o.parquet").write_bytes(content)
    with pytest.raises(CostError, match=r"o\.parquet cannot be read"):
        read_parquet(tmp_path / "o.parquet")


def test_damage_anywhere_in_a_file_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "o.parquet"
    write_parquet(path, [row(flops=float(i)) for i in range(20)])
    content = path.read_bytes()
    for position in range(0, len(content), 97):
        path.write_bytes(content[:position] + bytes([content[position] ^ 0x5A]) + content[position + 1:])
        try:
            rows = read_parquet(path)
        except CostError:
            continue
        assert all(type(r.flops) is float and r.seconds >= 0 for r in rows)


@pytest.mark.parametrize(("change", "message"), [
    ({"flops": float("nan")}, "column flops"), ({"seconds": -1.0}, "column seconds"),
])
def test_values_that_cannot_be_are_named(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    write_parquet(tmp_path / "o.parquet", [row(**change)])
    with pytest.raises(CostError, match=message):
        read_parquet(tmp_path / "o.parquet")


def test_other_columns_are_refused(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), tmp_path / "o.parquet")
    with pytest.raises(CostError, match="its columns are a"):
        read_parquet(tmp_path / "o.parquet")


def test_without_pyarrow_the_remedy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_import = builtins.__import__

    def no_pyarrow(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("pyarrow"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_pyarrow)
    with pytest.raises(ConfigError, match=r"pip install 'genie-dynamo\[costs\]'"):
        write_parquet(tmp_path / "o.parquet", [row()])
