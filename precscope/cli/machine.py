"""Commands about this machine: what it can do, the demonstration on it, and how precscope itself does there."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ..bench import BENCHMARKS
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
    """Measure precscope on this machine: list the benchmarks, run one with its own arguments, or run all.

    Example: precscope bench quantize --rounds 3
    """
    if context.invoked_subcommand is None:
        for name, benchmark in BENCHMARKS.items():
            needs = [*benchmark.needs, *(["a CUDA device"] if benchmark.cuda else [])]
            uses = [f"more with {', '.join(benchmark.uses)}"] if benchmark.uses else []
            remarks = "; ".join([f"needs {', '.join(needs)}"] * bool(needs) + uses)
            say(f"{name}: {benchmark.what}" + (f" ({remarks})" if remarks else ""))
        say(
            "All but zoo are files of the repository and run in a checkout of it; --quick makes any of them short; "
            "precscope bench all --out DIR runs them all."
        )
        next_command("precscope bench zoo")


@bench_app.command()
def zoo(
    folder: Annotated[Path | None, typer.Argument(help="folder of case files; default: those of precscope")] = None,
    format: Annotated[str, typer.Option(help="fp16, bf16, or both separated by a comma")] = "fp16,bf16",
    case: Annotated[list[str] | None, typer.Option(help="only this case (may be repeated)")] = None,
    seed: SeedOption = 0,
    json: Annotated[Path | None, typer.Option(help="also write everything to this JSON file")] = None,
    html: Annotated[Path | None, typer.Option(help="also write a page of it, to show to others")] = None,
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
    if html is not None:
        from ..bench.page import save_page

        wrote(save_page(result, html))
    if not result.summary.good:
        raise typer.Exit(1)


@bench_app.command(name="all")
def everything(
    out: Annotated[Path, typer.Option(help="folder for NAME.json, NAME.txt and the index, bench.json")],
    quick: Annotated[
        bool, typer.Option("--quick", help="the short setting of each: does it run, not how fast")
    ] = False,
    only: Annotated[list[str] | None, typer.Option(help="only this benchmark (may be repeated)")] = None,
) -> None:
    """Run all benchmarks in turn, in a checkout of the repository; one that fails does not stop the rest.

    Example: precscope bench all --out bench --quick
    """
    from ..bench.running import run_all, table

    with progress() as shown:
        done = run_all(out, quick=quick, only=only or (), note=shown.note)
    print(table(done))
    wrote(out / "bench.json")
    if any(ran.status == "failed" for ran in done):
        raise typer.Exit(1)


def _script(name: str, what: str) -> None:
    """`precscope bench NAME [ARGS...]`: the script answers --help itself."""

    def run(context: typer.Context) -> None:
        from ..bench.running import run_one

        if status := run_one(name, context.args):
            raise typer.Exit(status)

    run.__doc__ = f"{what[0].upper()}{what[1:]}."
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    bench_app.command(name=name, context_settings=settings)(run)


for _name, _benchmark in BENCHMARKS.items():
    if _benchmark.script:
        _script(_name, _benchmark.what)
