"""Gradient-weighted histograms: every backend against a count by frexp, and what a slot remembers."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from precscope.errors import UsageError
from precscope.histogram import BINS, EXP_LO
from precscope.kernels import SlotBuffer, openmp

BACKENDS = ("torch", "numba")


def oracle(y: torch.Tensor, g: torch.Tensor) -> np.ndarray:
    """Sum of g^2 over the elements of y in each binade, by frexp and fsum."""
    values, gradient = (t.detach().double().numpy().ravel() for t in (y, g))
    kept = np.isfinite(values) & (values != 0)
    column = np.clip(np.frexp(values[kept])[1] - 1 - EXP_LO, 0, BINS - 1)
    squares = gradient[kept] ** 2
    return np.array([math.fsum(squares[column == c]) for c in range(BINS)])


def awkward(n: int = 10_007, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor]:
    """y over all binades with subnormals, zeros and specials; g over twelve orders of magnitude."""
    generator = torch.Generator().manual_seed(n)
    y = torch.randn(n, generator=generator, dtype=torch.float64)
    y *= torch.exp2(torch.randint(-149, 126, (n,), generator=generator).double())
    y[::7], y[1::31] = 0.0, -0.0
    if n > 20:
        y[3], y[4], y[5], y[6] = math.inf, -math.inf, math.nan, 2.0**-149
        y[8:20] = torch.exp2(torch.arange(-6, 6).double())
    g = torch.randn(n, generator=generator, dtype=torch.float64)
    g *= torch.exp2(torch.randint(-40, 0, (n,), generator=generator).double())
    return y.to(dtype), g.to(dtype)


def weights_of(y, g, backend="auto"):
    buffer = SlotBuffer("cpu", 1, backend=backend)
    buffer.accumulate_weights(0, y, g)
    return buffer.read().weights[0]


@pytest.mark.parametrize("n", [1, 3, 10_007, 200_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_equal_an_independent_sum(backend, dtype, n):
    y, g = awkward(n, dtype)
    np.testing.assert_allclose(weights_of(y, g, backend), oracle(y, g), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_tensors_and_mixed_dtypes_are_widened_exactly(backend):
    y, g = awkward(5_000)
    for a, b in ((y.bfloat16(), g.bfloat16()), (y.half(), g), (y, g.double()), (y.to(torch.float8_e5m2), g)):
        np.testing.assert_allclose(weights_of(a, b, backend), oracle(a, b), rtol=1e-12, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_elements_stay_paired_whatever_the_layout(backend):
    y, g = (t[:9_000].view(90, 100) for t in awkward())
    same = oracle(y, g)
    for a, b in ((y.t(), g.t()), (y.t().contiguous(), g.t()), (y, g.t().contiguous().t())):
        np.testing.assert_allclose(weights_of(a, b, backend), same, rtol=1e-12, atol=0)
    np.testing.assert_allclose(weights_of(y[::2, 1:], g[::2, 1:], backend), oracle(y[::2, 1:], g[::2, 1:]), rtol=1e-12)
    one = torch.ones(()).expand(90, 100)  # the gradient of a sum
    np.testing.assert_allclose(weights_of(y, one, backend), oracle(y, one), rtol=1e-12)


def test_threads_change_nothing(monkeypatch):
    y, g = awkward(400_000)
    alone = weights_of(y, g, "numba")
    if openmp._gomp_parallel() is None:
        pytest.skip("torch's OpenMP threads cannot be reached here")
    monkeypatch.setattr(openmp, "threads", lambda: 4)
    assert np.array_equal(weights_of(y, g, "numba"), alone)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_non_finite_gradient_shows_and_one_at_a_zero_does_not(backend):
    y, g = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([math.nan, math.inf, math.nan])
    weights = weights_of(y, g, backend)
    assert np.isnan(weights[-EXP_LO]) and np.isinf(weights[1 - EXP_LO])
    assert np.delete(weights, [-EXP_LO, 1 - EXP_LO]).sum() == 0


def test_slots_add_up_grow_and_clear_and_know_what_was_not_priced():
    y, g = awkward(1_000)
    buffer = SlotBuffer("cpu", 2)
    buffer.accumulate(1, y)
    assert buffer.read().weights is None
    buffer.accumulate_weights(0, y, g)
    buffer.accumulate_weights(0, y, g)
    buffer.grow(4)
    buffer.accumulate_weights(3, y, g)
    table = buffer.read()
    np.testing.assert_allclose(table.weights[0], 2 * oracle(y, g), rtol=1e-12)
    np.testing.assert_allclose(table.weights[3], oracle(y, g), rtol=1e-12)
    assert np.isnan(table.weights[1:3]).all()
    merged = table.group([0, 0, 1, 0], 2)  # rows that are not priced are neutral
    np.testing.assert_allclose(merged.weights[0], 3 * oracle(y, g), rtol=1e-12)
    assert np.isnan(merged.weights[1]).all()
    assert np.isnan(table.shift(3).weights[1]).all()
    buffer.clear(2)
    table = buffer.read()
    assert np.isnan(table.weights[0]).all() and not np.isnan(table.weights[3]).any()


def test_shapes_and_devices_must_agree():
    buffer = SlotBuffer("cpu", 1)
    with pytest.raises(UsageError, match=r"got \(3,\) for \(4,\)"):
        buffer.accumulate_weights(0, torch.ones(4), torch.ones(3))
    with pytest.raises(UsageError, match="floating-point"):
        buffer.accumulate_weights(0, torch.ones(4), torch.ones(4, dtype=torch.int64))


INTERPRETED = """
import sys; sys.path.insert(0, "tests")
import numpy as np, torch
from test_weights import awkward, oracle, weights_of
for dtype in (torch.float32, torch.float64):
    for n in (1, 9001):
        y, g = awkward(n, dtype)
        np.testing.assert_allclose(weights_of(y, g, "triton"), oracle(y, g), rtol=1e-12, atol=0)
y, g = awkward(5000)
np.testing.assert_allclose(weights_of(y.bfloat16(), g, "triton"), oracle(y.bfloat16(), g), rtol=1e-12, atol=0)
print("all equal")
"""


def test_triton_interpreted_equals_the_oracle():
    pytest.importorskip("triton")
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    root = os.path.dirname(os.path.dirname(__file__))
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED], env=environment, cwd=root, capture_output=True, text=True
    )
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr
