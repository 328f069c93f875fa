"""The dpdk lane (native/dpdk/): this process's port, if it was given one, and the lanes over it.

DPDK is started when the first lane is opened or offered, once in the life of a process, and stopped when that ends.
"""
from __future__ import annotations

import atexit
import tempfile
import threading
from pathlib import Path
from typing import Any

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.runtime.lanes import native

KINDS = ("memif", "af_packet:INTERFACE", "af_xdp:INTERFACE", "pci:ADDRESS")

_module: Any = None
_why_not = ""
try:
    from genie_dynamo import _dpdk

    _module = _dpdk
except ImportError as error:
    _why_not = (f"not in this build, or its libraries are not here ({error}); it needs libdpdk when the package is "
                "built (Debian: apt-get install libdpdk-dev)")

_port: str | None = None
_facts: dict[str, Any] = {}
_lock = threading.Lock()


def module() -> Any:
    """genie_dynamo._dpdk, or None; `why_not` then says why."""
    return _module


def why_not() -> str:
    """Why there is no dpdk lane in this process; empty where there may be one."""
    if _module is None:
        return _why_not
    if native.module() is None:
        return native.why_not()
    return "" if _port else ("no port was given: dpdk_port= or GENIE_DPDK_PORT for clients, `genie worker --dpdk-port` "
                             f"for workers ({', '.join(KINDS)})")


def use_port(port: str | None) -> None:
    """Give this process a port. It keeps it: DPDK starts once. Raises: ConfigError for another one than before."""
    global _port
    if port is None:
        return
    if _port is not None and _port != port:
        raise ConfigError(f"dpdk_port={port!r}: this process has {_port!r} already, and DPDK starts once in a process",
                          option="dpdk_port")
    _port = port


def stays_on_host() -> bool:
    """Whether this process's port joins processes of one user on one host only."""
    return _port == "memif"


def listen(directory: Path | None = None, digest: bool | None = None) -> Any:
    """A native Listener on this process's port. Raises: OSError.

    Args: directory: where memif's sockets go, of mode 0700; None makes one.  digest: on every frame that comes here;
        None: where the port leaves the host.
    """
    _start()
    if directory is None and _port == "memif":
        made = tempfile.TemporaryDirectory(prefix="genie-dpdk-")
        atexit.register(made.cleanup)
        directory = Path(made.name)
    return native.module().adopt_listener(_module.listen(_port, str(directory or ""), digest))


def connect(address: str, timeout_s: float, digest: bool | None = None) -> Any:
    """A native Channel to a listener's address. Raises: OSError."""
    _start()
    return native.module().adopt_lane(_module.connect(_port, address, timeout_s, digest))


def facts() -> dict[str, Any]:
    """How DPDK was started here: hugepages, memory, file_prefix, init_s. Empty where it was not."""
    return dict(_facts)


def describe() -> str:
    """What a dpdk lane would be here, for people."""
    on_hardware = _port is not None and _port.startswith("pci:")
    verified = "not verified on hardware" if on_hardware else "verified on virtual ports"
    return f"port {_port}; {verified}; {_facts.get('memory', 'DPDK is started with the first lane')}"


def _start() -> None:
    if why := why_not():
        raise OSError(f"no dpdk lane: {why}")
    with _lock:
        if _facts:
            return
        assert _port is not None
        pci = [_port.removeprefix("pci:")] if _port.startswith("pci:") else []
        _facts.update(_module.start(pci=pci))
        atexit.register(_module.stop)
