"""The configuration: one frozen value, built once and passed down.

Order: argument > environment > default. Every option is one field of `Config`; its metadata holds what it may
be and its one-line doc, and `ENV_TABLE` (all GENIE_* names that the running library reads) is made from that.

Raises: ConfigError for an unknown option or a bad value, naming where it came from, what is allowed and the
nearest right names; also for an option whose feature is not there yet, asked for more than its default.
"""
from __future__ import annotations

import dataclasses
import difflib
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Self, cast

from genie_dynamo.core.errors import ConfigError

Policy = Literal["min_latency", "max_throughput", "min_cost"]
Awareness = Literal["full", "weights", "blind"]
WorkerCompiler = Literal["flat", "inductor", "auto"]
OnWorkerLoss = Literal["retry", "local", "error"]
CompressionOption = Literal["off", "lz4", "zstd", "auto"]
Progress = Literal["auto", "on", "off"]

LOG_LEVELS = {"DEBUG": 10, "INFO": 20, "WARNING": 30, "ERROR": 40, "CRITICAL": 50}
MAX_EMBEDDED_WORKERS = 256
HOUSEKEEPING_S = 1.0       # a client tells each worker this often that it lives
MIN_LEASE_S = 3 * HOUSEKEEPING_S
MAX_THREADS = 4096
_ADDRESS = re.compile(r"tcp://(\[[0-9A-Fa-f:.%\w]+\]|[^\s:/\[\]]+):(\d{1,5})$|ipc://\S+$")
_DPDK_PORT = re.compile(r"memif|(?:af_packet|af_xdp):[^\s:/]{1,15}|pci:[0-9a-fA-F:.]+")
_MODULE = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*$")


class _Bad(Exception):
    """Says what would have been right: 'one of a, b' or 'a number above 0'."""


Parser = Callable[[Any], Any]   # value (a str when it comes from the environment) -> checked value, or _Bad


# ---------------------------------------------------------------- what a value may be
def _choice(*allowed: str) -> Parser:
    def parse(value: Any) -> str:
        if isinstance(value, str) and value in allowed:
            return value
        near = difflib.get_close_matches(str(value), allowed, n=1)
        hint = f" (did you mean {near[0]!r}?)" if near else ""
        raise _Bad(f"one of {', '.join(map(repr, allowed))}{hint}")

    return parse


