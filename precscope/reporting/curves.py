"""A comparison as a picture: loss curves with their spread over seeds, and the paired difference from the baseline."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import RunDirectoryError, UsageError
from .figures import _LINES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from ..comparison import Comparison, CurvePoint

_STRONGEST = 3.0  # margins that the axis of differences shows at most: early steps differ much


def compare_figure(comparison: Comparison, *, smooth: int | None = None) -> Figure:
    """Above: training loss by step, mean over seeds with one standard deviation. Below: paired difference from the
    baseline, with its interval step by step, and the margin as a band. smooth: as in Comparison.curves.

    A mean stops where a seed has no finite loss. Raises UsageError where matplotlib is missing or no run was read.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'precscope[figures]' (or matplotlib)") from error
    if not comparison.groups:
        raise UsageError("this comparison holds no curves: make it with precscope.compare(runs)")
    curves, differences = comparison.curves(smooth=smooth), comparison.difference_curves(smooth=smooth)
    styles = {name: _LINES[i % len(_LINES)] for i, name in enumerate(curves)}
    seeds = {str(g.run.path): max(len(g.seeds), 1) for g in comparison.groups}
    figure = Figure(figsize=(7.2, 5.6 if differences else 3.6), layout="constrained")
    axes = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2)) if differences else (figure.subplots(),)
    for name, points in curves.items():
        count = f", {seeds[name]} seeds" if seeds[name] > 1 else ""
        _band(axes[0], points, styles[name], label=f"{Path(name).name}{count}")
    axes[0].set_ylabel("training loss" + (" (mean, ± std. dev.)" if max(seeds.values()) > 1 else ""))
    if differences:
        _differences(axes[1], comparison, differences, styles)
    for axis in axes:
        axis.grid(alpha=0.25)
        axis.legend(frameon=False, fontsize=8)
    axes[-1].set_xlabel("step")
    return figure


def save_figure(comparison: Comparison, path: str | Path) -> Path:
    """Write `compare_figure` to `path` (.png, .svg, .pdf). Raises UsageError for another kind of file,
    RunDirectoryError where it cannot be written."""
    path = Path(path)
    figure = compare_figure(comparison)
    kinds = figure.canvas.get_supported_filetypes()
    if path.suffix.lstrip(".").lower() not in kinds:
        raise UsageError(f"cannot write a figure as {path.name}: name it .png, .svg or .pdf")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path} ({error.strerror or error}): choose another place") from error
    return path


def _differences(axis: Any, comparison: Comparison, differences: dict[str, Any], styles: dict[str, Any]) -> None:
    axis.axhline(0, color="#56606c", lw=0.8)
    for name, points in differences.items():
        _band(axis, points, styles[name], label=f"{Path(name).name} - {Path(comparison.baseline).name}")
    margins = [p.loss.bound for p in comparison.pairs if p.loss is not None and p.loss.bound]
    if margins:
        margin = margins[0]
        lo, hi = (_STRONGEST * margin * side for side in (-1, 1))
        lo, hi = max(lo, axis.get_ylim()[0]), min(hi, axis.get_ylim()[1])
        where = "" if lo < -margin or hi > margin else ", wider than this axis"
        axis.axhspan(
            -margin, margin, color="#00875f", alpha=0.08, lw=0, label=f"margin {100 * comparison.margin:g}%{where}"
        )
        axis.set_ylim(lo, hi)
    several = any(len(p.seeds) > 1 for p in comparison.pairs)
    interval = f"\n(mean, {100 * comparison.confidence:g}% interval)" if several else ""
    axis.set_ylabel("paired difference" + interval)


def _band(axis: Any, points: tuple[CurvePoint, ...], style: tuple[str, str], *, label: str) -> None:
    color, dash = style
    steps = [p.step for p in points]
    axis.plot(steps, [p.mean for p in points], color=color, ls=dash, lw=1.3, label=label)
    axis.fill_between(steps, [p.lo for p in points], [p.hi for p in points], color=color, alpha=0.18, lw=0)
