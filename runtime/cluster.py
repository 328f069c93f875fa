"""Which workers there are: a cluster.yaml, or a list of addresses. One parser for both.

    workers:
      - address: tcp://10.0.0.1:5555
        server_key: keys/server.key        # a public key file (relative to this file), or the 40 characters
        name: left                         # optional; w0, w1, ... otherwise
        price_per_hour: 2.5                # optional, in any currency; policy min_cost needs it
      - tcp://127.0.0.1:5556               # short for {address: ...}
    client_key: keys/client.key_secret     # needed where a worker has a server_key
    options:                               # optional: what genie.init(...) takes, below its arguments
      timeout_s: 60

Raises: ConfigError with the file, line and field, and the right names where one is wrong.
"""
from __future__ import annotations

import dataclasses
import difflib
import os
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from genie_dynamo.core.config import OPTIONS, Config, is_worker_address
from genie_dynamo.core.errors import ConfigError
from genie_dynamo.runtime.security import Security, is_curve_key, load_public_key

MAX_FILE_BYTES = 1 << 20
MAX_WORKERS = 4096
_TOP_FIELDS = ("workers", "client_key", "options")
_WORKER_FIELDS = ("address", "server_key", "name", "price_per_hour")
_OPTION_FIELDS = tuple(name for name in OPTIONS if name not in ("workers", "cluster"))


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerAddress:
    """One running worker."""

    address: str                        # tcp://HOST:PORT or ipc://PATH
    name: str
    server_key: bytes | None = None     # its public CURVE key; None: a worker without keys
    price_per_hour: float | None = None # None: not known


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterSpec:
    """Running workers, and what this client shows them."""

    workers: tuple[WorkerAddress, ...]
    security: Security = field(default_factory=Security)
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.security.client_secret is None:
            for worker in self.workers:
                if worker.server_key is not None:
                    raise ConfigError(f"worker {worker.name} ({worker.address}) has a server_key, so it asks for "
                                      "this client's key: name client_key (a client.key_secret of `genie keygen`)")


def parse_workers(addresses: Iterable[str]) -> ClusterSpec:
    """`genie.init(workers=["tcp://...", ...])`: workers without keys. Raises: ConfigError."""
    return _cluster({"workers": list(addresses)}, _Place("workers=[...]", Path(), None))


def load_cluster(path: str | os.PathLike[str]) -> ClusterSpec:
    """Read a cluster.yaml. Raises: ConfigError."""
    file = Path(path)
    try:
        if file.stat().st_size > MAX_FILE_BYTES:
            raise ConfigError(f"{file}: {file.stat().st_size} bytes; a cluster.yaml has at most {MAX_FILE_BYTES}")
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"cannot read the cluster file {file}: {exc}") from exc
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        data = yaml.safe_load(text)
    except (yaml.YAMLError, RecursionError, ValueError) as exc:
        raise ConfigError(f"{file}: not YAML: {exc}") from exc
    return _cluster(data, _Place(str(file), file.parent, node))


def connect_spec(config: Config) -> tuple[tuple[WorkerAddress, ...], Security]:
    """The running workers that a configuration names, and the keys for them; none where it starts its own.

    Raises: ConfigError.
    """
    if config.cluster is not None:
        spec = load_cluster(config.cluster)
    elif isinstance(config.workers, tuple):
        spec = parse_workers(config.workers)
    else:
        return (), Security()
    return spec.workers, spec.security


