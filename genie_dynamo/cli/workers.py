"""`genie workers`: one short session with each worker, to see whether it answers and what it holds."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from genie_dynamo.core.errors import ConfigError, GenieError


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerRow:
    """What one worker said, or why nothing."""

    address: str
    error: str | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def nothing_to_ask() -> ConfigError:
    return ConfigError("say whom to ask: addresses (tcp://HOST:PORT), or --cluster FILE, but not both; embedded "
                       "workers belong to one process, whose genie.get_stats() knows them")


def ask(addresses: Sequence[str], cluster: str | None, timeout_s: float) -> list[WorkerRow]:
    """A row for each worker, in the order given. Raises: ConfigError for what is no address or cluster.yaml."""
    from genie_dynamo.runtime.client.session import Session
    from genie_dynamo.runtime.cluster import build_config, connect_spec

    whom: dict[str, Any] = {"cluster": cluster} if cluster else {"workers": list(addresses)}
    config = build_config(**whom, connect_timeout_s=timeout_s, progress="off")
    workers, security = connect_spec(config)
    rows = []
    for worker in workers:
        try:
            with Session(config, [worker], security) as session:
                row = next(iter(session.stats()["workers"].values()))
        except GenieError as exc:
            rows.append(WorkerRow(address=worker.address, error=str(exc)))
            continue
        rows.append(WorkerRow(address=worker.address, error=row.get("error"), facts=_its_own(row)))
    return rows


def _its_own(row: Mapping[str, Any]) -> dict[str, Any]:
    """What the worker reported about itself, without this session's counters, which are all zero."""
    counters = {"calls", "fragment_runs", "bytes_sent", "bytes_received", "by_reason", "seconds", "address", "lost",
                "error"}
    return {name: value for name, value in row.items() if name not in counters}


def table_of(rows: Sequence[WorkerRow]) -> str:
    """A line or two for each worker."""
    lines = []
    for row in rows:
        lines.append(f"{row.address}  {'answers' if row.error is None else 'DOES NOT ANSWER'}")
        lines += [f"    {row.error}"] if row.error else [f"    {name}: {value}" for name, value in row.facts.items()]
    return "\n".join(lines)
