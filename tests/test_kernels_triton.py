"""The Triton kernels without a GPU: run by Triton's interpreter in a process of its own, and compiled for a GPU."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

triton = pytest.importorskip("triton", reason="triton is not installed")

INTERPRETED = """
import math, torch
from precscope.kernels import SlotBuffer, summarize

generator = torch.Generator().manual_seed(0)
x = torch.randn(9001, generator=generator) * torch.exp2(torch.randint(-140, 120, (9001,), generator=generator).float())
x[::7], x[3], x[4], x[5], x[6] = 0.0, math.inf, -math.inf, math.nan, -0.0
x[100:200], x[300:320] = 2.0**-149, 2.0**-130

def same(a, b):
    for name in ("counts", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero"):
        assert (getattr(a, name) == getattr(b, name)).all(), name
    for name in ("sum", "sumsq"):
        torch.testing.assert_close(torch.tensor(getattr(a, name)), torch.tensor(getattr(b, name)), rtol=1e-12, atol=0.0,
                                   equal_nan=True)
    assert a.source.tolist() == b.source.tolist()

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
    same(*tables)
    assert tables[1].count[0] == y.numel()
    assert (tables[1].counts[0] == tables[1].counts[5]).all()

for dtype in (torch.float16, torch.bfloat16):
    codes = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    same(*(summarize(codes, backend=b).table() for b in ("torch", "triton")))
print("all equal")
"""


def test_interpreted_kernels_equal_the_reference():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", INTERPRETED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "all equal" in done.stdout, done.stdout + done.stderr


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing")
@pytest.mark.parametrize("kind", ["fp32", "bf16", "fp16", "fp64"])
def test_kernels_compile_for_a_gpu_into_few_atomics(kind):
    """For compute capability 9.0. A program ends with two vectors of counts, two extremes and two sums."""
    from triton.backends.compiler import GPUTarget

    from precscope.kernels import triton as ours

    constants = {"kind": ["fp32", "bf16", "fp16", "fp64"].index(kind), **ours._CONSTANTS}
    signature = {"rows": "*i64", "x_pointer": f"*{kind}", "n": "i64", "slot": "i32", "k": "i32"}
    signature |= dict.fromkeys(constants, "constexpr")
    source = triton.compiler.ASTSource(fn=ours._accumulate_kernel, signature=signature, constexprs=constants)
    binary = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=ours._OPTIONS)
    atomics = re.findall(r"atom\.global\S*", binary.asm["ptx"])
    assert {a.rsplit(".", 2)[-2] for a in atomics} == {"add", "max", "min"}
    assert len(atomics) <= 8

    if kind in ("fp32", "fp64"):
        signature = {
            "rows": "*i64",
            "before_pointer": f"*{kind}",
            "step_pointer": f"*{kind}",
            "n": "i64",
            "slot": "i32",
        }
        signature |= dict.fromkeys(constants, "constexpr")
        source = triton.compiler.ASTSource(fn=ours._ratio_kernel, signature=signature, constexprs=constants)
        assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=ours._OPTIONS).asm["ptx"]
