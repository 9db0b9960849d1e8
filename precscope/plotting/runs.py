"""Training runs: loss with its spread over seeds, loss scale, speed and memory, and a whole comparison."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..comparison import Comparison, compare
from ..comparison.curves import loss_table, spread
from ..comparison.runs import Group, Run, read_group, read_run
from ..errors import RunDirectoryError, UsageError
from ..events import NAME, read_events
from ..reporting.courses import named, run_names
from ..reporting.numbers import bytes_text, number
from . import canvas
from .canvas import GREY, LINES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ..comparison import CurvePoint

_STRONGEST = 3.0  # margins that the axis of differences shows at most: early steps differ much
_SMOOTH = 50  # a moving average is a fiftieth of the run


def loss(
    runs: str | Path | Sequence[str | Path], ax: Axes | None = None, *, smooth: int | None = None, held_out: bool = True
) -> Axes:
    """Training loss by step of run directories: the mean over a run and its twins of other seeds (below RUN/seeds),
    with one standard deviation of the seeds as a band.

    smooth: steps of the moving average of each seed; default: a fiftieth of the run; where it is more than 1, a thin
    line behind it is the run as it was. held_out: also draw the held-out losses of the run, as points. A mean stops
    where a seed has no finite loss. Raises UsageError without runs or without matplotlib, RunDirectoryError for what is
    no run.
    """
    canvas.pyplot()
    runs = [runs] if isinstance(runs, str | Path) else list(runs)
    if not runs:
        raise UsageError("loss needs at least one run directory, for example runs/fp32")
    groups = [read_group(run) for run in runs]
    ax = canvas.one(ax, size=(6.4, 3.8))
    for group, name, style in zip(groups, named(groups), LINES * len(groups), strict=False):
        _draw_loss(ax, group, name, style, smooth=smooth or max(1, len(group.run.log) // _SMOOTH), held_out=held_out)
    _nest(ax)
    several = any(len(g.seeds) > 1 for g in groups)
    canvas.steps(ax)
    ax.set_ylabel("training loss" + (" (mean, ± std. dev. over seeds)" if several else ""))
    ax.grid(alpha=0.25)
    canvas.legend(ax)
    return ax


def loss_scale(run: str | Path, ax: Axes | None = None) -> Axes:
    """The loss scale of a run by step; ticks below are steps that were skipped, crosses those that were not finite,
    lines what a guard did.

    Raises UsageError without matplotlib, RunDirectoryError for what is no run.
    """
    canvas.pyplot()
    read = read_run(Path(run))
    ax = canvas.one(ax, size=(6.4, 3.0))
    _draw_scale(ax, read, LINES[0], label="loss scale")
    skipped, broken = (read.log.step[read.log[name].astype(bool)] for name in ("skipped", "nonfinite"))
    below = ax.get_xaxis_transform()
    ax.plot(skipped, np.full(len(skipped), 0.04), ls="", marker="|", ms=9, color="#d14406", transform=below,
            label=f"skipped: {len(skipped)} of {len(read.log)} steps")  # fmt: skip
    if len(broken):
        ax.plot(broken, np.full(len(broken), 0.11), ls="", marker="x", ms=4, color="#a84a98", transform=below,
                label=f"not finite: {len(broken)} steps")  # fmt: skip
    _draw_events(ax, read)
    canvas.steps(ax)
    ax.grid(alpha=0.25)
    canvas.title(ax, read.name + (f" ({read.precision})" if read.precision != read.name else ""))
    canvas.legend(ax)
    return ax


def speed(comparison: Comparison | Sequence[str | Path], ax: Any = None) -> Any:
    """Time per step and peak memory of each run, as bars; the line is the baseline. Returns an array of Axes.

    Raises UsageError without matplotlib, and as `compare`.
    """
    canvas.pyplot()
    compared = _compared(comparison)
    rows = compared.rows
    paths = [str(g.run.path) for g in compared.groups]
    base = rows[paths.index(compared.baseline)] if compared.baseline in paths else rows[0]
    names = run_names(compared) if compared.groups else tuple(r.run for r in rows)
    columns = [
        ("step_time_ms", "time per step (ms)", lambda r: f"{number(r.step_time_ms)} ms, {r.speed:.2f}×"),
        ("peak_memory_bytes", "peak memory (GB)", lambda r: bytes_text(r.peak_memory_bytes)),
    ]
    axes = canvas.several(ax, 2, size=(8.4, 1.1 + 0.3 * len(rows)), ncols=2, sharey=True)
    for axis, (column, label, said) in zip(axes, columns, strict=False):
        unit = 1e9 if column == "peak_memory_bytes" else 1.0
        values = np.array([getattr(r, column) for r in rows], float) / unit
        largest = np.nanmax(values) if np.isfinite(values).any() else 1.0
        axis.barh(np.arange(len(rows)) + 0.5, np.nan_to_num(values), height=0.66, color="#3468a4")
        for i, (row, value) in enumerate(zip(rows, values, strict=True)):
            at = value + 0.015 * largest if np.isfinite(value) else 0.0
            text = said(row) if np.isfinite(value) else " not known"
            axis.text(at, i + 0.5, text, fontsize=7, va="center", bbox={"fc": "white", "ec": "none", "pad": 0.6})
        axis.axvline(getattr(base, column) / unit, color=GREY, lw=0.9, ls="--")
        axis.set_xlim(0, largest * 1.45)
        axis.set_xlabel(label)
    canvas.name_rows(axes[0], names)
    for axis in axes[1:]:
        axis.tick_params(axis="y", length=0)
    return canvas.returned(axes)


def comparison(
    compared: Comparison | str | Path | Sequence[str | Path], ax: Any = None, *, smooth: int | None = None
) -> Any:
    """A comparison in panels: training loss, mean over seeds with one standard deviation; the paired difference from
    the baseline, with its interval step by step and the margin as a band; and the loss scales, where any run has one.

    compared: a Comparison, or run directories to compare. smooth: as in Comparison.curves. A mean stops where a seed
    has no finite loss. ax: as many Axes as panels are wanted. Returns an array of Axes. Raises UsageError where
    matplotlib is missing or no run was read.
    """
    canvas.pyplot()
    compared = _compared(compared)
    if not compared.groups:
        raise UsageError("this comparison holds no curves: make it with precscope.compare(runs)")
    curves, differences = compared.curves(smooth=smooth), compared.difference_curves(smooth=smooth)
    styles = {name: LINES[i % len(LINES)] for i, name in enumerate(curves)}
    names = dict(zip((str(g.run.path) for g in compared.groups), run_names(compared), strict=True))
    scaled = [g.run for g in compared.groups if has_scale(g.run)]
    panels = [3.0, *([2.0] if differences else []), *([1.4] if scaled else [])]
    axes = canvas.several(
        ax, len(panels), size=(7.2, 1.1 * sum(panels) + 0.4), nrows=len(panels), sharex=True, height_ratios=panels
    )
    _curves(axes[0], compared, curves, styles, names)
    rest = axes[1:]
    if differences and rest:
        _differences(rest[0], compared, differences, styles, names)
        rest = rest[1:]
    if scaled and rest:
        for run in scaled:
            _draw_scale(rest[0], run, styles[str(run.path)], label=canvas.plain(names[str(run.path)]))
    for axis in axes:
        _nest(axis)
        axis.grid(alpha=0.25)
        canvas.legend(axis)
    canvas.steps(axes[-1])
    return canvas.returned(axes)


def _compared(runs: Comparison | str | Path | Sequence[str | Path]) -> Comparison:
    if isinstance(runs, Comparison):
        return runs
    return compare([runs] if isinstance(runs, str | Path) else runs)


def _draw_loss(ax: Axes, group: Group, name: str, style: tuple[str, str], *, smooth: int, held_out: bool) -> None:
    run = group.run
    members = list(group.seeds.values()) or [run]
    about = [run.precision] if run.precision != name else []
    about += [f"{len(members)} seeds"] if len(members) > 1 else []
    label = canvas.plain(name + (f" ({', '.join(about)})" if about else ""))
    if smooth > 1 and len(members) == 1:
        ax.plot(run.log.step, run.log.loss, color=style[0], lw=0.5, alpha=0.35)
    _band(ax, spread(*loss_table(members), smooth=smooth), style, label=label)
    if held_out and "eval_loss" in run.log:
        known = run.log[np.isfinite(run.log.eval_loss)]
        if len(known):
            label = None if any(line.get_label() == "held-out" for line in ax.lines) else "held-out"
            ax.plot(known.step, known.eval_loss, ls="", marker="D", ms=4.5, color=style[0], mfc="none", label=label)


def has_scale(run: Run) -> bool:
    """Whether a loss scale multiplied any of its losses."""
    return "scale" in run.log and bool((run.log.scale != 1).any())


def _draw_scale(ax: Axes, run: Run, style: tuple[str, str], *, label: str) -> None:
    scale = run.log.scale if "scale" in run.log else np.ones(len(run.log))
    ax.step(
        run.log.step, np.log2(np.asarray(scale, float)), where="post", color=style[0], ls=style[1], lw=1.3, label=label
    )
    lo, hi = ax.get_ylim()
    lo, hi = int(np.floor(lo)), int(np.ceil(hi))
    lo, hi = (lo - 1, hi + 1) if hi - lo < 4 else (lo, hi)
    canvas.power_ticks(ax, lo, hi, axis="y")
    ax.set_ylim(lo, hi)
    ax.set_ylabel("loss scale")


def _draw_events(ax: Axes, run: Run) -> None:
    if not (run.path / NAME).is_file():
        return
    try:
        events = [e for e in read_events(run.path) if e.action not in ("none", "warn")]
    except RunDirectoryError:
        return  # a damaged line of the guard's diary is no reason to show nothing
    for i, event in enumerate(events):
        ax.axvline(event.step, color=GREY, lw=0.9, ls="-.", label="guard acted" if i == 0 else None)
        if len(events) <= 12:
            ax.text(event.step, 1.0, event.action, transform=ax.get_xaxis_transform(), fontsize=6.5, ha="center",
                    va="bottom", color=GREY)  # fmt: skip


def _curves(
    ax: Axes, compared: Comparison, curves: dict[str, tuple[CurvePoint, ...]], styles: dict[str, Any],
    names: dict[str, str],
) -> None:  # fmt: skip
    seeds = {str(g.run.path): max(len(g.seeds), 1) for g in compared.groups}
    for name, points in curves.items():
        count = f", {seeds[name]} seeds" if seeds[name] > 1 else ""
        _band(ax, points, styles[name], label=canvas.plain(f"{names[name]}{count}"))
    ax.set_ylabel("training loss" + ("\n(mean, ± std. dev. over seeds)" if max(seeds.values()) > 1 else ""))


def _differences(
    ax: Axes, compared: Comparison, differences: dict[str, Any], styles: dict[str, Any], names: dict[str, str]
) -> None:
    ax.axhline(0, color=GREY, lw=0.8)
    for name, points in differences.items():
        _band(ax, points, styles[name], label=canvas.plain(f"{names[name]} − {names[compared.baseline]}"))
    margins = [p.loss.bound for p in compared.pairs if p.loss is not None and p.loss.bound]
    if margins:
        margin = margins[0]
        lo, hi = (_STRONGEST * margin * side for side in (-1, 1))
        lo, hi = max(lo, ax.get_ylim()[0]), min(hi, ax.get_ylim()[1])
        where = "" if lo < -margin or hi > margin else ", wider than this axis"
        ax.axhspan(
            -margin, margin, color="#00875f", alpha=0.08, lw=0, label=f"margin {100 * compared.margin:g}%{where}"
        )
        ax.set_ylim(lo, hi)
    several = any(len(p.seeds) > 1 for p in compared.pairs)
    interval = f"\n(mean, {100 * compared.confidence:g}% interval)" if several else ""
    ax.set_ylabel("paired difference" + interval)


def _nest(ax: Axes) -> None:
    """Lines that lie on one another all show: the first is the widest."""
    named = [line for line in ax.lines if not str(line.get_label()).startswith("_") and line.get_linestyle() != "None"]
    for i, line in enumerate(named):
        line.set_linewidth(1.2 + 0.9 * (len(named) - 1 - i) if len(named) <= 6 else 1.3)


def _band(ax: Axes, points: tuple[CurvePoint, ...], style: tuple[str, str], *, label: str) -> None:
    color, dash = style
    steps = [p.step for p in points]
    ax.plot(steps, [p.mean for p in points], color=color, ls=dash, lw=1.3, label=label)
    ax.fill_between(steps, [p.lo for p in points], [p.hi for p in points], color=color, alpha=0.18, lw=0)
