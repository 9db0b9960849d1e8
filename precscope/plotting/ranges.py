"""Where the values of tensors lie: the range map of all sites of a role, and the histogram of one site."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..formats import FloatFormat, get_format
from ..profiles import Profile
from ..reporting.alike import pattern
from ..reporting.numbers import number, percent, plural, shorten
from ..reporting.rows import SiteRow, site_rows
from . import canvas
from .canvas import FAINT, GREY, HATCHES, INK, REGIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DRAWN = ("fp16", "bf16", "e4m3", "e5m2")
_CHOSEN = "#0a5ea8"
_ABOVE = 62  # points from the map to its title, with the bars of the formats between
_WORDS = {
    "normal": "kept", "subnormal": "subnormal: fewer bits", "flushed": "flushed to zero", "overflow": "overflow"
}  # fmt: skip


def range_map(
    profile: Profile | str | Path,
    role: str = "output",
    ax: Axes | None = None,
    *,
    format: str | FloatFormat = "fp16",
    scale_exponent: int = 0,
    most: int = 120,
) -> Axes:
    """Sites of one role by binades as a heat map: darker for a larger share of the values (logarithmic), coloured by
    what `format` does to them after a scale of 2^scale_exponent; bars above show where the formats begin and end.

    most: rows at most; of more sites those whose names differ in numbers alone share a row, and then those with the
    largest values stay. Raises UsageError for an unknown role, for a role without statistics, and where matplotlib is
    missing.
    """
    canvas.pyplot()
    recorded = canvas.of_roles(canvas.load(profile), role)
    sites, fmt = _at_most(recorded, most), get_format(format)
    filled = [s for s in sites if s.histogram]
    lo = min([s.lo - 1 for s in filled] + [-28 - scale_exponent])
    hi = max([s.lo + len(s.histogram) + 1 for s in filled] + [18 - scale_exponent])
    ax = canvas.one(ax, size=(9, 1.9 + 0.16 * len(sites)))
    ax.imshow(_image(sites, fmt, scale_exponent, lo, hi), extent=(lo, hi, len(sites), 0), aspect="auto",
              interpolation="nearest")  # fmt: skip
    ax.hlines(np.arange(1, len(sites)), lo, hi, color="white", lw=0.6)
    known = [(i, np.log2(s.amax)) for i, s in enumerate(sites) if s.amax > 0]
    if known:
        rows, logs = np.asarray(known).T
        ax.vlines(logs, rows + 0.15, rows + 0.85, color=INK, lw=1.2)
    _draw_formats(ax, lo, hi, fmt, scale_exponent)
    canvas.name_rows(ax, [f"{s.module or '(root)'}#{s.call}" if s.call else s.module for s in sites])
    ax.set_xlim(lo, hi)
    scaled = f" after a scale of {canvas.power(scale_exponent)}" if scale_exponent else ""
    ax.set_xlabel(f"magnitude of the recorded values (binade); darker: more of them; colours: {fmt}{scaled}")
    canvas.power_ticks(ax, lo, hi)
    shown = "" if len(sites) == len(recorded) else f", in {len(sites)} rows"
    canvas.title(ax, f"{role.replace('_', ' ')} of {plural(len(recorded), 'site')}{shown}", pad=_ABOVE)
    _key(ax, sites, fmt, scale_exponent)
    return ax


def histogram(
    profile: Profile | str | Path,
    site: str,
    ax: Axes | None = None,
    *,
    format: str | FloatFormat = "fp16",
    scale_exponent: int = 0,
) -> Axes:
    """Exponent histogram of one site, named as in the report ("blocks.0.fc1.output", "#1" behind the module for its
    second call). Raises UsageError for an unknown site (with the nearest names), and where matplotlib is missing."""
    canvas.pyplot()
    sites = {s.name: s for s in site_rows(canvas.load(profile))[1]}
    if site not in sites:
        raise canvas.unknown("site", site, list(sites))
    row, fmt = sites[site], get_format(format)
    ax = canvas.one(ax, size=(6.4, 3.4))
    exponents = row.lo + np.arange(len(row.histogram))
    total = max(sum(row.histogram), 1)
    regions = np.array([region(row, fmt, scale_exponent, int(e)) for e in exponents], dtype=object)
    for name, color in REGIONS.items():
        here = regions == name
        if here.any():
            shares = np.asarray(row.histogram)[here] / total
            ax.bar(
                exponents[here] + 0.5, shares, width=0.9, color=color, hatch=HATCHES[name], edgecolor="white", lw=0.3,
                label=f"{_WORDS[name]}: {percent(shares.sum())}%",
            )  # fmt: skip
    _draw_ends(ax, exponents, fmt, scale_exponent)
    canvas.logarithmic(ax, "y")
    if len(exponents):
        canvas.power_ticks(ax, int(exponents[0]), int(exponents[-1]) + 1)
    scaled = f" after a scale of {canvas.power(scale_exponent)}" if scale_exponent else ""
    ax.set_xlabel(f"magnitude of the recorded values (binade); colours: {fmt}{scaled}")
    ax.set_ylabel("share of the non-zero values")
    said = f"{shorten(site, 48)}: {plural(row.count, 'value')}, largest {number(row.amax)}"
    if row.nonfinite:
        said += f", {percent(row.nonfinite / row.count)}% not finite"
    canvas.title(ax, said, pad=14 if ax.texts else None)
    canvas.legend(ax, loc="upper left")
    return ax


def region(site: SiteRow, fmt: FloatFormat, k: int, binade: int) -> str:
    """What the format does to a binade of a site, as the page colours it. The format's top binade overflows in part:
    it counts where no value lies beyond it."""
    scaled = binade + k
    if scaled > fmt.emax:
        return "overflow"
    if scaled == fmt.emax and math.frexp(site.amax)[1] - 1 == binade and fmt.overflows(math.ldexp(site.amax, k)):
        return "overflow"
    if scaled < fmt.emin - fmt.precision - 1:
        return "flushed"
    return "subnormal" if scaled < fmt.emin else "normal"


def _image(sites: Sequence[SiteRow], fmt: FloatFormat, k: int, lo: int, hi: int) -> np.ndarray:
    """RGBA, float64 [sites, binades, 4]: the colour says what becomes of a binade, the depth how full it is."""
    image = np.zeros((len(sites), hi - lo, 4))
    for i, site in enumerate(sites):
        total = sum(site.histogram)
        for j, count in enumerate(site.histogram):
            if count:
                depth = min(1.0, max(0.0, 1 + np.log10(count / total) / 6))
                what = region(site, fmt, k, site.lo + j)
                least = 0.6 if what == "overflow" else 0.13  # a single value that overflows is to be seen
                image[i, site.lo + j - lo] = (*_rgb(REGIONS[what]), least + (1 - least) * depth**1.4)
    return image


def _at_most(sites: list[SiteRow], most: int) -> list[SiteRow]:
    """At most so many rows: siblings merged first, then those with the largest values, in the model's order."""
    if len(sites) <= most:
        return sites
    groups: dict[tuple[str, int], list[SiteRow]] = {}
    for site in sites:
        groups.setdefault((pattern(site.module), site.call), []).append(site)
    merged = [_sum(members, name) if len(members) > 1 else members[0] for (name, _), members in groups.items()]
    kept = sorted(range(len(merged)), key=lambda i: -merged[i].amax)[:most]
    return [merged[i] for i in sorted(kept)]


