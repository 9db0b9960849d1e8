"""Whether what runs on the device gives what the CPU gives."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import precscope as ps
from precscope.applying.scaled import cast, missing_on
from precscope.kernels import SlotBuffer, backend_for
from precscope.plans import PrecisionPlan
from precscope.rounding import quantize

from .setting import Setting

FORMATS = ("fp16", "bf16", "e4m3", "e5m2", "e4m3fnuz", "e5m2fnuz", "e3m2", "e2m3", "e2m1")
KINDS = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}


def correctness(setting: Setting) -> None:
    """Mismatches by check; all must be 0. A check that raises says what."""
    device, mismatches = setting.device, {}
    setting.keep(backend=backend_for(device), fp8=missing_on(device) or "native (torch._scaled_mm)")
    count = 2**20 if setting.cuda else 2**14
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0), dtype=torch.int64)
    x = bits.to(torch.int32).view(torch.float32)
    checks: dict[str, Callable[[], int]] = {
        **{f"quantize {fmt}": lambda fmt=fmt: _rounding(x, fmt, device) for fmt in FORMATS},
        **{f"summarize {name}": lambda t=t: _summary(x.to(t), device) for name, t in KINDS.items()},
        **{f"accumulate_update {name}": lambda t=t: _update(x.to(t), device) for name, t in KINDS.items()},
        **{f"accumulate_weights {name}": lambda t=t: _weights(x.to(t), device) for name, t in KINDS.items()},
        **{f"8-bit cast {fmt}": lambda fmt=fmt: _cast(x, fmt, device) for fmt in ("e4m3", "e5m2")},
        "8-bit linear module": lambda: _linear(device),
        "accumulate_many": lambda: _many(x, device),
    }  # fmt: skip
    errors = {}
    for name, check in checks.items():
        try:
            mismatches[name] = check()
        except Exception as error:  # the next one may work
            errors[name] = f"{type(error).__name__}: {error}"
        setting.keep(mismatches=mismatches, errors=errors)
        if errors and setting.cuda:
            torch.cuda.synchronize()  # a fault of the device ends the part here, not somewhere later
    wrong = [name for name, n in mismatches.items() if n]
    if wrong or errors:
        raise AssertionError(f"mismatches: {wrong or 'none'}; raised: {errors or 'none'}")


def _rounding(x: Tensor, fmt: str, device: torch.device) -> int:
    here, there = quantize(x, fmt), quantize(x.to(device), fmt).cpu()
    same = (here.view(torch.int32) == there.view(torch.int32)) | (here.isnan() & there.isnan())
    return int((~same).sum())


def _summary(x: Tensor, device: torch.device) -> int:
    return _tables_differ(*(_table(x.to(where), lambda b, y: b.accumulate(0, y)) for where in ("cpu", device)))


def _update(x: Tensor, device: torch.device) -> int:
    """dw from a hundredth of w up to all of it; the CPU's sum in another order may differ in its last bits."""
    step = x * torch.rand(x.shape, generator=torch.Generator().manual_seed(1)).to(x.dtype)

    def table(where: Any) -> Any:
        before, after = x.to(where), (x + step).to(where)
        return _table(before, lambda b, y: b.accumulate_update(0, 1, y, after), rows=2)

    return _tables_differ(table("cpu"), table(device))


def _weights(x: Tensor, device: torch.device) -> int:
    """Gradient-weighted histograms: the sums of another order agree to 1e-9."""
    g = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))

    def table(where: Any) -> Any:
        return _table(x.to(where), lambda b, y: b.accumulate_weights(0, y, g.to(where))).weights

    here, there = table("cpu"), table(device)
    return int((~np.isclose(here, there, rtol=1e-9, atol=0.0, equal_nan=True)).sum())


def _many(x: Tensor, device: torch.device) -> int:
    """Several small tensors at once, of several dtypes."""
    pieces = [p.to(t) for p in x[: 2**12].split(301) for t in (torch.float32, torch.bfloat16, torch.float16)]

    def fill(buffer: SlotBuffer, where: Any) -> SlotBuffer:
        buffer.accumulate_many(list(range(len(pieces))), [p.to(where) for p in pieces])
        return buffer

    tables = [fill(SlotBuffer(where, len(pieces)), where).read() for where in (torch.device("cpu"), device)]
    return _tables_differ(*tables)


def _table(x: Tensor, fill: Callable[[SlotBuffer, Tensor], object], rows: int = 1) -> Any:
    buffer = SlotBuffer(x.device, rows)
    fill(buffer, x)
    return buffer.read(rows)


def _tables_differ(here: Any, there: Any) -> int:
    """Counts, zeros, non-finite values and extremes that differ."""
    wrong = 0
    for name in ("counts", "zeros", "pos_inf", "neg_inf", "nan", "amax", "amin_nonzero"):
        wrong += int((np.asarray(getattr(here, name)) != np.asarray(getattr(there, name))).sum())
    return wrong


def _cast(x: Tensor, fmt: str, device: torch.device) -> int:
    """Codes, their transpose and the scale; in fp32, bf16, and with rows that are no multiple of 16."""
    wrong = 0
    for y in (x.view(-1, 128), x.view(-1, 128)[:37] * 2.0**-40, x.view(128, -1).t().bfloat16()):
        here, there = cast(y, fmt, columns=True), cast(y.to(device), fmt, columns=True)
        for a, b in zip(here, there, strict=True):
            assert a is not None and b is not None
            a, b = a.float(), b.float().cpu()
            wrong += int((~((a == b) | (a.isnan() & b.isnan()))).sum())
    return wrong


def _linear(device: torch.device) -> int:
    """Results and gradients of a linear module under e4m3 that are further from the CPU's emulation than the rounding
    to bf16 and the order of an fp32 sum explain."""
    torch.manual_seed(0)
    layer, x, g = nn.Linear(512, 256), torch.randn(8, 24, 512), torch.randn(8, 24, 256)

    def run(where: Any) -> list[Tensor]:
        layer.to(where).zero_grad()
        y_in = x.to(where).requires_grad_()
        with ps.apply(PrecisionPlan.uniform("e4m3"), layer):
            y = layer(y_in)
            y.backward(g.to(where, y.dtype))
        return [t.detach().float().cpu() for t in (y, y_in.grad, layer.weight.grad, layer.bias.grad)]

    pairs = zip(run("cpu"), run(device), strict=True)
    return sum(int(((a - b).abs() > 2.0**-7 * a.abs() + 1e-4 * a.abs().max()).sum()) for a, b in pairs)


def tests(setting: Setting) -> None:
    """The tests marked gpu, in a process of their own."""
    root = Path(ps.__file__).parents[1]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "-rfEs", "tests"]
    if setting.quick:
        command[-1] = "tests/test_rounding.py"
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=setting.left(), check=False)
    tail = (done.stdout + done.stderr).strip().splitlines()[-25:]
    setting.keep(summary=tail[-1] if tail else "", returncode=done.returncode)
    if done.returncode not in (0, 5):  # 5: none were collected
        raise AssertionError("\n".join(tail))
