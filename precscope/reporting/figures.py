"""Static figures for papers and slides. Each returns the matplotlib Axes it drew on; nothing is saved or shown.

ax = figures.range_map(Profile.load("runs/a"), role="output"); ax.figure.savefig("ranges.svg")
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError, nearest
from ..formats import FloatFormat, get_format
from ..profiles import Profile
from ..sites import Role
from .numbers import number, shorten
from .rows import SiteRow, curve, site_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMATS = ("fp16", "bf16", "e4m3", "e5m2")
_COLORS = {"normal": "#3468a4", "subnormal": "#de9c00", "flushed": "#a84a98", "overflow": "#d14406"}
_LINES = (("#1b2027", "-"), ("#c77700", "--"), ("#2a8fd0", ":"), ("#00875f", "-"), ("#a8559a", "-."), ("#d1490a", "--"))


def range_map(
    profile: Profile | str | Path,
    role: str = "output",
    ax: Axes | None = None,
    *,
    format: str | FloatFormat = "fp16",
    scale_exponent: int = 0,
) -> Axes:
    """Sites of one role by binades as a heat map: darker for a larger share of the values (logarithmic), coloured by
    what `format` does to them after a scale of 2^scale_exponent; bars above show where the formats begin and end.

    Raises UsageError for an unknown role, for a role without statistics, and where matplotlib is missing.
    """
    plt = _pyplot()
    sites = _of_role(_load(profile), role)
    fmt = get_format(format)
    filled = [s for s in sites if s.histogram]
    lo = min([s.lo - 1 for s in filled] + [-28])
    hi = max([s.lo + len(s.histogram) + 1 for s in filled] + [18])
    image = np.zeros((len(sites), hi - lo, 4))
    for i, site in enumerate(sites):
        total = sum(site.histogram)
        for j, count in enumerate(site.histogram):
            if count:
                depth = min(1.0, max(0.0, 1 + np.log10(count / total) / 6))
                color = _rgb(_COLORS[_region(site, fmt, scale_exponent, site.lo + j)])
                image[i, site.lo + j - lo] = (*color, 0.13 + 0.87 * depth**1.4)
    if ax is None:
        ax = plt.subplots(figsize=(9, 1.6 + 0.16 * len(sites)), layout="constrained")[1]
    ax.imshow(image, extent=(lo, hi, len(sites), 0), aspect="auto", interpolation="nearest")
    ax.hlines(np.arange(1, len(sites)), lo, hi, color="white", lw=0.6)
    known = [(i, np.log2(s.amax)) for i, s in enumerate(sites) if s.amax > 0]
    if known:
        rows, logs = np.asarray(known).T
        ax.vlines(logs, rows + 0.15, rows + 0.85, color="#1b2027", lw=1.2, label="largest magnitude")
    _draw_formats(ax, lo, hi, fmt, scale_exponent)
    names = [s.module or "(root)" for s in sites]
    ax.set_yticks(np.arange(len(sites)) + 0.5, [shorten(n, 34) for n in names], fontsize=7, parse_math=False)
    ax.set_xlim(lo, hi)
    ax.set_xlabel(f"binade of the recorded values; colours: {fmt} at scale $2^{{{scale_exponent}}}$")
    ticks = [e for e in range(lo, hi + 1) if e % 10 == 0]
    ax.set_xticks(ticks, [f"$2^{{{e}}}$" for e in ticks])
    ax.set_title(f"{role.replace('_', ' ')} of {len(sites)} sites", loc="left", fontsize=10, pad=62)
    return ax


def loss_curves(runs: Sequence[str | Path], ax: Axes | None = None) -> Axes:
    """Training loss by step of several run directories. Raises UsageError without runs or without matplotlib."""
    plt = _pyplot()
    if isinstance(runs, str | Path):
        runs = [runs]
    if not len(runs):
        raise UsageError("loss_curves needs at least one run directory, for example runs/fp32")
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 3.6), layout="constrained")[1]
    for i, path in enumerate(runs):
        one = curve(path)
        losses = [np.nan if x is None else x for x in one.losses]
        color, dash = _LINES[i % len(_LINES)]
        ax.plot(one.steps, losses, color=color, ls=dash, lw=1.3, label=f"{one.run} ({one.precision})")
    ax.set_xlabel("step")
    ax.set_ylabel("training loss")
    ax.grid(alpha=0.25)
    ax.legend(frameon=False)
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
    plt = _pyplot()
    sites = {s.name: s for s in site_rows(_load(profile))[1]}
    if site not in sites:
        hint = nearest(site, sites)
        raise UsageError(f"no recorded site {site!r}" + (f" (did you mean {hint}?)" if hint else ""))
    row, fmt = sites[site], get_format(format)
    if ax is None:
        ax = plt.subplots(figsize=(6.4, 3.2), layout="constrained")[1]
    exponents = row.lo + np.arange(len(row.histogram))
    colors = [_COLORS[_region(row, fmt, scale_exponent, int(e))] for e in exponents]
    ax.bar(exponents + 0.5, np.asarray(row.histogram) / max(sum(row.histogram), 1), width=0.9, color=colors)
    for name, edge in (("smallest normal", fmt.emin), ("max", float(np.log2(fmt.max)))):
        at = edge - scale_exponent
        if len(exponents) and exponents[0] - 8 <= at <= exponents[-1] + 9:
            ax.axvline(at, color="#56606c", lw=0.8, ls="--")
            ax.text(at, 1.01, f"{fmt} {name}", transform=ax.get_xaxis_transform(), fontsize=7, ha="center")
    ax.set_yscale("log")
    ax.set_xlabel("binade")
    ax.set_ylabel("share of the non-zero values")
    ax.set_title(f"{shorten(site, 60)}, amax {number(row.amax)}", loc="left", fontsize=9, pad=14, parse_math=False)
    return ax


def _pyplot() -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError("figures need matplotlib: pip install 'precscope[figures]' (or matplotlib)") from error
    return plt


def _load(profile: Profile | str | Path) -> Profile:
    return profile if isinstance(profile, Profile) else Profile.load(profile)


def _of_role(profile: Profile, role: str) -> list[SiteRow]:
    known = [r.value for r in Role]
    if role not in known:
        raise UsageError(f"unknown role {role!r}; roles are {', '.join(known)}")
    sites = [s for s in site_rows(profile)[1] if s.role == role]
    if not sites:
        raise UsageError(
            f"{profile.path} holds no statistics of role {role!r}: record with hooks on it, or choose another"
        )
    return sites


def _region(site: SiteRow, fmt: FloatFormat, k: int, binade: int) -> str:
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


def _draw_formats(ax: Axes, lo: int, hi: int, chosen: FloatFormat, k: int) -> None:
    """Bars above the map: thin over subnormals, thick over the normal range; the chosen format's ends go through."""
    names = [*FORMATS, *([chosen.name] if chosen.name not in FORMATS else [])]
    for i, name in enumerate(names):
        fmt = get_format(name)
        y = 1.02 + 0.12 * (len(names) - 1 - i) / max(len(names), 4)
        style: dict[str, Any] = {"transform": ax.get_xaxis_transform(), "clip_on": False, "solid_capstyle": "butt"}
        color = "#0a5ea8" if name == chosen.name else "#8a94a0"
        ends = [fmt.emin - fmt.precision - k, fmt.emin - k, float(np.log2(fmt.max)) - k]
        a, b, c = (min(max(e, lo), hi) for e in ends)
        ax.plot([a, b], [y, y], color=color, lw=1.2, **style)
        ax.plot([b, c], [y, y], color=color, lw=4, **style)
        ax.text(lo, y, f"{name} ", transform=ax.get_xaxis_transform(), ha="right", va="center", fontsize=7, color=color)
    for edge, dash in (
        (np.log2(chosen.max) - k, "-"),
        (chosen.emin - k, "--"),
        (chosen.emin - chosen.precision - k, ":"),
    ):
        if lo < edge < hi:
            ax.axvline(float(edge), color="#56606c", lw=0.8, ls=dash)


def _rgb(color: str) -> tuple[float, float, float]:
    return tuple(int(color[i : i + 2], 16) / 255 for i in (1, 3, 5))  # type: ignore[return-value]
