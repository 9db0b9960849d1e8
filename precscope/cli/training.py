"""The command that trains."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    progress,
    wrote,
)

if TYPE_CHECKING:
    from ..plans import PrecisionPlan


def train(
    task: TaskArgument,
    size: SizeOption = None,
    out: Annotated[Path, typer.Option(help="run directory to write")] = Path("runs/train"),
    plan: Annotated[Path | None, typer.Option(help="plan.json to train with")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (default), tf32, bf16 or fp16, where no plan is")] = None,
    phase: Annotated[
        list[str] | None,
        typer.Option(help="STEP:PRECISION, from which step on; PRECISION is a format, plan, or a file (repeat it)"),
    ] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 500,
    lr: Annotated[float | None, typer.Option(help="peak learning rate; default: the trainer's")] = None,
    schedule: Annotated[str, typer.Option(help="cosine, linear, constant or none")] = "cosine",
    accumulate: Annotated[
        int | None, typer.Option(help="micro-batches per optimizer step; default: the task's")
    ] = None,
    grad_clip: Annotated[float, typer.Option(help="largest gradient norm; 0 for no clipping")] = 1.0,
    params: Annotated[str | None, typer.Option(help="store parameters in fp32, bf16 or fp16, where no plan is")] = None,
    updates: Annotated[
        str | None, typer.Option(help="how those stored low are written: nearest, stochastic, kahan or master")
    ] = None,
    state: Annotated[str | None, typer.Option(help="store optimizer state in fp32, bf16, int8, int4 or fp8")] = None,
    guard: Annotated[
        str | None, typer.Option(help="what to do when the run goes wrong: warn, skip, promote or rollback")
    ] = None,
    eval_every: Annotated[int | None, typer.Option(help="steps between evaluations")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps between checkpoints")] = None,
    keep: Annotated[int, typer.Option(help="newest checkpoints that stay")] = 2,
    keep_best: Annotated[bool, typer.Option("--keep-best", help="keep the best checkpoint, by --eval-every, too")] = (
        False
    ),
    save_model: Annotated[bool, typer.Option("--save-model", help="write the weights as model.safetensors")] = False,
    shadow_every: Annotated[
        int | None, typer.Option(help="run every N-th step in fp32 too and record both: what precision does to it")
    ] = None,
    record_every: Annotated[int | None, typer.Option(help="record the ranges of every N-th step into --out")] = None,
    live: LiveOption = False,
    tensorboard: TensorboardOption = None,
    wandb: WandbOption = None,
    mlflow: MlflowOption = None,
    processes: Annotated[
        int | None, typer.Option(help="train with so many processes on this machine; several machines: torchrun")
    ] = None,
    strategy: Annotated[str | None, typer.Option(help="of several processes: ddp (default) or fsdp")] = None,
    compile: Annotated[bool, typer.Option("--compile", help="run the model under torch.compile")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in --out")] = False,
    verify: Annotated[
        bool,
        typer.Option("--verify", help="then train the fp32 twin too; exit 1 where the loss is not within --margin"),
    ] = False,
    verify_out: Annotated[Path | None, typer.Option(help="directory of the fp32 twin; default: OUT-fp32")] = None,
    margin: Annotated[float, typer.Option(help="of --verify, as a share of fp32's loss")] = 0.02,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a task, in one precision, with a plan, or with phases of either.

    Example: precscope train gpt --plan plan.json --steps 200 --out runs/plan --guard promote --checkpoint-every 50
    """
    from ..integrations.loggers import logging_to
    from ..live import watching
    from ..tasks import sized
    from ..training import train as run
    from ..training.launching import is_not_first, started_by_launch
    from ..training.recorders import recording_every

    task = sized(task, size)
    low = plan is not None or phase is not None or precision not in (None, "fp32", "float32")
    if verify and not low:
        raise UsageError(
            "--verify compares with fp32, and this run is in fp32: give --plan or --precision, or leave it out"
        )
    if processes is not None:
        _on_processes(processes, out, verify=verify)
        _say_next(task, out, steps, low=low)
        return
    recorder = None
    if record_every is not None:
        recorder = recording_every(record_every, out, shadow_every=shadow_every, resume=resume)
        shadow_every = None  # the recorder's
    planned = _planned(plan, precision, phase)
    settings: dict[str, Any] = {} if accumulate is None else {"accumulate": accumulate}
    if is_not_first():
        tensorboard = wandb = mlflow = None
    with (
        watching(
            f"train {task}", out=out, live=live, tensorboard=tensorboard, precision=precision, plan=planned
        ) as shown,
        logging_to(
            out, beside=shown.callback, wandb=wandb, mlflow=mlflow, precision=precision, plan=planned
        ) as callback,
    ):  # fmt: skip
        run(
            task, out=out, plan=planned, precision=precision, steps=steps, lr=lr,
            schedule=schedule, grad_clip=grad_clip or None, params=params, updates=updates,
            state=state, guard=guard, eval_every=eval_every, checkpoint_every=checkpoint_every, keep=keep,
            keep_best=keep_best, save_model=save_model, shadow_every=shadow_every, strategy=strategy, compile=compile,
            resume=resume, seed=seed, exist="append" if resume else exist(overwrite),
            recorder=recorder, progress=callback, **settings,
        )  # fmt: skip
    from ..comparison import compare as table

    if is_not_first():
        return
    print(table([out]))
    if verify:
        _verify(out, verify_out, margin)
        return
    if not started_by_launch():
        _say_next(task, out, steps, low=low)


def _on_processes(processes: int, out: Path, *, verify: bool) -> None:
    """This very command on several processes."""
    from ..training.launching import launch, without_option

    if verify:
        raise UsageError(
            "--verify trains two runs, and --processes starts one: train the fp32 twin with --processes, too, and put "
            "both side by side with precscope compare"
        )
    arguments = without_option(sys.argv[1:], "--processes")
    launch(["-m", "precscope", *arguments], processes=processes, logs=out / "logs")


def _planned(plan: Path | None, precision: str | None, phase: list[str] | None) -> PrecisionPlan | Path | None:
    """The plan, with the phases of --phase."""
    if not phase:
        return plan
    from ..plans import PrecisionPlan
    from ..training import phases

    if precision is not None:
        raise UsageError(f"give --phase 0:{precision} instead of --precision {precision}: phases say it for each step")
    return phases.parse(phase, plan=PrecisionPlan.load(plan) if plan is not None else None)


def _say_next(task: str, out: Path, steps: int, *, low: bool) -> None:
    """low: whether the run was in anything but fp32, and has a twin to be compared with."""
    base = Path("runs/fp32")
    if not low or out == base:
        wrote(out, next=f"precscope train {task} --plan plan.json --steps {steps} --out runs/plan")
    else:
        twin = f"precscope train {task} --precision fp32 --steps {steps} --out runs/fp32"
        wrote(out, next=f"precscope compare {base} {out}" if base.is_dir() else twin)


def _verify(out: Path, twin: Path | None, margin: float) -> None:
    """Train the fp32 twin, print the comparison, and exit 1 where the loss does not hold."""
    from ..comparison import verify

    with progress() as shown:
        compared = verify(out, out=twin, margin=margin, progress=shown.run, note=shown.note)
    print(compared)
    wrote(out, Path(compared.baseline), next=f"precscope compare {compared.baseline} {out} --seeds 5")
    if not compared.passed:
        raise typer.Exit(1)