def _boolean(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else None
    if word in ("1", "true", "yes", "on"):
        return True
    if word in ("0", "false", "no", "off"):
        return False
    raise _Bad("True or False (in the environment: 1, 0, true, false, yes, no, on, off)")


def _number(low: float, high: float, *, above: bool = False) -> Parser:
    """A float in [low, high], or (low, high] when `above`."""
    span = f"a number {'above' if above else 'from'} {low:g} {'and at most' if above else 'to'} {high:g}"

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise _Bad(span)
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise _Bad(span) from None
        if not low <= number <= high or (above and number == low):   # nan fails the first
            raise _Bad(span)
        return number

    return parse


def _integer(low: int, high: int) -> Parser:
    def parse(value: Any) -> int:
        if isinstance(value, str) and re.fullmatch(r"[+-]?\d{1,12}", value.strip()):
            value = int(value)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise _Bad(f"a whole number from {low} to {high}")
        return value

    return parse


def _optional(parse: Parser) -> Parser:
    def parse_optional(value: Any) -> Any:
        if value is None or (isinstance(value, str) and value.lower() in ("", "none")):
            return None
        try:
            return parse(value)
        except _Bad as exc:
            raise _Bad(f"None or {exc}") from None

    return parse_optional


def _words(value: Any) -> tuple[str, ...] | None:
    """A list of strings, or one string with commas; None for anything else."""
    if isinstance(value, str):
        return tuple(word.strip() for word in value.split(",") if word.strip())
    if isinstance(value, (list, tuple)) and all(isinstance(word, str) for word in value):
        return tuple(value)
    return None


def _modules(value: Any) -> tuple[str, ...]:
    words = _words(value)
    if words is None or not all(_MODULE.match(word) for word in words):
        raise _Bad("names of importable modules, as ['my_ops', 'pkg.ops'] (in the environment with commas)")
    return words


def _workers(value: Any) -> int | tuple[str, ...]:
    what = (f"a number of embedded workers from 1 to {MAX_EMBEDDED_WORKERS}, or addresses such as "
            "['tcp://10.0.0.1:5555'] (in the environment with commas)")
    if isinstance(value, str) and value.strip().isdigit():
        value = int(value)
    if isinstance(value, int):
        if isinstance(value, bool) or not 1 <= value <= MAX_EMBEDDED_WORKERS:
            raise _Bad(what)
        return value
    words = _words(value)
    if not words:
        raise _Bad(what)
    for word in words:
        if not is_worker_address(word):
            raise _Bad(f"{what}; {word!r} is neither tcp://HOST:PORT nor ipc://PATH")
    if len(set(words)) != len(words):
        raise _Bad(f"{what}, each of them once")
    return words


def _dpdk_port(value: Any) -> str:
    if not isinstance(value, str) or not _DPDK_PORT.fullmatch(value):
        raise _Bad("memif, af_packet:INTERFACE, af_xdp:INTERFACE or pci:ADDRESS")
    return value


def _cluster(value: Any) -> str:
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value:
        raise _Bad("the path of a cluster.yaml")
    if value == "ray":
        raise _Bad("the path of a cluster.yaml; 'ray' is not available yet")
    return value


def _log_level(value: Any) -> str:
    if isinstance(value, str) and value.upper() in LOG_LEVELS:
        return value.upper()
    for name, number in LOG_LEVELS.items():
        if not isinstance(value, bool) and str(value) == str(number):
            return name
    raise _Bad(f"one of {', '.join(LOG_LEVELS)} (or {', '.join(map(str, LOG_LEVELS.values()))})")


def _not_yet(parse: Parser, *available: Any) -> Parser:
    """What asks for a feature that does not exist yet is refused in these words, not ignored."""

    def parse_available(value: Any) -> Any:
        try:
            parsed = parse(value)
        except _Bad:
            parsed = value
        if parsed not in available:
            right = " or ".join(map(repr, available))
            raise _Bad(f"{right}: the rest is not available yet in this release")
        return parsed

    return parse_available


def is_worker_address(text: str) -> bool:
    """True for tcp://HOST:PORT (IPv6 in brackets, port 1..65535) and ipc://PATH."""
    match = _ADDRESS.match(text)
    return match is not None and (match.group(2) is None or 1 <= int(match.group(2)) <= 65535)


# ---------------------------------------------------------------- the options
def _per_session(parse: Parser, doc: str) -> dict[str, Any]:
    return {"parse": parse, "doc": doc, "per_compile": False}


def _per_compile(parse: Parser, doc: str) -> dict[str, Any]:
    """The metadata of an option that `torch.compile(options=...)` takes too."""
    return {"parse": parse, "doc": doc, "per_compile": True}


@dataclass(frozen=True, slots=True, kw_only=True)
class Config:
    """Every option. Make one with `Config.build(...)`; a direct construction is checked too."""

    policy: Policy = field(default="min_latency", metadata=_per_compile(
        _choice("min_latency", "max_throughput", "min_cost"), "what placement minimises; min_cost needs prices in "
        "cluster.yaml"))
    latency_bound_s: float | None = field(default=None, metadata=_per_compile(
        _optional(_number(0, 1e6, above=True)), "min_cost: the longest estimate that a graph's call may have"))
    awareness: Awareness = field(default="full", metadata=_per_compile(
        _choice("full", "weights", "blind"),
        "what stays on workers: full (weights, and caches and other state), weights, blind (nothing)"))
    worker_compiler: WorkerCompiler = field(default="flat", metadata=_per_compile(
        _choice("flat", "inductor", "auto"), "how workers run a fragment; auto takes the faster"))
    strict: bool = field(default=False, metadata=_per_compile(
        _boolean, "raise UnsupportedGraphError instead of running locally what cannot be shipped"))
    timeout_s: float = field(default=300.0, metadata=_per_compile(
        _number(0, 1e6, above=True), "deadline of one request"))
    connect_timeout_s: float = field(default=20.0, metadata=_per_session(
        _number(0, 1e6, above=True), "deadline for starting or reaching a worker"))
    on_worker_loss: OnWorkerLoss = field(default="retry", metadata=_per_compile(
        _choice("retry", "local", "error"), "a worker is lost in a call: run on another, locally, or raise"))
    verify: float = field(default=0.0, metadata=_per_compile(
        _number(0, 1), "fraction of calls that are compared with local eager"))
    parameters: Literal["local", "remote"] = field(default="local", metadata=_per_compile(
        _choice("local", "remote"), "where what a compiled optimizer.step changes lives: here too, or on its worker "
        "until it is read or genie.synchronize is called"))
    microbatches: int = field(default=1, metadata=_per_compile(
        _integer(1, 4096), "parts that a batch is cut into, so that they follow each other through workers"))
    require_lane: str | None = field(default=None, metadata=_per_compile(
        _optional(_choice("zmq", "stream", "tcp", "shm", "dpdk")),
        "refuse to run when payload would use another lane"))
    busy_poll_s: float = field(default=0.0, metadata=_per_session(
        _number(0, 1), "how long a thread that waits for an answer over a native lane polls before it sleeps; it keeps "
        "its core busy meanwhile"))
    compression: CompressionOption = field(default="off", metadata=_per_session(
        _choice("off", "lz4", "zstd", "auto"), "compress payload over tcp and ZeroMQ to other hosts where a sample "
        "says that it pays; auto: by whichever library both sides have"))
    dpdk_port: str | None = field(default=None, metadata=_per_session(
        _optional(_dpdk_port), "this end of the dpdk lane: memif, af_packet:INTERFACE, af_xdp:INTERFACE, pci:ADDRESS"))
    qos: str | None = field(default=None, metadata=_per_compile(
        _not_yet(_optional(_choice("realtime", "interactive", "batch")), None),
        "class of service of this model's calls"))
    deadline_s: float | None = field(default=None, metadata=_per_compile(
        _not_yet(_optional(_number(0, 1e6, above=True)), None), "latency that scheduling aims at for a call"))
    heartbeat_interval_s: float = field(default=1.0, metadata=_per_session(
        _number(0, 3600, above=True), "time between two heartbeats of one worker"))
    heartbeat_timeout_s: float = field(default=10.0, metadata=_per_session(
        _number(0, 3600, above=True), "silence after which a worker is lost"))
    session_lease_s: float = field(default=60.0, metadata=_per_session(
        _number(0, 86400, above=True), "silence after which a worker drops a client and all it holds for it"))
    num_threads: int | None = field(default=None, metadata=_per_session(
        _optional(_integer(1, MAX_THREADS)), "compute threads of an embedded worker (None: shared out)"))
    fingerprint_samples: int = field(default=8, metadata=_per_session(
        _integer(0, 4096), "elements sampled per trainable parameter to see edits that torch does not count"))
    resident_quota_gib: float | None = field(default=None, metadata=_per_session(
        _optional(_number(0, 1e6, above=True)),
        "GiB that a session may keep on an embedded worker (None: 60 % of its memory limit)"))
    observe: bool = field(default=True, metadata=_per_session(
        _boolean, "time the ops of placed graphs now and then, and keep the times for estimates to come"))
    progress: Progress = field(default="auto", metadata=_per_session(
        _choice("auto", "on", "off"), "progress bars: on a terminal, always, never"))
    workers: int | tuple[str, ...] | None = field(default=None, metadata=_per_session(
        _optional(_workers), "number of embedded workers, or addresses of running ones"))
    cluster: str | None = field(default=None, metadata=_per_session(
        _optional(_cluster), "path of a cluster.yaml that lists running workers"))
    op_libraries: tuple[str, ...] = field(default=(), metadata=_per_session(
        _modules, "modules with torch.library ops that embedded workers import at start"))
    log_level: str = field(default="WARNING", metadata=_per_session(
        _log_level, "threshold of the genie_dynamo loggers"))

    def __post_init__(self) -> None:
        for name in OPTIONS:
            object.__setattr__(self, name, _parsed(name, getattr(self, name), name))
        if self.heartbeat_timeout_s < 2 * self.heartbeat_interval_s:
            raise ConfigError(
                f"heartbeat_timeout_s={self.heartbeat_timeout_s:g} leaves no room for a lost heartbeat at "
                f"heartbeat_interval_s={self.heartbeat_interval_s:g}; make it at least twice the interval",
                option="heartbeat_timeout_s")
        if self.session_lease_s < MIN_LEASE_S:
            raise ConfigError(
                f"session_lease_s={self.session_lease_s:g} ends between two signs of life, which a client sends its "
                f"workers every {HOUSEKEEPING_S:g} s; make it at least {MIN_LEASE_S:g}", option="session_lease_s")
        if self.latency_bound_s is not None and self.policy != "min_cost":
            raise ConfigError(f"latency_bound_s={self.latency_bound_s:g} bounds min_cost; policy={self.policy!r} has "
                              "no use for it", option="latency_bound_s")
        if self.parameters == "remote" and self.awareness == "blind":
            raise ConfigError("parameters='remote' leaves parameters on their worker, and awareness='blind' keeps "
                              "nothing there; choose one of them", option="parameters")
        if self.workers is not None and self.cluster is not None:
            raise ConfigError(
                f"both workers={self.workers!r} and cluster={self.cluster!r} are given; keep one of them",
                option="workers")

    @classmethod
    def build(cls, file_options: Mapping[str, Any] | None = None, /, **overrides: Any) -> Self:
        """Arguments over the environment over a file's options over defaults.

        `workers` and `cluster` say the same thing: an argument for one hides the environment's other.
        Raises: ConfigError.
        """
        _check_names(overrides, tuple(OPTIONS), "option")
        values = _from_environment(os.environ)
        for one, other in (("workers", "cluster"), ("cluster", "workers")):
            if overrides.get(one) is not None:
                values.pop(other, None)
        return cls(**(dict(file_options or {}) | values | overrides))

    def override(self, **overrides: Any) -> Self:
        """This configuration with other values; the environment is not read again. Raises: ConfigError."""
        _check_names(overrides, tuple(OPTIONS), "option")
        return dataclasses.replace(self, **overrides)

    def for_compile(self, options: Mapping[str, Any] | None) -> Self:
        """This configuration for one compile: `torch.compile(options=...)` or `genie.compile(**options)`.

        Raises: ConfigError, also for options that belong to a session and not to one compile.
        """
        given = dict(options or {})
        for name in given:
            if name in OPTIONS and name not in COMPILE_OPTIONS:
                raise ConfigError(
                    f"option {name!r} belongs to a session, not to one compile: give it to "
                    f"genie.init({name}=...) or set {env_name(name)}; "
                    f"a compile takes {', '.join(sorted(COMPILE_OPTIONS))}",
                    option=name)
        _check_names(given, tuple(COMPILE_OPTIONS), "compile option")
        return dataclasses.replace(self, **given)

    @property
    def log_level_number(self) -> int:
        """The threshold as the logging module counts."""
        return LOG_LEVELS[self.log_level]


class EnvOption(NamedTuple):
    """One row of ENV_TABLE."""

    field: str
    type: str
    default: Any
    doc: str


def env_name(field: str) -> str:
    """The environment variable of an option: policy -> GENIE_POLICY."""
    return "GENIE_" + field.upper()


OPTIONS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(Config)}
COMPILE_OPTIONS: frozenset[str] = frozenset(n for n, f in OPTIONS.items() if f.metadata["per_compile"])
ENV_TABLE: dict[str, EnvOption] = {
    env_name(n): EnvOption(n, cast(str, f.type), f.default, f.metadata["doc"]) for n, f in OPTIONS.items()
}
# Read by the Makefile and the build, not by the library; here so that all names stand in one file.
SETUP_TABLE: dict[str, str] = {
    "GENIE_SYSTEM": "0: set-up changes nothing system-wide (no apt, no hugepages)",
    "GENIE_REQUIRE_NATIVE": "1: a build without the native extension is an error",
}


