"""Commands that run a model to look at it: record it, trace one of its steps."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import UsageError
from .printing import (
    LiveOption,
    MlflowOption,
    OverwriteOption,
    SeedOption,
    SizeOption,
    TaskArgument,
    TensorboardOption,
    WandbOption,
    exist,
    next_command,
    say,
    wrote,
)


def profile(
    task: TaskArgument,
    size: SizeOption = None,
    out: Annotated[Path, typer.Option(help="run directory to write")] = Path("runs/profile"),
    steps: Annotated[int, typer.Option(help="optimizer steps to train")] = 50,
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16 (autocast)")] = "bf16",
    every: Annotated[int, typer.Option(help="record every N-th step")] = 10,
    shadow_every: Annotated[
        str, typer.Option(help="run every N-th step in fp32 too, to price rounding: a number, auto (three) or none")
    ] = "auto",
    ops: Annotated[bool, typer.Option(help="shadow steps also record every op: precscope ask RUN FORMAT --ops")] = True,
    infer: Annotated[bool, typer.Option("--infer", help="run the model without training it; --steps are batches")] = (
        False
    ),
    accumulate: Annotated[
        int | None, typer.Option(help="micro-batches per optimizer step; default: the task's")
    ] = None,
    lr: Annotated[float | None, typer.Option(help="peak learning rate; default: the trainer's")] = None,
    seed: SeedOption = 0,
    costs: Annotated[bool, typer.Option(help="also measure what each module costs in each format")] = True,
    live: LiveOption = False,
    tensorboard: TensorboardOption = None,
    wandb: WandbOption = None,
    mlflow: MlflowOption = None,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a task for some steps and record the ranges of all its tensors.

    Example: precscope profile gpt --steps 50 --precision bf16 --out runs/a
    """
    from ..integrations.loggers import logging_to
    from ..live import watching
    from ..profiling import profile as run
    from ..tasks import sized

    task = sized(task, size)
    settings: dict[str, Any] = {"accumulate": accumulate, "lr": lr}
    settings = {name: value for name, value in settings.items() if value is not None}
    if infer and settings:
        raise UsageError(f"--{next(iter(settings))} is for training: leave it out, or leave out --infer")
    name = f"profile {task}"
    watched = not infer or live or any(to is not None for to in (tensorboard, wandb, mlflow))
    with (
        watching(name, out=out, live=live, tensorboard=tensorboard, precision=precision) as shown,
        logging_to(out, beside=shown.callback, wandb=wandb, mlflow=mlflow, precision=precision) as callback,
    ):
        result = run(
            task, out=out, steps=steps, precision=precision, every=every, train=not infer, seed=seed, costs=costs,
            shadow_every=_shadow_every(shadow_every), ops=ops, exist=exist(overwrite),
            progress=callback if watched else None, note=shown.note, **settings,
        )  # fmt: skip
    print(result)
    wrote(out, next=f"precscope ask {out} fp16, or precscope recommend {out}" + (f" --task {task}" if infer else ""))


def _shadow_every(text: str) -> int | str | None:
    """What --shadow-every says, as ps.profile takes it. Raises UsageError for other words than auto and none."""
    if text in ("auto", "none"):
        return None if text == "none" else text
    try:
        return int(text)
    except ValueError:
        raise UsageError(
            f"--shadow-every takes a number of steps of at least 1, auto (the first, the middle and the last recorded "
            f"step) or none, not {text!r}"
        ) from None


def trace(
    task: TaskArgument,
    size: SizeOption = None,
    precision: Annotated[str | None, typer.Option(help="fp16 (default), bf16, fp32 or tf32, where no plan is")] = None,
    plan: Annotated[Path | None, typer.Option(help="plan.json to run the step with")] = None,
    step: Annotated[int, typer.Option(help="whose batch, from 0")] = 0,
    scale: Annotated[float | None, typer.Option(help="loss scale; default: the precision's initial one")] = None,
    run: Annotated[Path | None, typer.Option(help="training run whose newest checkpoint gives the weights")] = None,
    save: Annotated[Path | None, typer.Option(help="file to keep the step in, for --replay")] = None,
    replay: Annotated[Path | None, typer.Option(help="run a saved step twice instead: reproducible or not?")] = None,
    seed: SeedOption = 0,
) -> None:
    """Run one training step and name the first op that makes inf or NaN: module, line, ranges, likely cause.

    Example: precscope trace my_task.py:make --precision fp16 --save step.pt
    """
    from ..replaying import replay as again
    from ..replaying import trace_step
    from ..tasks import sized

    task = sized(task, size)
    if replay is not None:
        print(again(replay, task))
        next_command(f"precscope profile {task} --precision fp16")
        return
    result = trace_step(task, precision=precision, plan=plan, step=step, scale=scale, seed=seed, run=run, save=save)
    print(result)
    for text in result.notes:
        say(text)
    smaller = f"precscope trace {task} --precision {result.precision} --scale {result.scale / 16:g}"
    if save is not None:
        wrote(save, next=f"precscope trace {task} --replay {save}")
    else:
        next_command(smaller if result.by_scale and plan is None else f"precscope profile {task} --precision fp16")
