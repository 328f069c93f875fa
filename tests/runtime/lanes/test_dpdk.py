"""A GPT-2 whose payload takes the dpdk lane and nothing else, over every kind of port that needs no NIC."""
from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from genie_dynamo.core.errors import ConfigError
from genie_dynamo.runtime.lanes import dpdk
from tests.runtime.lanes import networks

pytestmark = pytest.mark.heavy

ROOT = Path(__file__).resolve().parents[3]
START_S = 120.0


def client(port: str, *address: str, prefix: tuple[str, ...] = (), environment: dict[str, str] | None = None) -> Any:
    """What gpt2_over_dpdk.py says."""
    done = subprocess.run(
        [*prefix, sys.executable, "-m", "tests.runtime.lanes.gpt2_over_dpdk", port, *address], cwd=ROOT,
        env=os.environ | (environment or {}), capture_output=True, text=True, timeout=START_S, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@contextlib.contextmanager
def worker(port: str, prefix: list[str]) -> Iterator[str]:
    """Address of a worker in another namespace; its control socket is a Unix one, which every namespace reaches."""
    with tempfile.TemporaryDirectory(prefix="genie-t-") as directory, Path(directory, "log").open("wb") as log:
        address = f"ipc://{directory}/worker"
        process = subprocess.Popen(
            [*prefix, sys.executable, "-m", "genie_dynamo.cli", "worker", "--bind", address, "--threads", "1",
             "--dpdk-port", port], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            until_s = time.monotonic() + START_S
            while b"genie worker" not in Path(directory, "log").read_bytes():
                assert process.poll() is None and time.monotonic() < until_s, Path(directory, "log").read_text()[-3000:]
                time.sleep(0.05)
            yield address
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            print(Path(directory, "log").read_text()[-3000:])


def check(facts: Any) -> None:
    assert facts["difference"] <= 1e-5
    assert facts["lane"]["name"] == "dpdk"
    assert facts["lane"]["bytes_sent"] > 1_000_000          # the weights at least
    assert facts["same_cores"], "EAL has pinned the threads of this process"


def test_memif_between_client_and_embedded_worker() -> None:
    if why := networks.why_no_dpdk():
        pytest.skip(why)
    check(client("memif"))


def test_af_packet_between_two_namespaces() -> None:
    if why := networks.why_no_namespaces():
        pytest.skip(why)
    with networks.veth(mtu=9000) as pair, worker(f"af_packet:{pair.second_interface}", pair.inside(1)) as address:
        check(client(f"af_packet:{pair.first_interface}", address, prefix=tuple(pair.inside(0))))


def test_af_xdp_between_two_namespaces() -> None:
    if why := networks.why_no_namespaces():
        pytest.skip(why)
    with networks.veth(mtu=3498) as pair, worker(f"af_xdp:{pair.second_interface}", pair.inside(1)) as address:
        check(client(f"af_xdp:{pair.first_interface}", address, prefix=tuple(pair.inside(0))))


def test_a_process_has_one_port(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dpdk, "_port", None)
    dpdk.use_port("memif")
    dpdk.use_port(None)
    dpdk.use_port("memif")
    with pytest.raises(ConfigError, match="has 'memif' already"):
        dpdk.use_port("af_packet:eth0")


def test_without_a_port_it_says_how_to_give_one(monkeypatch: pytest.MonkeyPatch) -> None:
    if why := networks.why_no_dpdk():
        pytest.skip(why)
    monkeypatch.setattr(dpdk, "_port", None)
    assert "GENIE_DPDK_PORT" in dpdk.why_not()
    with pytest.raises(OSError, match="no port was given"):
        dpdk.connect("memif|/nowhere", 1.0)
