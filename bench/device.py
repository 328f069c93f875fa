"""The device `remote_accelerator`: what recording costs, and what a training step and a decoded token cost there.

    ops         seconds per recorded op in steady state, beside the same CPU op in the same process; nothing is
                read; where results stay (in place, into views), handing them over each hundred ops or more is in
    long        10,000 recorded ops planned, loaded and run the first time, beside 2,500: cost per op must not grow
    memory      bytes that a process grows by over 1,000,000 recorded ops in a loop that reads nothing
    training    a step of a small GPT-2 on the device over the same eager step in the other side's process
    decode      bytes that cross per token where sampling is on the device

The training step's eager side is a process of its own with the worker's number of threads: what the worker would do.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import Case, Measurement, Settings, Side, Step, Target, measure, ratio_target

DEVICE = "remote_accelerator"
OPS = 300                    # per sample: well below where a recording is cut
LONG, SHORT = 10_000, 2_500
MEMORY_OPS = 1_000_000
TOKENS = 50

OP_LIMIT_S = 3e-6
LONG_LIMIT = 1.5
MEMORY_LIMIT_BYTES = 8 << 20
STEP_LIMIT = 1.05
TOKEN_LIMIT_BYTES = 2048

_OPS: dict[str, tuple[int, Callable[[Any, Any], Any]]] = {
    "add": (1, lambda x, y: x + y),
    "mul by a number": (1, lambda x, y: x * 1.5),
    "matmul": (1, lambda x, y: x @ y),
    "add_": (1, lambda x, y: x.add_(y)),
    "softmax": (1, lambda x, y: x.softmax(-1)),
    "transpose": (1, lambda x, y: x.t()),
    "view": (1, lambda x, y: x.view(2, 8)),
    "select": (1, lambda x, y: x[1]),
    "slice": (1, lambda x, y: x[1:3]),
    "fill a row (select, fill_)": (2, lambda x, y: x[1].fill_(2.0)),
    "copy a row (select, select, copy_)": (3, lambda x, y: x[1].copy_(y[0])),
}
"""Ops in a call, and the call."""


def _remote(params: Mapping[str, Any]) -> Any:
    from bench import workloads

    return workloads.remote(params)


def op(params: Mapping[str, Any]) -> Step:
    """Seconds per op: of recording on the device, of the op itself on the CPU."""
    import time

    import torch

    torch.set_grad_enabled(False)
    x, y, call = torch.full((4, 4), 0.5), torch.full((4, 4), 1e-9), _OPS[params["op"]][1]
    count = OPS * _OPS[params["op"]][0]
    remote = None
    if params["device"] == DEVICE:
        remote = _remote(params)
        x, y = x.to(DEVICE), y.to(DEVICE)

    def sample() -> float:
        if remote is not None:
            torch.remote_accelerator.synchronize()
        started_s = time.perf_counter()
        for _ in range(OPS):
            call(x, y)
        return (time.perf_counter() - started_s) / count

    for _ in range(20):
        sample()
    return Step(measure=sample, close=remote.close if remote is not None else None)


def long(params: Mapping[str, Any]) -> Step:
    """Seconds per op of a recording that was never seen: to record, plan, load and run it."""
    import time

    import torch

    from genie_dynamo.device import engine

    engine.CUT_OPS = engine.MAX_OPS = 10 * LONG          # as one piece
    remote, count = _remote(params), params["count"]
    torch.set_grad_enabled(False)
    start = torch.zeros(4).to(DEVICE)
    torch.remote_accelerator.synchronize()               # from here on it is
    shapes = iter(range(2, 100_000))

    def sample() -> float:
        width = next(shapes)
        engine.current.programs.clear()
        started_s = time.perf_counter()
        x = start[:1].expand(width)
        for _ in range(count // 2):
            x = (x + 1.0).sin()
        x.cpu()
        return (time.perf_counter() - started_s) / count

    sample()
    return Step(measure=sample, close=remote.close)


def memory(params: Mapping[str, Any]) -> Step:
    """Bytes that this process and its worker grow by over MEMORY_OPS ops."""
    import gc

    import torch

    from bench import procfs

    remote = _remote(params)
    torch.set_grad_enabled(False)
    x = torch.zeros(16).to(DEVICE)
    pids: list[int] = []

    def loop(count: int) -> None:
        nonlocal x
        for _ in range(count // 3):
            x = (x + 1.0) * 0.5
            x.sub_(0.25)
        torch.remote_accelerator.synchronize()

    def size() -> int:
        import os

        gc.collect()
        pids[:] = [os.getpid(), *procfs.descendants(os.getpid())]
        return sum(_resident_bytes(pid) for pid in pids)

    loop(50_000)

    def sample() -> float:
        before = size()
        loop(params["ops"])
        return float(size() - before)

    return Step(measure=sample, close=remote.close)


def _resident_bytes(pid: int) -> int:
    import resource
    from pathlib import Path

    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * resource.getpagesize()


def training(params: Mapping[str, Any]) -> Step:
    """A step of a GPT-2 of two layers with AdamW; the loss is read every time."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    device = params["device"]
    remote = _remote(params) if device == DEVICE else None
    torch.manual_seed(0)
    config = GPT2Config(n_layer=2, n_head=8, n_embd=256, vocab_size=4096, resid_pdrop=0.0, embd_pdrop=0.0,
                        attn_pdrop=0.0)
    model = GPT2LMHeadModel(config).train().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    ids = torch.randint(0, 4096, (params["batch"], 64))

    def call() -> float:
        logits = model(input_ids=ids.to(device), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids.to(device)[:, 1:].flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    first = [call() for _ in range(4)]
    if remote is None:
        return Step(call=call, checksum=lambda: first)
    return Step(call=call, checksum=lambda: first, facts=remote.counters, close=remote.close)


def decode(params: Mapping[str, Any]) -> Step:
    """TOKENS sampled tokens of a Llama of two layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    device = params["device"]
    remote = _remote(params) if device == DEVICE else None
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, hidden_size=256, intermediate_size=512, num_hidden_layers=2,
                                         num_attention_heads=8, num_key_value_heads=4)).eval().to(device)
    prompt = torch.randint(0, 4096, (1, 72))

    def call() -> list[int]:
        torch.manual_seed(1)
        tokens = model.generate(prompt.to(device), do_sample=True, max_new_tokens=TOKENS, pad_token_id=0,
                                eos_token_id=None)
        return tokens[0, -TOKENS:].tolist()  # type: ignore[no-any-return]

    first = [float(token) for token in call()]
    call()
    if remote is None:
        return Step(call=call, checksum=lambda: first)
    return Step(call=call, checksum=lambda: first, facts=remote.counters, close=remote.close)


SIDES = {"op": op, "long": long, "memory": memory, "training": training, "decode": decode}


def run(settings: Settings) -> Iterator[Case]:
    quick = settings.quick
    for name in list(_OPS)[:1] if quick else _OPS:
        seen = measure(settings, [_side("op", where, op=name, device=where) for where in ("cpu", DEVICE)], blocks=1,
                       samples=20)
        yield _case(seen, f"recording: {name}", 1, (
            Target(name=f"recording {name}", value=seen.median(DEVICE), limit=OP_LIMIT_S, unit="s",
                   terms={DEVICE: seen.median(DEVICE), "cpu": seen.median("cpu")}),))
    sides = [_side("long", f"{count} ops", count=count) for count in (SHORT, LONG)]
    seen = measure(settings, sides, blocks=1, samples=1, settle=0)
    yield _case(seen, "a recording that was never seen, per op", 1, (
        ratio_target("10,000 ops over 2,500, per op", seen.ratio(f"{LONG} ops", f"{SHORT} ops"), LONG_LIMIT),))
    ops = MEMORY_OPS // 20 if quick else MEMORY_OPS
    seen = measure(settings, [_side("memory", f"{ops} ops", ops=ops, unit="bytes")], blocks=1, samples=1, settle=0)
    yield _case(seen, "growth over a loop", 1, (
        Target(name=f"growth over {ops} ops", value=seen.median(f"{ops} ops"), limit=MEMORY_LIMIT_BYTES, unit="bytes",
               terms={"growth": seen.median(f"{ops} ops")}),))
    for batch in (4,) if quick else (4, 16):
        seen = measure(settings, [_side("training", where, device=where, batch=batch) for where in ("cpu", DEVICE)],
                       blocks=1, samples=3 if quick else 10, tolerance=1e-3)
        ratio = seen.ratio(DEVICE, "cpu")
        yield _case(seen, f"training step, batch {batch} x 64 tokens", 1, (
            ratio_target(f"device over eager, batch {batch}", ratio, STEP_LIMIT),))
    seen = measure(settings, [_side("decode", where, device=where) for where in ("cpu", DEVICE)], blocks=1,
                   samples=1 if quick else 3, tolerance=0.0)
    moved = seen.per_call[DEVICE]
    per_token = (moved["bytes_sent"] + moved["bytes_received"]) / TOKENS
    yield _case(seen, f"decode of {TOKENS} tokens, sampled on the device", 1, (
        Target(name="bytes per token", value=per_token, limit=TOKEN_LIMIT_BYTES, unit="bytes",
               terms={"up": moved["bytes_sent"] / TOKENS, "down": moved["bytes_received"] / TOKENS}),))


def _side(factory: str, name: str, *, unit: Any = "s", **params: Any) -> Side:
    return Side(module=__name__, factory=factory, name=name, unit=unit, params=params)


def _case(seen: Measurement, title: str, threads: int, targets: tuple[Target, ...]) -> Case:
    labels = list(seen.series)
    ratios = (seen.ratio(labels[-1], labels[0]),) if len(labels) > 1 else ()
    return Case(bench="device", title=title, threads=threads, pinned=False, series=seen.series, ratios=ratios,
                targets=targets, per_call=seen.per_call)
