"""What all figures share: how matplotlib is reached, Axes to draw on, colours, dashes and names."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import UsageError, nearest
from ..profiles import Profile
from ..reporting.numbers import raised, shorten
from ..reporting.rows import SiteRow, site_rows
from ..reporting.text import clean
from ..sites import Role

if TYPE_CHECKING:
    from matplotlib.axes import Axes

INK, GREY, FAINT = "#1b2027", "#56606c", "#8a94a0"
REGIONS = {"normal": "#3468a4", "subnormal": "#de9c00", "flushed": "#a84a98", "overflow": "#d14406"}
"""What a format does to a value; the colours of the page. They differ for the colour-blind, and in brightness."""
HATCHES = {"normal": "", "subnormal": "///", "flushed": "xxx", "overflow": "..."}
LINES = ((INK, "-"), ("#c77700", "--"), ("#2a8fd0", ":"), ("#00875f", "-"), ("#a8559a", "-."), ("#d1490a", "--"))
"""(colour, dash) of the first, second, ... line."""
FORMATS = {
    "fp32": (INK, ""), "tf32": ("#6b7683", ""), "bf16": ("#2a8fd0", "///"), "fp16": ("#e0a030", "..."),
    "e4m3": ("#00875f", "xxx"), "e5m2": ("#a8559a", "\\\\\\"),
}  # fmt: skip
"""(colour, hatching) of a compute format."""
NAME_WIDTH = 34
_MISSING = "figures need matplotlib: pip install 'precscope[figures]' (or matplotlib)"


def pyplot() -> Any:
    """matplotlib.pyplot. Raises UsageError where it is not installed, with what to install."""
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise UsageError(_MISSING) from error
    return plt


def one(ax: Axes | None, *, size: tuple[float, float]) -> Axes:
    """`ax`, or the only one of a new figure. size: inches."""
    plt = pyplot()
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def several(ax: Any, n: int, *, size: tuple[float, float], **layout: Any) -> list[Axes]:
    """The Axes of a figure of n panels: those given, one alone or at most n of them, else those of a new figure."""
    plt = pyplot()
    if ax is not None:
        return list(np.ravel(np.asarray(ax, dtype=object)))[:n]
    return list(np.ravel(plt.subplots(figsize=size, layout="constrained", **layout)[1]))


def returned(axes: Sequence[Axes]) -> Any:
    """An array of Axes [panels], as matplotlib gives them."""
    made = np.empty(len(axes), dtype=object)
    made[:] = list(axes)
    return made


def load(profile: Profile | str | Path) -> Profile:
    """The profile, read where a run directory is given."""
    return profile if isinstance(profile, Profile) else Profile.load(profile)


def name_rows(ax: Axes, names: Sequence[str], *, width: int = NAME_WIDTH) -> None:
    """Names at the left of rows 0, 1, ... from the top, each in the middle of its row; nothing in them is markup."""
    short = [shorten(clean(n) or "(root)", width) for n in names]
    ax.set_yticks(np.arange(len(names)) + 0.5, short, fontsize=7, parse_math=False)
    ax.tick_params(axis="y", length=0)
    ax.set_ylim(max(len(names), 1), 0)


def steps(ax: Axes) -> None:
    """The horizontal axis counts steps."""
    from matplotlib.ticker import MaxNLocator

    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("step")


def title(ax: Axes, text: str, *, pad: float | None = None) -> None:
    """A title at the left, in which nothing is markup."""
    ax.set_title(clean(text), loc="left", fontsize=9.5, pad=pad, parse_math=False)


def plain(name: str) -> str:
    """A name as the label of a line: matplotlib leaves labels that begin with "_" out of a legend."""
    shown = clean(name)
    return f" {shown}" if shown.startswith("_") else shown


def legend(ax: Axes, **options: Any) -> None:
    """A legend where there is something to name; nothing in it is markup."""
    if ax.get_legend_handles_labels()[0] or "handles" in options:
        for text in ax.legend(**{"frameon": False, "fontsize": 7.5, **options}).get_texts():
            text.set_parse_math(False)


def of_roles(profile: Profile, role: str | Sequence[str]) -> list[SiteRow]:
    """The recorded sites of one role, or of several. Raises UsageError for unknown roles, and where there is none."""
    roles, known = [role] if isinstance(role, str) else list(role), [r.value for r in Role]
    for word in roles:
        if word not in known:
            raise UsageError(f"unknown role {word!r}; roles are {', '.join(known)}")
    sites = [s for s in site_rows(profile)[1] if s.role in roles]
    if not sites:
        raise UsageError(
            f"{profile.path} holds no statistics of role {' or '.join(roles)!r}: record with hooks on it, or choose "
            "another"
        )
    return sites


def unknown(what: str, name: str, names: Sequence[str]) -> UsageError:
    """The error for a name that is not there, with the nearest ones."""
    hint = nearest(name, names)
    return UsageError(f"no recorded {what} {name!r}" + (f" (did you mean {hint}?)" if hint else ""))


def power_ticks(ax: Axes, lo: int, hi: int, *, axis: str = "x") -> None:
    """Ticks 2^e of an axis that holds exponents."""
    every = next(e for e in (1, 2, 5, 10, 20, 40, 80) if (hi - lo) / e <= 9)
    ticks = [e for e in range(lo, hi + 1) if e % every == 0]
    (ax.set_xticks if axis == "x" else ax.set_yticks)(ticks, [power(e) for e in ticks])


def logarithmic(ax: Axes, axis: str, *, base: int = 10) -> None:
    """A logarithmic axis whose ticks are plain text: mathematical typesetting takes a second a figure."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    (ax.set_xscale if axis == "x" else ax.set_yscale)("log", base=base)
    which = ax.xaxis if axis == "x" else ax.yaxis
    which.set_major_formatter(FuncFormatter(lambda x, _: power(round(math.log(x, base)), base) if x > 0 else ""))
    which.set_minor_formatter(NullFormatter())


def power(exponent: int, base: int = 2) -> str:
    """2^-14 with its exponent raised."""
    return raised(f"2^{exponent}").replace("2", str(base), 1)
