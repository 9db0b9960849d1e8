"""A plan: which modules run in what, and what that gains."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..plans import PrecisionPlan
from ..profiles import Profile
from ..reporting.beside import beyond_autocast
from ..reporting.numbers import number, percent, plural
from ..reporting.rows import PlanRow, group_rows, plan_rows
from . import canvas
from .canvas import FORMATS, GREY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_WHY = 82
_OUTLIER = 3.0  # a bar so many times as long as fp32's is cut: formats that are emulated here take 30 times as long


def plan(
    plan: PrecisionPlan | str | Path, profile: Profile | str | Path | None = None, *, most: int = 60, ax: Any = None
) -> Any:
    """What each module computes in, with its share of the FLOPs and the first reason; beside it, where the plan knows
    them, the times of a step beside fp32 and plain autocast, predicted and measured.

    profile: the run that the plan was made from, for types and FLOPs; without it the plan's own entries are drawn, each
    as large as the number of its modules. Modules whose names differ in one number share a row. most: rows at most. ax:
    one Axes takes the modules alone. Returns an array of Axes. Raises PlanError, RunDirectoryError, and UsageError
    where matplotlib is missing.
    """
    canvas.pyplot()
    chosen = plan if isinstance(plan, PrecisionPlan) else PrecisionPlan.load(plan)
    rows = _rows(chosen, None if profile is None else canvas.load(profile))
    groups = group_rows(rows)
    counted = any(r.flops_share for r in rows)
    shown = groups if len(groups) <= most else _largest(groups, most)
    times = _times(chosen)
    ratios = (max(0.16 * len(shown), 1.2), 0.22 * len(times) + 0.5)[: 1 + bool(times)]
    axes = canvas.several(
        ax, len(ratios), size=(9.5, 1.5 + sum(ratios)), nrows=len(ratios), height_ratios=ratios,
    )  # fmt: skip
    _draw_modules(axes[0], shown, counted)
    used = dict.fromkeys(r.compute for r in rows)
    total = {fmt: sum(_weight(r, counted) for r in rows if r.compute == fmt) for fmt in used}
    whole = sum(total.values()) or 1
    parts = ", ".join(f"{fmt} {percent(x / whole)}%" for fmt, x in sorted(total.items(), key=lambda item: -item[1]))
    left = "" if shown is groups else f"; {len(groups) - len(shown)} smaller rows left out"
    what = "FLOPs" if counted else "modules"
    canvas.title(axes[0], f"Plan ({chosen.status}), {plural(len(rows), 'module')}; {what}: {parts}{left}", pad=18)
    if len(axes) > 1:
        _draw_times(axes[1], times)
    return canvas.returned(axes)


def _rows(chosen: PrecisionPlan, profile: Profile | None) -> tuple[PlanRow, ...]:
    if profile is not None:
        return plan_rows(profile, chosen)
    named = {"(all others)": chosen.default, **chosen.modules}
    return tuple(
        PlanRow(name, "", p.compute, p.params, p.policy, None, None, tuple(map(str, p.reasons)))
        for name, p in named.items()
    )


def _weight(row: PlanRow, counted: bool) -> float:
    return (row.flops_share or 0.0) if counted else row.count


def _largest(groups: tuple[PlanRow, ...], most: int) -> tuple[PlanRow, ...]:
    """The rows that matter most: those kept high, then those with the most FLOPs; in their order."""
    ranked = sorted(range(len(groups)), key=lambda i: (groups[i].low, -(groups[i].flops_share or 0.0)))
    return tuple(groups[i] for i in sorted(ranked[:most]))


def _draw_modules(ax: Axes, rows: tuple[PlanRow, ...], counted: bool) -> None:
    weights = [_weight(r, counted) for r in rows]
    largest = max([*weights, 0.0]) or 1.0
    for i, (row, weight) in enumerate(zip(rows, weights, strict=True)):
        color, hatch = FORMATS[row.compute]
        style: dict[str, Any] = {"height": 0.72, "color": color, "hatch": hatch, "edgecolor": "white", "lw": 0.3}
        ax.barh(
            i + 0.5, 0.045 * largest, left=-0.06 * largest, **style
        )  # a swatch: a row without FLOPs has a colour, too
        ax.barh(i + 0.5, weight, **style)
        why = row.reasons[0].removeprefix(f"{row.compute}: ") if row.reasons else ""
        why = why if why.startswith(row.compute) else f"{row.compute}: {why}" if why else row.compute
        ax.text(1.04 * largest, i + 0.5, shorten_end(why, _WHY), fontsize=6.5, va="center", parse_math=False)
    ax.set_xlim(-0.065 * largest, 2.5 * largest)
    canvas.name_rows(ax, [r.label or r.module for r in rows])
    ticks = [t for t in ax.get_xticks() if 0 <= t <= largest * 1.02]
    ax.set_xticks(ticks, [f"{100 * t:g}%" if counted else f"{t:g}" for t in ticks])
    ax.set_xlabel("share of the FLOPs" if counted else "modules", loc="left")
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    _key(ax, rows)


def _key(ax: Axes, rows: tuple[PlanRow, ...]) -> None:
    from matplotlib.patches import Patch

    used = [fmt for fmt in FORMATS if any(r.compute == fmt for r in rows)]
    handles = [Patch(facecolor=FORMATS[f][0], hatch=FORMATS[f][1], edgecolor="white", label=f) for f in used]
    canvas.legend(ax, handles=handles, loc="lower left", bbox_to_anchor=(0, 1), ncols=6, borderaxespad=0)


def _times(chosen: PrecisionPlan) -> list[tuple[str, str, float]]:
    """(what, how it is known, ms per step): predicted for each format throughout and the plan, then as measured."""
    found = []
    main = chosen.made_from.get("main")
    beyond = beyond_autocast(chosen.made_from)  # then the plan among `step_ms` is the one that this was made from
    for key, how in (("predicted_ms", "predicted"), ("step_ms", "measured")):
        for name, ms in (chosen.made_from.get(key) or {}).items():
            if isinstance(ms, int | float) and not (name == "plan" and key == "step_ms" and beyond):
                word = f"{main} autocast" if name == "main" else f"{name} throughout" if name != "plan" else "the plan"
                found.append((word, how, float(ms)))
    for key, word in (("ms_autocast", "under autocast"), ("ms_cast", "the plan")):
        if isinstance(beyond.get(key), int | float):
            found.append((word, "measured in turn", float(beyond[key])))
    return found


def _draw_times(ax: Axes, times: list[tuple[str, str, float]]) -> None:
    usual = [ms for what, _, ms in times if what in ("the plan", "fp32 throughout")]
    largest = min(max(ms for _, _, ms in times), _OUTLIER * max(usual, default=float("inf")))
    for i, (_, how, ms) in enumerate(times):
        color, hatch = ("#3468a4", "") if how.startswith("measured") else ("#9db8d6", "///")
        ax.barh(i + 0.5, min(ms, largest), height=0.72, color=color, hatch=hatch, edgecolor="white", lw=0.3)
        cut = " (bar cut)" if ms > largest else ""
        ax.text(min(ms, largest) + 0.01 * largest, i + 0.5, f"{number(ms)} ms{cut}", fontsize=7, va="center")
    canvas.name_rows(ax, [f"{what} ({how})" for what, how, _ in times])
    ax.set_xlim(0, largest * 1.25)
    ax.set_xlabel("time per step (ms); predicted times are those of the modules alone")
    ax.grid(axis="x", alpha=0.25)
    ax.axhline(next((i for i, t in enumerate(times) if t[1].startswith("measured")), 0), color=GREY, lw=0.6)


def shorten_end(text: str, width: int) -> str:
    """`text` within `width` characters, cut at its end."""
    return text if len(text) <= width else text[: width - 1] + "…"
