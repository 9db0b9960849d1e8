"""What a format and a loss scale would do to every site at once."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError
from ..formats import FloatFormat, get_format
from ..profiles import Profile, worst_first
from ..reporting.material import site_name
from ..reporting.numbers import plural
from . import canvas
from .canvas import GREY, REGIONS

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

_LEAST = 1e-6  # shares below it are drawn there
_MARKS = {"overflow": "^", "flushed": "o", "subnormal": "D"}


def what_if(
    profile: Profile | str | Path,
    format: str | FloatFormat = "fp16",
    *,
    scale_exponent: int = 0,
    role: str | Sequence[str] | None = None,
    sort: str | None = None,
    rows: int = 30,
    ax: Any = None,
) -> Any:
    """What `format` would do to the recorded tensors, were they multiplied by 2^scale_exponent first: the panels are
    the shares that overflow (from the lower to the upper bound), are flushed and become subnormal; the SQNR; and, where
    shadow steps priced them, the loss noise. A row per site, the worst first.

    role: one, several, or None for all. sort: a column of Profile.ask; None takes the first of overflow_hi, flushed,
    loss_noise and sqnr_db that says anything of these sites. rows: sites at most. ax: one Axes takes the
    first panel alone, several take as many as they are. Returns an array of Axes. Raises UsageError for unknown roles
    and columns, where there are no statistics, and where matplotlib is missing.
    """
    canvas.pyplot()
    loaded, fmt = canvas.load(profile), get_format(format)
    table = loaded.ask(fmt, scale_exponent=scale_exponent, roles=role)
    if not len(table):
        raise UsageError(f"{loaded.path} holds no statistics{'' if role is None else f' of role {role!r}'}")
    shown = worst_first(table, sort or _telling(table)).head(rows)
    priced = bool(shown.loss_noise.notna().any())
    n = 3 if priced else 2
    axes = canvas.several(ax, n, size=(9.5, 1.4 + 0.17 * len(shown)), ncols=n, sharey=True,
                          width_ratios=(3, 2, 2)[:n])  # fmt: skip
    names = [site_name(row) for row in shown.itertuples(index=False)]
    for axis, draw in zip(axes, (_shares, _sqnr, _noise), strict=False):
        draw(axis, shown, fmt)
        axis.grid(axis="x", alpha=0.25)
        axis.hlines(np.arange(1, len(shown)), *axis.get_xlim(), color=GREY, lw=0.2, alpha=0.5)
    canvas.name_rows(axes[0], names, width=40)
    for axis in axes[1:]:
        axis.tick_params(axis="y", length=0)
    scaled = f", values times {canvas.power(scale_exponent)}" if scale_exponent else ""
    rest = f", the worst {len(shown)}" if len(shown) < len(table) else ""
    canvas.title(axes[0], f"{fmt}{scaled}: {plural(len(table), 'site')}{rest}", pad=20)
    return canvas.returned(axes)


def _telling(table: pd.DataFrame) -> str:
    """The column that tells the sites apart."""
    for column, least in (("overflow_hi", 0.0), ("flushed", 1e-4), ("loss_noise", 0.0)):
        if (table[column] > least).any():
            return column
    return "sqnr_db"


def _shares(ax: Axes, table: pd.DataFrame, fmt: FloatFormat) -> None:
    y = np.arange(len(table)) + 0.5
    for name, mark in _MARKS.items():
        lo = table["overflow_lo" if name == "overflow" else name].to_numpy()
        hi = table["overflow_hi" if name == "overflow" else name].to_numpy()
        here = hi > 0
        if not here.any():  # an empty line that is not clipped would lie in the corner of the figure
            continue
        ends = np.maximum(lo, _LEAST), np.maximum(hi, _LEAST)
        ax.hlines(y[here], ends[0][here], ends[1][here], color=REGIONS[name], lw=2.5, alpha=0.6)
        ax.plot(ends[1][here], y[here], ls="", marker=mark, ms=4.2, color=REGIONS[name], mec="white", mew=0.3,
                label=name, zorder=3, clip_on=False)  # fmt: skip
    if not ax.lines:
        ax.text(0.5, 0.5, "nothing overflows, is flushed\nor becomes subnormal", transform=ax.transAxes, ha="center",
                va="center", color=GREY, fontsize=8)  # fmt: skip
    canvas.logarithmic(ax, "x")
    ax.set_xlim(_LEAST, 1)
    ax.set_xlabel("share of all values")
    ax.set_xticks([1e-6, 1e-4, 1e-2, 1], ["≤1 ppm", "0.01%", "1%", "100%"])
    canvas.legend(ax, loc="lower left", bbox_to_anchor=(0, 1), ncols=3, borderaxespad=0, handletextpad=0.1,
                  columnspacing=1.0)  # fmt: skip


def _sqnr(ax: Axes, table: pd.DataFrame, fmt: FloatFormat) -> None:
    values = table.sqnr_db.to_numpy()
    y, known = np.arange(len(table)) + 0.5, np.isfinite(values)
    ax.plot(values[known], y[known], ls="", marker="s", ms=3.5, color="#3468a4")
    if known.any():
        ax.set_xlim(min(0.0, values[known].min() - 2), values[known].max() + 4)
    end = ax.get_xlim()[1]
    for at in y[~known]:
        ax.text(end, at, "exact ", fontsize=6, ha="right", va="center", color=GREY)
    ax.set_xlabel("SQNR (dB); right is better")


def _noise(ax: Axes, table: pd.DataFrame, fmt: FloatFormat) -> None:
    values = table.loss_noise.to_numpy()
    y, known = np.arange(len(table)) + 0.5, np.isfinite(values) & (values > 0)
    ax.plot(values[known], y[known], ls="", marker="o", ms=3.5, color="#a84a98")
    if known.any():
        canvas.logarithmic(ax, "x")
        ax.set_xlim(values[known].min() / 2, values[known].max() * 2)
    ax.set_xlabel("loss noise (std. dev.)")
