"""Staging for CUDA workers, without a GPU: the order of copies and waits with streams that write down what is asked of
them, and page-locking with a driver that keeps books. What a device does with it was not run."""
from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

from genie_dynamo.runtime.lanes import native
from genie_dynamo.runtime.worker import staging
from genie_dynamo.runtime.worker.staging import SMALL_BYTES, Staging, open_staging, prove

CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(native.module() is None, reason="the native extension is not built")


class Event:
    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self._log, self.done = name, log, False

    def query(self) -> bool:
        return self.done

    def synchronize(self) -> None:
        self._log.append(f"host waits for {self.name}")
        self.done = True


class Streams:
    """Stands in for torch.cuda: every copy happens at once, and what was asked for is in `log`."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.events: list[Event] = []
        self.compute = Stream(self, "compute")
        self._names = iter(("up", "down"))
        self.active = "compute"

    def Stream(self, device: torch.device) -> Stream:
        return Stream(self, next(self._names))

    def current_stream(self, device: torch.device) -> Stream:
        return self.compute

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, self.active = self.active, stream.name
        yield
        self.active = before


class Stream:
    def __init__(self, streams: Streams, name: str) -> None:
        self.streams, self.name = streams, name

    def record_event(self) -> Event:
        assert self.streams.active == self.name
        event = Event(f"{self.name} {len(self.streams.events)}", self.streams.log)
        self.streams.events.append(event)
        self.streams.log.append(f"{self.name} queues a copy")
        return event

    def wait_event(self, event: Event) -> None:
        self.streams.log.append(f"{self.name} waits for {event.name}")

    def wait_stream(self, other: Stream) -> None:
        self.streams.log.append(f"{self.name} waits for {other.name}")


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Streams:
    made = Streams()
    monkeypatch.setattr(torch.Tensor, "record_stream",
                        lambda self, stream: made.log.append(f"memory is held for {stream.name}"))
    return made


@pytest.fixture
def staged(streams: Streams) -> Staging:
    return Staging(CPU, native.module().Pool(), streams)


def test_an_upload_is_waited_for_by_the_device_and_not_by_the_host(staged: Staging, streams: Streams) -> None:
    host = torch.randn(256, 256).t()
    made = staged.up(host)
    assert torch.equal(made, host) and made.stride() == host.stride()
    assert streams.log == ["up queues a copy", "compute waits for up 0", "memory is held for compute"]
    assert staged.counted == {"up": host.nbytes}


def test_host_memory_is_kept_until_the_device_has_read_it(staged: Staging, streams: Streams) -> None:
    pool: Any = staged._pool
    for _ in range(3):
        staged.up(torch.randn(256, 256))
    assert pool.statistics()["used_bytes"] >= 3 * 256 * 256 * 4
    streams.events[0].done = streams.events[1].done = True
    staged.up(torch.randn(256, 256))
    assert pool.statistics()["used_bytes"] < 3 * 256 * 256 * 4


def test_a_download_follows_what_makes_the_value_and_is_complete(staged: Staging, streams: Streams) -> None:
    value = torch.randn(128, 1024)
    assert staged.begin(value) and staged.begin(value)
    assert streams.log == ["down waits for compute", "down queues a copy", "memory is held for down"]
    host = staged.down(value)
    assert torch.equal(host, value) and host.data_ptr() != value.data_ptr()
    assert streams.log[3:] == ["host waits for down 0"] and staged.counted == {"down": value.nbytes}


@pytest.mark.parametrize("value", [
    pytest.param(torch.randn(8, 8), id="small"),
    pytest.param(torch.randn(1, 64).expand(SMALL_BYTES, 64), id="expanded"),
    pytest.param(torch.randn(512, 512)[:, ::2], id="gaps"),
    pytest.param(torch.randn(512, 512, dtype=torch.complex64).conj(), id="conj"),
])
def test_what_gains_nothing_takes_the_plain_way(staged: Staging, streams: Streams, value: torch.Tensor) -> None:
    assert torch.equal(staged.down(value), value)
    assert torch.equal(staged.up(value.resolve_conj()), value)
    assert "down queues a copy" not in streams.log


def test_without_staging_memory_copies_are_plain_and_counted(streams: Streams) -> None:
    short = Staging(CPU, native.module().Pool(limit_bytes=1 << 20), streams)
    value = torch.randn(2 << 20)
    assert torch.equal(short.down(value), value) and torch.equal(short.up(value), value)
    assert short.counted == {"plain": 2 * value.nbytes} and not streams.log
    with pytest.raises(RuntimeError, match="no staging memory"):
        prove(Staging(CPU, native.module().Pool(limit_bytes=1 << 16), Streams()))


def test_results_that_nobody_asks_for_do_not_pile_up(staged: Staging, streams: Streams,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "MAX_BEGUN", 2)
    values = [torch.randn(1 << 15) for _ in range(4)]
    for value in values:
        staged.begin(value)
    assert streams.log.count("host waits for down 0") == 1 and "host waits for down 2" not in streams.log
    assert [torch.equal(staged.down(value), value) for value in values] == [True] * 4


def test_a_pattern_that_comes_back_changed_is_found(staged: Staging, monkeypatch: pytest.MonkeyPatch) -> None:
    prove(staged)
    right = staged.down
    monkeypatch.setattr(staged, "down", lambda value: right(value).add_(1))
    with pytest.raises(RuntimeError, match="changed"):
        prove(staged)


def test_other_devices_have_none() -> None:
    assert open_staging(CPU) is None


DRIVER = """
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
/* A CUDA driver that registers memory and says so on stderr. */
int cuInit(unsigned flags) { return 0; }
int cuDriverGetVersion(int* v) { *v = 12040; return 0; }
int cuDeviceGetCount(int* n) { *n = 1; return 0; }
int cuDeviceGet(int* d, int n) { *d = n; return 0; }
int cuDeviceGetAttribute(int* v, int which, int d) { *v = which == 113 && getenv("READ_ONLY") != NULL; return 0; }
int cuDevicePrimaryCtxRetain(void** c, int d) { static int context; *c = &context; return 0; }
static void* current;
int cuCtxSetCurrent(void* c) { current = c; return 0; }
int cuCtxGetCurrent(void** c) { *c = current; return 0; }
int cuMemHostRegister_v2(void* p, size_t n, unsigned flags) {
  if (current == NULL || getenv("REFUSE") != NULL) return 712;
  fprintf(stderr, "register %p %zu %u\\n", p, n, flags);
  return 0;
}
int cuMemHostUnregister(void* p) { fprintf(stderr, "unregister %p\\n", p); return 0; }
"""
SCRIPT = """
import json, threading
from genie_dynamo import _native
assert _native.pin_segments() == (True, "")
pool = _native.Pool(keep_idle_bytes=0, huge=False)
memory = pool.allocate(1 << 20)
print(json.dumps(_native.pin_statistics()))
del memory
pool.trim()
print(json.dumps(_native.pin_statistics()))
listener = _native.listen("shm", "@genie-test-staging")
got = []
def other():
    while (channel := listener.accept()) is None:
        pass
    got.append(channel.receive(10.0)[1][0])
