"""A GPT-2-small-sized training step: forward and backward compiled, AdamW local, parameters local.

After a step every parameter has changed, so at least this must move: all parameters up, all gradients down, the
tokens up. That over the lane's measured rate is the time a step may take beyond the local one:

    limit = 1.05 x local + 1.2 x (parameter bytes / rate up + gradient bytes / rate down)

The rates are measured in the same run with a bulk transfer through bare sockets of the same kind.
"""
from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from bench.harness import Case, Measurement, Settings, Side, Step, Target, measure

LENGTH = 64
BATCHES = (1, 4, 16)
BULK_FRAMES = 16          # x 8 MiB
_LEARNING_RATE = 1e-4


def _step(compile_with: Callable[..., Any], batch: int, **more: Any) -> Step:
    import torch
    from transformers import GPT2LMHeadModel

    from bench import workloads

    torch.manual_seed(0)
    model = GPT2LMHeadModel(workloads.gpt2_config()).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=_LEARNING_RATE)

    def loss_of(ids: torch.Tensor) -> torch.Tensor:      # the loss alone: logits are no output of the graph
        logits = model(input_ids=ids, use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())

    compiled = compile_with(loss_of)
    ids, seed = workloads.tokens(batch, LENGTH), 0

    def prepare() -> None:
        nonlocal seed
        seed += 1
        ids.copy_(workloads.tokens(batch, LENGTH, seed))

    def call() -> float:
        loss = compiled(ids)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    first_losses = [call() for _ in range(3)]
    return Step(call=call, prepare=prepare, checksum=lambda: first_losses, **more)


def genie(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    remote = workloads.remote(params)
    return _step(remote.compile, params["batch"], facts=remote.counters, close=remote.close)


def local(params: Mapping[str, Any]) -> Step:
    from bench import workloads

    return _step(lambda target: workloads.local(target, params["how"]), params["batch"])


def lane(params: Mapping[str, Any]) -> Step:
    """Seconds for BULK_FRAMES frames in one direction."""
    from bench.echo import BULK_FRAME_BYTES, Peer

    peer = Peer("bulk", "ipc")
    frame = bytearray(BULK_FRAME_BYTES)

    def call() -> None:
        if params["direction"] == "up":
            peer.socket.send_multipart([b"up", *[frame] * BULK_FRAMES], copy=False)
        else:
            peer.socket.send_multipart([b"down", str(BULK_FRAMES).encode()])
        peer.socket.recv_multipart(copy=False)

    call()
    return Step(call=call, close=peer.close)


SIDES = {"genie": genie, "local": local, "lane": lane}


def run(settings: Settings) -> Iterator[Case]:
    for threads in settings.threads:
        for batch in BATCHES[:1] if settings.quick else BATCHES:
            sides = [Side(module=__name__, factory="local", name=f"local {how}", params={
                "how": how, "batch": batch}) for how in ("eager", "empty")]
            sides += [Side(module=__name__, factory="lane", name=f"lane {way}", params={"direction": way})
                      for way in ("up", "down")]
            sides.append(Side(module=__name__, factory="genie", params={
                "backend": settings.backend, "threads": threads, "batch": batch}))
            seen = measure(settings, sides, blocks=1, samples=1 if settings.quick or batch == BATCHES[-1] else 3,
                           settle=1, threads=threads, tolerance=1e-3)
            yield _case(seen, threads, batch)


def _case(seen: Measurement, threads: int, batch: int) -> Case:
    from bench.echo import BULK_FRAME_BYTES

    bulk_bytes = BULK_FRAMES * BULK_FRAME_BYTES
    rate_up, rate_down = bulk_bytes / seen.median("lane up"), bulk_bytes / seen.median("lane down")
    parameter_bytes, token_bytes = _parameter_bytes(), batch * LENGTH * 8
    moving_s = (parameter_bytes + token_bytes) / rate_up + parameter_bytes / rate_down
    best = seen.fastest("local eager", "local empty")
    local_s, genie_s = seen.median(best), seen.median("genie")
    target = Target(
        name=f"training step, batch {batch}: time over 1.05 x local + 1.2 x moving", limit=1.0, unit="x",
        value=genie_s / (1.05 * local_s + 1.2 * moving_s),
        terms={"genie": genie_s, best: local_s, "moving_s": moving_s, "must_move_up_bytes": parameter_bytes,
               "must_move_down_bytes": parameter_bytes, "lane_up_bytes_per_s": rate_up,
               "lane_down_bytes_per_s": rate_down})
    notes = [f"must move per step: {2 * parameter_bytes / 1e6:.0f} MB; lane up {rate_up / 1e9:.2f} GB/s, "
             f"down {rate_down / 1e9:.2f} GB/s: {moving_s * 1e3:.0f} ms"]
    if counters := seen.per_call.get("genie"):
        notes.append(f"moved per step: up {counters['bytes_sent'] / 1e6:.0f} MB, "
                     f"down {counters['bytes_received'] / 1e6:.0f} MB")
    return Case(
        bench="training_step", title=f"GPT-2 small, batch {batch} x {LENGTH} tokens, AdamW", threads=threads,
        pinned=False, series=seen.series, targets=(target,), per_call=seen.per_call, notes=tuple(notes),
        ratios=tuple(seen.ratio("genie", f"local {how}") for how in ("eager", "empty")))


def _parameter_bytes() -> int:
    """GPT-2 small's trainable bytes, the tied embedding once; counted without allocating them."""
    import torch
    from transformers import GPT2LMHeadModel

    from bench import workloads

    with torch.device("meta"):
        model = GPT2LMHeadModel(workloads.gpt2_config())
    model.tie_weights()
    return sum(p.numel() * p.element_size() for p in model.parameters())
