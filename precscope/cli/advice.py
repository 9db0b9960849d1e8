"""Commands that advise: a precision plan, and what the coming steps may bring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from ..sites import Role
from .printing import (
    CsvOption,
    FormatArgument,
    RowsOption,
    RunArgument,
    SizeOption,
    SkipOption,
    load,
    next_command,
    progress,
    say,
    with_size,
    write_csv,
    wrote,
)


def recommend(
    run: RunArgument,
    task: Annotated[
        str | None, typer.Option(help="try the plan on this task and tighten it until it holds; see train")
    ] = None,
    size: SizeOption = None,
    formats: Annotated[str, typer.Option(help="formats that may be chosen, separated by commas")] = "fp16,bf16,fp32",
    policy: Annotated[str, typer.Option(help="autocast (fp32 master weights) or cast (.half()-style)")] = "autocast",
    costs: Annotated[str, typer.Option(help="auto (as measured on this device) or model (FLOPs and bytes)")] = "auto",
    loss_scaling: Annotated[bool | None, typer.Option(help="whether fp16 gradients get a loss scale")] = None,
    updates: Annotated[
        str | None,
        typer.Option(help="allow low storage, with updates written by master, kahan, stochastic or nearest; auto"),
    ] = None,
    beyond_autocast: Annotated[
        bool,
        typer.Option(help="try in bf16 what autocast keeps in fp32 (norms, softmax), where that is faster"),
    ] = True,
    trial_steps: Annotated[int, typer.Option(help="training steps of the trial, fp32 beside the plan")] = 32,
    horizon: Annotated[int | None, typer.Option(help="steps ahead that growing ranges must get through")] = None,
    out: Annotated[Path, typer.Option(help="plan file to write")] = Path("plan.json"),
    skip_damaged: SkipOption = False,
) -> None:
    """Recommend a precision per module, with reasons, and write the plan.

    With --task the model itself is run in the candidate formats and the plan is confirmed; else it is predicted.

    Example: precscope recommend runs/a --task gpt --formats bf16,fp32 --out plan.json
    """
    from ..advice import Limits
    from ..confirmation import recommend as run_it
    from ..plans.table import text_of
    from ..reporting.text import line_width

    task = with_size(task, size)
    loaded = load(run, skip_damaged=skip_damaged)
    with progress() as shown:
        plan = run_it(
            loaded, formats=formats.split(","), policy=policy, task=task, costs=costs, loss_scaling=loss_scaling,
            trial_steps=trial_steps, updates=updates, limits=Limits(horizon=horizon), note=shown.note,
            beyond_autocast=beyond_autocast,
        )  # fmt: skip
    plan.save(out)
    print(text_of(plan, width=line_width(None)))
    print()
    say(plan.made_from["says"])
    name = task or loaded.run.get("task_ref") or "TASK"
    if plan.status != "confirmed" and task is None:
        wrote(out, next=f"precscope recommend {run} --task {name}")
    elif loaded.run.get("mode") == "inference":
        wrote(out, next=f"precscope report {run} --plan {out}")
    else:
        wrote(out, next=f"precscope train {name} --plan {out} --out runs/plan")


def forecast(
    run: RunArgument,
    format: FormatArgument,
    horizon: Annotated[
        int | None, typer.Option(help="how many coming steps; default: as many as were recorded from first to last")
    ] = None,
    role: Annotated[
        list[str] | None, typer.Option(help="only this role (may be repeated); default: input, output, weight")
    ] = None,
    rows: RowsOption = 20,
    csv: CsvOption = None,
    skip_damaged: SkipOption = False,
) -> None:
    """Say how likely each tensor is to overflow a format within the coming steps, from how it grew so far.

    Example: precscope forecast runs/a fp16 --horizon 1000
    """
    from ..advice.forecast import forecast as run_it
    from ..reporting.tables import forecast_table, likeliest_first

    loaded = load(run, skip_damaged=skip_damaged)
    options: dict[str, Any] = {"roles": _roles(role)} if role else {}
    table = likeliest_first(run_it(loaded, format, horizon=horizon, **options))
    steps = loaded.steps
    ahead = horizon if horizon is not None else max(steps[-1] - steps[0], 1) if steps else 1
    print(forecast_table(table.head(rows) if rows else table, of=table, format=format, horizon=ahead))
    following = f"precscope recommend {run} --horizon {ahead}"
    if csv is not None:
        write_csv(table, csv)
        wrote(csv, next=following)
    else:
        next_command(following)


def _roles(words: list[str]) -> list[str]:
    known = [r.value for r in Role]
    for word in words:
        if word not in known:
            raise UsageError(f"unknown role {word!r}; roles are {', '.join(known)}")
    return words
