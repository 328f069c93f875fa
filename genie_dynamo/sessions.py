"""The default session of this process: who opens it, who closes it, and what it has counted."""
from __future__ import annotations

import atexit
import logging
import os
import sys
import threading
from collections.abc import Sequence
from typing import Any, Literal

from genie_dynamo.core.config import Config
from genie_dynamo.core.errors import ConfigError, SessionClosedError, WorkerLostError
from genie_dynamo.runtime.client import stale
from genie_dynamo.runtime.client.session import Session
from genie_dynamo.runtime.cluster import build_config, connect_spec

_lock = threading.RLock()
_default: Session | None = None
_owner_pid = os.getpid()
_config: Config | None = None


def init(workers: int | str | Sequence[str] | None = None, *, cluster: str | os.PathLike[str] | None = None,
         config: Config | None = None, **options: Any) -> Session:
    """Open the default session; an open one is closed first.

    Args:
        workers: how many embedded workers to start, or the addresses of running ones.
        cluster: a cluster.yaml that names running workers and keys.
        config:  a ready configuration; otherwise it is built from the options and the environment.
        options: any option of core/config.py.
    Raises:  ConfigError for a wrong option; WorkerUnreachableError where a worker does not answer.
    """
    global _default, _owner_pid, _config
    if isinstance(workers, str):
        workers = [workers]
    given = {k: v for k, v in {"workers": workers, "cluster": cluster}.items() if v is not None}
    config = config.override(**given, **options) if config is not None else build_config(**given, **options)
    with _lock:
        shutdown()
        logging.getLogger("genie_dynamo").setLevel(config.log_level)
        _default = _open(config, ())
        _owner_pid = os.getpid()
        _config = config
        return _default


def ensure(workers: int | str | Sequence[str]) -> Session:
    """The default session, if it is open and was given exactly these workers; otherwise a new one with them."""
    wanted = Config.build(workers=[workers] if isinstance(workers, str) else workers).workers
    with _lock:
        current = _default
        if (current is not None and not current.closed and _owner_pid == os.getpid()
                and current.config.workers == wanted):
            return current
        return init(wanted)


def session(namespaces: frozenset[str] = frozenset()) -> Session:
    """The default session; opened with embedded workers where there is none.

    Args: namespaces: op namespaces the first graph needs; new embedded workers import the modules that define them.
    """
    global _default, _owner_pid
    current = _default
    if current is None or current.closed or _owner_pid != os.getpid():
        with _lock:
            if _default is None or _default.closed or _owner_pid != os.getpid():
                # A forked child never touches what its parent opened.
                _default = _open(default_config(), _op_modules(namespaces))
                _owner_pid = os.getpid()
            current = _default
    if namespaces and not namespaces <= current.namespaces:
        current.serve(_op_modules(namespaces))
        current.namespaces |= namespaces
    return current


def opened() -> Session | None:
    """The default session where one is open; none is opened for this."""
    current = _default
    return None if current is None or current.closed or _owner_pid != os.getpid() else current


def shutdown() -> None:
    """Close the default session: embedded workers end, running ones forget this client. Safe to call twice."""
    global _default
    with _lock:
        if _default is not None and _owner_pid == os.getpid():
            _default.close()
        _default = None


def default_config() -> Config:
    """What genie.init was given, else the environment and the defaults."""
    return _config if _config is not None else Config.build()


def get_stats() -> dict[str, Any]:
    """Counters since the session began or reset_stats was called; see docs for the shape.

    Raises: SessionClosedError where no session is open.
    """
    current = _default
    if current is None or _owner_pid != os.getpid():
        raise SessionClosedError("no session is open: call genie.init() or run a compiled model first")
    return current.stats()


def reset_stats() -> None:
    """Set all counters to zero."""
    if _default is not None:
        _default.reset_stats()


def invalidate(target: Any) -> None:
    """Tell genie that a tensor, or all of a module, was edited in a way that torch does not count.

    Its content is sent again with the next call that uses it. Raises: TypeError for anything else.
    """
    import torch

    if isinstance(target, torch.Tensor):
        items = [target]
    elif isinstance(target, torch.nn.Module):
        items = [*target.parameters(), *target.buffers()]
    else:
        raise TypeError(f"invalidate takes a tensor or a module, got {type(target).__name__}")
    stale.bring_home()
    if _default is not None:
        _default.residency.touch(items)
    from genie_dynamo.device import foreign

    foreign.forget(items)


def synchronize(target: Any = None, *, lost: Literal["error", "rollback"] = "error") -> None:
    """Bring parameters and optimizer state that live on workers alone (`parameters="remote"`) up to date here.

    All of them, whatever the target: they then are as one and the same step has left them. Reading one does the same.

    Args:
        target: a module or optimizer, for those who read the code.
        lost:   where a worker cannot be asked any more: raise, or take the last synchronised state ("rollback").
    Raises:     WorkerLostError; ConfigError for another `lost`.
    """
    if lost not in ("error", "rollback"):
        raise ConfigError(f"lost={lost!r}: must be 'error' or 'rollback'", option="lost", value=lost)
    try:
        stale.bring_home()
    except WorkerLostError:
        if lost == "error":
            raise
        stale.rollback()


def set_log_level(level: int | str) -> None:
    """Set the threshold of all genie_dynamo loggers, by name or number. Raises: ConfigError for an unknown one."""
    logging.getLogger("genie_dynamo").setLevel(Config.build(log_level=level).log_level_number)


def _open(config: Config, op_libraries: Sequence[str]) -> Session:
    addresses, security = connect_spec(config)
    if config.policy == "min_cost":
        from genie_dynamo.passes.partition import check_prices

        # Before any worker is started. The price of embedded ones cannot be said.
        count = config.workers if isinstance(config.workers, int) else 1
        embedded = {f"embedded worker {n}": None for n in range(count)}
        check_prices({worker.name: worker.price_per_hour for worker in addresses} or embedded)
    return Session(config, addresses, security, op_libraries)


def _op_modules(namespaces: frozenset[str]) -> tuple[str, ...]:
    """Importable modules that define the custom ops of these namespaces in this process."""
    from torch._library.custom_ops import OPDEFS
    from torch._library.simple_registry import singleton

    modules = {str(d._init_fn.__module__) for d in OPDEFS.values() if d._namespace in namespaces}
    # Ops of torch.library.define are known by the file that registered their fake kernel.
    files = {str(kernel.source).rpartition(":")[0] for name, entry in singleton._data.items()
             if name.split("::")[0] in namespaces for kernel in entry.fake_impl.kernels}
    modules |= {name for name, module in list(sys.modules.items()) if getattr(module, "__file__", None) in files}
    return tuple(sorted(modules - {"__main__"}))


atexit.register(shutdown)
