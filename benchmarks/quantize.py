"""Throughput of quantize beside torch's casts, gfloat and ml_dtypes, with the mismatches of each in the same table.

    python benchmarks/quantize.py [--size 24] [--rounds 7] [--device cpu] [--json OUT]

Every contender rounds the same 2^size float32 values (normal, times 2^j for j from -12 to 8; nothing overflows) to the
format and back to float32, nearest even. They take turns, round after round, so that whatever slows the machine slows
all; the table shows medians, and the ratio to torch's float16 cast there and back of the same rounds. gfloat, which
needs seconds, works on an eighth of the values (marked *), its times multiplied by eight.

Mismatches are counted against gfloat on 2^20 bit patterns spread over all exponents, specials and overflow included:
all of them, and those within the range of the format, where no overflow policy is involved. gfloat, numpy and ml_dtypes
run on one CPU thread; they have no other.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import gfloat
import gfloat.formats as gformats
import ml_dtypes
import numpy as np
import torch

import precscope
from precscope.formats import get_format
from precscope.rounding import quantize

GFLOAT = {
    "fp16": gformats.format_info_binary16,
    "bf16": gformats.format_info_bfloat16,
    "e4m3": gformats.format_info_ocp_e4m3,
    "e5m2": gformats.format_info_ocp_e5m2,
}
NUMPY = {
    "fp16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
}
LIMIT = "torch float16 cast"  # the yardstick of every row


@dataclass(frozen=True)
class Contender:
    """`run` takes a float32 tensor and returns the rounded float32 tensor; it sees 1/`share` of the values."""

    name: str
    fmt: str
    run: Callable[[torch.Tensor], torch.Tensor]
    share: int = 1


@dataclass(frozen=True)
class Row:
    """ratio: median over the rounds of the time over that of the yardstick. mismatches: of 2^20 values;
    mismatches_in_range: of those with a finite magnitude up to the format's largest."""

    format: str
    contender: str
    milliseconds: float
    giga_values_per_second: float
    ratio: float
    mismatches: int
    mismatches_in_range: int
    extrapolated: bool


def torch_cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype).to(torch.float32)


def numpy_cast(dtype: type) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))


def gfloat_round(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.from_numpy(gfloat.round_ndarray(GFLOAT[name], x.numpy()))


def contenders(device: str) -> list[Contender]:
    """The yardstick first; then, for each format, ours and the others."""
    found = [Contender(LIMIT, "fp16", torch_cast(torch.float16))]
    for name in GFLOAT:
        fmt = get_format(name)
        found.append(Contender("precscope", name, lambda x, name=name: quantize(x, name)))
        found.append(Contender("precscope saturating", name, lambda x, name=name: quantize(x, name, saturate=True)))
        if name != "fp16":
            found.append(Contender("torch cast", name, torch_cast(getattr(torch, fmt.torch_dtype_name))))
        if device == "cpu":
            label = "numpy" if name == "fp16" else "ml_dtypes"
            found.append(Contender(label, name, numpy_cast(NUMPY[name])))
            found.append(Contender("gfloat", name, gfloat_round(name), share=8))
    return found


def oracle_input() -> torch.Tensor:
    """2^20 random bit patterns: every exponent, subnormals, inf and NaN."""
    bits = np.random.default_rng(20).integers(0, 2**32, 2**20, dtype=np.uint32)
    return torch.from_numpy(bits.view(np.int32)).view(torch.float32)


def count_mismatches(contender: Contender, device: str) -> tuple[int, int]:
    """Values of `oracle_input` on which the contender differs from gfloat (in float64), bit for bit save a NaN's
    payload: all of them, and those within the range of the format."""
    x = oracle_input()
    got = contender.run(x.to(device)).cpu()
    want = gfloat.round_ndarray(GFLOAT[contender.fmt], x.double().numpy(), sat="saturating" in contender.name)
    want = torch.from_numpy(want).float()
    wrong = ~(((got == want) & (got.signbit() == want.signbit())) | (got.isnan() & want.isnan()))
    in_range = x.abs() <= get_format(contender.fmt).max
    return int(wrong.sum()), int((wrong & in_range).sum())


def time_once(contender: Contender, x: torch.Tensor) -> float:
    """Seconds for all of `x`, scaled up from the share that the contender sees."""
    part = x[: x.numel() // contender.share]
    if x.is_cuda:
        torch.cuda.synchronize()
    start = time.perf_counter()
    contender.run(part)
    if x.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * contender.share


def measure(size: int, rounds: int, device: str) -> list[Row]:
    """One row per contender. size: log2 of the number of values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**size, generator=generator)
    x *= torch.exp2(torch.randint(-12, 9, (2**size,), generator=generator).float())
    x = x.clamp_(-240, 240).to(device)
    field = contenders(device)
    wrong = [count_mismatches(c, device) for c in field]
    times: list[list[float]] = [[] for _ in field]
    for round_number in range(rounds + 1):
        print(f"round {round_number} of {rounds}", end="\r", file=sys.stderr, flush=True)
        for contender, seconds in zip(field, times, strict=True):
            elapsed = time_once(contender, x)
            if round_number:  # the first round warms up
                seconds.append(elapsed)
    limit = times[0]
    return [
        Row(
            format=c.fmt,
            contender=c.name,
            milliseconds=1e3 * statistics.median(seconds),
            giga_values_per_second=2**size / statistics.median(seconds) / 1e9,
            ratio=statistics.median(s / base for s, base in zip(seconds, limit, strict=True)),
            mismatches=bad,
            mismatches_in_range=bad_in_range,
            extrapolated=c.share > 1,
        )
        for c, seconds, (bad, bad_in_range) in zip(field, times, wrong, strict=True)
    ]


def print_table(rows: list[Row]) -> None:
    print(
        f"{'format':6}  {'contender':22}{'ms':>9}  {'Gvalues/s':>9}  {'ratio':>7}  {'mismatches':>10}  {'in range':>8}"
    )
    for row in rows:
        mark = "*" if row.extrapolated else " "
        print(
            f"{row.format:6}  {row.contender:22}{row.milliseconds:9.1f}{mark} {row.giga_values_per_second:9.2f}  "
            f"{row.ratio:7.2f}  {row.mismatches:10,}  {row.mismatches_in_range:8,}"
        )
    print(f"ratio: to {LIMIT!r} there and back, round by round. mismatches: of {2**20:,} against gfloat.")
    print("* extrapolated from an eighth of the values.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=24, help="log2 of the number of values (default: 24)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one to warm up (default: 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    with np.errstate(all="ignore"):  # overflow and NaN are part of the test
        rows = measure(arguments.size, arguments.rounds, arguments.device)
    print_table(rows)
    if arguments.json:
        cuda = arguments.device.startswith("cuda")
        result = {
            "schema": 1,
            "benchmark": "quantize",
            "device": torch.cuda.get_device_name() if cuda else platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "versions": {m.__name__: m.__version__ for m in (precscope, torch, np, ml_dtypes)},
            "values": 2**arguments.size,
            "rounds": arguments.rounds,
            "yardstick": LIMIT,
            "rows": [asdict(row) for row in rows],
        }
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
