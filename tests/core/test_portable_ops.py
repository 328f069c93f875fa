"""genie::sdpa against F.scaled_dot_product_attention: bits, strides, gradients; traced, compiled, elsewhere."""
from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from genie_dynamo.core import portable_ops
from genie_dynamo.core.portable_ops import direct_kernel, sdpa, sdpa_bw

B, H, L, S, E = 2, 4, 5, 7, 8


class Case(NamedTuple):
    """Inputs of one attention; gradients are asked of q, k and v."""

    q: Tensor
    k: Tensor
    v: Tensor
    attn_mask: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, dtype=dtype)


def heads_second(x: Tensor) -> Tensor:
    """(B, H, L, E) with the strides of a view of (B, L, H, E), as models make it."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


def cases() -> dict[str, Case]:
    torch.manual_seed(0)
    qkv = [(randn(B, H, L, E), randn(B, H, S, E), randn(B, H, S, E)) for _ in range(12)]
    square = [tuple(randn(B, H, L, E) for _ in range(3)) for _ in range(3)]
    few_heads = (randn(B, H, L, E), randn(B, 2, S, E), randn(B, 2, S, E))
    return {
        "contiguous": Case(*qkv[0]),
        "heads second": Case(*(heads_second(x) for x in qkv[1])),
        "mixed layouts": Case(heads_second(qkv[2][0]), *qkv[2][1:]),
        "batch innermost": Case(*(x.permute(1, 0, 2, 3).contiguous().permute(1, 0, 2, 3) for x in qkv[2])),
        "sliced": Case(*randn(B, H, L, 3 * E).chunk(3, -1)),
        "expanded": Case(qkv[3][0][:1].expand(B, H, L, E), *qkv[3][1:]),
        "last dim strided": Case(qkv[4][0].transpose(2, 3).contiguous().transpose(2, 3), *qkv[4][1:]),
        "causal": Case(*square[0], is_causal=True),
        "causal, more keys": Case(*qkv[5], is_causal=True),
        "scale": Case(*qkv[5], scale=0.3),
        "negative scale": Case(*qkv[5], scale=-0.3),
        "bool mask": Case(*qkv[6], attn_mask=torch.rand(L, S) > 0.3),
        "bool mask per batch": Case(*qkv[6], attn_mask=torch.rand(B, 1, L, S) > 0.3),
        "bool mask, a row all False": Case(*qkv[6], attn_mask=(torch.arange(L) > 0)[:, None].expand(L, S)),
        "float mask": Case(*qkv[7], attn_mask=randn(B, 1, 1, S)),
        "float mask of 3 dims": Case(*qkv[7], attn_mask=randn(H, L, S)),
        "other value width": Case(*qkv[8][:2], randn(B, H, S, E + 3)),
        "grouped heads": Case(*few_heads, enable_gqa=True),
        "grouped heads, masked": Case(
            *(heads_second(x) for x in few_heads), torch.rand(B, 1, L, S) > 0.3, scale=0.5, enable_gqa=True),
        "2 dims": Case(randn(L, E), randn(S, E), randn(S, E)),
        "3 dims": Case(randn(H, L, E), randn(H, S, E), randn(H, S, E)),
        "5 dims": Case(randn(2, B, H, L, E), randn(2, B, H, S, E), randn(2, B, H, S, E)),
        "one query": Case(qkv[9][0][:, :, :1], *qkv[9][1:]),
        "no keys": Case(qkv[9][0], *(x[:, :, :0] for x in qkv[9][1:])),
        "no queries": Case(qkv[9][0][:, :, :0], *qkv[9][1:]),
        "empty batch": Case(*(x[:0] for x in qkv[9])),
        "float64": Case(*(x.double() for x in qkv[10])),
        "bfloat16": Case(*(x.bfloat16() for x in qkv[10]), attn_mask=torch.rand(L, S) > 0.3),
        "float16": Case(*(x.half() for x in qkv[10])),
        "bfloat16, math": Case(*(x.bfloat16()[0] for x in qkv[11])),
        "long": Case(*(heads_second(randn(1, 2, 600, 16)) for _ in range(3)), is_causal=True),
    }


CASES = cases()
Attention = Callable[..., Tensor]


def eager(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    return F.scaled_dot_product_attention(
        q, k, v, case.attn_mask, 0.0, case.is_causal, scale=case.scale, enable_gqa=case.enable_gqa)


def portable(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
    out: Tensor = sdpa(q, k, v, *case[3:])[0]
    return out


def leaves(case: Case) -> list[Tensor]:
    """The inputs with their strides, as leaves that want gradients."""
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x).requires_grad_()
            if 0 not in x.stride() else x.detach().requires_grad_() for x in case[:3]]


def with_grads(attention: Attention, case: Case) -> tuple[Tensor, tuple[Tensor, ...]]:
    inputs = leaves(case)
    out = attention(*inputs, case)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype)
    return out, torch.autograd.grad(out, inputs, weight)


def assert_same(actual: Tensor, expected: Tensor, *, strides: bool = True) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    if strides:
        assert actual.stride() == expected.stride()


def compiled_with_aot(attention: Attention, **options: Any) -> Attention:
    def backend(gm: Any, inputs: Any) -> Any:
        return aot_autograd(fw_compiler=lambda graph, _: make_boxed_func(graph))(gm, inputs)

    return torch.compile(attention, backend=backend, fullgraph=True, **options)


# ---------------------------------------------------------------- equal to eager
@pytest.mark.parametrize("name", CASES)
def test_forward_and_gradients_are_eagers(name: str) -> None:
    case = CASES[name]
    with torch.no_grad():
        assert_same(portable(*case[:3], case), eager(*case[:3], case))
    with torch.inference_mode():
        assert_same(portable(*case[:3], case), eager(*case[:3], case))
    (out, grads), (expected, expected_grads) = with_grads(portable, case), with_grads(eager, case)
    assert_same(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_same(grad, expected_grad, strides=False)


@pytest.mark.parametrize("name", CASES)
def test_fake_kernels_say_what_the_real_ones_do(name: str) -> None:
    case = CASES[name]
    out, lse = sdpa(*case)
    grads = sdpa_bw(torch.ones_like(out), *case[:3], out, lse, *case[3:])
    with FakeTensorMode(shape_env=ShapeEnv()) as mode:
        fakes = [None if x is None else mode.from_tensor(x) for x in case[:4]]
        fake_out, fake_lse = sdpa(*fakes, *case[4:])
        fake_grads = sdpa_bw(torch.ones_like(fake_out), *fakes[:3], fake_out, fake_lse, fakes[3], *case[4:])
    for fake, real in zip((fake_out, fake_lse, *fake_grads), (out, lse, *grads), strict=True):
        assert (fake.dtype, fake.device) == (real.dtype, real.device)
        assert tuple(int(n) for n in fake.shape) == tuple(real.shape)
        if real.numel():
            assert tuple(int(n) for n in fake.stride()) == real.stride()


@pytest.mark.heavy
@pytest.mark.parametrize(("name", "dynamic"), [
    ("heads second", False), ("contiguous", True), ("causal", True), ("bool mask per batch", True), ("3 dims", True),
    ("other value width", True), ("grouped heads", True), ("bfloat16", True), ("no keys", False)])
def test_compiled_by_aot_autograd(name: str, dynamic: bool, fresh_dynamo: None) -> None:
    case = CASES[name]
    compiled = compiled_with_aot(lambda q, k, v, case: portable(q * 1, k * 1, v * 1, case) * 2, dynamic=dynamic)
    (out, grads), (expected, expected_grads) = (
        with_grads(compiled, case), with_grads(lambda q, k, v, case: eager(q * 1, k * 1, v * 1, case) * 2, case))
    assert_same(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_same(grad, expected_grad, strides=False)


def test_one_compilation_serves_all_lengths(fresh_dynamo: None) -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: sdpa(q, k, v, None, True)[0], backend=counter, dynamic=True)
    for length in (5, 6, 31):
        q, k, v = (heads_second(randn(B, H, length, E)) for _ in range(3))
        assert_same(compiled(q, k, v), F.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert counter.frame_count == 1


@pytest.mark.parametrize("wanted", [(0,), (1, 2), (2,)])
def test_only_some_inputs_may_want_gradients(wanted: tuple[int, ...]) -> None:
    case = CASES["causal"]

    def grads(attention: Attention) -> list[Tensor | None]:
        inputs = [x.detach().clone().requires_grad_(i in wanted) for i, x in enumerate(case[:3])]
        attention(*inputs, case).sum().backward()
        return [x.grad for x in inputs]

    for grad, expected in zip(grads(portable), grads(eager), strict=True):
        assert (grad is None) == (expected is None)
        if grad is not None and expected is not None:
            assert_same(grad, expected)


@pytest.mark.heavy
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_random_shapes_masks_and_layouts(data: st.DataObject) -> None:
    draw = data.draw
    batch, groups, per_group = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))
    length, keys, width = draw(st.integers(1, 40)), draw(st.integers(1, 40)), draw(st.integers(1, 20))
    dtype = draw(st.sampled_from([torch.float32, torch.float64, torch.bfloat16]))
    layout = draw(st.sampled_from([heads_second, lambda x: x]))
    heads = groups * per_group
    mask_shape = draw(st.sampled_from([None, (length, keys), (batch, 1, 1, keys), (batch, heads, length, keys)]))
    mask = None
    if mask_shape is not None:
        mask = torch.rand(mask_shape) > 0.5 if draw(st.booleans()) else torch.randn(mask_shape, dtype=dtype)
    case = Case(
        layout(randn(batch, heads, length, width, dtype=dtype)), layout(randn(batch, groups, keys, width, dtype=dtype)),
        layout(randn(batch, groups, keys, width, dtype=dtype)), mask, mask is None and draw(st.booleans()),
        draw(st.none() | st.floats(0.01, 2)), per_group > 1)
    (out, grads), (expected, expected_grads) = with_grads(portable, case), with_grads(eager, case)
    assert_same(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_same(grad, expected_grad, strides=False)


# ---------------------------------------------------------------- modes
@pytest.mark.parametrize("mask", [None, torch.ones(L, S).tril().bool(), torch.linspace(-1, 1, L * S).reshape(L, S)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_autocast_casts_as_for_eager(mask: Tensor | None, dtype: torch.dtype) -> None:
    q, k, v = (x.to(dtype) for x in CASES["contiguous"][:3])
    mask = mask.to(dtype) if mask is not None and mask.is_floating_point() else mask
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, expected = sdpa(q, k, v, mask)[0], F.scaled_dot_product_attention(q, k, v, mask)
    assert out.dtype == expected.dtype
    assert_same(out, expected)


def test_autocast_of_mixed_types_compiled_with_gradients(fresh_dynamo: None) -> None:
    def step(attention: Attention) -> Attention:
        def run(q: Tensor, k: Tensor, v: Tensor, case: Case) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return attention(q, k.bfloat16(), v, case).float()
        return run

    case = CASES["contiguous"]
    (out, grads), (expected, expected_grads) = (
        with_grads(compiled_with_aot(step(portable)), case), with_grads(step(eager), case))
    assert_same(out, expected)
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_same(grad, expected_grad, strides=False)


@pytest.mark.parametrize("name", ["contiguous", "3 dims", "other value width"])
def test_the_backward_runs_in_inference_mode_as_a_worker_may(name: str) -> None:
    case = CASES[name]
    _, expected = with_grads(eager, case)
    out = eager(*case[:3], case)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(out.dtype)
    with torch.inference_mode():
        inputs = [x.clone() for x in case[:3]]
        out, lse = sdpa(*inputs, *case[3:])
        grads = sdpa_bw(weight.clone(), *inputs, out, lse, *case[3:])
    for grad, expected_grad in zip(grads, expected, strict=True):
        torch.testing.assert_close(grad, expected_grad, rtol=0, atol=0)


def test_a_mask_that_wants_a_gradient_is_refused_and_not_forgotten() -> None:
    q, k, v = CASES["contiguous"][:3]
    mask = randn(L, S).requires_grad_()
    with pytest.raises(NotImplementedError, match="attn_mask no gradient"):
        sdpa(q, k, v, mask)
    with torch.no_grad():
        assert_same(sdpa(q, k, v, mask)[0], F.scaled_dot_product_attention(q, k, v, mask))


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["heads second", "bool mask per batch", "grouped heads", "3 dims"])
def test_registration_holds_torchs_own_rules(name: str) -> None:
    case = CASES[name]
    torch.library.opcheck(sdpa, (*leaves(case), *case[3:]))
    out, lse = sdpa(*case)
    torch.library.opcheck(sdpa_bw, (torch.ones_like(out), *case[:3], out, lse, *case[3:]))


@pytest.mark.parametrize("name", CASES)
def test_direct_kernels_are_the_ops(name: str) -> None:
    case = CASES[name]
    forward, short = direct_kernel(sdpa, "cpu"), direct_kernel(sdpa, "cpu", needs_lse=False)
    backward = direct_kernel(sdpa_bw, "cpu")
    assert forward is not None and short is not None and backward is not None
    out, lse = sdpa(*case)
    for direct, dispatched in zip(forward(*case), (out, lse), strict=True):
        assert_same(direct, dispatched)
    out_only, nothing = short(*case)
    assert_same(out_only, out)
    assert nothing is None
    arguments = (torch.ones_like(out), *case[:3], out, lse, *case[3:])
    for direct, dispatched in zip(backward(*arguments), sdpa_bw(*arguments), strict=True):
        assert_same(direct, dispatched)


def test_there_are_direct_kernels_for_the_cpu_and_these_ops_only() -> None:
    assert direct_kernel(sdpa, "cuda") is None
    assert direct_kernel(torch.ops.aten.add.Tensor, "cpu") is None


# ---------------------------------------------------------------- other devices
@pytest.mark.parametrize("name", CASES)
def test_elsewhere_the_strides_are_the_cpus(name: str) -> None:
    """The kernel for CUDA, run on CPU tensors: a device whose own kernels give whatever strides they like."""
    case = CASES[name]
    out, lse = sdpa(*case)
    expected_grads = sdpa_bw(torch.ones_like(out), *case[:3], out, lse, *case[3:])
    other_out, other_lse = portable_ops._sdpa_elsewhere(*case)
    assert_same(other_out, out)
    assert (other_lse.shape, other_lse.dtype) == (lse.shape, lse.dtype)
    assert other_lse.stride() == lse.stride() or not lse.numel()
    grads = portable_ops._sdpa_bw_elsewhere(torch.ones_like(out), *case[:3], out, other_lse, *case[3:])
    for grad, expected in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=0, equal_nan=True)
        assert grad.stride() == expected.stride() or not grad.numel()


def test_foreign_strides_are_put_right(monkeypatch: pytest.MonkeyPatch) -> None:
    case = CASES["contiguous"]
    real = portable_ops._ATEN_SDPA

    def with_foreign_strides(*args: Any, **options: Any) -> Tensor:
        return heads_second(real(*args, **options))

    expected, _ = sdpa(*case)
    portable_ops._cpu_layout(*case[:4], False, False)      # remembered before the stand-in takes over
    monkeypatch.setattr(portable_ops, "_ATEN_SDPA", with_foreign_strides)
    out, _ = portable_ops._sdpa_elsewhere(*case)
    assert_same(out, expected)


@pytest.mark.parametrize("name", ["contiguous", "heads second", "3 dims", "other value width", "bool mask"])
def test_meta_tensors_get_the_cpus_strides(name: str) -> None:
    case = CASES[name]
    real, real_lse = sdpa(*case)
    metas = [None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
             for x in case[:4]]
    out, lse = sdpa(*metas, *case[4:])
    assert out.device.type == lse.device.type == "meta"
    assert (out.shape, out.stride(), out.dtype) == (real.shape, real.stride(), real.dtype)
    assert (lse.shape, lse.stride(), lse.dtype) == (real_lse.shape, real_lse.stride(), real_lse.dtype)
