"""The Triton kernels without a GPU: run by Triton's interpreter in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = """
import math
import numpy as np, torch
from precscope.kernels import SlotBuffer, summarize

generator = torch.Generator().manual_seed(0)
x = torch.randn(9001, generator=generator) * torch.exp2(torch.randint(-140, 120, (9001,), generator=generator).float())
x[::7], x[3], x[4], x[5], x[6] = 0.0, math.inf, -math.inf, math.nan, -0.0
x[100:200], x[300:320] = 2.0**-149, 2.0**-130

def same(a, b, size):
    # Equal counts and extremes, sums to the bound that triton.py states; size: sum of finite magnitudes, per row.
    for name in ("counts", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero"):
        assert (getattr(a, name) == getattr(b, name)).all(), name
    with np.errstate(invalid="ignore"):
        assert (np.abs(a.sum - b.sum) <= 2.0**-21 * np.asarray(size)).all(), (a.sum, b.sum)
        assert ((a.sumsq == b.sumsq) | (np.abs(a.sumsq - b.sumsq) <= 2.0**-21 * a.sumsq)).all(), (a.sumsq, b.sumsq)
    assert a.source.tolist() == b.source.tolist() and a.source_exponent.tolist() == b.source_exponent.tolist()

def magnitudes(y):
    return y.double()[y.isfinite()].abs().sum().item()

for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
    tables = []
    y = x.to(dtype)
    if dtype == torch.float64:
        y = torch.cat([y, y * 2.0**-900, y * 2.0**800])
    for backend in ("torch", "triton"):
        buffer = SlotBuffer("cpu", 8, backend=backend)
        buffer.accumulate(0, y)
        buffer.accumulate(1, y[:1])
        buffer.accumulate(2, y, multiplier=2.0**-16)
        buffer.accumulate(3, y[: 9000].view(90, 100).t())
        buffer.accumulate(4, y[:0])
        buffer.accumulate(5, y[:4000])
        buffer.accumulate(5, y[4000:])
        w = x.to(dtype)
        step = (torch.randn(9001, generator=torch.Generator().manual_seed(1)) * 1e-3).to(dtype) * w
        buffer.accumulate_update(6, 7, w, w + step)
        tables.append(buffer.read())
    dw = (w + step).double() - w.double()
    same(*tables, [magnitudes(y)] * 6 + [magnitudes(dw)] * 2)
    assert tables[1].count[0] == y.numel()
    assert (tables[1].counts[0] == tables[1].counts[5]).all()

for dtype in (torch.float16, torch.bfloat16):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    same(*(summarize(codes, backend=b).table() for b in ("torch", "triton")), magnitudes(codes))

# Usual values: the first walk alone, at sizes around blocks and shares of programs, and from any address.
for dtype in (torch.float32, torch.bfloat16, torch.float16):
    x = torch.randn(60_001, generator=generator).to(dtype)
    x[::5] = 0
    for n in (1, 2, 511, 8191, 8192, 8193, 16384, 24577, 60_001):
        for begin in (0, 1):
            y = x[begin:n + begin]
            same(*(summarize(y, backend=b).table() for b in ("torch", "triton")), magnitudes(y))
    for edge in (2.0**-49, 2.0**-48, 2.0**59, 2.0**60, 2.0**62):  # where the second walk begins
        y = (torch.tensor([1.0, -1.5, 0.0, 2.0**-20]) * edge).to(dtype)
        same(*(summarize(y, backend=b).table() for b in ("torch", "triton")), magnitudes(y))

# Many at once: every format, unaligned ones, empty ones, several programs to one tensor, one slot twice.
dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
tensors = [torch.randn(n, generator=generator).to(d) for d in dtypes for n in (0, 1, 700, 9000, 70_000)]
tensors += [tensors[4][1:], tensors[9][3:5000], tensors[3].view(90, 100).t(), torch.tensor([math.inf, 2.0**-140, -3.0])]
tensors += [tensors[2].to(torch.float8_e5m2), tensors[2].to_sparse()]
slots = [*range(len(tensors) - 1), 0]
multipliers = [2.0 ** (i % 3 - 1) for i in range(len(tensors))]
tables = []
for backend in ("torch", "triton"):
    buffer = SlotBuffer("cpu", len(tensors), backend=backend)
    buffer.accumulate_many(slots, tensors, multipliers=multipliers)
    buffer.accumulate_many([1, 2], [torch.empty(0), torch.empty(0)])
    tables.append(buffer.read())
same(*tables, [2 * magnitudes(t.to_dense().float()) + 700 for t in tensors])
print("all equal")
"""


def test_interpreted_kernels_equal_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr
