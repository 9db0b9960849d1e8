"""What recording at op level costs: a step of the demo GPT in fp32, forward and backward, plain and recorded.

    python benchmarks/oplevel.py [--steps 15] [--size small] [--json OUT]

The two take steps in turn, so that a change in the machine's speed meets both alike. A recorded step includes entering
and leaving the recorder and `table()`, which waits for the device and copies. The figure is the median of the ratios of
each turn, with its quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from common import Target, check, machine, spread, write_json

from precscope.recording.ops import record_ops
from precscope.tasks import TaskRef, make_task
from precscope.training.tasks.gpt import gpt

WARM_UP = 2


def measure(size: str, steps: int, device: str) -> dict[str, Any]:
    """The row of one size of the GPT."""
    task = make_task(TaskRef("gpt", lambda: gpt(size=size)))
    model = task.model.to(device)
    times: dict[bool, list[float]] = {False: [], True: []}
    rows = 0
    for step in range(WARM_UP + steps):
        batch = tuple(x.to(device) for x in task.batch(step))
        for recorded in (False, True):
            model.zero_grad()
            _wait(device)
            start = time.perf_counter()
            if recorded:
                with record_ops(model) as ops:
                    task.loss(model, batch).backward()
                rows = len(ops.table()[0])
            else:
                task.loss(model, batch).backward()
            _wait(device)
            if step >= WARM_UP:
                times[recorded].append(time.perf_counter() - start)
    plain, watched = (statistics.median(times[kind]) for kind in (False, True))
    ratio = spread([w / p for p, w in zip(times[False], times[True], strict=True)])
    return {"model": f"gpt {size}", "precision": "fp32", "plain_ms": plain * 1e3, "recorded_ms": watched * 1e3,
            "ratio": ratio.median, "quartiles": [ratio.low, ratio.high], "ops": rows}  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--size", default="small")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    row = measure(options.size, options.steps, options.device)
    low, high = row["quartiles"]
    print(f"plain {row['plain_ms']:.1f} ms, recorded {row['recorded_ms']:.1f} ms")
    print(f"recorded / plain: {row['ratio']:.2f} (quartiles {low:.2f} to {high:.2f})")
    print(f"{row['ops']} ops on {options.device}, {torch.get_num_threads()} threads, size {options.size}")
    asked = [Target("op level", row["ratio"], 3.0)] if options.device == "cpu" and options.size == "small" else []
    check(asked)
    details = machine(device=options.device)
    write_json(options.json, "oplevel", [row], targets=asked, steps=options.steps, **details)


if __name__ == "__main__":
    main()
