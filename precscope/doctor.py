"""What this machine can do: devices, which formats are native, measured rates, versions."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING

from .errors import UsageError

if TYPE_CHECKING:
    import torch

PACKAGES = (
    "precscope", "torch", "numpy", "pandas", "pyarrow", "scipy", "numba", "triton", "transformers", "torchao",
)  # fmt: skip


@dataclass(frozen=True)
class Rate:
    """Measured matrix-product rate of a format.

    native: whether the device has instructions for it, as far as its rate tells. gflops: 1e9 FLOP per second; NaN where
    there is nothing to measure. note: why a format is not native, or was not measured.
    """

    format: str
    native: bool
    gflops: float
    note: str


@dataclass(frozen=True)
class Diagnosis:
    """What `examine` found."""

    device: str
    device_name: str
    threads: int
    rates: tuple[Rate, ...]
    copy_gbytes: float
    kernels: str
    versions: dict[str, str]

    @property
    def advice(self) -> list[str]:
        """What the rates mean, in sentences for a newcomer."""
        by_name = {r.format: r for r in self.rates}
        base = by_name["fp32"].gflops
        said = []
        for name in ("bf16", "fp16"):
            ratio = by_name[name].gflops / base
            if ratio >= 1.2:
                said.append(f"{name} matrix products run {ratio:.1f} times as fast as fp32: {name} can gain time here.")
            elif ratio >= 0.8:
                said.append(f"{name} matrix products are no faster than fp32: {name} saves memory here, not time.")
            else:
                said.append(
                    f"{name} matrix products run {1 / ratio:.3g} times slower than fp32 here: train in another format. "
                    f"The bundled trainer computes them through fp32 and rounds, so that {name} can be studied."
                )
        if not any(r.native for r in self.rates if r.format.startswith("e")):
            said.append("fp8 formats are emulated here: quality can be studied, speed cannot.")
        return said


def examine(*, device: str | None = None, size: int = 1024) -> Diagnosis:
    """Measure this machine: matrix products of size^3 in each format, copy bandwidth, kernel backend, versions.

    Raises UsageError where size is below 16, the least that fp8 products take.
    """
    if size < 16:
        raise UsageError(f"size must be an integer of 16 or more, not {size}; below some hundreds a rate means little")
    import torch

    from .kernels import backend_for
    from .recording.provenance import cpu_name

    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else cpu_name()
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
    measured = {n: _matmul_gflops(d, where, size) for n, d in dtypes.items()}
    rates = [rate_of(n, gflops, fp32_gflops=measured["fp32"]) for n, gflops in measured.items()]
    rates += [_fp8_rate(n, where, size) for n in ("e4m3", "e5m2")]
    return Diagnosis(
        where.type, name, torch.get_num_threads(), tuple(rates), _copy_gbytes(where), backend_for(where), _versions()
    )


def rate_of(name: str, gflops: float, *, fp32_gflops: float) -> Rate:
    """A measured rate. Below a third of fp32's the format is emulated in software, whatever the device claims: with
    instructions of its own it would be no slower than what is twice as wide."""
    native = gflops >= fp32_gflops / 3
    return Rate(name, native, gflops, "" if native else "no native instructions")


def _matmul_gflops(dtype: torch.dtype, device: torch.device, size: int) -> float:
    import torch

    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    seconds = _median_seconds(lambda: a @ b, device)
    return 2 * size**3 / seconds / 1e9


def _fp8_rate(name: str, device: torch.device, size: int) -> Rate:
    """fp8 by torch._scaled_mm on CUDA devices of compute capability 8.9 and above; emulated elsewhere."""
    import torch

    from .applying.scaled import missing_on

    if why := missing_on(device):
        return Rate(name, False, float("nan"), f"emulated: {why}")
    if name == "e5m2":
        return Rate(name, True, float("nan"), "native beside e4m3 operands (gradients)")
    size -= size % 16  # as the kernel asks
    a = torch.randn(size, size, device=device).to(torch.float8_e4m3fn)
    b = torch.randn(size, size, device=device).to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=device)
    seconds = _median_seconds(lambda: torch._scaled_mm(a, b, one, one, out_dtype=torch.bfloat16), device)
    return Rate(name, True, 2 * size**3 / seconds / 1e9, "")


def _median_seconds(action, device: torch.device, *, budget_s: float = 0.4) -> float:
    import torch

    def once() -> float:
        start = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() - start

    first = once()
    if first > budget_s:
        return first
    times = [once() for _ in range(max(3, min(30, int(budget_s / max(first, 1e-6)))))]
    return statistics.median(times)


def _copy_gbytes(device: torch.device) -> float:
    """Copy bandwidth in 1e9 bytes per second, bytes read and written counted."""
    import torch

    x = torch.ones(1 << 24, device=device)
    y = torch.empty_like(x)
    return 2 * x.numel() * 4 / _median_seconds(lambda: y.copy_(x), device) / 1e9


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    return found


def describe(found: Diagnosis) -> str:
    """The diagnosis in words, as wide as the terminal, 80 columns at most."""
    import textwrap

    from .reporting.text import line_width

    width = line_width(most=80)

    base = found.rates[0].gflops
    lines = [
        f"device    {found.device_name} ({found.device}, {found.threads} threads)",
        f"memory    {found.copy_gbytes:.3g} GB/s copied (read and written)",
        f"kernels   statistics in one pass by {found.kernels}",
        "",
        "format    matrix products         against fp32",
    ]
    for rate in found.rates:
        if rate.gflops == rate.gflops:
            line = f"{rate.format:<9} {rate.gflops:>9.4g} GFLOP/s {rate.gflops / base:>16.3g}x  {rate.note}"
            lines += (
                [line.rstrip()] if len(line) <= width else [line[: -len(rate.note)].rstrip(), f"{'':<9} {rate.note}"]
            )
        else:
            lines.append(f"{rate.format:<9} {rate.note}")
    lines += ["", *(line for text in found.advice for line in textwrap.wrap(text, width))]
    lines += ["", *textwrap.wrap("versions: " + ", ".join(f"{k} {v}" for k, v in found.versions.items()), width)]
    return "\n".join(lines)