def _parsed(name: str, value: Any, where: str) -> Any:
    try:
        return OPTIONS[name].metadata["parse"](value)
    except _Bad as exc:
        raise ConfigError(f"{where}={value!r}: must be {exc}", option=name, value=value) from None


def _check_names(given: Mapping[str, Any], allowed: tuple[str, ...], what: str) -> None:
    for name in given:
        if name in allowed:
            continue
        near = difflib.get_close_matches(str(name), allowed, n=3)
        hint = f"did you mean {' or '.join(map(repr, near))}? " if near else ""
        raise ConfigError(
            f"unknown {what} {name!r}; {hint}there are: {', '.join(sorted(allowed))}",
            option=name, nearest=tuple(near))


def _from_environment(environment: Mapping[str, str]) -> dict[str, Any]:
    """What GENIE_* variables say; an empty one says nothing. An unknown name is an error only if it looks
    like a misspelt one of ours: another program may own it."""
    values: dict[str, Any] = {}
    for name, text in environment.items():
        if not name.startswith("GENIE_") or name in SETUP_TABLE or not text:
            continue
        if name not in ENV_TABLE:
            fields = [row.field for row in ENV_TABLE.values()]
            near = difflib.get_close_matches(name.removeprefix("GENIE_").lower(), fields, n=1, cutoff=0.8)
            if near:
                raise ConfigError(
                    f"unknown environment variable {name}={text!r}; did you mean {env_name(near[0])}?",
                    option=name, nearest=tuple(map(env_name, near)))
            continue
        option = ENV_TABLE[name].field
        values[option] = _parsed(option, text, f"environment variable {name}")
    return values
