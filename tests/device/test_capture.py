"""`genie.capture()` and what is done with what it records."""
from __future__ import annotations

import copy
import threading
from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import genie_dynamo as genie
from genie_dynamo import worker_facts
from tests.passes.test_partition import WORKERS, Towers, lane

DEVICE = "remote_accelerator"


def test_factory_calls_go_to_the_device_in_this_thread_alone(session: object) -> None:
    seen: list[str] = []
    with genie.capture():
        with genie.capture():
            inner = torch.zeros(2)
        outer = torch.ones(2) + inner
        thread = threading.Thread(target=lambda: seen.append(torch.ones(1).device.type))
        thread.start()
        thread.join()
        assert torch.ones(1, device="cpu").device.type == "cpu"
    assert (inner.device.type, outer.device.type, seen) == (DEVICE, DEVICE, ["cpu"])
    assert torch.ones(1).device.type == "cpu"
    assert outer.tolist() == [1, 1]


def test_weights_from_outside_go_up_once(session: object) -> None:
    model = nn.Linear(64, 8)
    x = torch.randn(3, 64)
    genie.reset_stats()
    assert torch.allclose(genie.run(model, x), model(x), atol=1e-6)
    first = genie.get_stats()["by_reason"]["inputs"]["sent"]
    genie.reset_stats()
    genie.run(model, x)
    assert genie.get_stats()["by_reason"]["inputs"]["sent"] == x.nbytes < first
    with torch.no_grad():
        model.weight.add_(1)
    assert torch.allclose(genie.run(model, x), model(x), atol=1e-5)


def test_weights_edited_behind_torch_go_up_again(session: object) -> None:
    model = nn.Linear(100, 1, bias=False)
    x = torch.ones(1, 100)
    for value in (1.0, 2.0):
        model.weight.data.fill_(value)
        assert genie.run(model, x).item() == 100 * value
    model.weight.data[0, 5] = 0                # between the elements that are looked at
    genie.invalidate(model)
    assert genie.run(model, x).item() == 198


def test_control_flow_that_hangs_on_values(session: object) -> None:
    def collatz(x: torch.Tensor) -> torch.Tensor:
        steps = torch.zeros((), dtype=torch.int64)
        while x > 1:
            x = x // 2 if x % 2 == 0 else 3 * x + 1
            steps = steps + 1
        return steps

    assert genie.run(collatz, torch.tensor(27)).item() == 111


def test_a_recorded_graph_runs_here_and_there(session: object) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 2))
    with genie.capture(), torch.no_grad():
        x = torch.arange(12.0).reshape(3, 4)
        y = model(x)
    graph = genie.get_graph()
    assert "aten.gelu" in str(graph)
    plan = graph.plan()
    (here,) = [t for t in genie.execute_local(plan, graph.inputs) if t.shape == (3, 2)]
    (there,) = [t for t in genie.execute(plan, graph.inputs) if t.shape == (3, 2)]
    want = model(torch.arange(12.0).reshape(3, 4))
    for got in (here, there, y.cpu()):
        torch.testing.assert_close(got, want.detach())
    with pytest.raises(genie.GenieError, match="inputs"):
        genie.execute(plan, ())


def test_nothing_recorded_is_said(session: object) -> None:
    torch.remote_accelerator.synchronize()
    with pytest.raises(genie.GenieError, match="nothing is recorded"):
        genie.get_graph()


def test_recorded_eager_ops_are_understood(session: object) -> None:
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=96, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                                         num_attention_heads=4, num_key_value_heads=2)).eval()
    there = copy.deepcopy(model).to(DEVICE)
    torch.remote_accelerator.synchronize()
    with genie.capture(), torch.no_grad():
        out = there(input_ids=torch.randint(0, 96, (1, 7)), use_cache=False).logits
    meaning = genie.annotate(genie.get_graph(), there)
    assert len(meaning.of_kind("attention")) == 2
    assert len(meaning.of_kind("gated_mlp")) == 2
    assert out.shape == (1, 7, 96)


def test_devices_and_policies_that_cannot_be_are_refused(session: Any) -> None:
    names = ", ".join(link.name for link in session.links)
    with pytest.raises(genie.ConfigError, match="policy"):
        genie.run(torch.relu, torch.ones(1), policy="fastest")
    for devices in (99, 0, ["w7"], []):
        with pytest.raises(genie.ConfigError, match=names):
            genie.run(torch.relu, torch.ones(1), devices=devices)
    assert genie.run(torch.relu, torch.ones(1), devices=[DEVICE], policy="min_latency").tolist() == [1]


