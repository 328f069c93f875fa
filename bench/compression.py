"""What compression gains and costs between two hosts, by content and by rate of the network.

Client and worker stand in two network namespaces joined by a veth pair whose rate the kernel's token bucket limits (tc
tbf): the rate is the network's, the processors are this machine's, and both ends share them. A call brings 2 MiB that
are new each time and takes one number back. "off" and "auto" are two clients of one worker. Needs root, iproute2, tc.
"""
from __future__ import annotations

import contextlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from bench.harness import ROOT, Case, NotInstalledError, Settings, Side, Step, Target, measure

SIZE_BYTES = 2 << 20
CONTENTS = ("ids", "zeros", "float weights", "bfloat16 weights")
COSTS_AT_MOST = 1.05
"""What it may cost where it does not pay: the samples."""


def _content(kind: str) -> Any:
    import torch

    torch.manual_seed(0)
    if kind == "ids":
        return torch.randint(50_000, (SIZE_BYTES // 8,))
    if kind == "zeros":
        return torch.zeros(SIZE_BYTES // 4)
    weights = torch.randn(SIZE_BYTES // 4) * 0.02
    return weights if kind == "float weights" else torch.cat((weights, weights)).bfloat16()


def call(params: Mapping[str, Any]) -> Step:
    import torch

    import genie_dynamo as genie
    from tests.runtime.lanes import networks

    with contextlib.ExitStack() as stack:
        stack.enter_context(networks.thread_inside(params["namespace"]))
        inside = stack.pop_all()                 # until the end
    genie.init(workers=[params["address"]], require_lane="tcp", compression=params["compression"], strict=True)
    torch.set_num_threads(1)
    x, link = _content(params["content"]), genie.session().links[0]
    run = torch.compile(lambda x: x[:8].sum(), backend="genie")

    def step() -> None:
        with torch.no_grad():
            run(x)

    def change() -> None:
        x[-1] += 1

    def facts() -> Mapping[str, float]:
        found = link.lane_facts()
        return {"bytes_before": found["compression"]["sent_before"], "bytes_after": found["compression"]["sent_after"]}

    def close() -> None:
        genie.shutdown()
        inside.close()

    step()
    return Step(call=step, prepare=change, facts=facts, close=close)


SIDES = {"call": call}


def run(settings: Settings) -> Iterator[Case]:
    from genie_dynamo.runtime.lanes.compression import installed
    from tests.runtime.lanes import networks

    if why := networks.why_no_network() or ("" if shutil.which("tc") else "needs tc (iproute2)"):
        raise NotInstalledError(why)
    if not installed():
        raise NotInstalledError("needs zstandard or lz4: pip install 'genie-dynamo[compression]'")
    for rate in ("1gbit",) if settings.quick else ("100mbit", "1gbit", "10gbit"):
        with networks.veth(mtu=1500) as pair:
            for which, interface in enumerate((pair.first_interface, pair.second_interface)):
                subprocess.run([*pair.inside(which), "tc", "qdisc", "add", "dev", interface, "root", "tbf",
                                "rate", rate, "burst", "512kb", "latency", "50ms"], check=True)
            _, host = networks.give_addresses(pair)
            with _worker(pair.inside(1), host) as address:
                for content in CONTENTS:
                    yield _case(settings, rate, content, address, pair.first)


def _case(settings: Settings, rate: str, content: str, address: str, namespace: str) -> Case:
    sides = [Side(module=__name__, factory="call", name=name,
                  params={"address": address, "namespace": namespace, "content": content, "compression": name})
             for name in ("off", "auto")]
    seen = measure(settings, sides, blocks=2, samples=5 if settings.quick else 10, settle=1)
    ratio, moved = seen.ratio("auto", "off"), seen.per_call["auto"]
    note = (f"compressed: {moved['bytes_before'] / 1e6:.2f} MB of a call's, to {moved['bytes_after'] / 1e6:.2f} MB"
            if moved["bytes_before"] else "compressed: nothing, a sample said that it does not pay")
    terms = {"auto": ratio.numerator, "off": ratio.denominator}
    return Case(bench="compression", title=f"2 MiB of {content} over a veth pair limited to {rate}", threads=1,
                pinned=False, series=seen.series, ratios=(ratio,), per_call=seen.per_call, notes=(note,),
                targets=(Target(name=f"auto over off, {content}, {rate}", value=ratio.value, limit=COSTS_AT_MOST,
                                unit="x", terms=terms),))


@contextlib.contextmanager
def _worker(inside: list[str], host: str) -> Iterator[str]:
    """A worker in a namespace; its address."""
    process = subprocess.Popen(
        [*inside, sys.executable, "-m", "genie_dynamo.cli", "worker", "--bind", f"tcp://{host}:*", "--threads", "1",
         "--allow-anyone-on-the-network"], cwd=ROOT, env=dict(os.environ), stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        found = re.search(r" at (\S+) on cpu", process.stdout.readline())
        if found is None:
            raise RuntimeError("the worker did not say where it is")
        yield found[1]
    finally:
        process.kill()
        process.communicate()
