"""Tensors of `remote_accelerator` as a user meets them: making, reading, printing, copying, saving, errors."""
from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
from typing import Any

import pytest
import torch

import genie_dynamo as genie

DEVICE = "remote_accelerator"


def test_the_device_is_there_whichever_is_imported_first() -> None:
    for first, second in (("torch", "genie_dynamo"), ("genie_dynamo", "torch")):
        code = f"import {first}, {second}, torch; print(torch.device('{DEVICE}:0'), torch.{DEVICE}.device_count())"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
        assert done.stdout.split() == [f"{DEVICE}:0", "1"]


def test_compiled_calls_of_other_backends_do_not_pay_for_the_device() -> None:
    code = ("import torch, genie_dynamo\n"
            "from torch._dynamo import graph_bytecode_inputs as fetched, utils\n"
            "calls = []\n"
            "fetched.store_user_object_weakrefs = lambda *args: calls.append(args)\n"
            "utils.get_current_stream = lambda device: calls.append(device)\n"
            "compiled = torch.compile(lambda x: x + 1, backend='eager')\n"
            "print(compiled(torch.ones(2)).tolist(), torch.accelerator.is_available(), calls)\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[2.0, 2.0] True []"


def test_importing_us_does_not_import_torch() -> None:
    code = "import genie_dynamo, sys; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


def test_another_backend_that_holds_the_place_is_named_and_compile_still_works() -> None:
    code = ("import torch; from torch.utils import backend_registration as b\n"
            "b._setup_privateuseone_for_python_backend('npux')\n"
            "import genie_dynamo as genie, genie_dynamo.device as device\n"
            "assert 'npux' in device.unavailable\n"
            "genie.init(workers=1)\n"
            "print(torch.compile(lambda x: x + 1, backend='genie')(torch.ones(2)).tolist())\n"
            "print(torch.remote_accelerator.is_available())\n"
            "try:\n    torch.remote_accelerator.synchronize()\n"
            "except genie.ConfigError as error:\n    print('npux' in str(error))\n")
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=180)
    assert done.stdout.splitlines() == ["[2.0, 2.0]", "False", "True"]


def test_seeds_give_the_numbers_of_the_cpu(session: object) -> None:
    torch.manual_seed(3)
    here = [torch.randn(5), torch.rand(4), torch.randint(0, 9, (3,)), torch.randperm(6), torch.randn(3)]
    torch.manual_seed(3)
    there = [torch.randn(5, device=DEVICE), torch.rand(4, device=DEVICE), torch.randint(0, 9, (3,), device=DEVICE)]
    state = torch.remote_accelerator.get_rng_state()
    there.append(torch.randperm(6, device=DEVICE))
    torch.randn(7, device=DEVICE)          # nobody wants it, but it draws
    torch.remote_accelerator.set_rng_state(state)
    torch.randperm(6, device=DEVICE)
    there.append(torch.randn(3, device=DEVICE))
    for a, b in zip(here, there, strict=True):
        assert torch.equal(a, b.cpu())


def test_random_with_bounds_draws_as_on_the_cpu(session: object) -> None:
    drawn = []
    for device in ("cpu", DEVICE):
        torch.manual_seed(4)
        x = torch.zeros(2, 6, device=device)
        x.random_(3, 9)                    # its functional twin is called aten.random.from, which is no Python
        x[:, ::2].random_(-5, 0)
        drawn.append(x.cpu())
    assert torch.equal(*drawn)


def test_a_negative_zero_is_another_number_than_zero(session: object) -> None:
    for zero in (0.0, -0.0, 0.0, 1.0, -0.0):
        expected, found = (1 / (torch.ones(2, device=device) * zero) for device in ("cpu", DEVICE))
        assert torch.equal(expected, found.cpu()), zero


def test_a_copy_that_does_not_fit_is_refused_at_once(session: object) -> None:
    target = torch.zeros(1, 3, device=DEVICE)
    for source in (torch.ones(4, 3), torch.ones(4, 3, device=DEVICE)):
        with pytest.raises(RuntimeError, match=r"expand|broadcast|size"):
            target.copy_(source)
    assert target.copy_(torch.ones(3)).tolist() == [[1, 1, 1]]


def test_repeats_decide_a_shape(session: object) -> None:
    x = torch.tensor([3, 0, 2], device=DEVICE)
    assert torch.repeat_interleave(x, x).tolist() == [3, 3, 3, 2, 2]
    assert torch.repeat_interleave(x, 2).tolist() == [3, 3, 0, 0, 2, 2]


def test_draws_that_nobody_wants_still_draw(session: object) -> None:
    torch.manual_seed(4)
    torch.randn(3)
    want = torch.randn(3)
    torch.manual_seed(4)
    torch.randn(3, device=DEVICE)
    assert torch.equal(torch.randn(3, device=DEVICE).cpu(), want)


