"""The command that chooses: format, loss scale and accumulation from a short profile."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import OverwriteOption, SeedOption, SizeOption, TaskArgument, next_command, progress, wrote


def tune(
    task: TaskArgument,
    size: SizeOption = None,
    steps: Annotated[int, typer.Option(help="optimizer steps of the profile")] = 50,
    formats: Annotated[str, typer.Option(help="formats that may be chosen, separated by commas")] = "fp16,bf16,fp32",
    accumulate: Annotated[
        int | None, typer.Option(help="micro-batches per optimizer step; default: the task's")
    ] = None,
    effective_batch: Annotated[
        int | None, typer.Option(help="examples per optimizer step, instead of --accumulate")
    ] = None,
    batch: Annotated[int | None, typer.Option(help="examples in a batch of the task, where its shape hides it")] = None,
    memory: Annotated[str | None, typer.Option(help="limit for one micro-batch, such as 4GiB or 500MB")] = None,
    train_steps: Annotated[int, typer.Option(help="optimizer steps of the run to come")] = 500,
    lr: Annotated[float | None, typer.Option(help="peak learning rate; default: the trainer's")] = None,
    rounds: Annotated[int, typer.Option(help="times that each precision is timed, 8 steps each")] = 3,
    trial_steps: Annotated[int, typer.Option(help="training steps of the plan's trial, fp32 beside it")] = 32,
    run: Annotated[Path | None, typer.Option(help="keep the profile in this run directory")] = None,
    out: Annotated[Path, typer.Option(help="plan file to write; the settings go beside it")] = Path("plan.json"),
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Choose format, loss scale and gradient accumulation for a task on this machine, with reasons.

    Example: precscope tune gpt --steps 50 --effective-batch 64 --memory 4GiB --out plan.json
    """
    from ..tasks import sized
    from ..tuning import settings_path
    from ..tuning import tune as run_it
    from .printing import exist

    task = sized(task, size)
    with progress() as shown:
        chosen = run_it(
            task, steps=steps, formats=formats.split(","), accumulate=accumulate, effective_batch=effective_batch,
            batch=batch, memory=memory, train_steps=train_steps, lr=lr, rounds=rounds, trial_steps=trial_steps,
            out=run, exist=exist(overwrite), seed=seed, note=shown.note,
        )  # fmt: skip
    chosen = chosen.save(out)
    print(chosen)
    print()
    wrote(out, settings_path(out))
    next_command(chosen.command)
