"""Commands that read recorded runs and print or write tables and reports of them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import RunDirectoryError, UsageError
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
    with_size,
    write_csv,
    wrote,
)

if TYPE_CHECKING:
    import pandas as pd

    from ..profiles import Profile


def ask(
    run: RunArgument,
    format: FormatArgument,
    scale_exponent: Annotated[int, typer.Option("--scale-exponent", "-k", help="multiply tensors by 2^k first")] = 0,
    role: Annotated[list[str] | None, typer.Option(help="only this role (may be repeated)")] = None,
    sort: Annotated[str, typer.Option(help="column to sort by, worst first")] = "overflow_hi",
    rows: RowsOption = 20,
    by: Annotated[str, typer.Option(help="site, tensor or module")] = "site",
    ops: Annotated[bool, typer.Option("--ops", help="of every op's result instead, also inside modules")] = False,
    csv: CsvOption = None,
    skip_damaged: SkipOption = False,
) -> None:
    """Say what a number format would do to every recorded tensor.

    Example: precscope ask runs/a e5m2 -k 12 --role grad_output
    """
    from ..profiles import worst_first
    from ..reporting.tables import ops_table
    from ..reporting.text import ask_table

    if ops:
        if role or by != "site":
            raise UsageError(f"{'--role' if role else '--by'} does not go with --ops, whose rows are ops: leave it out")
        table = worst_first(_asked_of_ops(run, format, scale_exponent, skip_damaged), sort)
        print(ops_table(table.head(rows) if rows else table, total=len(table)))
    else:
        loaded = load(run, skip_damaged=skip_damaged)
        table = worst_first(loaded.ask(format, scale_exponent=scale_exponent, by=by, roles=role), sort)
        print(ask_table(table.head(rows) if rows else table, total=len(table)))
    if csv is not None:
        write_csv(table, csv)
        wrote(csv, next=f"precscope recommend {run}")
    else:
        next_command(f"precscope recommend {run}")


def _asked_of_ops(run: Path, format: str, scale_exponent: int, skip_damaged: bool) -> pd.DataFrame:
    from ..formats import get_format
    from ..opstore import load_ops

    fmt = get_format(format)
    records = load_ops(run, skip_damaged=skip_damaged)
    if not len(records):
        load(run, skip_damaged=skip_damaged)  # says what is wrong where there is no run at all
        raise RunDirectoryError(
            f"{run} holds no op-level records: record them with precscope profile TASK --ops --out DIR, or leave out "
            "--ops to ask about what modules take and give"
        )
    return records.ask(fmt, scale_exponent=scale_exponent)


def compare(
    runs: Annotated[list[Path], typer.Argument(help="run directories of precscope train")],
    baseline: Annotated[Path | None, typer.Option(help="run to measure against; default: the first fp32 run")] = None,
    seeds: Annotated[
        int | None, typer.Option(help="compare over so many seeds: train those that lack into RUN/seeds")
    ] = None,
    task: Annotated[str | None, typer.Option(help="task of the runs, where they do not know it or it moved")] = None,
    size: SizeOption = None,
    margin: Annotated[float, typer.Option(help="difference that does not matter, as a share of the loss")] = 0.02,
    confidence: Annotated[float, typer.Option(help="of intervals and tests")] = 0.95,
    csv: Annotated[Path | None, typer.Option(help="also write the table to this CSV file")] = None,
    json: Annotated[Path | None, typer.Option(help="also write everything to this JSON file")] = None,
    figure: Annotated[Path | None, typer.Option(help="also draw the loss curves: .png, .svg or .pdf")] = None,
) -> None:
    """Put training runs side by side: is the loss the same within a margin, speed, memory, skipped steps.

    Example: precscope compare runs/fp32 runs/plan --seeds 5
    """
    from ..comparison import compare as run

    task = with_size(task, size)
    with progress() as shown:
        result = run(
            runs, baseline=baseline, seeds=seeds, task=task, margin=margin, confidence=confidence,
            progress=shown.run, note=shown.note,
        )  # fmt: skip
    print(result)
    if csv is not None:
        write_csv(result.table(), csv)
        wrote(csv)
    if json is not None:
        wrote(result.save(json))
    if figure is not None:
        from ..plotting import comparison, save

        wrote(save(comparison(result), figure))
    listed = " ".join(f"--run {r}" for r in runs)
    recorded = next((r for r in runs if any(r.glob("stats-*.parquet"))), "RECORDED_RUN")
    next_command(f"precscope report {recorded} {listed} --out reports/comparison.html")


def report(
    run: RunArgument,
    plan: Annotated[Path | None, typer.Option(help="plan.json to explain")] = None,
    runs: Annotated[list[Path] | None, typer.Option("--run", help="training run to compare (may be repeated)")] = None,
    out: Annotated[Path | None, typer.Option(help="file to write; default: reports/report.html")] = None,
    title: Annotated[str | None, typer.Option(help="heading of the report")] = None,
    text: Annotated[bool, typer.Option("--text", help="print it as text instead")] = False,
    markdown: Annotated[
        bool, typer.Option("--markdown", help="as Markdown for a pull request instead: printed, or written to --out")
    ] = False,
    figures: Annotated[
        Path | None, typer.Option(help="also write every figure as PNG and SVG into this directory")
    ] = None,
    skip_damaged: SkipOption = False,
) -> None:
    """Write a self-contained HTML report of a recorded run.

    Example: precscope report runs/a --plan plan.json --out reports/a.html
    """
    from ..reporting import report as write
    from ..reporting.markdown import markdown as as_markdown
    from ..reporting.markdown import save_markdown
    from ..reporting.text import verdict_text
    from ..reporting.view import build_view

    if text and (markdown or out is not None):
        raise UsageError(f"--text prints: leave out {'--markdown' if markdown else '--out'}")
    loaded = load(run, skip_damaged=skip_damaged)
    if figures is not None:
        _figures(loaded, figures, plan, runs)
    if text or markdown:
        view = build_view(loaded, plan=plan, runs=runs or (), title=title)
        if markdown and out is not None:
            wrote(save_markdown(view, out))
        else:
            print(as_markdown(view) if markdown else verdict_text(view))
        return
    written = write(loaded, plan=plan, runs=runs or (), out=out or Path("reports/report.html"), title=title)
    wrote(written, next=f"open {written}")


def _figures(profile: Profile, to: Path, plan: Path | None, runs: list[Path] | None) -> None:
    """Draw what there is something for; what goes with the report itself stays on standard output."""
    from ..plotting import save_all

    with progress() as shown:
        shown.note("drawing the figures")
        written = save_all(profile, to, plan=plan, runs=runs or (), note=shown.note)
        shown.note(f"wrote {len(written)} figures into {to}")