def test_a_draw_that_fails_disturbs_no_other(session: object) -> None:
    def draws(device: str) -> list[torch.Tensor]:
        torch.manual_seed(4)
        first = torch.rand(2, device=device)
        failed = torch.bernoulli(torch.full((2,), 7.0, device=DEVICE)) if device == DEVICE else None
        torch.rand(5, device=device)           # nobody wants it, but it draws
        second = torch.rand(2, device=device)
        hangs_on = None if failed is None else torch.bernoulli(failed)
        if failed is not None and hangs_on is not None:
            for value in (failed, hangs_on):
                with pytest.raises(genie.RemoteExecutionError, match="bernoulli"):
                    value.cpu()
        return [first.cpu(), second.cpu(), torch.rand(2, device=device).cpu()]

    for a, b in zip(draws("cpu"), draws(DEVICE), strict=True):
        assert torch.equal(a, b)


def test_printing_shows_content_and_device(session: object) -> None:
    x = torch.arange(3.0, device=DEVICE, requires_grad=True)
    assert repr(x) == f"tensor([0., 1., 2.], device='{DEVICE}:0', requires_grad=True)"
    assert "grad_fn=<MulBackward0>" in repr(x * 2)
    assert repr(torch.zeros(0, device=DEVICE)) == f"tensor([], device='{DEVICE}:0')"
    assert f"{x.sum():.1f}" == "3.0"
    assert repr(torch.nn.Parameter(x.detach())).startswith("Parameter containing:\ntensor([0., 1., 2.]")


def test_numpy_and_pickle_are_refused_with_the_way_out(session: object) -> None:
    x = torch.ones(2, device=DEVICE)
    with pytest.raises(TypeError, match=r"Tensor\.cpu\(\)"):
        x.numpy()
    with pytest.raises(TypeError, match=r"x\.cpu\(\)"):
        pickle.dumps(x)


def test_save_and_load_by_way_of_the_cpu(session: object) -> None:
    model = torch.nn.Linear(3, 2).to(DEVICE)
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    for place, expected in ((None, DEVICE), ("cpu", "cpu")):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=place)
        assert {value.device.type for value in loaded.values()} == {expected}
        assert torch.equal(loaded["weight"].cpu(), model.weight.cpu())
    fresh = torch.nn.Linear(3, 2)
    fresh.load_state_dict(loaded)
    model.load_state_dict(fresh.state_dict())


def test_what_was_saved_on_the_cpu_loads_to_the_device(session: object) -> None:
    buffer = io.BytesIO()
    shared = torch.ones(2)
    torch.save({"a": [shared, shared], "b": torch.nn.Parameter(torch.zeros(1)), "n": 3}, buffer)
    for place in (DEVICE, f"{DEVICE}:0", torch.device(DEVICE)):
        buffer.seek(0)
        loaded = torch.load(buffer, map_location=place)
        assert loaded["a"][0].device.type == loaded["b"].device.type == DEVICE
        assert loaded["a"][0] is loaded["a"][1]
        assert isinstance(loaded["b"], torch.nn.Parameter)
        assert loaded["a"][0].tolist() == [1, 1]
    buffer.seek(0)
    assert torch.load(buffer)["a"][0].device.type == "cpu"


def test_pinned_memory_is_a_copy_that_counts_as_pinned(session: object) -> None:
    x = torch.ones(3)
    pinned = x.pin_memory()
    x.add_(1)
    assert (x.is_pinned(), pinned.is_pinned(), pinned.tolist()) == (False, True, [1, 1, 1])
    assert pinned.to(DEVICE, non_blocking=True).tolist() == [1, 1, 1]
    loader = torch.utils.data.DataLoader(torch.arange(4.0), batch_size=2, pin_memory=True)
    assert [batch.is_pinned() for batch in loader] == [True, True]


def test_the_accelerator_api_asks_the_device(session: object) -> None:
    x = torch.ones(1000, device=DEVICE)
    torch.accelerator.synchronize()
    assert torch.accelerator.memory_allocated() == torch.remote_accelerator.memory_allocated() >= x.nbytes
    torch.accelerator.reset_peak_memory_stats()
    assert torch.accelerator.max_memory_allocated() >= x.nbytes


def test_sparse_tensors_are_refused_with_the_way_out(session: object) -> None:
    embedding = torch.nn.Embedding(4, 2, sparse=True).to(DEVICE)
    for refused in (lambda: torch.eye(2).to_sparse().to(DEVICE), lambda: torch.eye(2, device=DEVICE).to_sparse(),
                    lambda: embedding(torch.tensor([1], device=DEVICE)).sum().backward()):
        with pytest.raises(NotImplementedError, match="to_dense"):
            refused()


