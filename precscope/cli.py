"""The command line: parsing only. Each command calls the function of the same name in the package, prints what it
wrote and the next command to try.

Exit status: 0 done, 1 failed honestly, 2 wrong use.
"""

from __future__ import annotations

import os
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Annotated, Any

import typer

from . import __version__
from .errors import PrecscopeError

app = typer.Typer(
    name="precscope",
    help="Record a training run, ask any number format, get a precision plan with reasons, train with it, compare.\n\n"
    "Example: precscope profile gpt --out runs/a && precscope recommend runs/a && "
    "precscope train gpt --plan plan.json --out runs/b",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    epilog="--debug (or PRECSCOPE_DEBUG=1) anywhere on the line shows the traceback of an error.",
)

TaskArgument = Annotated[str, typer.Argument(help="file.py:function, module:function, or a bundled task such as gpt")]
RunArgument = Annotated[Path, typer.Argument(help="run directory, as written by profile or train")]
FormatsOption = Annotated[str, typer.Option(help="formats that may be chosen, separated by commas")]
SeedOption = Annotated[int, typer.Option(help="seed of parameters, data order and dropout")]
OverwriteOption = Annotated[bool, typer.Option("--overwrite", help="replace a run that is already there")]
SkipOption = Annotated[bool, typer.Option("--skip-damaged", help="leave out parts that cannot be read")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="print the version and exit")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit()


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="where the runs go")] = Path("runs/demo"),
    report: Annotated[Path, typer.Option(help="the HTML report")] = Path("reports/demo/index.html"),
    steps: Annotated[int | None, typer.Option(help="steps per run; by default as many as fit in four minutes")] = None,
    size: Annotated[str | None, typer.Option(help="model size; by default small on a CPU, medium on a GPU")] = None,
) -> None:
    """Record, recommend, train with the plan and compare, on a GPT and real text.

    Example: precscope demo --steps 60
    """
    from .demo import run

    with _progress() as progress:
        result = run(out=out, report=report, steps=steps, size=size, progress=progress)
    print(result.comparison)
    for finding in result.findings:
        _say(finding)
    _wrote(result.report, result.plan_path, next=f"open {result.report}, then precscope ask {result.recorded} e4m3")


@app.command()
def doctor(size: Annotated[int, typer.Option(help="edge of the matrices that are multiplied")] = 1024) -> None:
    """Say what this machine can do: devices, native formats, measured rates, versions.

    Example: precscope doctor
    """
    from .doctor import describe, examine

    print(describe(examine(size=size)))
    _next("precscope demo")


