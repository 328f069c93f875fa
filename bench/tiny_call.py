"""The smallest remote call: 1 KB in, one op, 1 KB out.

Floor: a bare pyzmq DEALER/ROUTER echo of 1 KB with a process over the same kind of transport. What is left is
what the client (guards, argument check, message) and the worker (message, run, message) add. "pyzmq ipc, op run" is
the same echo with the op between: two processes that use torch leave each other's caches and the sockets' code cold,
and this side shows how much of the distance from the floor that is. "pyzmq ipc, a core each" is the echo with all
threads of either end on a core of their own, as genie's ends lie; where the scheduler puts them otherwise varies.
"""
from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import BUSY_POLL_S, Case, Settings, Side, Step, measure, ratio_target

LIMIT_OVER_FLOOR = 1.6
OP_RUN = "pyzmq ipc, op run"
APART = "pyzmq ipc, a core each"
POLLING = "genie ipc, busy polling"


def _step(run: Callable[[Any], Any], params: Mapping[str, Any], **more: Any) -> Step:
    from bench import workloads

    x = workloads.tiny_input()
    for _ in range(3):
        run(x)
    # The input is written before each call, so that no side can answer from what it has seen.
    return Step(call=lambda: run(x), prepare=lambda: x.add_(1),
                checksum=lambda: workloads.fingerprint(run(workloads.tiny_input())), **more)


def genie(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    remote = workloads.remote(params)
    return _step(remote.compile(workloads.tiny), params, facts=remote.counters, close=remote.close)


def local(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    return _step(workloads.local(workloads.tiny, params["how"]), params)


def pyzmq(params: Mapping[str, Any]) -> Step:
    from bench.echo import Peer

    peer, payload = Peer("echo", params["transport"]), bytes(1024)
    send, recv = peer.socket.send, peer.socket.recv

    def call() -> None:
        send(payload)
        recv()

    call()
    if params.get("apart"):
        peer.part()
    return Step(call=call, close=peer.close)


SIDES = {"genie": genie, "local": local, "pyzmq": pyzmq}


def run(settings: Settings) -> Iterator[Case]:
    transports = ("ipc",) if settings.quick else ("ipc", "tcp")
    for threads, pinned in settings.placements():
        common = {"backend": settings.backend, "threads": threads}
        sides = [Side(module=__name__, factory="local", name=f"local {how}", process="local", params={"how": how})
                 for how in ("eager", "empty")]
        for kind in transports:
            params = {**common, "transport": kind}
            sides += [Side(module=__name__, factory="pyzmq", name=f"pyzmq {kind}", params=params),
                      Side(module=__name__, factory="genie", name=f"genie {kind}", params=params)]
        if not (pinned or settings.quick) and len(os.sched_getaffinity(0)) > 1:
            sides.append(Side(module=__name__, factory="pyzmq", name=APART, params={
                **common, "transport": "ipc", "apart": True}))
        if not pinned:
            sides.append(Side(module=__name__, factory="genie", name=POLLING, params={
                **common, "busy_poll_s": BUSY_POLL_S}))
        if not settings.quick:
            sides.append(Side(module="bench.peers", factory="pyzmq", name=OP_RUN, params={"work": "tiny"}))
        seen = measure(settings, sides, blocks=1 if settings.quick else 4, samples=50 if settings.quick else 250,
                       settle=20, threads=threads, pinned=pinned)
        ratios, targets = [], []
        for kind in transports:
            over_floor = seen.ratio(f"genie {kind}", f"pyzmq {kind}")
            ratios += [over_floor] + [seen.ratio(f"genie {kind}", f"local {how}") for how in ("empty", "eager")]
            targets.append(ratio_target(f"tiny call over the pyzmq floor ({kind})", over_floor, LIMIT_OVER_FLOOR))
        if POLLING in seen:
            ratios.append(seen.ratio(POLLING, "pyzmq ipc"))
        if APART in seen:
            ratios.append(seen.ratio("genie ipc", APART))
        if OP_RUN in seen:
            ratios.append(seen.ratio("genie ipc", OP_RUN))
        yield Case(bench="tiny_call", title="1 KB in, one op, 1 KB out", threads=threads, pinned=pinned,
                   series=seen.series, ratios=tuple(ratios), targets=tuple(targets), per_call=seen.per_call)
