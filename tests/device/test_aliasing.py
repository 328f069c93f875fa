"""Views and in-place ops on the device against eager: any sequence of them leaves every tensor with eager's content."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

DEVICE = "remote_accelerator"
pytestmark = pytest.mark.usefixtures("way")

Tensor = torch.Tensor

VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "transpose": lambda t: t.t() if t.dim() == 2 else t.reshape(2, -1).t(),
    "row": lambda t: t[0] if t.dim() > 1 else t[:1],
    "column": lambda t: t[..., 1:2],
    "step": lambda t: t[..., ::2],
    "flat": lambda t: t.reshape(-1),
    "diagonal": lambda t: t.diagonal() if t.dim() == 2 else t[1:],
    "unsqueeze": lambda t: t.unsqueeze(0),
    "detach": lambda t: t.detach(),
    "bits": lambda t: t.view(torch.int32),
    "strided": lambda t: t.as_strided((2,), (1,)),
    "half": lambda t: t.chunk(2, -1)[-1],
}
WRITES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "add": lambda t, o: t.add_(1),
    "mul": lambda t, o: t.mul_(2),
    "fill": lambda t, o: t.fill_(3),
    "zero": lambda t, o: t.zero_(),
    "item": lambda t, o: t.__setitem__((..., 0), 5),
    "copy": lambda t, o: t.copy_(o.reshape(-1)[:1].clone().to(t.dtype)),
    "add other": lambda t, o: t.add_(o.reshape(-1)[0].clone().to(t.dtype)),
    "out": lambda t, o: torch.add(t, 2, out=t),
    "foreach": lambda t, o: torch._foreach_add_([t], 1),
}


def _size_is_right(tensor: Tensor) -> bool:
    return tensor.numel() >= 2 and tensor.stride()[-1:] != () and tensor.dim() <= 3


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_any_sequence_of_views_and_writes(data: st.DataObject) -> None:
    start = torch.arange(24.0).reshape(4, 6)
    here, there = [start.clone()], [start.to(DEVICE)]
    for _ in range(data.draw(st.integers(1, 10))):
        at = data.draw(st.integers(0, len(here) - 1))
        if data.draw(st.booleans()):
            view = VIEWS[data.draw(st.sampled_from(sorted(VIEWS)))]
            try:
                new = view(here[at])
            except (RuntimeError, IndexError):
                continue
            if not _size_is_right(new):
                continue
            here.append(new)
            there.append(view(there[at]))
            assert there[-1].stride() == new.stride()
            assert there[-1].storage_offset() == new.storage_offset()
        else:
            other = data.draw(st.integers(0, len(here) - 1))
            write = WRITES[data.draw(st.sampled_from(sorted(WRITES)))]
            write(here[at], here[other])
            write(there[at], there[other])
        if data.draw(st.booleans()):
            torch.remote_accelerator.synchronize()
    for mine, theirs in zip(here, there, strict=True):
        assert torch.equal(mine, theirs.cpu())
        assert mine.dtype == theirs.dtype


def test_a_write_to_a_view_reaches_autograd(session: object) -> None:
    def run(device: str) -> tuple[list[float], list[float]]:
        x = torch.arange(4.0).to(device).requires_grad_()
        y = x * 2
        y[1:3].mul_(x[:2])
        y.t_() if y.dim() == 2 else None
        y.sum().backward()  # type: ignore[no-untyped-call]
        assert x.grad is not None
        return y.tolist(), x.grad.tolist()

    assert run(DEVICE) == run("cpu")


def test_autograd_sees_writes_to_what_it_has_saved(session: object) -> None:
    x = torch.ones(3, device=DEVICE, requires_grad=True)
    y = x.exp()
    y.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()  # type: ignore[no-untyped-call]


def test_in_place_changes_of_shape(session: object) -> None:
    x = torch.arange(6.0, device=DEVICE)
    y = x.view(2, 3)
    y.t_()
    y.unsqueeze_(0)
    assert y.shape == (1, 3, 2)
    y.add_(1)
    assert x.tolist() == [1, 2, 3, 4, 5, 6]
    z = torch.empty(0, device=DEVICE)
    torch.add(x, 1, out=z)
    assert z.tolist() == [2, 3, 4, 5, 6, 7]
    x.data = torch.zeros(2, device=DEVICE)
    assert x.tolist() == [0, 0]


def test_conjugate_and_negative_views(session: object) -> None:
    a = torch.view_as_complex(torch.arange(6.0).reshape(3, 2))
    x = a.to(DEVICE)
    c = x.conj()
    x.mul_(2)
    assert torch.equal(c.cpu(), (a * 2).conj())
    c.add_(1j)
    assert torch.equal(x.cpu(), a * 2 - 1j)
    assert torch.equal(c.imag.cpu(), -(a * 2 - 1j).imag)
    mine, theirs = c[0], (a * 2 - 1j).conj()[0]
    assert torch.equal((mine * mine).cpu(), theirs * theirs)
