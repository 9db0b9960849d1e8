"""Time `ps.summarize` beside torch.sum, which reads every value once and adds it: the limit on a CPU.

    python benchmarks/summarize.py [--json OUT] [--elements 24] [--repeats 11] [--device cpu]

All candidates run in turn on the same tensor, round after round; the table gives medians and the ratio to torch.sum of
fp32. What each one computes stands beside it. torch.histc and numpy.histogram count into linear bins of fp32 values.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

import precscope as ps
from precscope.kernels import SlotBuffer, backend_for

ALL = "binade histogram, zeros, +-inf, nan, amax, amin, sum, sumsq"


def candidates(x: torch.Tensor) -> dict[str, tuple[str, Callable[[], object]]]:
    """name -> (what it gives, the call), on the fp32 tensor x and copies of it."""
    half, bfloat = x.half(), x.bfloat16()
    found: dict[str, tuple[str, Callable[[], object]]] = {
        "torch.sum, fp32": ("sum", x.sum),
        "torch.sum, bf16": ("sum", bfloat.sum),
        "x.abs().max(), fp32": ("amax", lambda: x.abs().max()),
        "summarize, fp32": (ALL, lambda: ps.summarize(x)),
        "summarize, bf16": (ALL, lambda: ps.summarize(bfloat)),
        "summarize, fp16": (ALL, lambda: ps.summarize(half)),
        "summarize, backend='torch', fp32": (ALL, lambda: ps.summarize(x, backend="torch")),
        "torch.histc(bins=280), fp32": ("linear histogram", lambda: torch.histc(x, bins=280)),
    }
    if x.device.type == "cpu":
        array = x.numpy()
        found["numpy.histogram(bins=280), fp32"] = ("linear histogram", lambda: np.histogram(array, bins=280))
    return found


def median_ms(calls: dict[str, Callable[[], object]], repeats: int, device: torch.device) -> dict[str, float]:
    """Medians in milliseconds. Candidates alternate, so that a noisy moment hits all of them; slow ones run less."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(repeats + 1):
        for name, call in calls.items():
            if turn > 2 and statistics.median(times[name]) > 500:
                continue
            start = time.perf_counter()
            call()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if turn:  # the first turn warms up
                times[name].append(1e3 * (time.perf_counter() - start))
    return {name: statistics.median(values) for name, values in times.items()}


def small_us(device: torch.device) -> dict[int, float]:
    """Microseconds for one SlotBuffer.accumulate of a small tensor (what a recorder's hook pays), by size."""
    buffer, found = SlotBuffer(device), {}
    for n in (1, 1_000, 10_000, 60_000):
        x = torch.randn(n, device=device)
        times = []
        for _ in range(300):
            start = time.perf_counter()
            buffer.accumulate(0, x)
            times.append(1e6 * (time.perf_counter() - start))
        found[n] = statistics.median(times)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    parser.add_argument("--elements", type=int, default=24, help="log2 of the number of values (default 24)")
    parser.add_argument("--repeats", type=int, default=11)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()

    device = torch.device(arguments.device)
    x = torch.randn(1 << arguments.elements, generator=torch.Generator().manual_seed(0)).to(device)
    entries = candidates(x)
    medians = median_ms({name: call for name, (_, call) in entries.items()}, arguments.repeats, device)
    small = small_us(device)
    limit = medians["torch.sum, fp32"]
    print(
        f"2^{arguments.elements} values, {device}, {torch.get_num_threads()} threads, backend {backend_for(device)}, "
        f"torch {torch.__version__}"
    )
    print(f"{'':36}{'ms':>10}{'x torch.sum':>13}  gives")
    for name, (gives, _) in entries.items():
        print(f"{name:36}{medians[name]:>10.2f}{medians[name] / limit:>13.1f}  {gives}")
    print("SlotBuffer.accumulate: " + ", ".join(f"{n:,} values {us:.1f} us" for n, us in small.items()))
    if arguments.json:
        record = {
            "elements": x.numel(), "device": str(device), "threads": torch.get_num_threads(),
            "machine": platform.machine(), "torch": torch.__version__, "backend": backend_for(device),
            "median_ms": medians, "ratio_to_sum": {name: t / limit for name, t in medians.items()},
            "accumulate_us": small,
        }  # fmt: skip
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print(f"wrote {arguments.json}")


if __name__ == "__main__":
    main()