@pytest.mark.filterwarnings("ignore:.*quantize:UserWarning", "ignore:.*nested tensors:UserWarning")
def test_quantized_and_nested_tensors_are_refused_with_the_way_out(session: object) -> None:
    there = torch.ones(3, device=DEVICE)
    for quantized in (lambda: torch.quantize_per_tensor(there, 0.1, 0, torch.qint8),
                      lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8).to(DEVICE),
                      lambda: torch.empty(3, dtype=torch.quint8, device=DEVICE)):
        with pytest.raises(NotImplementedError, match=r"int_repr|dequantize"):
            quantized()
    with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
        torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)]).to(DEVICE)
    with pytest.raises(NotImplementedError, match=r"layout=torch\.jagged"):
        torch.nested.as_nested_tensor([there, there]) * 2
    ragged = torch.nested.nested_tensor([torch.ones(2, 3), torch.ones(3, 3)], layout=torch.jagged).to(DEVICE)
    assert (ragged * 2).values().sum().item() == 30


def test_a_stream_orders_nothing_and_the_device_can_be_waited_for(session: object) -> None:
    stream = torch.Stream(device=DEVICE)
    x = torch.ones(3, device=DEVICE) + 1
    runs = torch.remote_accelerator.stats()["runs"]
    stream.synchronize()
    assert torch.remote_accelerator.stats()["runs"] == runs
    torch.remote_accelerator.synchronize()
    assert torch.remote_accelerator.stats()["runs"] == runs + 1 and x.tolist() == [2, 2, 2]


def test_deepcopy_keeps_what_is_shared(session: object) -> None:
    base = torch.arange(6.0, device=DEVICE)
    pair = {"base": base, "row": base[2:4]}
    twin = copy.deepcopy(pair)
    twin["row"].add_(10)
    assert base.tolist() == [0, 1, 2, 3, 4, 5]
    assert twin["base"].tolist() == [0, 1, 12, 13, 4, 5]
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.BatchNorm1d(2)).to(DEVICE)
    other = copy.deepcopy(model)
    assert isinstance(other[0].weight, torch.nn.Parameter)
    assert torch.equal(other[0].weight.cpu(), model[0].weight.cpu())


def test_devices_do_not_mix_but_for_numbers(session: object) -> None:
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="same device"):
        x + torch.ones(3)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3).add_(x)
    assert (x + torch.tensor(2.0)).tolist() == [3, 3, 3]
    assert (torch.tensor(2.0, dtype=torch.float64) * x).dtype == torch.float32
    one = torch.tensor(1.5, device=DEVICE)
    assert (one * torch.tensor(2.0, dtype=torch.float64)).dtype == torch.float64
    assert (one * 2.0).dtype == torch.float32
    assert x[torch.tensor([0, 2])].shape == (2,)


def test_shapes_that_hang_on_values(session: object) -> None:
    x = torch.tensor([3.0, -1.0, 2.0, -5.0], device=DEVICE)
    assert x[x > 0].tolist() == [3, 2]
    assert torch.nonzero(x > 0).tolist() == [[0], [2]]
    values, counts = torch.unique(torch.tensor([1, 2, 2], device=DEVICE), return_counts=True)
    assert (values.tolist(), counts.tolist()) == ([1, 2], [1, 2])
    if x.sum() < 0:
        x = -x
    assert x.sum().item() == 1


def test_errors_of_shapes_come_at_once_and_others_with_the_read(session: object) -> None:
    x = torch.ones(3, device=DEVICE)
    with pytest.raises(RuntimeError, match="broadcast"):
        x + torch.ones(4, device=DEVICE)
    bad = x[torch.tensor([7], device=DEVICE)]
    good = x * 2
    with pytest.raises(genie.RemoteExecutionError, match="out of bounds"):
        bad.cpu()
    assert good.tolist() == [2, 2, 2]
    with pytest.raises(genie.RemoteExecutionError, match="out of bounds"):
        (bad + 1).cpu()


def test_a_read_of_a_part_brings_the_part(session: object) -> None:
    x = torch.zeros(1000, 1000, device=DEVICE)
    torch.remote_accelerator.synchronize()
    genie.reset_stats()
    assert x[3, :5].tolist() == [0] * 5
    assert genie.get_stats()["bytes_received"] < 1000


def test_values_that_nobody_holds_are_neither_made_nor_kept(session: object) -> None:
    torch.remote_accelerator.synchronize()
    before = torch.remote_accelerator.memory_allocated()
    x = torch.ones(1000, device=DEVICE)
    torch.remote_accelerator.synchronize()
    assert torch.remote_accelerator.memory_allocated() - before == 4000
    for _ in range(50):
        x * 2
    torch.remote_accelerator.synchronize()
    assert torch.remote_accelerator.memory_allocated() - before == 4000
    del x
    assert torch.remote_accelerator.memory_allocated() == before


