"""fp16 matrix products through fp32: the same numbers as fp16 with fp32 accumulation, forward and backward."""

from __future__ import annotations

import time

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from precscope.training.halfmatmul import half_matmul_through_fp32, matmul_rates, needs_half_matmul


def half(*shape: int, seed: int = 0, grad: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).half().requires_grad_(grad)


OPERATIONS = {
    "mm": lambda a, b, c: a @ b,
    "addmm": lambda a, b, c: F.linear(a, b.t(), c),
    "scaled addmm": lambda a, b, c: torch.addmm(c, a, b, beta=0.5, alpha=2.0),
    "bmm": lambda a, b, c: torch.bmm(a.expand(3, -1, -1), b.expand(3, -1, -1)),
    "baddbmm": lambda a, b, c: torch.baddbmm(c, a.expand(3, -1, -1), b.expand(3, -1, -1)),
    "einsum": lambda a, b, c: torch.einsum("ij,jk->ki", a, b),
    "convolution": lambda a, b, c: F.conv1d(a.view(2, 4, -1), b.view(16, 4, 8), c, padding=2),
    "transposed convolution": lambda a, b, c: F.conv_transpose1d(a.view(2, 16, -1), b.view(16, 8, 4)),
    "attention": lambda a, b, c: F.scaled_dot_product_attention(
        a.view(1, 2, -1, 16), b.view(1, 2, -1, 16), b.view(1, 2, -1, 16), is_causal=False
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_results_and_gradients_are_those_of_fp64_rounded_once(name):
    operation = OPERATIONS[name]
    inputs = [half(16, 32, seed=1, grad=True), half(32, 16, seed=2, grad=True), half(16, seed=3, grad=True)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    with half_matmul_through_fp32():
        out = operation(*inputs)
        seed = half(*out.shape, seed=4)
        out.backward(seed)
    reference = operation(*exact)
    reference.backward(seed.double())
    assert out.dtype == torch.float16
    # one rounding: half an ulp of fp16, 2^-11 relative; attention's backward also starts from the rounded output
    rtol, atol = (2**-9, 4e-3) if name == "attention" else (1.01 * 2**-11, 1e-5)
    torch.testing.assert_close(out.double(), reference, rtol=rtol, atol=atol)
    for ours, theirs in zip(inputs, exact, strict=True):
        if theirs.grad is not None:
            assert ours.grad.dtype == torch.float16
            torch.testing.assert_close(
                ours.grad.double(), theirs.grad, rtol=2**-9, atol=2**-9 * float(theirs.grad.abs().max())
            )


@pytest.mark.parametrize("name", OPERATIONS)
def test_equal_to_the_native_kernels(name):
    inputs = [half(16, 32, seed=1, grad=True), half(32, 16, seed=2, grad=True), half(16, seed=3, grad=True)]
    native = [t.detach().clone().requires_grad_() for t in inputs]
    with half_matmul_through_fp32():
        ours = OPERATIONS[name](*inputs)
        ours.backward(torch.ones_like(ours))
    theirs = OPERATIONS[name](*native)
    theirs.backward(torch.ones_like(theirs))
    assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=2**-8, atol=8e-3)  # some native kernels accumulate in fp16
    for a, b in zip(inputs, native, strict=True):
        assert (a.grad is None) == (b.grad is None)
        if a.grad is not None:
            torch.testing.assert_close(a.grad, b.grad, rtol=2**-8, atol=3e-2)


def test_overflow_is_inf_and_subnormals_are_kept():
    large, tiny = torch.full((2, 4096), 8.0).half(), torch.full((2, 4), 2.0**-12).half()
    with half_matmul_through_fp32():
        assert torch.isposinf(large @ large.t()).all()  # 4096 * 64 = 262144
        assert torch.isneginf(-large @ large.t()).all()
        assert ((tiny @ tiny.t()) == 2.0**-22).all()  # 4 * 2^-24
    assert torch.isposinf(large @ large.t()).all()


def test_in_place_products_write_into_their_tensor():
    a, b = half(4, 8, seed=1), half(8, 4, seed=2)
    out = torch.ones(4, 4).half()
    with half_matmul_through_fp32():
        assert out.addmm_(a, b, alpha=2.0) is out
    torch.testing.assert_close(out.double(), 1 + 2 * a.double() @ b.double(), rtol=2**-11, atol=1e-5)


def test_under_inference_mode_whole_operations_are_taken_apart():
    layer, x = nn.Linear(32, 16).half(), half(4, 32)
    with torch.no_grad():
        reference = F.linear(x.double(), layer.weight.double(), layer.bias.double())
    with torch.inference_mode(), half_matmul_through_fp32():
        out = layer(x)
    torch.testing.assert_close(out.double(), reference, rtol=1.01 * 2**-11, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_other_dtypes_are_left_alone(dtype):
    a = torch.randn(8, 8, dtype=dtype)
    with half_matmul_through_fp32():
        inside = a @ a
    assert torch.equal(inside, a @ a)


def test_a_recurrent_layer_runs_under_fp16_autocast():
    torch.manual_seed(0)
    layer, x = nn.LSTM(8, 16, num_layers=2, batch_first=True, bidirectional=True), torch.randn(4, 6, 8)
    reference = layer(x)[0]
    reference.sum().backward()
    expected = layer.weight_hh_l0.grad.clone()
    layer.zero_grad()
    with half_matmul_through_fp32():
        with torch.autocast("cpu", torch.float16):
            out = layer(x)[0]
        assert out.dtype == torch.float16
        out.float().sum().backward()
    torch.testing.assert_close(out.float(), reference, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(layer.weight_hh_l0.grad, expected, rtol=2e-2, atol=2e-2)


def test_a_scaled_autocast_step_with_checkpointing_works():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 16)), torch.randn(8, 16)
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.1), torch.amp.GradScaler("cpu")
    with half_matmul_through_fp32():
        with torch.autocast("cpu", torch.float16):
            loss = checkpoint(model, x, use_reentrant=False).float().square().mean()
        scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    gradient = model[0].weight.grad.clone()
    model.zero_grad()
    model(x).square().mean().backward()
    torch.testing.assert_close(gradient, model[0].weight.grad, rtol=2e-2, atol=1e-4)


def test_need_is_measured_and_the_mode_meets_it():
    half_rate, single_rate = matmul_rates()
    assert half_rate > 0 and single_rate > 0
    assert needs_half_matmul() == (single_rate > 3 * half_rate)
    if not needs_half_matmul():
        pytest.skip("this CPU multiplies fp16 matrices natively")
    a = half(256, 256)

    def best(runs: int = 5) -> float:
        times = []
        for _ in range(runs):
            start = time.perf_counter()
            a @ a
            times.append(time.perf_counter() - start)
        return min(times)

    native = best()
    with half_matmul_through_fp32():
        assert best() < native / 2


def test_an_encoder_layer_evaluates_under_autocast():
    """PyTorch's fused kernel for it takes no part in autocast below a mode."""
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    before = torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad():
        true = layer(x)
        with half_matmul_through_fp32(), torch.autocast("cpu", torch.float16):
            low = layer(x.half())
    torch.testing.assert_close(low.float(), true, rtol=0.02, atol=0.02)
    assert torch.backends.mha.get_fastpath_enabled() is before


def test_what_tracers_ask_of_tensors_passes_through():
    """torch.compile's fake tensors ask for their device by an operator that has no kernels."""
    x = torch.ones(2, dtype=torch.float16)
    with half_matmul_through_fp32():
        assert torch.ops.prim.device.default(x) == x.device
