"""How a recorded figure of a site, or of all tensors of a module, goes over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..errors import UsageError
from ..formats import get_format
from ..profiles import Profile
from ..reporting.numbers import shorten
from ..sites import Role, Site
from . import canvas
from .canvas import FAINT, GREY, LINES

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

COLUMNS = {
    "amax": "largest magnitude",
    "amin_nonzero": "smallest non-zero magnitude",
    "rms": "root mean square",
    "mean": "mean",
    "zeros": "zeros (% of all values)",
    "nonfinite": "inf and NaN (% of all values)",
    "loss_scale": "loss scale that was divided out",
}
_NEEDED = {
    "amin_nonzero": ("amin_nonzero",), "rms": ("sumsq", "count", "pos_inf", "neg_inf", "nan"),
    "mean": ("sum", "count", "pos_inf", "neg_inf", "nan"), "zeros": ("zeros", "count"),
    "nonfinite": ("pos_inf", "neg_inf", "nan", "count"), "loss_scale": ("loss_scale",),
}  # fmt: skip
"""What each is made from; the largest magnitudes are at hand in Profile.peaks."""
_POWERS = ("amax", "amin_nonzero", "rms", "loss_scale")
_NEAR = 64.0  # a format's end is drawn where the values come within so many times of it


def history(
    profile: Profile | str | Path,
    where: str,
    column: str = "amax",
    ax: Axes | None = None,
    *,
    formats: tuple[str, ...] = ("fp16", "e4m3"),
) -> Axes:
    """A recorded figure over the steps. Gradients have the loss scale divided out.

    where: a site as the report names it ("blocks.0.fc1.output"), or a module: all its sites, a line each. column: one
    of "amax", "amin_nonzero", "rms", "mean", "zeros", "nonfinite", "loss_scale". formats: whose largest finite values
    are drawn beside "amax" where the values come near. Raises UsageError for unknown sites, modules and columns, and
    where matplotlib is missing.
    """
    canvas.pyplot()
    if column not in COLUMNS:
        raise UsageError(f"no column {column!r} to draw; columns are {', '.join(COLUMNS)}")
    loaded = canvas.load(profile)
    lines = _lines(loaded, _sites(loaded, where), column)
    ax = canvas.one(ax, size=(6.4, 3.4))
    for i, (site, steps, values) in enumerate(lines):
        color, dash = LINES[i % len(LINES)]
        label = f"{site.role.value}#{site.call}" if site.call else site.role.value
        ax.plot(steps, values, color=color, ls=dash, lw=1.3, marker="o", ms=2.5, label=label)
    if column in _POWERS:
        canvas.logarithmic(ax, "y", base=2)
    if column == "amax":
        _ends(ax, max((float(np.nanmax(v)) for _, _, v in lines if np.isfinite(v).any()), default=0.0), formats)
    canvas.steps(ax)
    ax.set_ylabel(COLUMNS[column])
    ax.grid(alpha=0.25)
    canvas.title(ax, shorten(where or "(root)", 60))
    if len(lines) > 1:
        canvas.legend(ax, loc="center left", bbox_to_anchor=(1, 0.5))
    return ax


def _sites(profile: Profile, where: str) -> list[Site]:
    """One site, or all sites of one module, by role and call."""
    sites = profile.merged()[0]
    module = "" if where == "(root)" else where
    found = [s for s in sites if s.module == module] or [s for s in sites if str(s) == where]
    if not found:
        raise canvas.unknown("site or module", where, [*map(str, sites), *profile.modules])
    roles = list(Role)
    return sorted(found, key=lambda s: (roles.index(s.role), s.call))


def _lines(profile: Profile, sites: list[Site], column: str) -> list[tuple[Site, np.ndarray, np.ndarray]]:
    """(site, steps, values) of each; NaN where there is no value. Of a long run only what is drawn is read: the largest
    magnitudes from Profile.peaks, else the columns needed, one role at a time."""
    if column == "amax":
        peaks = profile.peaks
        place = {site: i for i, site in enumerate(peaks.sites)}
        found = [(site, peaks.amax[place[site]]) for site in sites]
        recorded = [(site, ~np.isnan(values), values) for site, values in found]
        return [(s, peaks.steps[here], np.where(v[here] > 0, v[here], np.nan)) for s, here, v in recorded]
    lines = []
    for role in dict.fromkeys(s.role for s in sites):
        frame = profile.history(("step", "module", "call", *_NEEDED[column]), roles=(role.value,))
        for site in (s for s in sites if s.role is role):
            lines.append((site, *_series(frame[(frame.module == site.module) & (frame.call == site.call)], column)))
    return lines


def _series(rows: pd.DataFrame, column: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values): the tensors of a site in one, a value per step; NaN where there is none."""
    steps, at = np.unique(rows.step.to_numpy(), return_inverse=True)

    def total(*names: str) -> np.ndarray:
        return np.bincount(at, sum(rows[name].to_numpy(float) for name in names), len(steps))

    if column == "loss_scale":
        values = np.zeros(len(steps))
        np.maximum.at(values, at, rows[column].to_numpy(float))
        return steps, np.where(values > 0, values, np.nan)
    if column == "amin_nonzero":
        values = np.full(len(steps), np.inf)
        np.minimum.at(values, at, rows[column].to_numpy(float))
        return steps, np.where(np.isfinite(values), values, np.nan)
    count = total("count")
    if column in ("zeros", "nonfinite"):
        part = total("zeros") if column == "zeros" else total("pos_inf", "neg_inf", "nan")
        return steps, 100 * part / np.maximum(count, 1)
    finite = np.maximum(count - total("pos_inf", "neg_inf", "nan"), 1)
    if column == "mean":
        return steps, total("sum") / finite
    rms = np.sqrt(total("sumsq") / finite)
    return steps, np.where(rms > 0, rms, np.nan)


def _ends(ax: Axes, largest: float, formats: tuple[str, ...]) -> None:
    for name in formats:
        end = get_format(name).max
        if largest / _NEAR <= end <= largest * _NEAR:
            ax.axhline(end, color=FAINT, lw=0.9, ls="--")
            lo, hi = ax.get_ylim()
            ax.set_ylim(min(lo, end / 2.5), max(hi, 2.5 * end))
            ax.annotate(
                f"{name} ends", (1, end), (-3, 3), xycoords=ax.get_yaxis_transform(), textcoords="offset points",
                fontsize=7, color=GREY, ha="right", va="bottom",
                bbox={"fc": "white", "ec": "none", "pad": 0.4, "alpha": 0.8},
            )  # fmt: skip
