"""Throughput of quantize beside torch's casts, gfloat, ml_dtypes, qtorch and pychop, and the mismatches of each.

    python benchmarks/quantize.py [--size 24] [--rounds 7] [--device cpu] [--memory kept] [--json OUT]

Every contender rounds the same 2^size float32 values (normal, times 2^j for j from -12 to 8; nothing overflows) to the
format and back to float32, nearest even. They take turns, in an order drawn anew each round, so that whatever slows the
machine slows all; the table shows medians, and the ratio to torch's float16 cast there and back of the same rounds.
The slow ones work on a share of the values (marked *), their times multiplied. With --memory kept the allocator keeps
what is freed, for all alike: a result of 64 MB handed to the system and asked for again costs page faults several times
dearer than the rounding, which is what --memory fresh shows.

Each tool in its fastest fitting setting: gfloat.round_ndarray; ml_dtypes' casts in numpy; qtorch.quant.float_quantize
(C++, compiled when it is imported); pychop.Chop on torch tensors (its numpy backend takes thirty times as long,
FaultChop longer and with more mismatches). gfloat, numpy, ml_dtypes and qtorch run on one thread; they have no other.
qtorch's and pychop's e4m3 end at 240, as in IEEE formats; nothing that is timed lies beyond. What is not installed is
left out and named.

Mismatches are counted against gfloat on 2^20 bit patterns spread over all exponents, specials and overflow included:
all of them; those within the range of the format, where no overflow policy is involved; and of these the ones that
differ in value, not only in the sign of a zero.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gfloat
import gfloat.formats as gformats
import ml_dtypes
import numpy as np
import torch
from common import Target, check, keep_memory, machine, spread, turns, write_json

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
BITS = {"fp16": (5, 10), "bf16": (8, 7), "e4m3": (4, 3), "e5m2": (5, 2)}  # of exponent and significand
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
    mismatches_in_range: of those with a finite magnitude up to the format's largest; wrong_values_in_range: of these,
    more than the sign of a zero. share: 1/share of the values was timed."""

    format: str
    contender: str
    milliseconds: float
    giga_values_per_second: float
    ratio: float
    quartiles: tuple[float, float]
    mismatches: int
    mismatches_in_range: int
    wrong_values_in_range: int
    share: int


