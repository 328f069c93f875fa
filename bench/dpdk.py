"""The dpdk lane between two processes, against dpdk-testpmd with the same port and frame size plus one memcpy.

memif joins two processes; af_packet stands on a veth pair between two network namespaces. What is lost is lost by the
sending ports themselves, by a seeded generator: this kernel may have no netem. CPU seconds are those of both ends.
"""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from typing import Any

from bench import testpmd
from bench.harness import Case, NotInstalledError, Settings, Side, Step, measure, ratio_target

MIB = 1 << 20
OVER_TESTPMD = 1 / 0.8
OVER_TESTPMD_WITH_DIGEST = 1 / 0.6
WARMUP = 3
"""A receiver has two payloads at once now and then: memory that nobody has touched costs more than the way there."""
LOSSES = {"0.1 % lost": (0.001, 1 / 0.8), "1 % lost": (0.01, 1 / 0.5)}


@contextlib.contextmanager
def _network(port: str) -> Iterator[tuple[tuple[str, str], tuple[list[str], list[str]]]]:
    """Interfaces and command prefixes of both ends. Raises: NotInstalledError where they cannot be had."""
    from tests.runtime.lanes import networks

    if port == "memif":
        yield ("", ""), ([], [])
        return
    if why := networks.why_no_namespaces():
        raise NotInstalledError(why)
    with networks.veth(mtu=9000) as pair:
        yield (pair.first_interface, pair.second_interface), (pair.inside(0), pair.inside(1))


def lane(params: Mapping[str, Any]) -> Step:
    from bench.lane_peer import Peer
    from tests.runtime.lanes import networks

    stack = contextlib.ExitStack()
    (here, there), (own, other) = stack.enter_context(_network(params["port"]))
    if own:
        stack.enter_context(networks.thread_inside(own[-1]))
    os.environ["LANE_DIGEST"] = str(int(params["digest"]))
    os.environ["LANE_LOSS"] = str(params["loss"])
    port = params["port"]
    peer = Peer(f"{params.get('owner', 'dpdk')}:{port}" + (f":{here}" if here else ""),
                there=f"dpdk:{port}" + (f":{there}" if there else ""), prefix=other)
    stack.callback(peer.close)
    payload = bytearray(range(256)) * (params["size"] // 256)

    cpu_s = 0.0

    def seconds() -> float:
        nonlocal cpu_s              # of the calls alone: an idle port is looked at all the time
        before_s, began_s = peer.cpu_s(), time.perf_counter()
        peer.channel.send([b"l", payload], digest=params["digest"])
        peer.channel.receive(60.0)
        took_s = time.perf_counter() - began_s
        cpu_s += peer.cpu_s() - before_s
        return took_s

    def facts() -> Mapping[str, float]:
        counters = peer.channel.statistics()
        names = ("chunks_sent_again", "timeouts", "not_taken", "no_buffer")
        return {"cpu_s": cpu_s} | {name: counters.get(name, 0) for name in names}

    for _ in range(WARMUP):
        seconds()
    return Step(measure=seconds, facts=facts, close=stack.close)


def port_alone(params: Mapping[str, Any]) -> Step:
    """Seconds that testpmd takes for so many bytes, and one memcpy for what it received."""
    stack = contextlib.ExitStack()
    interfaces, prefixes = stack.enter_context(_network(params["port"]))
    size = params["size"]
    source, target = memoryview(bytearray(size)), memoryview(bytearray(size))

    def once() -> float:
        began_s = time.perf_counter()
        target[:] = source
        return time.perf_counter() - began_s

    def seconds() -> float:
        moved_s = size / testpmd.bytes_per_s(params["port"], 2, interfaces, prefixes)
        return moved_s + sorted(once() for _ in range(9))[4]

    return Step(measure=seconds, close=stack.close)


SIDES = {"lane": lane, "port_alone": port_alone}


def run(settings: Settings) -> Iterator[Case]:
    from tests.runtime.lanes import networks

    if why := networks.why_no_dpdk():
        raise NotInstalledError(why)
    for port in ("memif",) if settings.quick or networks.why_no_namespaces() else ("memif", "af_packet"):
        yield _bulk(settings, port, 64 * MIB)
    for size in (1024, 4 * MIB):
        yield _owners(settings, size)


def _bulk(settings: Settings, port: str, size: int) -> Case:
    def side(name: str, loss: float = 0.0, digest: bool = False) -> Side:
        return Side(module=__name__, factory="lane", name=name,
                    params={"port": port, "size": size, "loss": loss, "digest": digest})

    baseline = "testpmd and a memcpy"
    sides = [side("lane"), side("lane, digest", digest=True), *(side(f"lane, {name}", loss) for name, (loss, _) in
                                                              LOSSES.items())]
    alone = Side(module=__name__, factory="port_alone", name=baseline, params={"port": port, "size": size},
                 optional=True)
    # testpmd polls both cores, so it has its turn as one sample a round.
    seen = measure(settings, [*sides, alone], blocks=1, samples=2, settle=0)
    targets, ratios = [], []
    if baseline in seen:
        for name, limit in (("lane", OVER_TESTPMD), ("lane, digest", OVER_TESTPMD_WITH_DIGEST)):
            ratios.append(seen.ratio(name, baseline))
            targets.append(ratio_target(f"{port}: {name} over testpmd and a memcpy", ratios[-1], limit))
    for name, (_, limit) in LOSSES.items():
        ratios.append(seen.ratio(f"lane, {name}", "lane"))
        targets.append(ratio_target(f"{port}: {name}, over nothing lost", ratios[-1], limit))
    rates = ", ".join(f"{label} {size / s.median / 1e9:.2f}" for label, s in seen.series.items())
    cpu = ", ".join(f"{label} {facts['cpu_s'] / size * 1e9:.2f}" for label, facts in seen.per_call.items())
    return Case(bench="dpdk", title=f"{size // MIB} MiB one way over {port}", threads=1, pinned=False,
                series=seen.series, ratios=tuple(ratios), targets=tuple(targets), skipped=seen.skipped,
                per_call=seen.per_call, notes=(f"GB/s: {rates}", f"CPU seconds per GB, both ends: {cpu}",
                                               "frames are lost by the sending ports, not by the network"))


def _owners(settings: Settings, size: int) -> Case:
    """What ADR 8 decides: DPDK in the process that sends, or in a sidecar that has its messages over shm."""
    params = {"port": "memif", "size": size, "loss": 0.0, "digest": False}
    sides = [Side(module=__name__, factory="lane", name="in the process", params=params),
             Side(module=__name__, factory="lane", name="in a sidecar", params={**params, "owner": "sidecar"})]
    seen = measure(settings, sides, blocks=2, samples=200 if size < MIB else 20, settle=3)
    cpu = ", ".join(f"{label} {facts['cpu_s'] * 1e6:.0f}" for label, facts in seen.per_call.items())
    label = f"{size // MIB} MiB" if size >= MIB else f"{size} bytes"
    return Case(bench="dpdk", title=f"{label} one way over memif, answered by one byte: who owns the port", threads=1,
                pinned=False, series=seen.series, ratios=(seen.ratio("in a sidecar", "in the process"),), targets=(),
                per_call=seen.per_call, notes=(f"CPU microseconds a payload, all processes: {cpu}",))