@app.command()
def profile(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="run directory to write")] = Path("runs/profile"),
    steps: Annotated[int, typer.Option(help="optimizer steps to train")] = 50,
    precision: Annotated[str, typer.Option(help="fp32, tf32, bf16 or fp16 (autocast)")] = "bf16",
    every: Annotated[int, typer.Option(help="record every N-th step")] = 10,
    accumulate: Annotated[int, typer.Option(help="micro-batches per optimizer step")] = 1,
    lr: Annotated[float | None, typer.Option(help="peak learning rate; default: the trainer's")] = None,
    seed: SeedOption = 0,
    costs: Annotated[bool, typer.Option(help="also measure what each module costs in each format")] = True,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a task for some steps and record the ranges of all its tensors.

    Example: precscope profile gpt --steps 50 --precision bf16 --out runs/a
    """
    from .profiling import profile as run

    with _progress() as progress:
        result = run(
            task, out=out, steps=steps, precision=precision, every=every, accumulate=accumulate, lr=lr, seed=seed,
            costs=costs, exist=_exist(overwrite), progress=progress.run(f"profile {task}"), note=progress.note,
        )  # fmt: skip
    print(result)
    _wrote(out, next=f"precscope ask {out} fp16, or precscope recommend {out}")


@app.command()
def ask(
    run: RunArgument,
    format: Annotated[str, typer.Argument(help="fp16, bf16, e4m3, e5m2, ...")],
    scale_exponent: Annotated[int, typer.Option("--scale-exponent", "-k", help="multiply tensors by 2^k first")] = 0,
    role: Annotated[list[str] | None, typer.Option(help="only this role (may be repeated)")] = None,
    sort: Annotated[str, typer.Option(help="column to sort by, worst first")] = "overflow_hi",
    rows: Annotated[int, typer.Option(help="rows to print; 0 for all")] = 20,
    by: Annotated[str, typer.Option(help="site, tensor or module")] = "site",
    csv: Annotated[Path | None, typer.Option(help="also write all rows to this CSV file")] = None,
    skip_damaged: SkipOption = False,
) -> None:
    """Say what a number format would do to every recorded tensor.

    Example: precscope ask runs/a e5m2 -k 12 --role grad_output
    """
    from .profiles import Profile, worst_first
    from .reporting.text import ask_table

    loaded = Profile.load(run, skip_damaged=skip_damaged)
    _warn_damaged(loaded)
    table = worst_first(loaded.ask(format, scale_exponent=scale_exponent, by=by, roles=role), sort)
    print(ask_table(table.head(rows) if rows else table, total=len(table)))
    if csv is not None:
        _write_csv(table, csv)
        _wrote(csv, next=f"precscope recommend {run}")
    else:
        _next(f"precscope recommend {run}")


@app.command()
def recommend(
    run: RunArgument,
    task: Annotated[
        str | None, typer.Option(help="try the plan on this task and tighten it until it holds; see train")
    ] = None,
    formats: FormatsOption = "fp16,bf16,fp32",
    policy: Annotated[str, typer.Option(help="autocast (fp32 master weights) or cast (.half()-style)")] = "autocast",
    costs: Annotated[str, typer.Option(help="auto (as measured on this device) or model (FLOPs and bytes)")] = "auto",
    loss_scaling: Annotated[bool | None, typer.Option(help="whether fp16 gradients get a loss scale")] = None,
    trial_steps: Annotated[int, typer.Option(help="training steps of the trial, fp32 beside the plan")] = 32,
    horizon: Annotated[int | None, typer.Option(help="steps ahead that growing ranges must get through")] = None,
    out: Annotated[Path, typer.Option(help="plan file to write")] = Path("plan.json"),
    skip_damaged: SkipOption = False,
) -> None:
    """Recommend a precision per module, with reasons, and write the plan.

    With --task the model itself is run in the candidate formats and the plan is confirmed; else it is predicted.

    Example: precscope recommend runs/a --task gpt --formats bf16,fp32 --out plan.json
    """
    from .advice import Limits
    from .confirmation import recommend as run_it
    from .profiles import Profile

    loaded = Profile.load(run, skip_damaged=skip_damaged)
    _warn_damaged(loaded)
    with _progress() as progress:
        plan = run_it(
            loaded, formats=formats.split(","), policy=policy, task=task, costs=costs, loss_scaling=loss_scaling,
            trial_steps=trial_steps, limits=Limits(horizon=horizon), note=progress.note,
        )  # fmt: skip
    plan.save(out)
    print(plan)
    print()
    _say(plan.made_from["says"])
    name = task or loaded.run.get("task_ref") or "TASK"
    if plan.status != "confirmed" and task is None:
        _wrote(out, next=f"precscope recommend {run} --task {name}")
    else:
        _wrote(out, next=f"precscope train {name} --plan {out} --out runs/plan")


@app.command()
def train(
    task: TaskArgument,
    out: Annotated[Path, typer.Option(help="run directory to write")] = Path("runs/train"),
    plan: Annotated[Path | None, typer.Option(help="plan.json to train with")] = None,
    precision: Annotated[str | None, typer.Option(help="fp32 (default), tf32, bf16 or fp16, where no plan is")] = None,
    steps: Annotated[int, typer.Option(help="optimizer steps")] = 500,
    lr: Annotated[float | None, typer.Option(help="peak learning rate; default: the trainer's")] = None,
    schedule: Annotated[str, typer.Option(help="cosine, linear, constant or none")] = "cosine",
    accumulate: Annotated[int, typer.Option(help="micro-batches per optimizer step")] = 1,
    grad_clip: Annotated[float, typer.Option(help="largest gradient norm; 0 for no clipping")] = 1.0,
    eval_every: Annotated[int | None, typer.Option(help="steps between evaluations")] = None,
    checkpoint_every: Annotated[int | None, typer.Option(help="steps between checkpoints")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="go on from the last checkpoint in --out")] = False,
    seed: SeedOption = 0,
    overwrite: OverwriteOption = False,
) -> None:
    """Train a task, in one precision or with a plan.

    Example: precscope train gpt --plan plan.json --steps 200 --out runs/plan
    """
    from .training import train as run

    with _progress() as progress:
        result = run(
            task, out=out, plan=plan, precision=precision, steps=steps, lr=lr, schedule=schedule,
            accumulate=accumulate, grad_clip=grad_clip or None, eval_every=eval_every,
            checkpoint_every=checkpoint_every, resume=resume, seed=seed,
            exist="append" if resume else _exist(overwrite), progress=progress.run(f"train {task}"),
        )  # fmt: skip
    from .comparison import compare as table

    print(table([out]))
    for text in result.notes:
        _say(text)
    twin = f"precscope train {task} --precision fp32 --steps {steps} --out runs/fp32"
    planned = f"precscope train {task} --plan plan.json --steps {steps} --out runs/plan"
    base = Path("runs/fp32")
    if out == base:
        _wrote(out, next=planned)
    else:
        _wrote(out, next=f"precscope compare {base} {out}" if base.is_dir() else twin)


@app.command()
def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories of precscope train")],
    baseline: Annotated[Path | None, typer.Option(help="run to measure against; default: the first fp32 run")] = None,
    csv: Annotated[Path | None, typer.Option(help="also write the table to this CSV file")] = None,
) -> None:
    """Put training runs side by side: loss, speed, memory, skipped and non-finite steps.

    Example: precscope compare runs/fp32 runs/plan
    """
    from .comparison import compare as run

    result = run(runs, baseline=baseline)
    print(result)
    if csv is not None:
        _write_csv(result.table(), csv)
        _wrote(csv)
    listed = " ".join(f"--run {r}" for r in runs)
    recorded = next((r for r in runs if any(r.glob("stats-*.parquet"))), "RECORDED_RUN")
    _next(f"precscope report {recorded} {listed} --out reports/comparison.html")


@app.command()
def trace(
    task: TaskArgument,
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
    from .replaying import replay as again
    from .replaying import trace_step

    if replay is not None:
        print(again(replay, task))
        _next(f"precscope profile {task} --precision fp16")
        return
    result = trace_step(task, precision=precision, plan=plan, step=step, scale=scale, seed=seed, run=run, save=save)
    print(result)
    for text in result.notes:
        _say(text)
    smaller = f"precscope trace {task} --precision {result.precision} --scale {result.scale / 16:g}"
    if save is not None:
        _wrote(save, next=f"precscope trace {task} --replay {save}")
    else:
        _next(smaller if result.by_scale and plan is None else f"precscope profile {task} --precision fp16")


@app.command()
def report(
    run: RunArgument,
    plan: Annotated[Path | None, typer.Option(help="plan.json to explain")] = None,
    runs: Annotated[list[Path] | None, typer.Option("--run", help="training run to compare (may be repeated)")] = None,
    out: Annotated[Path, typer.Option(help="HTML file to write")] = Path("reports/report.html"),
    title: Annotated[str | None, typer.Option(help="heading of the report")] = None,
    text: Annotated[bool, typer.Option("--text", help="print it as text instead")] = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="print it as Markdown instead")] = False,
    skip_damaged: SkipOption = False,
) -> None:
    """Write a self-contained HTML report of a recorded run.

    Example: precscope report runs/a --plan plan.json --out reports/a.html
    """
    from .profiles import Profile
    from .reporting import report as write
    from .reporting.text import markdown as as_markdown
    from .reporting.text import verdict_text
    from .reporting.view import build_view

    loaded = Profile.load(run, skip_damaged=skip_damaged)
    _warn_damaged(loaded)
    if text or markdown:
        from .plans import PrecisionPlan

        view = build_view(loaded, plan=PrecisionPlan.load(plan) if plan else None, runs=runs or (), title=title)
        print(as_markdown(view) if markdown else verdict_text(view))
        return
    written = write(loaded, plan=plan, runs=runs or (), out=out, title=title)
    _wrote(written, next=f"open {written}")


bench_app = typer.Typer(help="Measure precscope on this machine.", rich_markup_mode=None)
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """List the benchmarks, or run one.

    Example: precscope bench zoo --format bf16
    """
    if context.invoked_subcommand is None:
        from .bench import BENCHMARKS

        for name, what in BENCHMARKS.items():
            _say(f"{name}: {what}")
        _next(f"precscope bench {next(iter(BENCHMARKS))}")


@bench_app.command()
def zoo(
    folder: Annotated[Path | None, typer.Argument(help="folder of case files; default: those of precscope")] = None,
    format: Annotated[str, typer.Option(help="fp16, bf16, or both separated by a comma")] = "fp16,bf16",
    case: Annotated[list[str] | None, typer.Option(help="only this case (may be repeated)")] = None,
    seed: SeedOption = 0,
    json: Annotated[Path | None, typer.Option(help="also write everything to this JSON file")] = None,
) -> None:
    """Score the advice on models that are known to fail in fp16 or bf16, and on healthy ones that look like them.

    Example: precscope bench zoo --case dice_overlap --json zoo.json
    """
    from .bench.zoo import score_zoo

    with _progress() as progress:
        result = score_zoo(folder, formats=format, cases=case or (), seed=seed, note=progress.note)
    print(result)
    if json is not None:
        _wrote(result.save(json))
    if not result.summary.good:
        raise typer.Exit(1)


def main() -> None:
    """Entry of the console script: errors become one line and an exit status."""
    debug = "--debug" in sys.argv or os.environ.get("PRECSCOPE_DEBUG", "") not in ("", "0")
    sys.argv = [a for a in sys.argv if a != "--debug"]
    try:
        app()
    except PrecscopeError as error:
        _fail(error, f"error: {error}", error.exit_code, debug)
    except KeyboardInterrupt:
        print("interrupted; what was written before is intact", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        _fail(error, f"error: {type(error).__name__}: {reason} (--debug shows where)", 1, debug)


def _fail(error: BaseException, text: str, status: int, debug: bool) -> None:
    if debug:
        import traceback

        traceback.print_exception(error)
    print(" ".join(text.split()), file=sys.stderr)
    sys.exit(status)


def _exist(overwrite: bool) -> str:
    return "overwrite" if overwrite else "error"


def _progress() -> Any:
    from .progress import Progress

    return Progress()


def _say(text: str) -> None:
    """A sentence, wrapped to the terminal."""
    print(textwrap.fill(text, max(40, shutil.get_terminal_size().columns)))


def _wrote(*paths: Path, next: str | None = None) -> None:
    print("wrote " + ", ".join(str(p) for p in paths))
    if next:
        _next(next)


def _next(command: str) -> None:
    print(f"next: {command}")


def _write_csv(table: Any, path: Path) -> None:
    from .store import replacing

    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False)


def _warn_damaged(profile: Any) -> None:
    for part in profile.damaged:
        print(f"left out the damaged part {part}", file=sys.stderr)


if __name__ == "__main__":
    main()
