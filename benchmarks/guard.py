"""What the guard is worth and what it costs: `python benchmarks/guard.py [--steps 80] [--cost-steps 300] [--json OUT]`.

For each model of tests/guarded.py, whose weights grow on purpose until fp16 fails: held-out loss in fp32, in fp16
autocast, and in fp16 under each action; the step of the first alarm and of the promotion, the module named, the format.
Then false alarms over noisy healthy runs, and the cost per step of a guard that has nothing to do.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from common import write_json

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from guarded import CASES, STEPS, growing, noisy

from precscope.errors import TrainingError
from precscope.training import train
from precscope.training.guard import read_events
from precscope.training.tasks.gpt import gpt


def rescue(steps: int) -> list[dict[str, Any]]:
    """A row per model and action."""
    rows: list[dict[str, Any]] = []
    print("model      action    loss    against fp32  first alarm  promoted  steps lost  module and format")
    for name, (_, guilty) in CASES.items():
        settings = {"steps": steps, "lr": 3e-3}
        true = train(growing(name), precision="fp32", **settings).eval_loss
        print(f"{name:10} fp32      {true:.4f}")
        rows.append({"model": name, "how": "fp32", "loss": true})
        for action in (None, "warn", "promote", "rollback"):
            out = Path(tempfile.mkdtemp()) / "run"
            try:
                result = train(growing(name), precision="fp16", guard=action, out=out, **settings)
            except TrainingError as error:
                print(f"{name:10} {action or 'none':9} ended: {str(error)[:70]}")
                rows.append({"model": name, "how": action or "none", "loss": None, "ended": str(error)})
                continue
            events = read_events(out) if action else []
            promoted = [e for e in events if e.action == "promote"]
            shown = ", ".join(f"{m or '(root)'} to {c}" for e in promoted for m, c in e.numbers["modules"].items())
            print(
                f"{name:10} {action or 'none':9} {result.eval_loss:.4f}  {result.eval_loss / true - 1:+11.2%}"
                f"  {events[0].step if events else '-':>11}  {promoted[0].step if promoted else '-':>8}"
                f"  {result.skipped_steps:>10}  {shown}" + (f" (at fault: {guilty})" if shown else "")
            )
            rows.append({
                "model": name, "how": action or "none", "loss": result.eval_loss, "skipped": result.skipped_steps,
                "alarm": events[0].step if events else None, "promoted": promoted[0].step if promoted else None,
                "made_safer": shown,
            })  # fmt: skip
    return rows


def false_alarms(seeds: int) -> dict[str, int]:
    """Events of runs in which nothing is wrong, by noise and precision."""
    found = {}
    for heavy in (False, True):
        for precision in ("bf16", "fp16"):
            events = 0
            for seed in range(seeds):
                out = Path(tempfile.mkdtemp()) / "run"
                train(noisy(seed, heavy=heavy), precision=precision, steps=300, lr=3e-3, guard="promote", out=out)
                events += len(read_events(out))
            noise = "Cauchy" if heavy else "normal"
            found[f"{noise} {precision}"] = events
            print(f"false alarms, {noise} noise, {precision}: {events} in {seeds} runs of 300 steps")
    return found


def cost(steps: int) -> dict[str, float]:
    """Median step time of the demo model, runs with and without a guard in turn."""
    times: dict[str, list[float]] = {"none": [], "promote": [], "skip": []}
    for _ in range(3):
        for action, found in times.items():
            torch.manual_seed(0)
            begin = time.perf_counter()
            train(gpt("tiny"), precision="fp16", steps=steps, guard=None if action == "none" else action)
            found.append(1e3 * (time.perf_counter() - begin) / steps)
    for action, found in times.items():
        over = min(found) / min(times["none"]) - 1
        print(f"guard {action:8} {statistics.median(found):.2f} ms a step (least {min(found):.2f}, {over:+.1%})")
    return {action: statistics.median(found) for action, found in times.items()}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--cost-steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")
    rows, alarms, step_ms = rescue(chosen.steps), false_alarms(chosen.seeds), cost(chosen.cost_steps)
    write_json(chosen.json, "guard", rows, steps=chosen.steps, false_alarms=alarms, seeds=chosen.seeds, step_ms=step_ms)
