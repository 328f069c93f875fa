"""What DPDK does to a process that has other things to do, each in a process of its own; without NIC or hugepages."""
from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.runtime.lanes import networks

pytestmark = pytest.mark.heavy

PRELUDE = """
import os, sys, threading, tempfile
from genie_dynamo import _dpdk, _native
cores = os.sched_getaffinity(0)
"""


@pytest.fixture(autouse=True)
def _dpdk_is_here() -> None:
    if why := networks.why_no_dpdk():
        pytest.skip(why)


def script(text: str, *prefix: str) -> str:
    """What a process prints that runs `text`; it must end well."""
    done = subprocess.run([*prefix, sys.executable, "-c", PRELUDE + textwrap.dedent(text)], capture_output=True,
                          text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


def test_eal_pins_no_thread_not_even_later_ones() -> None:
    script("""
        _dpdk.start(memory="normal")
        assert os.sched_getaffinity(0) == cores
        later = []
        thread = threading.Thread(target=lambda: later.append(os.sched_getaffinity(0)))
        thread.start(); thread.join()
        assert later == [cores], later
        for task in os.listdir("/proc/self/task"):
            assert os.sched_getaffinity(int(task)) == cores, task
        _dpdk.stop()
    """)


def test_one_start_per_process_also_after_a_stop() -> None:
    out = script("""
        first = _dpdk.start(memory="normal")
        assert _dpdk.start(memory="normal") == first and _dpdk.is_running()
        _dpdk.stop()
        try:
            _dpdk.start(memory="normal")
        except _dpdk.DpdkError as error:
            print(error)
    """)
    assert "once in the life" in out


def test_a_fork_is_refused() -> None:
    out = script("""
        _dpdk.start(memory="normal")
        child = os.fork()
        if child == 0:
            try:
                _dpdk.start(memory="normal")
            except _dpdk.DpdkError as error:
                os.write(1, str(error).encode())
            os._exit(0)
        os.waitpid(child, 0)
        _dpdk.stop()
    """)
    assert "spawn it instead" in out


def test_too_few_hugepages_are_said_before_eal_is_touched() -> None:
    out = script("""
        why = _dpdk.why_no_hugepages(1 << 20)
        try:
            _dpdk.start(memory="hugepages", memory_mb=1 << 20)
        except _dpdk.DpdkError as error:
            print(error)
        print(_dpdk.start(memory="normal")["memory"])      # it can still start
        _dpdk.stop()
    """)
    assert "1048576 MB are needed (sysctl vm.nr_hugepages=524288)" in out
    assert "normal pages, as asked" in out


def test_nothing_is_left_of_a_process_that_was_killed() -> None:
    if why := networks.why_no_namespaces():      # root's directory is looked into
        pytest.skip(why)
    killed = script("""
        facts = _dpdk.start(memory="normal")
        print(facts["file_prefix"], flush=True)
        if os.fork() == 0:
            os._exit(0)
        os.wait()
    """).strip()
    Path("/var/run/dpdk", "genie-999999999").mkdir(parents=True, exist_ok=True)   # as after kill -9: no such process
    script("""_dpdk.start(memory="normal"); _dpdk.stop()""")
    assert not Path("/var/run/dpdk", "genie-999999999").exists()
    assert not Path("/var/run/dpdk", killed).exists()


def test_memif_needs_a_directory_that_only_its_user_may_enter(tmp_path: Path) -> None:
    tmp_path.chmod(0o755)
    out = script(f"""
        _dpdk.start(memory="normal")
        try:
            _dpdk.listen("memif", "{tmp_path}")
        except OSError as error:
            print(error)
        _dpdk.stop()
    """)
    assert "mode 0700" in out


def test_both_ends_need_the_same_kind_of_port() -> None:
    out = script("""
        _dpdk.start(memory="normal")
        for port, address in (("memif", "af_packet|00:00:00:00:00:00|" + "0" * 16), ("carrier_pigeon", "memif|/x"),
                              ("af_packet:nowhere9", "af_packet|00:00:00:00:00:00|" + "0" * 16)):
            try:
                _dpdk.connect(port, address, 1.0)
            except OSError as error:
                print(error)
        _dpdk.stop()
    """)
    assert "kind af_packet, this one is memif" in out
    assert "not 'carrier_pigeon'" in out
    assert "no network interface 'nowhere9'" in out


def test_an_mtu_that_af_xdp_cannot_carry_is_said() -> None:
    if why := networks.why_no_namespaces():
        pytest.skip(why)
    with networks.veth(mtu=9000) as pair:
        out = script(f"""
            _dpdk.start(memory="normal")
            try:
                _dpdk.listen("af_xdp:{pair.first_interface}", "")
            except OSError as error:
                print(error)
            _dpdk.stop()
        """, *pair.inside(0))
    assert f"MTU of '{pair.first_interface}' is 9000, at most 3542" in out
