"""Time `ps.summarize` beside torch.sum, which reads every value once and adds it: the limit.

    python benchmarks/summarize.py [--elements 24] [--rounds 11] [--tensors 200] [--device cpu] [--json OUT]

All candidates take turns on the same values, in an order drawn anew each round; the first table gives medians with
quartiles, and the ratio to torch.sum of fp32 in the same rounds. What each one computes stands beside it. torch.histc
and numpy.histogram count into linear bins of fp32 values; slow ones run in fewer rounds.

The second table is about small tensors, as parameters and their gradients are: one `SlotBuffer.accumulate_many` beside
as many calls of `accumulate`, and `x.sum()` of each.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, spread, turns, write_json

import precscope as ps
from precscope.kernels import SlotBuffer, backend_for

ALL = "binade histogram, zeros, +-inf, nan, amax, amin, sum, sumsq"
LIMIT = "torch.sum, fp32"
SMALL = (256, 4_096, 32_768)
_SLOW_S, _SLOW_ROUNDS = 0.5, 3


def candidates(x: torch.Tensor) -> dict[str, tuple[str, Callable[[], object]]]:
    """name -> (what it gives, the call), on the fp32 tensor x and copies of it."""
    half, bfloat = x.half(), x.bfloat16()
    found: dict[str, tuple[str, Callable[[], object]]] = {
        LIMIT: ("sum", x.sum),
        "torch.sum, bf16": ("sum", bfloat.sum),
        "torch.amax of |x|, fp32": ("amax", lambda: x.abs().amax()),
        "torch.aminmax, fp32": ("min, max", lambda: torch.aminmax(x)),
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


def small_candidates(n: int, count: int, device: torch.device) -> dict[str, Callable[[], object]]:
    """The same work on `count` tensors of about n values in three ways."""
    generator = torch.Generator().manual_seed(n)
    tensors = [torch.randn(n + i, generator=generator).to(device) for i in range(count)]
    buffer, slots = SlotBuffer(device, count), list(range(count))

    def one_by_one() -> None:
        for slot, x in enumerate(tensors):
            buffer.accumulate(slot, x)

    return {
        "accumulate_many": lambda: buffer.accumulate_many(slots, tensors),
        "accumulate, one by one": one_by_one,
        "x.sum() of each": lambda: [x.sum() for x in tensors],
    }


def measured(calls: dict[str, Callable[[], object]], rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Milliseconds of each call, round by round, after one that warms up."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()
    for order in turns(list(calls), rounds):
        for name in order:
            if len(times[name]) >= _SLOW_ROUNDS and statistics.median(times[name]) > 1e3 * _SLOW_S:
                continue
            _wait(device)
            start = time.perf_counter()
            calls[name]()
            _wait(device)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def rows_of(times: dict[str, list[float]], limit: str, **more: Any) -> list[dict[str, Any]]:
    """A row per candidate; ratio: of medians, to that of `limit`."""
    base = statistics.median(times[limit])
    return [
        {"name": name, "ms": asdict(spread(values)), "ratio": statistics.median(values) / base, **more}
        for name, values in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--elements", type=int, default=24, help="log2 of the number of values (default 24)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--tensors", type=int, default=200, help="how many small ones (default 200)")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, metavar="OUT", help="write the figures to this file")
    options = parser.parse_args()

    device = torch.device(options.device)
    x = torch.randn(1 << options.elements, generator=torch.Generator().manual_seed(0)).to(device)
    entries = candidates(x)
    rows = rows_of(measured({n: call for n, (_, call) in entries.items()}, options.rounds, device), LIMIT)
    print(
        f"2^{options.elements} values, {device}, {torch.get_num_threads()} threads, backend {backend_for(device)}, "
        f"torch {torch.__version__}"
    )
    print(f"{'':36}{'ms':>10}{'x torch.sum':>13}  gives")
    for row in rows:
        row["gives"] = entries[row["name"]][0]
        print(f"{row['name']:36}{row['ms']['median']:>10.2f}{row['ratio']:>13.1f}  {row['gives']}")
    print(f"\n{options.tensors} small tensors{'values each':>22}{'ms':>10}{'us each':>10}{'x one by one':>14}")
    for n in SMALL:
        calls = small_candidates(n, options.tensors, device)
        times = measured(calls, options.rounds, device)
        for row in rows_of(times, "accumulate, one by one", values=n, tensors=options.tensors):
            rows.append(row)
            ms = row["ms"]["median"]
            print(f"{row['name']:25}{n:>10,}{ms:>10.2f}{1e3 * ms / options.tensors:>10.2f}{row['ratio']:>14.2f}")
    write_json(
        options.json, "summarize", rows, elements=x.numel(), backend=backend_for(device),
        **machine(np, device=options.device),
    )  # fmt: skip


if __name__ == "__main__":
    main()