@pytest.fixture
def two_workers(own_session: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Two workers, and facts about them that do not depend on the machine."""
    monkeypatch.setattr(worker_facts, "facts_of", lambda session, *, wait=False: worker_facts.Facts(
        key=worker_facts.incarnations(session), workers=WORKERS, lanes=(lane(),)))
    return own_session(workers=2, num_threads=1)


def _calls() -> dict[str, int]:
    return {name: row["calls"] for name, row in genie.get_stats()["workers"].items() if row["calls"]}


def test_a_model_runs_over_several_workers(two_workers: Any) -> None:
    torch.manual_seed(0)
    model, inputs = Towers().eval(), (torch.randn(256, 512), torch.randn(256, 512))
    with torch.no_grad():
        want = model(*inputs)
    for options, used in (({"devices": 2}, {"w0", "w1"}), ({"policy": "min_latency"}, {"w0", "w1"}),
                          ({"devices": ["w1"]}, {"w1"}), ({"devices": 1}, {"w0"})):
        for again in (False, True):
            genie.reset_stats()
            torch.testing.assert_close(genie.run(model, inputs, **options), want, rtol=0, atol=0)
            assert set(_calls()) == used, options
            if again:                       # the weights are there
                assert genie.get_stats()["bytes_sent"] < 1.1 * sum(x.nbytes for x in inputs)
    with torch.no_grad():
        model.head.weight.add_(1)
        want = model(*inputs)
    torch.testing.assert_close(genie.run(model, inputs, devices=2), want, rtol=0, atol=0)


def test_reads_and_draws_over_several_workers(two_workers: Any) -> None:
    def search(x: torch.Tensor) -> tuple[torch.Tensor, int, torch.Tensor]:
        steps = 0
        while x.abs().sum() > 4:
            x, steps = x / 2, steps + 1
        kept = x[x > 0]
        return kept.sort(descending=True)[0], steps, (kept * 8).round().unique()

    x = torch.tensor([3.0, -7.0, 2.0, 5.0, 1.0])
    for got, want in zip(genie.run(search, x, devices=2), search(x), strict=True):
        torch.testing.assert_close(got, want)
    model = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.BatchNorm1d(4)).train()
    twin, batch = copy.deepcopy(model), torch.randn(6, 4)
    torch.manual_seed(1)
    with torch.no_grad():
        want = twin(batch)
    torch.manual_seed(1)
    torch.testing.assert_close(genie.run(model, batch, devices=2), want)
    torch.testing.assert_close(model[2].running_mean, twin[2].running_mean)


def test_an_error_over_several_workers_names_its_op(two_workers: Any) -> None:
    with pytest.raises(genie.RemoteExecutionError, match="out of bounds"):
        genie.run(lambda x: x[torch.tensor([7])] + 1, torch.ones(3), devices=2)
    assert genie.run(lambda x: x + 1, torch.ones(2), devices=2).tolist() == [2, 2]


def test_a_recorded_graph_is_planned_over_several_workers(two_workers: Any) -> None:
    model = Towers().eval()
    with genie.capture(), torch.no_grad():
        y = model(torch.ones(256, 512), torch.full((256, 512), 0.5))
    graph = genie.get_graph()
    plan = graph.plan(devices=2, policy="min_latency")
    assert plan.workers == ("w0", "w1")
    genie.reset_stats()
    there, here = genie.execute(plan, graph.inputs), genie.execute_local(plan, graph.inputs)
    assert set(_calls()) == {"w0", "w1"}
    for a, b in zip(there, here, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert y.shape == (256, 8)


def test_the_graph_can_be_had_while_recording_goes_on(session: object) -> None:
    net = nn.Sequential(nn.Linear(8, 5), nn.ReLU()).eval()
    with torch.no_grad(), genie.capture():
        x = torch.randn(1, 8)
        y = net(x)
        graph = genie.get_graph()
        assert {tuple(value.shape) for value in graph.inputs} >= {(5, 8), (5,)}
        assert all(value.device.type == "cpu" for value in graph.inputs)
        assert torch.equal(y.cpu(), net.cpu()(x.cpu()))


def test_a_recorded_graph_means_what_the_model_does_and_costs_what_its_ops_cost(session: object) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(),
                        nn.Linear(8 * 16 * 16, 10)).eval()
    here = torch.randn(2, 3, 32, 32)
    x = here.to(DEVICE)
    with torch.no_grad(), genie.capture():
        y = net(x)
    graph = genie.get_graph()
    found, expected = genie.annotate(graph, net), genie.analyze(net, here)
    assert found.workload == expected.workload == "vision"
    assert {region.kind for region in found.regions} == {region.kind for region in expected.regions}
    (stage,), (same,) = ([r for r in g.regions if r.kind == "conv_stage"] for g in (found, expected))
    assert stage.flops == pytest.approx(same.flops, rel=0.1) and stage.bytes_moved
    (local,) = genie.execute_local(graph.plan(), graph.inputs)
    assert torch.equal(local, y.cpu())