def torch_cast(dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: x.to(dtype).to(torch.float32)


def numpy_cast(dtype: type) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.from_numpy(x.numpy().astype(dtype).astype(np.float32))


def gfloat_round(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda x: torch.from_numpy(gfloat.round_ndarray(GFLOAT[name], x.numpy()))


def optional() -> tuple[dict[str, Callable[[str], Callable[[torch.Tensor], torch.Tensor]]], dict[str, str]]:
    """Packages that need not be there: name -> rounding of a format; and why the others are left out."""
    found: dict[str, Callable[[str], Callable[[torch.Tensor], torch.Tensor]]] = {}
    missing = {}
    try:
        from qtorch.quant import float_quantize  # compiles itself, half a minute the first time

        found["qtorch"] = lambda name: partial(float_quantize, exp=BITS[name][0], man=BITS[name][1], rounding="nearest")
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: no compiler, no ninja
        missing["qtorch"] = str(error).splitlines()[0]
    try:
        from pychop import Chop

        found["pychop"] = lambda name: Chop(exp_bits=BITS[name][0], sig_bits=BITS[name][1])
    except ImportError as error:
        missing["pychop"] = str(error)
    return found, missing


def contenders(device: str) -> tuple[list[Contender], dict[str, str]]:
    """The yardstick first; then, for each format, ours and the others. And what is left out, with the reason."""
    found = [Contender(LIMIT, "fp16", torch_cast(torch.float16))]
    others, missing = optional() if device == "cpu" else ({}, {})
    for name in GFLOAT:
        fmt = get_format(name)
        found.append(Contender("precscope", name, lambda x, name=name: quantize(x, name)))
        found.append(Contender("precscope saturating", name, lambda x, name=name: quantize(x, name, saturate=True)))
        if name != "fp16":
            found.append(Contender("torch cast", name, torch_cast(getattr(torch, fmt.torch_dtype_name))))
        if device == "cpu":
            label = "numpy" if name == "fp16" else "ml_dtypes"
            found.append(Contender(label, name, numpy_cast(NUMPY[name])))
            found.append(Contender("gfloat", name, gfloat_round(name), share=16))
        shares = {"qtorch": 4, "pychop": 8}
        found += [Contender(label, name, make(name), share=shares[label]) for label, make in others.items()]
    return found, missing


def oracle_input() -> torch.Tensor:
    """2^20 random bit patterns: every exponent, subnormals, inf and NaN."""
    bits = np.random.default_rng(20).integers(0, 2**32, 2**20, dtype=np.uint32)
    return torch.from_numpy(bits.view(np.int32)).view(torch.float32)


def count_mismatches(contender: Contender, device: str) -> tuple[int, int, int]:
    """Values of `oracle_input` on which the contender differs from gfloat (in float64), bit for bit save a NaN's
    payload: all of them, those within the range of the format, and of these the ones that are another number."""
    x = oracle_input()
    got = contender.run(x.to(device)).cpu()
    want = gfloat.round_ndarray(GFLOAT[contender.fmt], x.double().numpy(), sat="saturating" in contender.name)
    want = torch.from_numpy(want).float()
    same = (got == want) | (got.isnan() & want.isnan())
    wrong = ~(same & ((got.signbit() == want.signbit()) | want.isnan()))
    in_range = x.abs() <= get_format(contender.fmt).max
    return int(wrong.sum()), int((wrong & in_range).sum()), int((~same & in_range).sum())


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


def measure(size: int, rounds: int, device: str) -> tuple[list[Row], dict[str, str]]:
    """One row per contender, and what is left out. size: log2 of the number of values."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2**size, generator=generator)
    x *= torch.exp2(torch.randint(-12, 9, (2**size,), generator=generator).float())
    x = x.clamp_(-240, 240).to(device)
    field, missing = contenders(device)
    wrong = [count_mismatches(c, device) for c in field]
    for contender in field:
        time_once(contender, x)  # compiles, and fills what the allocator keeps
    times: list[list[float]] = [[] for _ in field]
    for round_number, order in enumerate(turns(range(len(field)), rounds), start=1):
        print(f"round {round_number} of {rounds}", end="\r", file=sys.stderr, flush=True)
        for index in order:
            times[index].append(time_once(field[index], x))
    return [row(c, s, times[0], bad, 2**size) for c, s, bad in zip(field, times, wrong, strict=True)], missing


def row(contender: Contender, seconds: list[float], limit: list[float], bad: tuple[int, int, int], count: int) -> Row:
    """limit: seconds of the yardstick in the same rounds."""
    ratio = spread([s / base for s, base in zip(seconds, limit, strict=True)])
    median = statistics.median(seconds)
    return Row(
        format=contender.fmt,
        contender=contender.name,
        milliseconds=1e3 * median,
        giga_values_per_second=count / median / 1e9,
        ratio=ratio.median,
        quartiles=(ratio.low, ratio.high),
        mismatches=bad[0],
        mismatches_in_range=bad[1],
        wrong_values_in_range=bad[2],
        share=contender.share,
    )


def targets(rows: list[Row]) -> list[Target]:
    """What is asked, with the figures of this run."""
    ratio = {(r.format, r.contender): r.ratio for r in rows}
    found = []
    for name in ("fp16", "bf16"):
        cast = ratio.get((name, "torch cast"), 1.0)
        found.append(Target(f"{name} / torch's cast there and back", ratio[name, "precscope"] / cast, 1.1))
    for name in ("e4m3", "e5m2"):
        found.append(Target(f"{name} / {LIMIT} there and back", ratio[name, "precscope"], 1.5))
        found += [
            Target(f"{other} / precscope, {name}", ratio[name, other] / ratio[name, "precscope"], 10, at_least=True)
            for other in ("gfloat", "qtorch", "pychop")
            if (name, other) in ratio
        ]
    return found


def print_table(rows: list[Row]) -> None:
    print(
        f"{'format':6}  {'contender':22}{'ms':>9}  {'Gvalues/s':>9}  {'ratio':>7} {'quartiles':>15}  {'mismatches':>10}"
        f"{'in range':>10}{'values':>9}"
    )
    for r in rows:
        mark = "*" if r.share > 1 else " "
        print(
            f"{r.format:6}  {r.contender:22}{r.milliseconds:9.1f}{mark} {r.giga_values_per_second:9.2f}  "
            f"{r.ratio:7.2f} {r.quartiles[0]:7.2f}-{r.quartiles[1]:<7.2f}  {r.mismatches:10,}"
            f"{r.mismatches_in_range:10,}{r.wrong_values_in_range:9,}"
        )
    shares = sorted({f"{r.contender} 1/{r.share}" for r in rows if r.share > 1})
    print(f"ratio: to {LIMIT!r} there and back, round by round. mismatches: of {2**20:,} against gfloat.")
    print(f"* extrapolated from a share of the values: {', '.join(shares)}.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=24, help="log2 of the number of values (default: 24)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds, after one to warm up (default: 7)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--memory", choices=("kept", "fresh"), default="kept", help="of freed results (default: kept)")
    parser.add_argument("--json", type=Path, help="where to write the numbers")
    arguments = parser.parse_args()
    kept = arguments.memory == "kept" and arguments.device == "cpu" and keep_memory()
    with np.errstate(all="ignore"):  # overflow and NaN are part of the test
        rows, missing = measure(arguments.size, arguments.rounds, arguments.device)
    print_table(rows)
    for name, why in missing.items():
        print(f"{name}: left out, {why}")
    asked = targets(rows) if arguments.size >= 22 and arguments.device == "cpu" else []  # fewer fit in caches
    check(asked)
    settings: dict[str, Any] = {
        "values": 2**arguments.size, "rounds": arguments.rounds, "yardstick": LIMIT, "left_out": missing,
        "memory": "kept" if kept else "fresh",
    }  # fmt: skip
    settings |= machine(np, ml_dtypes, device=arguments.device)
    write_json(arguments.json, "quantize", [asdict(r) for r in rows], targets=asked, **settings)


if __name__ == "__main__":
    main()
