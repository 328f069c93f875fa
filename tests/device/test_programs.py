"""What runs on the worker: loops find their programs again, generation, compiled graphs, a worker that is lost."""
from __future__ import annotations

import copy
import os
import signal
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import genie_dynamo as genie
from genie_dynamo.device import engine as engines

DEVICE = "remote_accelerator"


def _programs() -> int:
    return int(torch.remote_accelerator.stats()["programs"])


def test_a_loop_finds_its_program_again(session: object) -> None:
    x = torch.ones(4, 4, device=DEVICE)
    made = []
    for step in range(6):
        x = (x * (1.0 + step)).relu() / (step + 1.0)
        assert x.sum().item() == 16
        made.append(_programs())
    assert made[-1] == made[2], "numbers that change become inputs of the program"


def test_a_cache_that_grows_finds_its_program_again(session: object) -> None:
    cache = torch.zeros(1, 2, 3, device=DEVICE)
    made = []
    for step in range(8):
        cache = torch.cat([cache, torch.full((1, 1, 3), float(step), device=DEVICE)], 1)
        scores = (cache @ cache.transpose(1, 2)).softmax(-1)
        assert scores.shape == (1, 3 + step, 3 + step)
        assert scores.sum().item() == pytest.approx(3 + step, abs=1e-4)
        made.append(_programs())
    assert made[-1] == made[3]


def test_a_loop_that_reads_nothing_is_cut_where_it_repeats(session: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CUT_OPS", 100)
    monkeypatch.setattr(engines, "MAX_OPS", 300)
    x = torch.zeros(3, device=DEVICE)
    here = torch.zeros(3)
    torch.remote_accelerator.synchronize()
    before = torch.remote_accelerator.stats()
    for _ in range(500):
        x = (x + 1.0).sin()
        x.mul_(0.5)
        here = (here + 1.0).sin()
        here.mul_(0.5)
    after = torch.remote_accelerator.stats()
    assert after["cuts"] - before["cuts"] > 5
    assert after["programs"] - before["programs"] <= 4
    torch.testing.assert_close(x.cpu(), here)


def test_random_ops_draw_once_however_the_recording_is_cut(session: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CUT_OPS", 7)
    monkeypatch.setattr(engines, "MAX_OPS", 9)

    def run(device: str) -> list[Any]:
        torch.manual_seed(5)
        kept = []
        for step in range(30):
            x = torch.nn.functional.dropout(torch.ones(4, device=device), 0.5) + torch.rand(4, device=device)
            x.add_(torch.randn(4, device=device))
            if step % 4 == 0:
                kept.append(x)
            if step % 11 == 0:
                assert x.sum().item() != 0
        return [x.tolist() for x in kept]

    assert run(DEVICE) == run("cpu")


def _llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                         num_attention_heads=4, num_key_value_heads=2)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("sample", [False, True], ids=["greedy", "sampled"])
def test_generate_gives_the_same_tokens_and_moves_little(session: object, sample: bool) -> None:
    model = _llama()
    ids = torch.randint(0, 96, (1, 5))
    options = {"max_new_tokens": 12, "do_sample": sample, "pad_token_id": 0, "eos_token_id": None}
    torch.manual_seed(1)
    want = model.generate(ids, **options)
    there = copy.deepcopy(model).to(DEVICE)
    there.generate(ids.to(DEVICE), **options)
    torch.manual_seed(1)
    genie.reset_stats()
    got = there.generate(ids.to(DEVICE), **options)
    stats = genie.get_stats()
    assert torch.equal(got.cpu(), want)
    # The state of the generator goes up once, where torch.manual_seed has set it: 5 kB.
    assert stats["bytes_sent"] + stats["bytes_received"] - 5056 < 12 * 2048


def test_a_training_loop_moves_the_batch_up_and_the_loss_down(session: object) -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 4))
    there = copy.deepcopy(here).to(DEVICE)
    batches = [(torch.randn(8, 16), torch.randn(8, 4)) for _ in range(6)]

    def train(model: nn.Module, device: str) -> list[float]:
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        losses = []
        for number, (x, y) in enumerate(batches):
            if number == 4:
                genie.reset_stats()
            optimizer.zero_grad()
            loss = nn.functional.mse_loss(model(x.to(device)), y.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            losses.append(loss.item())
        return losses

    want = train(here, "cpu")
    assert train(there, DEVICE) == pytest.approx(want, rel=1e-4)
    stats = genie.get_stats()
    assert stats["by_reason"]["inputs"]["sent"] == 2 * (8 * 16 + 8 * 4) * 4
    assert stats["by_reason"]["outputs"]["received"] == 2 * 4
    for mine, theirs in zip(here.parameters(), there.parameters(), strict=True):
        torch.testing.assert_close(theirs.cpu(), mine, rtol=1e-4, atol=1e-5)


def test_compiled_graphs_run_forward_and_backward(session: object, fresh_dynamo: None) -> None:
    torch.manual_seed(0)
    here = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 2))
    there = copy.deepcopy(here).to(DEVICE)
    compiled = torch.compile(there, backend="genie", fullgraph=True)
    x = torch.randn(5, 4)
    for seed in range(3):
        torch.manual_seed(seed)
        want = here(x)
        want.sum().backward()
        torch.manual_seed(seed)
        got = compiled(x.to(DEVICE))
        got.sum().backward()
        assert got.device.type == DEVICE
        torch.testing.assert_close(got.cpu(), want)
    torch.testing.assert_close(there[0].weight.grad.cpu(), here[0].weight.grad)
    torch.testing.assert_close(there[2].running_var.cpu(), here[2].running_var)
    assert not genie.get_stats()["fallbacks"]


