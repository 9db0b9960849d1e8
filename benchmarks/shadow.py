"""What a shadow step costs: against a plain fp32 step, forward and backward, in turn.

    python benchmarks/shadow.py [--model gpt] [--steps 10] [--precision bf16] [--json OUT]

Every step is run three ways on the same batch: forward and backward as the run does them (recorded, under autocast
unless fp32), as a shadow step, files included, and in plain fp32, unwatched, on a model of its own. Ratios are of the
same turn: their median and quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import Target, check, machine, spread, write_json
from realmodels import MODELS, Missing

from precscope.recording import record

WARM_UP = 2


def measure(model: str, steps: int, precision: str, out: Path) -> dict[str, Any]:
    """The row of one model and precision. Raises Missing where a package is not installed."""
    task, plain = MODELS[model](), MODELS[model]()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    times: dict[str, list[float]] = {"run": [], "shadow": [], "fp32": []}

    def timed(name: str, action: Callable[[], Any]) -> None:
        started = time.perf_counter()
        action()
        times[name].append(time.perf_counter() - started)

    def run(batch: Any) -> None:
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            loss = task.loss(task.model, batch)
        loss.backward()

    with record(task.model, out, every=1) as rec:
        for step in range(steps + WARM_UP):
            batch = task.batch(step)
            timed("run", lambda batch=batch: run(batch))
            timed("shadow", lambda batch=batch: rec.shadow(lambda: task.loss(task.model, batch)))
            timed("fp32", lambda batch=batch: plain.loss(plain.model, batch).backward())
            task.model.zero_grad()
            plain.model.zero_grad()
            rec.step()
    times = {name: seconds[WARM_UP:] for name, seconds in times.items()}
    ratio = spread([s / p for s, p in zip(times["shadow"], times["fp32"], strict=True)])
    medians = {f"{name}_ms": 1e3 * statistics.median(seconds) for name, seconds in times.items()}
    return {"model": model, "precision": precision, **medians, "ratio": ratio.median,
            "quartiles": [ratio.low, ratio.high]}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", default=["gpt"], choices=tuple(MODELS))
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    rows = []
    for model in options.model:
        with tempfile.TemporaryDirectory() as folder:
            try:
                row = measure(model, options.steps, options.precision, Path(folder) / "run")
            except Missing as missing:
                print(f"{model}: skipped, {missing}")
                continue
        rows.append(row)
        print(f"{model}, {options.precision}, {options.steps} steps, {torch.get_num_threads()} threads")
        for name in ("run", "shadow", "fp32"):
            print(f"{name:8} {row[f'{name}_ms']:8.1f} ms")
        low, high = row["quartiles"]
        print(f"shadow step / plain fp32 step: {row['ratio']:.2f} (quartiles {low:.2f} to {high:.2f})")
    asked = [
        Target(f"{r['model']} {r['precision']}, shadow step", r["ratio"], 3.0) for r in rows if r["model"] == "gpt"
    ]
    check(asked)
    write_json(options.json, "shadow", rows, targets=asked, steps=options.steps, **machine())


if __name__ == "__main__":
    main()