def test_copies_are_of_the_moment(session: object) -> None:
    here = torch.ones(3)
    there = here.to(DEVICE, non_blocking=True)
    here.add_(5)
    back = torch.empty(3)
    back.copy_(there, non_blocking=True)
    assert back.tolist() == [1, 1, 1]
    there.copy_(here)
    assert there.tolist() == [6, 6, 6]
    assert there.to(torch.float64).dtype == torch.float64
    assert there.to("cpu", torch.int64).tolist() == [6, 6, 6]


def test_a_module_that_was_compiled_moves_and_has_other_weights_then(session: object) -> None:
    module = torch.nn.Linear(3, 2)
    compiled, x = torch.compile(module, backend="genie"), torch.ones(1, 3)
    before = compiled(x)
    weight = module.weight
    torch.utils.swap_tensors(weight, torch.nn.Parameter(weight.detach() * 2))
    assert module.weight is weight
    torch.testing.assert_close(compiled(x), 2 * (before - module.bias) + module.bias)
    module.to(DEVICE)
    assert module.weight is weight and weight.device.type == DEVICE
    torch.testing.assert_close(module(x.to(DEVICE)).cpu(), 2 * (before - module.bias.cpu()) + module.bias.cpu())


def test_moving_a_module_keeps_its_parameters(session: object) -> None:
    class Tied(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one = torch.nn.Linear(3, 3, bias=False)
            self.two = torch.nn.Linear(3, 3, bias=False)
            self.two.weight = self.one.weight

    model = Tied()
    weight = model.one.weight
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    want = weight.detach() - 1
    model.to(DEVICE)
    assert model.one.weight is model.two.weight is weight
    assert weight.device.type == DEVICE
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert torch.equal(model.cpu().one.weight.detach(), want)
    assert model.one.weight is model.two.weight is weight


@pytest.mark.parametrize("channels_last", [(), ("x",), ("weight",), ("x", "weight")], ids="+".join)
@pytest.mark.parametrize("convolve", [torch.conv2d, torch.conv_transpose2d], ids=["conv", "transposed"])
def test_convolutions_have_the_cpus_format(channels_last: tuple[str, ...], convolve: Any, session: object) -> None:
    draws = torch.Generator().manual_seed(0)
    given = {"x": torch.randn(2, 4, 6, 6, generator=draws), "weight": torch.randn(4, 4, 3, 3, generator=draws)}
    for name in channels_last:
        given[name] = given[name].to(memory_format=torch.channels_last)
    results = []
    for device in ("cpu", DEVICE):
        x, weight = (tensor.clone().to(device).requires_grad_() for tensor in given.values())
        out = convolve(x, weight)
        out.square().sum().backward()
        results.append([tensor.detach() for tensor in (out, x.grad, weight.grad)])
    for here, there in zip(*results, strict=True):
        assert there.stride() == here.stride() == there.cpu().stride()
        torch.testing.assert_close(there.cpu(), here, rtol=1e-4, atol=1e-4)


def test_a_convolution_of_two_dtypes_is_refused_at_once(session: object) -> None:
    with pytest.raises(RuntimeError, match="should be the same"):
        torch.conv2d(torch.zeros(1, 1, 4, 4, device=DEVICE), torch.zeros(1, 1, 3, 3, device=DEVICE).double())


@pytest.mark.parametrize("make", [
    lambda device: torch.ones(2, device=device), lambda device: torch.randn(2).to(device),
    lambda device: torch.zeros(2, device="remote_accelerator").to(device)])
def test_there_is_one_of_them(session: object, make: Any) -> None:
    with pytest.raises(RuntimeError, match="remote_accelerator:1: invalid device ordinal"):
        make("remote_accelerator:1")
    assert make("remote_accelerator:0").device == torch.device("remote_accelerator:0")


class OnTheDevice(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.ones(2, device=DEVICE)


def test_a_forked_process_is_refused(session: object) -> None:
    loader = torch.utils.data.DataLoader(OnTheDevice(), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match="cannot be used in a forked process"):
        next(iter(loader))
    held = torch.ones(3, device=DEVICE)
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            held.tolist()
            os.write(write, b"read")
        except RuntimeError as error:
            os.write(write, str(error).encode())
        finally:
            os._exit(0)
    os.close(write)
    os.waitpid(child, 0)
    assert b"forked process" in os.read(read, 1000)
    os.close(read)
    assert held.tolist() == [1, 1, 1]