thread = threading.Thread(target=other)
thread.start()
channel = _native.connect("shm", "@genie-test-staging", 10.0)
channel.send([b"", bytes(8 << 20)])
thread.join()
print(json.dumps(got[0].foreign))
"""


@pytest.mark.parametrize("read_only", [True, False])
def test_what_lanes_map_is_page_locked_until_it_is_unmapped(tmp_path: Path, read_only: bool) -> None:
    ran = _with_driver(tmp_path, {"READ_ONLY": "1"} if read_only else {})
    held, after, foreign = [json.loads(line) for line in ran.stdout.splitlines()]
    assert held["pinned_bytes"] >= 1 << 20 and held["num_pinned"] == 1
    assert after["pinned_bytes"] == 0 and "unregister" in ran.stderr
    calls = [line.split() for line in ran.stderr.splitlines() if line.startswith("register")]
    flags = {int(call[3]) for call in calls}
    assert flags == ({1, 9} if read_only else {1})        # a peer's pages are read-only here: where the device can
    assert foreign


def test_memory_that_the_driver_refuses_is_used_all_the_same(tmp_path: Path) -> None:
    ran = _with_driver(tmp_path, {"REFUSE": "1"})
    first = json.loads(ran.stdout.splitlines()[0])
    assert first == {"pinned_bytes": 0, "num_pinned": 0, "num_refused": 1} and "register" not in ran.stderr


def _with_driver(folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    source = folder / "driver.c"
    source.write_text(DRIVER)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(folder / "libcuda.so.1"), str(source)], check=True, timeout=60)
    ran = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=60, check=False,
                         env={"LD_LIBRARY_PATH": str(folder), "PATH": "/usr/bin:/bin", **environment})
    assert ran.returncode == 0, ran.stderr
    return ran
