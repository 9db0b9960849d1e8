"""The whole loop on a byte-level GPT and real text: record, recommend, train with the plan, compare, report.

The text is the standard library's own source, which every Python has; held-out files judge the result. The same seed
and data are trained as fp32, under plain autocast (bf16 and fp16) and with the plan. The recorded run is one of these:
bf16 autocast on a CPU, fp16 autocast with a GradScaler on a GPU.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import Comparison, compare
from .plans import PrecisionPlan

if TYPE_CHECKING:
    from .progress import Progress

_BUDGET_S = 170.0  # of training; the rest of the five minutes is for costs, evaluation and the report
_MOST_STEPS = 150


@dataclass(frozen=True)
class DemoResult:
    """What the demo made. recorded: the recorded run's directory. findings: sentences to print under the table."""

    comparison: Comparison
    plan: PrecisionPlan
    plan_path: Path
    report: Path
    recorded: Path
    findings: tuple[str, ...]
    seconds: float


def run(
    *,
    out: str | Path = "runs/demo",
    report: str | Path = "reports/demo/index.html",
    steps: int | None = None,
    size: str | None = None,
    progress: Progress,
    seed: int = 0,
) -> DemoResult:
    """Run the demo. out: parent of the run directories. steps: per run; None: as many as fit. size: of the GPT."""
    import torch

    from .advice import recommend
    from .profiles import Profile
    from .profiling import measure_costs, train_recorded
    from .reporting import report as write_report
    from .tasks import make_task
    from .training import train

    started = time.perf_counter()
    out = Path(out)
    on_gpu = torch.cuda.is_available()
    size = size or ("medium" if on_gpu else "small")
    recorded = "fp16" if on_gpu else "bf16"

    def task() -> Any:
        from .tasks import TaskRef
        from .training.tasks.gpt import gpt

        return make_task(TaskRef("gpt", lambda: gpt(size=size)), seed=seed)

    if steps is None:
        progress.note("timing a few steps")
        steps = _steps_that_fit(task())
    common = {"steps": steps, "seed": seed, "exist": "overwrite"}
    for precision in ("fp32", "bf16", "fp16"):
        one = task()
        bar = progress.run(precision if precision != recorded else f"{precision}, recorded")
        if precision == recorded:
            train_recorded(one, out=out / precision, precision=precision, progress=bar, **common)
            progress.note("measuring what each module costs in each format")
            measure_costs(one, out / precision, formats=("fp32", "bf16", "fp16"))
        else:
            train(one, out=out / precision, precision=precision, progress=bar, **common)
        del one
    profile = Profile.load(out / recorded)
    plan = recommend(profile)
    plan_path = out / "plan.json"
    plan.save(plan_path)
    train(task(), out=out / "plan", plan=plan, progress=progress.run("plan"), **common)
    runs = [out / name for name in ("fp32", "bf16", "fp16", "plan")]
    comparison = compare(runs)
    path = write_report(profile, out=report, plan=plan, runs=runs, title="precscope demo: a byte-level GPT")
    seconds = time.perf_counter() - started
    return DemoResult(comparison, plan, plan_path, Path(path), out / recorded, _findings(comparison, plan), seconds)


def _steps_that_fit(task: Any, probe: int = 4) -> int:
    """Steps for which four runs fit the budget, from the time of a few fp32 ones."""
    from .training import train

    result = train(task, steps=probe, precision="fp32", eval_limit=1)
    return max(20, min(_MOST_STEPS, int(_BUDGET_S / (4 * result.step_time_ms / 1e3))))


def _findings(comparison: Comparison, plan: PrecisionPlan) -> tuple[str, ...]:
    """What the table says, in sentences."""
    rows = {r.run: r for r in comparison.rows}
    mine, base = rows["plan"], rows["fp32"]
    autocast = max((rows["bf16"], rows["fp16"]), key=lambda r: r.speed)
    found = [
        f"The plan ran {mine.speed:.2f} times as fast as fp32, its held-out loss {mine.eval_change:+.2%} from fp32's; "
        f"{mine.nonfinite_steps} non-finite and {mine.skipped_steps} skipped steps."
    ]
    if mine.speed < 0.97 * autocast.speed:
        found.append(
            f"Plain {autocast.run} autocast was faster ({autocast.speed:.2f} times fp32): prefer it where its loss "
            f"({autocast.eval_change:+.2%}) is good enough."
        )
    elif abs(mine.speed / autocast.speed - 1) <= 0.03:
        found.append(f"Plain {autocast.run} autocast is as fast ({autocast.speed:.2f} times fp32) and as safe here.")
    if base.eval_loss != base.eval_loss:
        found.append("No held-out loss was measured.")
    return tuple(found)