def _sum(members: list[SiteRow], name: str) -> SiteRow:
    filled = [m for m in members if m.histogram]
    lo = min((m.lo for m in filled), default=0)
    counts = np.zeros(max((m.lo + len(m.histogram) for m in filled), default=0) - lo, np.int64)
    for m in filled:
        counts[m.lo - lo :][: len(m.histogram)] += m.histogram
    amax = max(m.amax for m in members)
    return replace(members[0], module=name, lo=lo, histogram=tuple(counts.tolist()), amax=amax)


def _draw_formats(ax: Axes, lo: int, hi: int, chosen: FloatFormat, k: int) -> None:
    """Bars above the map: thin over subnormals, thick over the normal range; the chosen format's ends go through."""
    names = [*_DRAWN, *([chosen.name] if chosen.name not in _DRAWN else [])]
    for i, name in enumerate(names):
        fmt = get_format(name)
        offset = 7 + 12 * (len(names) - 1 - i)  # points above the map, however high that is
        place = {"xycoords": ax.get_xaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
        color = _CHOSEN if name == chosen.name else FAINT
        ends = [fmt.emin - fmt.precision - k, fmt.emin - k, float(np.log2(fmt.max)) - k]
        a, b, c = (min(max(e, lo), hi) for e in ends)
        for start, stop, width in ((a, b, 1.2), (b, c, 4.0)):
            if stop > start:
                _bar(ax, start, stop, offset, color, width)
        ax.annotate(f"{name} ", (lo, 1), (-4, offset), ha="right", va="center", fontsize=7, color=color, **place)
    for edge, dash in _edges(chosen, k):
        if lo < edge < hi:
            ax.axvline(edge, color=GREY, lw=0.8, ls=dash)


def _bar(ax: Axes, start: float, stop: float, offset: float, color: str, width: float) -> None:
    from matplotlib.transforms import ScaledTranslation

    up = ScaledTranslation(0, offset / 72, ax.figure.dpi_scale_trans)
    ax.plot([start, stop], [1, 1], color=color, lw=width, transform=ax.get_xaxis_transform() + up, clip_on=False,
            solid_capstyle="butt")  # fmt: skip


def _edges(fmt: FloatFormat, k: int) -> tuple[tuple[float, str], ...]:
    """(exponent, dash) of the largest finite value, the smallest normal one and the smallest subnormal one."""
    return (float(np.log2(fmt.max)) - k, "-"), (fmt.emin - k, "--"), (fmt.emin - fmt.precision - k, ":")


def _draw_ends(ax: Axes, exponents: np.ndarray, fmt: FloatFormat, k: int) -> None:
    for name, (at, dash) in zip(("largest", "smallest normal", "smallest"), _edges(fmt, k), strict=True):
        if len(exponents) and exponents[0] - 8 <= at <= exponents[-1] + 9:
            ax.axvline(at, color=GREY, lw=0.8, ls=dash)
            ax.text(at, 1.01, f"{fmt} {name}", transform=ax.get_xaxis_transform(), fontsize=6.5, ha="center")


def _key(ax: Axes, sites: Sequence[SiteRow], fmt: FloatFormat, k: int) -> None:
    """What the colours mean, of those that occur."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.transforms import ScaledTranslation

    seen = {region(s, fmt, k, s.lo + j) for s in sites for j, n in enumerate(s.histogram) if n}
    handles: list[Any] = [Patch(color=c, label=_WORDS[n]) for n, c in REGIONS.items() if n in seen]
    handles.append(Line2D([], [], color=INK, lw=1.2, marker="|", ls="", label="largest magnitude"))
    at = ax.transAxes + ScaledTranslation(0, (_ABOVE - 6) / 72, ax.figure.dpi_scale_trans)
    canvas.legend(ax, handles=handles, handlelength=1.2, ncols=5, columnspacing=1.2, loc="lower right",
                  bbox_to_anchor=(1, 1), bbox_transform=at, borderaxespad=0)  # fmt: skip


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]