def build_config(**overrides: Any) -> Config:
    """`Config.build` that also reads the options in the cluster file: argument > environment > file > default.

    Raises: ConfigError.
    """
    config = Config.build(**overrides)
    if config.cluster is None:
        return config
    return Config.build(load_cluster(config.cluster).options, **overrides)


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a value stands, for messages: the file, the folder that paths are relative to, the YAML node."""

    label: str
    folder: Path
    node: yaml.Node | None
    field: str = ""

    def into(self, key: str | int) -> _Place:
        name = f"{self.field}[{key}]" if isinstance(key, int) else f"{self.field}.{key}".lstrip(".")
        return dataclasses.replace(self, node=_child(self.node, key), field=name)

    def error(self, problem: str) -> ConfigError:
        line = f", line {self.node.start_mark.line + 1}" if self.node is not None else ""
        where = f"{self.label}{line}{', field ' + self.field if self.field else ''}"
        return ConfigError(f"{where}: {problem}", field=self.field)


def _child(node: yaml.Node | None, key: str | int) -> yaml.Node | None:
    if isinstance(node, yaml.SequenceNode) and isinstance(key, int):
        child: yaml.Node = node.value[key]
        return child
    if isinstance(node, yaml.MappingNode):
        for key_node, value_node in node.value:
            if key_node.value == key:
                return value_node  # type: ignore[no-any-return]
    return node


# ---------------------------------------------------------------- data -> values
def _cluster(data: Any, place: _Place) -> ClusterSpec:
    top = _mapping(data, _TOP_FIELDS, place)
    entries = top.get("workers")
    if not isinstance(entries, list) or not entries:
        raise place.into("workers").error(f"must be a list of at least one worker, not {reprlib.repr(entries)}")
    if len(entries) > MAX_WORKERS:
        raise place.into("workers").error(f"{len(entries)} workers; at most {MAX_WORKERS}")
    workers = tuple(
        _worker(entry, index, place.into("workers").into(index)) for index, entry in enumerate(entries))
    for attribute in ("address", "name"):
        _check_unique([getattr(worker, attribute) for worker in workers], attribute, place.into("workers"))
    security = _client_security(top.get("client_key"), place.into("client_key"))
    options = _options(top.get("options"), place.into("options"))
    try:
        return ClusterSpec(workers=workers, security=security, options=options)
    except ConfigError as exc:
        raise place.error(str(exc)) from exc


def _worker(entry: Any, index: int, place: _Place) -> WorkerAddress:
    if isinstance(entry, str):
        entry = {"address": entry}
    fields = _mapping(entry, _WORKER_FIELDS, place)
    if "address" not in fields:
        raise place.error("a worker without an address; give address: tcp://HOST:PORT")
    address = _text(fields["address"], place.into("address"))
    if not is_worker_address(address):
        raise place.into("address").error(f"{address!r} is neither tcp://HOST:PORT nor ipc://PATH")
    name = _text(fields["name"], place.into("name")) if "name" in fields else f"w{index}"
    key = fields.get("server_key")
    server_key = None if key is None else _public_key(_text(key, place.into("server_key")), place.into("server_key"))
    price = fields.get("price_per_hour")
    if price is not None and (isinstance(price, bool) or not isinstance(price, int | float)
                              or not 0 <= price < float("inf")):
        raise place.into("price_per_hour").error(f"must be a number of at least 0, not {reprlib.repr(price)}")
    return WorkerAddress(address=address, name=name, server_key=server_key,
                         price_per_hour=None if price is None else float(price))


def _public_key(text: str, place: _Place) -> bytes:
    """A key is its 40 characters; everything else is a path."""
    path = place.folder / text
    if len(text) == 40 and not path.exists():
        if not is_curve_key(text.encode()):
            raise place.error(f"{text!r} is neither a CURVE key (40 characters of z85) nor a file")
        return text.encode()
    try:
        return load_public_key(path)
    except ConfigError as exc:
        raise place.error(str(exc)) from exc


def _client_security(value: Any, place: _Place) -> Security:
    if value is None:
        return Security()
    try:
        return Security.for_client(place.folder / _text(value, place))
    except ConfigError as exc:
        raise place.error(str(exc)) from exc


def _options(value: Any, place: _Place) -> dict[str, Any]:
    """Checked like arguments of genie.init, but not merged: an argument still goes first."""
    options = _mapping(value if value is not None else {}, _OPTION_FIELDS, place)
    for name, given in options.items():
        try:
            Config(**{name: given})
        except ConfigError as exc:
            raise place.into(name).error(str(exc)) from exc
    return options


def _mapping(data: Any, allowed: Sequence[str], place: _Place) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise place.error(f"must be a mapping with {', '.join(allowed)}, not {reprlib.repr(data)}")
    for key in data:
        if key not in allowed:
            near = difflib.get_close_matches(str(key), allowed, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise place.into(str(key)).error(f"unknown field {key!r}; {hint}there are: {', '.join(allowed)}")
    return data


def _text(value: Any, place: _Place) -> str:
    if not isinstance(value, str) or not value:
        raise place.error(f"must be text, not {reprlib.repr(value)}")
    return value


def _check_unique(values: list[str], what: str, place: _Place) -> None:
    for index, value in enumerate(values):
        first = values.index(value)
        if first != index:
            raise place.into(index).error(f"the {what} {value!r} is that of workers[{first}] already")
