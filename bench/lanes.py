"""Lanes alone, between two processes: payload against memcpy and a bare C socket, 1 KB there and back against ZeroMQ.

"shm" copies the payload into shared pages once and the receiver reads it there; "shm, both copy" has the receiver copy
it out as well; "shm, in place" sends memory that was the lane's from the start: what each payload costs whatever
its size: waking the other end, and its answer. "shm, awake" is "shm" with a receiver that polls for 0.4 ms before it
sleeps, as workers do after an answer. CPU seconds are those of both ends.
"""
from __future__ import annotations

import struct
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import Case, Settings, Side, Step, Target, measure, ratio_target

MIB = 1 << 20
SHM_OVER_MEMCPY = 1 / 0.8
TCP_OVER_RAW = 1 / 0.9
ECHO_OVER_ZMQ = 0.5
POOL_PAIR_S = 1e-6
POOL_PAIRS = 10_000
SPIN_S = 100e-6
LINGER_S = 400e-6
"""How long a worker stays awake after an answer (runtime/worker/lanes.py)."""
AWAKE = "shm, awake"


def _payload(size: int) -> bytearray:
    return bytearray(range(256)) * (size // 256)


def memcpy(params: Mapping[str, Any]) -> Step:
    source, target = memoryview(_payload(params["size"])), memoryview(bytearray(params["size"]))

    def call() -> None:
        target[:] = source

    return Step(call=call)


def lane(params: Mapping[str, Any]) -> Step:
    from bench.lane_peer import Peer

    peer = Peer(params["kind"], params.get("spin_s", 0.0))
    channel, mode = peer.channel, params["mode"]
    payload: Any = _payload(params["size"])
    if mode == "in place":
        memory = channel.allocate(params["size"])
        memoryview(memory)[:] = payload
        payload = memory
    head = b"c" if mode == "both copy" else b"l"

    def call() -> None:
        channel.send([head, payload])
        channel.receive(60.0)

    return _step(call, peer, peer.copies)


def raw(params: Mapping[str, Any]) -> Step:
    from bench.lane_peer import Peer

    peer, payload = Peer("raw"), bytes(_payload(params["size"]))
    sock, lead = peer.socket, struct.pack("<Q", params["size"])
    send, fd = peer.library.send_all, peer.socket.fileno()

    def call() -> None:
        sock.sendall(lead)
        send(fd, payload, len(payload))
        sock.recv(1)

    return _step(call, peer)


def echo(params: Mapping[str, Any]) -> Step:
    from bench.lane_peer import Peer

    peer, payload = Peer(params["kind"], params["spin_s"]), bytes(1024)
    send, receive, spin_s = peer.channel.send, peer.channel.receive, peer.spin_s

    def call() -> None:
        send([payload])
        receive(60.0, spin_s)

    return _step(call, peer)


def pyzmq(params: Mapping[str, Any]) -> Step:
    from bench import tiny_call

    return tiny_call.pyzmq(params)


def _step(call: Callable[[], None], peer: Any, more: Callable[[], dict[str, float]] = dict) -> Step:
    for _ in range(5):
        call()
    return Step(call=call, facts=lambda: {"cpu_s": peer.cpu_s(), **more()}, close=peer.close)


def pool(params: Mapping[str, Any]) -> Step:
    """Seconds that one slab takes to be lent and given back, from Python."""
    from genie_dynamo import _native

    slabs, size = _native.Pool(), params["size"]

    def seconds() -> float:
        began_s = time.perf_counter()
        for _ in range(POOL_PAIRS):
            slabs.allocate(size)             # nobody keeps it
        return (time.perf_counter() - began_s) / POOL_PAIRS

    def facts() -> Mapping[str, float]:
        counted = slabs.statistics()
        return {name: counted[name] for name in ("num_allocations", "num_segments", "used_bytes")}

    seconds()
    return Step(measure=seconds, facts=facts)


SIDES = {"memcpy": memcpy, "lane": lane, "raw": raw, "echo": echo, "pyzmq": pyzmq, "pool": pool}


def _side(factory: str, name: str, **params: Any) -> Side:
    return Side(module=__name__, factory=factory, name=name, params=params)


def run(settings: Settings) -> Iterator[Case]:
    yield _echoes(settings)
    yield _slabs(settings)
    for size in (4 * MIB,) if settings.quick else (MIB, 4 * MIB, 16 * MIB, 64 * MIB):
        yield _bulk(settings, size)


def _echoes(settings: Settings) -> Case:
    sides = [_side("pyzmq", "pyzmq ipc", transport="ipc"), _side("echo", "shm", kind="shm", spin_s=0.0),
             _side("echo", "shm, busy polling", kind="shm", spin_s=SPIN_S),
             _side("echo", "tcp", kind="tcp", spin_s=0.0)]
    seen = measure(settings, sides, blocks=1 if settings.quick else 4, samples=200, settle=20)
    ratios = [seen.ratio(side.label, "pyzmq ipc") for side in sides[1:]]
    return Case(bench="lanes", title="1 KB there and back", threads=1, pinned=False, series=seen.series,
                ratios=tuple(ratios), per_call=seen.per_call,
                targets=(ratio_target("1 KB over shm over the ZeroMQ echo", ratios[0], ECHO_OVER_ZMQ),))


def _slabs(settings: Settings) -> Case:
    sides = [_side("pool", f"{size >> 10} KiB", size=size) for size in (64 << 10, MIB, 64 * MIB)]
    samples = 5 if settings.quick else 35
    seen = measure(settings, sides, blocks=1, samples=samples, settle=1)
    targets = [Target(name=f"a slab of {label} lent and given back", value=series.median, limit=POOL_PAIR_S, unit="s",
                      terms={label: series.median}) for label, series in seen.series.items()]
    times = POOL_PAIRS * samples * settings.rounds
    return Case(bench="lanes", title=f"slabs of a pool, lent and given back {times:,} times from Python",
                threads=1, pinned=False, series=seen.series, ratios=(), per_call=seen.per_call, targets=tuple(targets),
                notes=("wall time, with Python's own share",))


def _bulk(settings: Settings, size: int) -> Case:
    sides = [_side("memcpy", "memcpy", size=size)]
    sides += [_side("lane", "shm" if mode == "one copy" else f"shm, {mode}", kind="shm", mode=mode, size=size)
              for mode in ("one copy", "both copy", "in place")]
    sides.append(_side("lane", AWAKE, kind="shm", mode="one copy", size=size, spin_s=LINGER_S))
    sides += [_side("raw", "raw C socket", size=size), _side("lane", "tcp", kind="tcp", mode="one copy", size=size)]
    seen = measure(settings, sides, blocks=1 if settings.quick else 3, samples=max(3, min(20, 128 * MIB // size)),
                   settle=2)
    shm, tcp = seen.ratio("shm", "memcpy"), seen.ratio("tcp", "raw C socket")
    targets = [ratio_target(f"{size // MIB} MiB over shm, one copy, over memcpy", shm, SHM_OVER_MEMCPY),
               ratio_target(f"{size // MIB} MiB over shm, one copy, the receiver awake as a worker is, over memcpy",
                            seen.ratio(AWAKE, "memcpy"), SHM_OVER_MEMCPY)]
    if size >= 4 * MIB:
        targets.append(ratio_target(f"{size // MIB} MiB over tcp over a raw C socket", tcp, TCP_OVER_RAW))
    copy_s = seen.series["shm"].median - seen.series["shm, in place"].median
    rates = ", ".join(f"{label} {size / s.median / 1e9:.2f}" for label, s in seen.series.items())
    cpu = ", ".join(f"{label} {facts['cpu_s'] / size * 1e9:.3f}" for label, facts in seen.per_call.items()
                    if "cpu_s" in facts)
    copies = ", ".join(f"{label} {facts['bytes_copied'] / facts['bytes_moved']:.2f}"
                       for label, facts in seen.per_call.items() if facts.get("bytes_moved"))
    return Case(bench="lanes", title=f"{size // MIB} MiB one way, with an answer of one byte", threads=1, pinned=False,
                series=seen.series, ratios=(shm, seen.ratio("shm, in place", "memcpy"), tcp), targets=tuple(targets),
                per_call=seen.per_call, notes=(f"GB/s: {rates}", f"CPU seconds per GB, both ends: {cpu}",
                       f"copies per byte, both ends, without the kernel's: {copies}",
                       f"shm less what it costs in place: {copy_s / seen.series['memcpy'].median:.2f} of memcpy"))
