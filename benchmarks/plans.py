"""Is a recommended plan ahead of plain autocast, never behind? Time per step, held-out loss, skipped steps, in one run.

    python benchmarks/plans.py [gpt resnet minilm] [--steps 40] [--timed 40] [--seeds 1] [--json OUT]

For each model: a recorded run with measured costs, a plan confirmed on the model, then training from the same start
in fp32, under plain autocast of the plan's main format, and with the plan: losses and skipped steps. Times are taken
apart: three models of equal start, fp32, plain autocast and planned, take single training steps in turn, and the median
of the ratios within each turn counts, since machines drift and share their cores. With several seeds, for models drawn
from torch's generator, losses are means over the seeds with half the spread (largest less smallest) beside them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from common import machine, write_json
from realmodels import TASKS, Missing

import precscope as ps


def measure(name: str, steps: int, timed: int, seeds: int) -> dict[str, Any]:
    """One model. Raises Missing where a package is not installed."""
    make = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        profile = ps.profile(
            make(), out=Path(folder) / "run", steps=24, precision="bf16", every=4, note=lambda text: None
        )
        plan = ps.recommend(profile, formats=("fp16", "bf16", "fp32"), task=make())
    used = {layer.compute for layer in plan.modules.values()}
    low = "fp16" if "fp16" in used else "bf16"
    asked: dict[str, dict[str, Any]] = {"fp32": {"precision": "fp32"}, low: {"precision": low}, "plan": {"plan": plan}}
    runs: dict[str, list[Any]] = {word: [] for word in asked}
    for seed in range(seeds):
        for word, how in asked.items():
            runs[word].append(ps.train(make(seed=seed), seed=seed, steps=steps, **how))
    times = step_times(make, plan, low, timed)
    ratios = [b / a for a, b in zip(times[low], times["plan"], strict=True)]
    quarters = statistics.quantiles(ratios, n=4)
    losses = {word: [run.eval_loss for run in of_word] for word, of_word in runs.items()}
    return {
        "model": name,
        "status": plan.status,
        "says": plan.made_from["says"],
        "counts": dict(plan.counts()),
        "autocast": low,
        "beyond_autocast": plan.made_from.get("beyond_autocast"),
        "threads": torch.get_num_threads(),
        "step_ms": {word: 1e3 * statistics.median(t) for word, t in times.items()},
        "plan_over_autocast": quarters[1],
        "plan_over_autocast_quartiles": [quarters[0], quarters[2]],
        "eval_loss": {word: statistics.mean(found) for word, found in losses.items()},
        "eval_losses": losses,
        "skipped": {word: sum(run.skipped_steps for run in of_word) for word, of_word in runs.items()},
        "nonfinite": {word: sum(run.nonfinite_steps for run in of_word) for word, of_word in runs.items()},
        "forward_passes": (plan.confirmed or {}).get("forward_passes"),
        "modules": (plan.confirmed or {}).get("modules"),
    }


def step_times(make: Callable[[], ps.Task], plan: ps.PrecisionPlan, low: str, steps: int) -> dict[str, list[float]]:
    """Seconds of each training step (forward, backward, AdamW) of three models that take turns."""
    tasks = {word: make() for word in ("fp32", low, "plan")}
    optimizers = {word: torch.optim.AdamW(t.model.parameters(), lr=1e-5) for word, t in tasks.items()}
    handle = ps.apply(plan, tasks["plan"].model)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}[low]
    around = {"fp32": nullcontext, low: lambda: torch.autocast("cpu", dtype=dtype), "plan": handle.autocast}
    times: dict[str, list[float]] = {word: [] for word in tasks}
    for step in range(steps + 3):
        words = list(tasks)
        for word in words[step % 3 :] + words[: step % 3]:
            task, batch = tasks[word], tasks[word].batch(step)
            start = time.perf_counter()
            with around[word]():
                loss = task.loss(task.model, batch)
            loss.backward()
            optimizers[word].step()
            optimizers[word].zero_grad()
            times[word].append(time.perf_counter() - start)
    return {word: t[3:] for word, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--timed", type=int, default=40)
    parser.add_argument("--seeds", type=int, default=1, help="trainings of each, with other starts and batches")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for name in args.models:
        try:
            found.append(measure(name, args.steps, args.timed, args.seeds))
        except Missing as missing:
            print(f"{name}: skipped, {missing}")
            continue
        one = found[-1]
        low = one["autocast"]
        print(f"{name}: {one['status']}, {one['counts']}; {one['says']}")
        if one["beyond_autocast"] and not one["beyond_autocast"]["taken"]:
            print(f"  without autocast: {one['beyond_autocast']['why']}")
        for word in ("fp32", low, "plan"):
            spread = (max(one["eval_losses"][word]) - min(one["eval_losses"][word])) / 2
            print(f"  {word:<5} {one['step_ms'][word]:8.1f} ms/step  held-out loss {one['eval_loss'][word]:.4f} "
                  f"+- {spread:.4f}  skipped {one['skipped'][word]}  non-finite {one['nonfinite'][word]}")  # fmt: skip
        first, last = one["plan_over_autocast_quartiles"]
        print(f"  plan / plain {low}: {one['plan_over_autocast']:.3f} of the time (quartiles {first:.3f}, {last:.3f}); "
              f"{one['forward_passes']} passes to confirm {one['modules']} modules", flush=True)  # fmt: skip
    write_json(args.json, "plans", found, steps=args.steps, timed=args.timed, **machine())


if __name__ == "__main__":
    main()
