"""What a shadow step costs: against a plain fp32 step, forward and backward, of the demo GPT, in turn.

    python benchmarks/shadow.py [--steps 10] [--precision bf16] [--json OUT]

Every step is run three ways on the same batch: forward and backward as the run does them (under autocast unless fp32),
in plain fp32, and as a shadow step, files included. Ratios are between medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch

from precscope.recording import record
from precscope.tasks import make_task

WARM_UP = 2


def measure(steps: int, precision: str, out: Path) -> dict[str, list[float]]:
    """Seconds of each step: "run", "fp32" and "shadow"."""
    task = make_task("gpt")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    times: dict[str, list[float]] = {"run": [], "fp32": [], "shadow": []}

    def timed(name: str, action) -> None:
        started = time.perf_counter()
        action()
        times[name].append(time.perf_counter() - started)

    with record(task.model, out, every=1) as rec:
        for step in range(steps + WARM_UP):
            batch = task.batch(step)

            def run(batch=batch) -> None:
                with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
                    loss = task.loss(task.model, batch)
                loss.backward()

            def plain(batch=batch) -> None:
                with rec.paused():
                    task.loss(task.model, batch).backward()

            timed("run", run)
            timed("shadow", lambda batch=batch: rec.shadow(lambda: task.loss(task.model, batch)))
            task.model.zero_grad()
            rec._watcher.detach()  # an unwatched step
            timed("fp32", plain)
            task.model.zero_grad()
            rec.step()
    return {name: seconds[WARM_UP:] for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--precision", default="bf16", choices=("fp32", "bf16", "fp16"))
    parser.add_argument("--json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = measure(arguments.steps, arguments.precision, Path(folder) / "run")
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    ratio = medians["shadow"] / medians["fp32"]
    for name, seconds in medians.items():
        print(f"{name:8} {1e3 * seconds:8.1f} ms")
    print(f"shadow step / plain fp32 step: {ratio:.2f}  ({arguments.steps} steps, {torch.get_num_threads()} threads)")
    if arguments.json:
        result = {"medians_s": medians, "ratio": ratio, "threads": torch.get_num_threads()}
        Path(arguments.json).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
