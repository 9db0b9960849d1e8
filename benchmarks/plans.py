"""Is a recommended plan ever worse than plain autocast? Time per step, held-out loss and skipped steps, in one run.

    python benchmarks/plans.py [gpt resnet minilm] [--steps 60] [--json OUT]

For each model: a recorded run with measured costs, a plan confirmed on the model, then training from the same start in
fp32, under plain autocast of the plan's main format, and with the plan. The order of the last two alternates over
`--rounds` rounds and the median step time of each is compared, since machines drift.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

from realmodels import TASKS, Missing

import precscope as ps


def measure(name: str, steps: int, rounds: int) -> dict[str, Any]:
    """One model. Raises Missing where a package is not installed."""
    make = TASKS[name]
    with tempfile.TemporaryDirectory() as folder:
        profile = ps.profile(
            make(), out=Path(folder) / "run", steps=24, precision="bf16", every=4, note=lambda text: None
        )
        plan = ps.recommend(profile, formats=("fp16", "bf16", "fp32"), task=make())
    used = {layer.compute for layer in plan.modules.values()}
    main = "fp16" if "fp16" in used else "bf16"
    runs: dict[str, list[Any]] = {"fp32": [ps.train(make(), steps=steps, precision="fp32")], main: [], "plan": []}
    for index in range(rounds):
        for word in (main, "plan") if index % 2 == 0 else ("plan", main):
            asked = {"plan": plan} if word == "plan" else {"precision": word}
            runs[word].append(ps.train(make(), steps=steps, **asked))
    times = {word: statistics.median(r.step_time_ms for r in found) for word, found in runs.items()}
    return {
        "model": name,
        "status": plan.status,
        "says": plan.made_from["says"],
        "counts": dict(plan.counts()),
        "autocast": main,
        "step_ms": times,
        "plan_over_autocast": times["plan"] / times[main],
        "eval_loss": {word: found[0].eval_loss for word, found in runs.items()},
        "skipped": {word: found[0].skipped_steps for word, found in runs.items()},
        "nonfinite": {word: found[0].nonfinite_steps for word, found in runs.items()},
        "forward_passes": (plan.confirmed or {}).get("forward_passes"),
        "modules": (plan.confirmed or {}).get("modules"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="*", default=list(TASKS), help=f"of {', '.join(TASKS)}")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    found = []
    for name in args.models:
        try:
            found.append(measure(name, args.steps, args.rounds))
        except Missing as missing:
            print(f"{name}: skipped, {missing}")
            continue
        one = found[-1]
        low = one["autocast"]
        print(f"{name}: {one['status']}, {one['counts']}; {one['says']}")
        for word in ("fp32", low, "plan"):
            print(f"  {word:<5} {one['step_ms'][word]:8.1f} ms/step  held-out loss {one['eval_loss'][word]:.4f}  "
                  f"skipped {one['skipped'][word]}  non-finite {one['nonfinite'][word]}")  # fmt: skip
        print(f"  plan / plain {low}: {one['plan_over_autocast']:.3f} of the time; "
              f"{one['forward_passes']} passes to confirm {one['modules']} modules", flush=True)  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps({"schema": 1, "plans": found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
