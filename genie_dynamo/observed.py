"""Observed costs in the user's cache directory: a Parquet file per kind of machine, bounded, the newest rows."""
from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable

from genie_dynamo.core import user_cache
from genie_dynamo.core.errors import ConfigError, CostError
from genie_dynamo.core.hardware import HardwareFacts
from genie_dynamo.core.observations import Observation, merge, read_parquet, to_parquet

log = logging.getLogger(__name__)

MAX_ROWS = 20_000
"""Rows kept per kind of machine: about a megabyte."""

_MAX_FILE_BYTES = 64 << 20
_said: set[str] = set()


def keep(hardware: HardwareFacts, rows: Iterable[Observation]) -> None:
    """Add rows to what is kept of a kind of machine. Without pyarrow nothing is kept, which is said once."""
    try:
        content = to_parquet(merge(kept(hardware), rows, MAX_ROWS))
    except ConfigError as error:
        _say_once(str(error))
        return
    user_cache.write(_file_name(hardware), content)


def kept(hardware: HardwareFacts) -> tuple[Observation, ...]:
    """What was observed on this kind of machine before; nothing where that cannot be read."""
    content = user_cache.read(_file_name(hardware), _MAX_FILE_BYTES)
    if content is None:
        return ()
    try:
        return read_parquet(content)
    except (ConfigError, CostError) as error:
        _say_once(f"observed costs are not used: {error}")
        return ()


def _file_name(hardware: HardwareFacts) -> str:
    identity = f"{hardware.name}\n{hardware.num_threads}"
    return f"observed-{hashlib.sha256(identity.encode()).hexdigest()[:24]}.parquet"


def _say_once(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.info("%s", text)
