"""Who spends the noise that rounding may add to the loss."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..advice.noise import Noise
from ..advice.recommender import Limits
from ..advice.units import ModelGraph
from ..errors import UsageError
from ..formats import get_format
from ..plans import PrecisionPlan
from ..profiles import Profile
from ..reporting.numbers import number, percent, plural
from . import canvas
from .canvas import FORMATS, GREY, INK

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def noise_budget(
    source: Profile | PrecisionPlan | str | Path, ax: Axes | None = None, *, format: str = "bf16", most: int = 20
) -> Axes:
    """The loss noise of each module, those that make most first, against what is allowed in all.

    source: a plan (each module in the format that it chose; read from its evidence), or a profile with shadow steps (or
    its run directory): every module in `format`. Loss noise is the standard deviation of one step's loss; variances add
    up, so that the sum is the root of the sum of squares. most: modules at most. Raises UsageError where the noise was
    not priced, and where matplotlib is missing.
    """
    canvas.pyplot()
    std, formats, budget, spread = _of_plan(source) if isinstance(source, PrecisionPlan) else _of_run(source, format)
    names = sorted(std, key=lambda name: -std[name])
    total = float(np.sqrt(sum(s * s for s in std.values())))
    shown = [n for n in names[:most] if std[n] > 0]
    ax = canvas.one(ax, size=(7, 1.7 + 0.19 * max(len(shown), 3)))
    rest = float(np.sqrt(sum(std[n] ** 2 for n in names[len(shown) :])))
    rows = [(n, std[n], formats[n]) for n in shown]
    if rest > 0:
        rows.append((f"{plural(len(names) - len(shown), 'more module')}", rest, ""))
    least = min([v for _, v, _ in rows] + [total or budget]) / 3
    for i, (_, value, fmt) in enumerate(rows):
        color, hatch = FORMATS.get(fmt, (GREY, ""))
        ax.barh(i + 0.5, value - least, left=least, height=0.68, color=color, hatch=hatch, edgecolor="white", lw=0.3)
    ends = [
        ("all together", total, INK, "-"),
        ("allowed", budget, "#d14406", "--"),
        ("batch to batch", spread, GREY, ":"),
    ]
    for label, value, color, dash in ends:
        if np.isfinite(value) and value > 0:
            ax.axvline(value, color=color, ls=dash, lw=1.3, label=f"{label}: {number(value)}")
    canvas.logarithmic(ax, "x")
    ax.set_xlim(least, max([v for _, v, _, _ in ends if np.isfinite(v)] + [least * 10]) * 2)
    canvas.name_rows(ax, [n for n, _, _ in rows])
    if not rows:
        ax.set_yticks([])
        ax.text(0.5, 0.5, "nothing is rounded", transform=ax.transAxes, ha="center", va="center", color=GREY)
    ax.set_xlabel("loss noise: standard deviation of one step's loss (in units of the loss)")
    share = f", {percent((total / budget) ** 2)}% of the variance that is allowed" if np.isfinite(budget) else ""
    what = "the plan" if isinstance(source, PrecisionPlan) else f"every module in {format}"
    canvas.title(ax, f"Loss noise of {what}: {number(total)}{share}", pad=20)
    canvas.legend(ax, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0)
    return ax


def _of_plan(plan: PrecisionPlan) -> tuple[dict[str, float], dict[str, str], float, float]:
    """(standard deviation per module, format per module, budget, spread over batches) from a plan's evidence."""
    noise = plan.made_from.get("loss_noise") or {}
    if not isinstance(noise.get("budget"), int | float):
        raise UsageError(
            "the plan does not say what its rounding does to the loss: make it from a run with shadow steps "
            "(precscope profile TASK), or draw the profile: noise_budget(profile)"
        )
    std: dict[str, float] = {}
    formats: dict[str, str] = {}
    for name, layer in plan.modules.items():
        value = (layer.evidence.get("loss_noise") or {}).get(layer.compute)
        if isinstance(value, int | float):
            std[name], formats[name] = float(value), str(layer.compute)
    for name, value in (noise.get("largest") or {}).items():
        std.setdefault(name, float(value))
        formats.setdefault(name, str(plan[name].compute))
    spread = noise.get("spread_over_batches")
    return std, formats, float(noise["budget"]), float(spread) if isinstance(spread, int | float) else float("nan")


def _of_run(run: Profile | str | Path, format: str) -> tuple[dict[str, float], dict[str, str], float, float]:
    """The same of every module of a run in one format."""
    profile, fmt = canvas.load(run), get_format(format).name
    noise = Noise.of_run(profile, ModelGraph.of(profile), (fmt,), share=Limits().noise)
    std = {unit: variance**0.5 for (unit, _), variance in noise.variance.items()}
    if not std:
        raise UsageError(
            f"{profile.path} prices no rounding to {fmt}: record shadow steps (precscope profile TASK --shadow-every "
            "auto, or rec.shadow), and a low format"
        )
    return std, dict.fromkeys(std, fmt), noise.budget**0.5, noise.spread
