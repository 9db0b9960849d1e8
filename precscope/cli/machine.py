"""Commands about this machine: what it can do, the demonstration on it, and how precscope itself does there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .printing import SeedOption, next_command, progress, say, wrote


def demo(
    out: Annotated[Path, typer.Option(help="where the runs go")] = Path("runs/demo"),
    report: Annotated[Path, typer.Option(help="the HTML report")] = Path("reports/demo/index.html"),
    steps: Annotated[int | None, typer.Option(help="steps per run; by default as many as fit in four minutes")] = None,
    size: Annotated[str | None, typer.Option(help="model size; by default small on a CPU, medium on a GPU")] = None,
) -> None:
    """Record, recommend, train with the plan and compare, on a GPT and real text.

    Example: precscope demo --steps 60
    """
    from ..demo import run

    with progress() as shown:
        result = run(out=out, report=report, steps=steps, size=size, progress=shown)
    print(result.comparison)
    for finding in result.findings:
        say(finding)
    wrote(result.report, result.plan_path, next=f"open {result.report}, then precscope ask {result.recorded} e4m3")


def doctor(size: Annotated[int, typer.Option(help="edge of the matrices that are multiplied")] = 1024) -> None:
    """Say what this machine can do: devices, native formats, measured rates, versions.

    Example: precscope doctor
    """
    from ..doctor import describe, examine

    print(describe(examine(size=size)))
    next_command("precscope demo")


bench_app = typer.Typer(rich_markup_mode=None)


@bench_app.callback(invoke_without_command=True)
def bench(context: typer.Context) -> None:
    """Measure precscope on this machine: list the benchmarks, or run one.

    Example: precscope bench zoo --format bf16
    """
    if context.invoked_subcommand is None:
        from ..bench import BENCHMARKS

        for name, what in BENCHMARKS.items():
            say(f"{name}: {what}")
        next_command(f"precscope bench {next(iter(BENCHMARKS))}")


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
    from ..bench.zoo import score_zoo

    with progress() as shown:
        result = score_zoo(folder, formats=format, cases=case or (), seed=seed, note=shown.note)
    print(result)
    if json is not None:
        wrote(result.save(json))
    if not result.summary.good:
        raise typer.Exit(1)
