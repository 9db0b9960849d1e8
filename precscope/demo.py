"""The whole loop on a byte-level GPT and real text: record, recommend, train with the plan, compare, report.

The text is the standard library's own source, which every Python has; held-out files judge the result. The same seed
and data are trained as fp32, under plain autocast (bf16 and fp16) and with the plan. The recorded run is one of these:
bf16 autocast on a CPU, fp16 autocast with a GradScaler on a GPU.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .comparison import Comparison, RunRow, compare
from .plans import PrecisionPlan

if TYPE_CHECKING:
    from .progress import Progress

_BUDGET_S = 170.0  # of training; the rest of the five minutes is for costs, evaluation and the report
_MOST_STEPS = 150
_BESIDE_STEPS = 40  # what costs, evaluations and the recorded steps take, in steps of training: 10, 11, about 15
_REPORT_S = 10.0
_ALIKE = 0.03  # speeds this close are alike on the quietest machine
_SAME_LOSS = 0.005  # held-out losses this close, relative to fp32's, are alike


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

    from .confirmation import recommend
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

    progress.note("timing a few steps")
    step_s = _step_seconds(task())
    if steps is None:
        steps = max(20, min(_MOST_STEPS, int(_BUDGET_S / (4 * step_s))))
    progress.note(_estimate(steps, step_s))
    common: dict[str, Any] = {"steps": steps, "seed": seed, "exist": "overwrite"}
    for precision in ("fp32", "bf16", "fp16"):
        one = task()
        bar = progress.run(precision if precision != recorded else f"{precision}, recorded")
        if precision == recorded:
            train_recorded(one, out=out / precision, precision=precision, progress=bar, note=progress.note, **common)
            measure_costs(one, out / precision, formats=("fp32", "bf16", "fp16"), note=progress.note)
        else:
            train(one, out=out / precision, precision=precision, progress=bar, **common)
        del one
    profile = Profile.load(out / recorded)
    plan = recommend(profile, task=task(), note=progress.note)
    plan_path = out / "plan.json"
    plan.save(plan_path)
    train(task(), out=out / "plan", plan=plan, progress=progress.run("plan"), **common)
    runs = [out / name for name in ("fp32", "bf16", "fp16", "plan")]
    comparison = compare(runs)
    path = write_report(profile, out=report, plan=plan, runs=runs, title="precscope demo: a byte-level GPT")
    seconds = time.perf_counter() - started
    said = (*findings(comparison, noise=_noise(runs)), plan.made_from["says"], f"The demo took {in_words(seconds)}.")
    return DemoResult(comparison, plan, plan_path, Path(path), out / recorded, said, seconds)


def _step_seconds(task: Any, probe: int = 4) -> float:
    """Of a step in fp32, from a few of them."""
    from .training import train

    return train(task, steps=probe, precision="fp32", eval_limit=1).step_time_ms / 1e3


def _estimate(steps: int, step_s: float) -> str:
    minutes = ((4 * steps + _BESIDE_STEPS) * step_s + _REPORT_S) / 60
    about = f"about {minutes:.0f} minutes" if minutes >= 1.5 else "about 1 minute"
    return f"{about}: 4 runs of {steps} steps, costs of each module, and a report"


def in_words(seconds: float) -> str:
    """ "3 min 40 s", or "40 s" below a minute."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _noise(runs: Sequence[Path]) -> float:
    """How far the times of single steps lie from their run's median: half the interquartile range over the median, of
    the run where that is largest. Recorded steps and the first three are left out, as in a comparison."""
    import pandas as pd

    spreads = [0.0]
    for run in runs:
        log = pd.read_parquet(run / "train.parquet")
        every = json.loads((run / "run.json").read_text(encoding="utf-8")).get("every")
        times = log.time_ms[(log.step >= 3) & ((log.step % every != 0) if every else True)]
        if len(times) >= 4:
            low, middle, high = times.quantile([0.25, 0.5, 0.75])
            spreads.append(float((high - low) / 2 / middle))
    return max(spreads)


def findings(comparison: Comparison, *, noise: float = 0.0) -> tuple[str, ...]:
    """What the table says, in sentences. noise: relative differences of speed up to this mean nothing."""
    rows = {r.run: r for r in comparison.rows}
    mine, alike = rows["plan"], max(_ALIKE, noise)
    found = [
        f"The plan ran {mine.speed:.2f} times as fast as fp32, its held-out loss {mine.eval_change:+.2%} from fp32's; "
        f"{mine.nonfinite_steps} non-finite and {mine.skipped_steps} skipped steps."
    ]
    if noise > _ALIKE:
        found.append(f"Times of single steps vary by {noise:.0%} within a run here: speeds closer than that are alike.")
    for row in sorted((rows["bf16"], rows["fp16"]), key=lambda r: -r.speed):
        if row.speed >= mine.speed / (1 + alike):
            found.append(_against_autocast(row, mine, faster=row.speed > mine.speed * (1 + alike)))
    if rows["fp32"].eval_loss != rows["fp32"].eval_loss:
        found.append("No held-out loss was measured.")
    return tuple(found)


def _against_autocast(row: RunRow, mine: RunRow, *, faster: bool) -> str:
    """About a run under plain autocast that was not slower than the plan. Safe is what was seen to be: not more
    non-finite steps than the plan, and a held-out loss as good."""
    said = f"Plain {row.run} autocast {'was faster' if faster else 'is as fast'} ({row.speed:.2f} times fp32)"
    if row.nonfinite_steps > mine.nonfinite_steps:
        return f"{said}, but {row.nonfinite_steps} of its steps were not finite: keep to the plan."
    if row.eval_change <= mine.eval_change + _SAME_LOSS:
        return f"{said} and as safe here" + (": prefer it." if faster else ".")
    if row.eval_change > mine.eval_change:
        return f"{said}, but its held-out loss is {row.eval_change:+.2%} from fp32's: prefer it where that is enough."
    return f"{said}; without held-out losses nothing says whether it is as safe."