def test_compiled_calls_are_recorded_from_memory(session: object, fresh_dynamo: None, no_lazy_bits: None) -> None:
    def step(state: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        state.mul_(0.5).add_(x)
        transposed = x.t()
        return transposed, state[0], (state * x).t(), state.sort(0)[0]

    compiled = torch.compile(step, backend="genie", fullgraph=True)
    before = torch.remote_accelerator.stats()["replays"]
    here_state = torch.ones(3, 4)
    there_state = here_state.to(DEVICE)
    for number in range(6):
        here_x = torch.full((3, 4), float(number)) + torch.arange(4.0)
        there_x = here_x.to(DEVICE)
        with torch.no_grad():
            want, got = step(here_state, here_x), compiled(there_state, there_x)
        for x in (here_x, there_x):
            x.add_(1)                          # the first output is a view of it
        for a, b in zip(got, want, strict=True):
            assert torch.equal(a.cpu(), b)
            assert a.stride() == b.stride()
        assert torch.equal(there_state.cpu(), here_state)
    assert torch.remote_accelerator.stats()["replays"] - before >= 3
    long = there_state.new_ones(5, 4)          # other sizes are recorded anew
    with torch.no_grad():
        assert torch.equal(compiled(long, long + 1)[2].cpu(), step(torch.ones(5, 4), torch.full((5, 4), 2.0))[2])


def test_compiled_loops_that_read_nothing_are_cut(session: object, fresh_dynamo: None,
                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "CUT_OPS", 100)
    monkeypatch.setattr(engines, "MAX_OPS", 300)
    compiled = torch.compile(lambda x: (x + 1).sin().cos().sin(), backend="genie")
    x, here = torch.zeros(3, device=DEVICE), torch.zeros(3)
    torch.remote_accelerator.synchronize()
    before = torch.remote_accelerator.stats()
    for _ in range(300):
        x, here = compiled(x), (here + 1).sin().cos().sin()
    after = torch.remote_accelerator.stats()
    assert after["cuts"] - before["cuts"] > 5
    torch.testing.assert_close(x.cpu(), here)


def test_a_lost_worker_takes_its_tensors_and_says_so(own_session: Any) -> None:
    session = own_session(workers=1)
    x = torch.ones(3, device=DEVICE)
    y = x + 1
    torch.remote_accelerator.synchronize()
    os.kill(session.links[0].embedded.pid, signal.SIGKILL)
    with pytest.raises(genie.WorkerLostError):
        y.cpu()
    with pytest.raises(genie.WorkerLostError, match="checkpoint"):
        (y * 2).cpu()
    assert (torch.ones(2, device=DEVICE) * 3).tolist() == [3, 3]


def test_a_closed_session_takes_its_tensors_and_says_so(own_session: Any) -> None:
    own_session(workers=1)
    x = torch.ones(3, device=DEVICE)
    torch.remote_accelerator.synchronize()
    own_session(workers=1)
    with pytest.raises(genie.StaleHandleError, match="session that was closed"):
        x.cpu()
    assert torch.ones(1, device=DEVICE).item() == 1


def test_autocast_lowers_products_and_keeps_sums(session: object) -> None:
    torch.manual_seed(0)
    here = nn.Linear(8, 4)
    there = copy.deepcopy(here).to(DEVICE)
    x = torch.randn(3, 8)
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        y = there(x.to(DEVICE))
        loss = y.softmax(-1).log().sum() + nn.functional.scaled_dot_product_attention(*[y[None]] * 3).sum()
    assert (y.dtype, loss.dtype) == (torch.bfloat16, torch.float32)
    loss.backward()
    assert there.weight.grad.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        want = here(x)
    torch.testing.assert_close(y.cpu(), want)
    assert there(x.to(DEVICE)).dtype == torch.float32
