"""Random numbers from a `torch.Generator`, the device's or the CPU's: what a CPU generator of the same seed draws."""
from __future__ import annotations

import copy
import io
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

DEVICE = "remote_accelerator"

Tensor = torch.Tensor

needs_place = pytest.mark.skipif(type(torch._C.Generator) is type, reason="this torch makes generators in C++ alone")

DRAWS: dict[str, Callable[[str, torch.Generator], Tensor]] = {
    "randn": lambda device, own: torch.randn(3, device=device, generator=own),
    "rand": lambda device, own: torch.rand(2, 2, device=device, generator=own, dtype=torch.float64),
    "randint": lambda device, own: torch.randint(3, 9, (5,), device=device, generator=own),
    "randperm": lambda device, own: torch.randperm(5, device=device, generator=own),
    "normal_": lambda device, own: torch.zeros(2, 3, device=device).normal_(1.0, 2.0, generator=own),
    "uniform_": lambda device, own: torch.zeros(2, 3, device=device).uniform_(generator=own),
    "random_, of a part": lambda device, own: torch.zeros(2, 3, device=device)[:, 1:].random_(2, 7, generator=own),
    "exponential_": lambda device, own: torch.zeros(4, device=device).exponential_(generator=own),
    "bernoulli_": lambda device, own: torch.zeros(4, device=device).bernoulli_(0.5, generator=own),
    "bernoulli": lambda device, own: torch.bernoulli(torch.full((4,), 0.5, device=device), generator=own),
    "normal": lambda device, own: torch.normal(torch.zeros(3, device=device), 2.0, generator=own),
    "poisson": lambda device, own: torch.poisson(torch.full((4,), 3.0, device=device), generator=own),
    "multinomial": lambda device, own: torch.multinomial(torch.tensor([0.2, 0.8], device=device), 4, replacement=True,
                                                         generator=own),
    "init": lambda device, own: torch.nn.init.kaiming_normal_(torch.zeros(3, 4, device=device), generator=own),
}


@pytest.fixture(params=["cpu", pytest.param(DEVICE, marks=needs_place)])
def own(request: pytest.FixtureRequest) -> torch.Generator:
    """A generator to be given to ops of the device."""
    return torch.Generator(device=request.param)


@pytest.mark.parametrize("name", DRAWS)
def test_it_draws_what_a_generator_of_the_cpu_draws(session: object, own: torch.Generator, name: str) -> None:
    here = torch.Generator()
    for generator in (here, own):
        assert generator.manual_seed(5) is generator
    for _ in range(2):
        drawn = DRAWS[name](DEVICE, own)
        assert drawn.device.type == DEVICE
        assert torch.equal(drawn.cpu(), DRAWS[name]("cpu", here))
    assert torch.equal(own.get_state(), here.get_state())


def test_the_devices_own_generator_is_another_one(session: object, own: torch.Generator) -> None:
    torch.manual_seed(1)
    wanted = torch.randn(4, device=DEVICE).tolist()
    torch.manual_seed(1)
    own.manual_seed(2)
    torch.randn(4, device=DEVICE, generator=own)
    assert torch.randn(4, device=DEVICE).tolist() == wanted


@needs_place
def test_seeds_and_states() -> None:
    own = torch.Generator(device=DEVICE)
    assert isinstance(own, torch.Generator) and own.device == torch.device(DEVICE, 0)
    assert own.manual_seed(7).initial_seed() == 7
    state = own.get_state()
    first = torch.randn(3, device=DEVICE, generator=own).tolist()
    for other in (own.set_state(state), torch.Generator(torch.device(DEVICE)).set_state(state)):
        assert torch.randn(3, device=DEVICE, generator=other).tolist() == first
    assert own.seed() == own.initial_seed() != 7


@needs_place
def test_copies_go_on_alike() -> None:
    own = torch.Generator(DEVICE).manual_seed(3)
    torch.randn(3, device=DEVICE, generator=own)
    saved = io.BytesIO()
    torch.save(own.get_state(), saved)
    saved.seek(0)
    others: list[Any] = [copy.deepcopy(own), own.clone_state(), pickle.loads(pickle.dumps(own)),
                         torch.Generator(DEVICE).set_state(torch.load(saved))]
    wanted = torch.randn(3, device=DEVICE, generator=own).tolist()
    for other in others:
        assert other.device.type == DEVICE
        assert torch.randn(3, device=DEVICE, generator=other).tolist() == wanted


@needs_place
def test_a_device_that_is_not_there() -> None:
    with pytest.raises(RuntimeError, match="there is one remote_accelerator"):
        torch.Generator(device=f"{DEVICE}:1")


def test_other_generators_are_torchs() -> None:
    class Own(torch.Generator):
        pass

    assert type(torch.Generator()) is type(torch.Generator("cpu")) is torch.Generator is torch._C.Generator
    assert type(Own()) is Own and Own().device.type == "cpu"
    with pytest.raises(RuntimeError, match=r"(?i)cuda|meta"):
        torch.Generator(device="meta")


def test_dynamo_breaks_at_a_generator_as_it_did() -> None:
    """Where one is made in a traced function: with no more breaks, and no warning about us."""
    code = ("import sys, torch\n"
            "if sys.argv[1] == 'with': import genie_dynamo\n"
            "from torch._dynamo.utils import counters\n"
            "def draw(x): return x + torch.rand(2, generator=torch.Generator().manual_seed(2))\n"
            "drawn = torch.compile(draw, backend='eager')(torch.ones(2))\n"
            "print(drawn.tolist(), sum(counters['graph_break'].values()))")
    done = [subprocess.run([sys.executable, "-c", code, which], capture_output=True, text=True, timeout=120, check=True)
            for which in ("with", "without")]
    assert done[0].stdout == done[1].stdout
    assert "does not know how to trace" not in done[0].stderr
