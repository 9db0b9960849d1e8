"""Does a pretrained model, fine-tuned with a recommended plan, reach the accuracy of fp32?

    python benchmarks/finetune.py [text] [--seeds 5] [--steps 120] [--formats fp16,bf16,fp32] [--plan FILE]
                                  [--json OUT] [--quick]

A bundled task that sorts into classes (text: real pretrained MiniLM on real labelled texts, two micro-batches per
step) is recorded for a third of the steps, a plan is recommended from that and confirmed on the task, and then fp32
and the plan are trained from the same start on the same batches, once per seed; each is judged by the share of the
held-out examples that it classifies right, the plan as it is trained. What is reported is the mean difference in
points (hundredths of accuracy) with Student's 95% interval over the seeds, and the time of a step.

The target: the mean within 1 point of fp32, and the interval's end no lower than 1 point below it.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from common import Target, check, write_json

import precscope as ps
from precscope.tasks import make_task
from precscope.training.tasks.classifying import accuracy, majority

POINTS = 1.0


@dataclass(frozen=True)
class Run:
    """accuracy: of the held-out examples, 0 to 1. loss: held out. step_ms: median time of a step."""

    seed: int
    precision: str
    accuracy: float
    loss: float
    step_ms: float


def train(name: str, seed: int, steps: int, plan: ps.PrecisionPlan | None, out: Path) -> Run:
    """One run, judged in the precision that it was trained in."""
    import pandas as pd

    task = make_task(name, seed=seed)
    word = "fp32" if plan is None else "plan"
    result = ps.train(task, plan=plan, precision=None if plan is not None else "fp32", steps=steps, seed=seed, out=out)
    if plan is None:
        right = accuracy(task.model, task)
    else:
        with ps.apply(plan, task.model):
            right = accuracy(task.model, task)
    times = pd.read_parquet(out / "train.parquet")["time_ms"]
    return Run(seed, word, right, float(result.eval_loss), float(times.iloc[len(times) // 5 :].median()))


def recommended(name: str, steps: int, formats: tuple[str, ...], folder: Path) -> ps.PrecisionPlan:
    """A plan from a recorded run of its own, confirmed on the task."""
    settings: dict[str, Any] = {"out": folder / "profile", "steps": max(3, steps // 3), "note": lambda text: None}
    profile = ps.profile(make_task(name, seed=0), **settings)
    return ps.recommend(profile, formats=formats, task=make_task(name, seed=0))


def interval(differences: list[float], level: float = 0.95) -> tuple[float, float, float]:
    """Mean and Student's interval of paired differences (one of them: no interval, NaN)."""
    import numpy as np
    from scipy import stats

    mean = float(np.mean(differences))
    if len(differences) < 2:
        return mean, float("nan"), float("nan")
    half = float(stats.t.ppf((1 + level) / 2, len(differences) - 1) * stats.sem(differences))
    return mean, mean - half, mean + half


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", nargs="?", default="text")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=120)
    parser.add_argument("--formats", default="fp16,bf16,fp32")
    parser.add_argument("--plan", type=Path, help="a plan that was recommended and confirmed before")
    parser.add_argument("--quick", action="store_true", help="the task's tiny size, 2 seeds, 6 steps: does it run")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    name, seeds, steps = (f"{given.task}@tiny", 2, 6) if given.quick else (given.task, given.seeds, given.steps)
    try:
        make_task(name, seed=0)
    except ps.PrecscopeError as error:  # a package or the texts are missing: it says what to do
        print(f"not measured: {error}")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if given.plan is not None:
            plan = ps.PrecisionPlan.load(given.plan)
        else:
            plan = recommended(name, steps, tuple(given.formats.split(",")), Path(folder))
        print(plan.made_from.get("says", ""), f"({plan.status})")
        pairs: list[tuple[Run, Run]] = []
        print(_line("seed", "fp32 %", "plan %", "points", "fp32 loss", "plan loss", "fp32 ms", "plan ms"))
        for seed in range(seeds):
            out = Path(folder, str(seed))
            exact, low = (train(name, seed, steps, p, out / w) for p, w in ((None, "fp32"), (plan, "plan")))
            pairs.append((exact, low))
            points = 100 * (low.accuracy - exact.accuracy)
            figures = (f"{100 * exact.accuracy:.2f}", f"{100 * low.accuracy:.2f}", f"{points:+.2f}")
            losses = (f"{exact.loss:.4f}", f"{low.loss:.4f}")
            print(_line(str(seed), *figures, *losses, f"{exact.step_ms:.0f}", f"{low.step_ms:.0f}"), flush=True)
    return report(name, steps, plan, pairs, given.json)


def _line(*cells: str) -> str:
    return " ".join(f"{cell:>9}" for cell in cells)


def report(name: str, steps: int, plan: ps.PrecisionPlan, pairs: list[tuple[Run, Run]], path: Path | None) -> int:
    """Means, the interval, targets, JSON."""
    mean, low, high = interval([100 * (p.accuracy - e.accuracy) for e, p in pairs])
    times = [p.step_ms / e.step_ms for e, p in pairs]
    guess = majority(make_task(name, seed=0))
    print(f"guessing the most frequent class: {100 * guess:.2f}%")
    print(f"plan minus fp32: {mean:+.2f} points, 95% interval {low:+.2f} to {high:+.2f}, {len(pairs)} seeds")
    print(f"time of a step, plan over fp32: {sorted(times)[len(times) // 2]:.3f}")
    targets = [
        Target("points that fp32 is ahead, mean", -mean, POINTS),
        Target("points that fp32 is ahead, end of the interval", -low, POINTS),
    ]
    check(targets)
    rows: list[dict[str, Any]] = [asdict(run) for pair in pairs for run in pair]
    write_json(
        path, "finetune", rows, targets=targets, task=name, steps=steps, says=plan.made_from.get("says", ""),
        status=plan.status, difference_points={"mean": mean, "low": low, "high": high}, majority=guess,
    )  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
