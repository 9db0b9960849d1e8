"""What a notebook shows of a Profile and of a PrecisionPlan: short tables without script or style sheet.

They take the notebook's own colours and fonts (light or dark), and add half-transparent grey and, beside its name, one
swatch for each format. Everything that comes from a run is escaped.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

import numpy as np

from ..advice.loss_scale import largest_scale
from ..formats import FloatFormat, get_format
from ..plans.table import confirmation_of, plan_lines
from .material import FORWARD, GRADIENTS, WIDE, head_room, overall, site_name
from .numbers import fixed, number, percent, plural, power_of_two, raised
from .text import clean

if TYPE_CHECKING:
    import pandas as pd

    from ..plans import PrecisionPlan
    from ..profiles import Profile

_ASKED = ("fp16", "bf16", "e4m3", "e5m2")
_ROWS = 40
_WHOLE = 40  # characters of a cell that is not broken into lines
_SWATCHES = {
    "fp32": "#7a8694", "tf32": "#9aa5b1", "bf16": "#2a8fd0", "fp16": "#de9c00", "e4m3": "#00a06f", "e5m2": "#b868ab"
}  # fmt: skip
_LINE = "border:0;border-bottom:1px solid rgba(128,128,128,.35);padding:.25em .8em .25em 0;vertical-align:top;"
_TABLE = "border-collapse:collapse;border:0;margin:.4em 0;background:transparent;font-size:.95em;"
_QUIET = "opacity:.75;font-size:.9em;"


def profile_html(profile: Profile) -> str:
    """A run in a few lines: what was recorded, and what each low format would do to it."""
    steps = profile.steps
    said = [f"{plural(len(profile.modules), 'module')}", plural(len(profile.merged()[0]), "site")]
    said.append(f"{plural(len(steps), 'step')} recorded, {steps[0]} to {steps[-1]}" if steps else "no step recorded")
    said += [f"in {profile.run['precision']}"] if profile.run.get("precision") else []
    if profile.shadow is not None:
        said.append(f"{plural(len(profile.shadow.steps), 'shadow step')}")
    name = str(profile.run.get("model") or profile.path.name)
    lines = [_heading(f"{name}: {profile.path}", " · ".join(said))]
    lines += [_note(f"{plural(len(profile.damaged), 'damaged part')} left out")] if profile.damaged else []
    rows = [row for fmt in _ASKED if (row := _asked(profile, get_format(fmt)))] if profile.sites else []
    if rows:
        head = ("format", "inputs, outputs, weights", "lowest SQNR", "gradients flushed to zero")
        lines.append(_table(head, rows))
        lines.append(_note("profile.ask(format, scale_exponent=k) answers for every tensor; ps.report writes it all"))
    return _whole(lines)


def plan_html(plan: PrecisionPlan) -> str:
    """A plan in a few lines: what it is, and a row per group of modules with the first reason."""
    said = [f"default {plan.default}", *(f"{n} × {fmt}" for fmt, n in plan.counts().most_common())]
    scale = plan.loss_scale.get("initial")
    said += [f"loss scale {raised(power_of_two(scale))}"] if scale else []
    said += [f"from step {p.from_step}: {p.precision or (p.plan and p.plan.default)}" for p in plan.phases]
    lines = [_heading(f"precision plan ({plan.status})", " · ".join(said))]
    lines += [_note(confirmation_of(plan.confirmed))] if plan.confirmed else []
    cells = plan_lines(plan)
    lines.append(_table(("modules", "precision", "why"), [(m, _Format(p), why) for m, p, why in cells[:_ROWS]]))
    if len(cells) > _ROWS:
        lines.append(_note(f"and {plural(len(cells) - _ROWS, 'more row')}: print(plan) shows all"))
    return _whole(lines)


class _Format(str):
    """A cell that begins with a format's name, and gets its swatch."""


def _asked(profile: Profile, fmt: FloatFormat) -> tuple[str, ...]:
    """The row of a format; () where no forward tensor was recorded. 8-bit tensors carry a scale of their own."""
    forward, gradients = (_answers(profile, fmt, roles) for roles in (FORWARD, GRADIENTS))
    if not len(forward):
        return ()
    flushed = overall(gradients, "flushed")
    how = "each scaled" if fmt.bits <= 8 else "without a loss scale"
    said = "–" if flushed is None else "none" if flushed == 0 else f"{percent(flushed)}% {how}"
    worst = forward[forward.sqnr_db < float("inf")].nsmallest(1, "sqnr_db")
    sqnr = f"{fixed(worst.sqnr_db.iloc[0])} dB" if len(worst) else "exact"
    return _Format(fmt.name), _fit(forward, fmt), sqnr, said


def _answers(profile: Profile, fmt: FloatFormat, roles: Sequence[str]) -> pd.DataFrame:
    """Profile.ask; of an 8-bit format each tensor with the largest scale that it has room for."""
    frame = profile.ask(fmt, roles=roles)
    if fmt.bits > 8 or not len(frame):
        return frame
    sites, table = profile.merged()
    table = table.take([i for i, site in enumerate(sites) if site.role in roles])
    scale = np.asarray([largest_scale(amax, fmt) if amax > 0 else 0 for amax in table.amax], np.int64)
    answers = table.ask(fmt, scale_exponent=scale)
    return frame.assign(**{name: answers[name] for name in ("flushed", "sqnr_db", "overflow_lo", "overflow_hi")})


def _fit(forward: pd.DataFrame, fmt: FloatFormat) -> str:
    """Whether the forward tensors fit the format's range."""
    beyond = int((forward.overflow_hi > 0).sum())
    largest = forward.loc[forward.amax.idxmax()]
    if fmt.bits <= 8:
        return f"{plural(len(forward), 'tensor')}, each scaled to its own largest value"
    if beyond:
        worst = f"{site_name(largest)} reaches {number(largest.amax)}"
        return f"{beyond} of {plural(len(forward), 'tensor')} overflow; {worst}"
    if fmt.emax >= WIDE or not largest.amax > 0:
        return f"all {plural(len(forward), 'tensor')} fit"
    room = fixed(head_room(fmt, largest.amax))
    return f"all {plural(len(forward), 'tensor')} fit; {room} binades left at {site_name(largest)}"


def _heading(first: str, second: str) -> str:
    return f'<div><strong>{_text(first)}</strong></div><div style="{_QUIET}">{_text(second)}</div>'


def _note(text: str) -> str:
    return f'<div style="{_QUIET}">{_text(text)}</div>'


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = "".join(f'<th scope="col" style="{_LINE}text-align:left;">{_text(h)}</th>' for h in head)
    body = "".join("<tr>" + "".join(map(_cell, row)) + "</tr>" for row in rows)
    return f'<table style="{_TABLE}"><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>'


def _cell(value: str) -> str:
    swatch = ""
    if isinstance(value, _Format):
        color = _SWATCHES.get(value.split(" ")[0], "#7a8694")
        swatch = (
            f'<span style="display:inline-block;width:.7em;height:.7em;margin-right:.4em;background:{color};"></span>'
        )
    keep = "white-space:nowrap;" if len(value) <= _WHOLE else ""
    return f'<td style="{_LINE}text-align:left;{keep}">{swatch}{_text(value)}</td>'


def _whole(lines: Iterable[str]) -> str:
    return f'<div style="line-height:1.45;">{"".join(lines)}</div>'


def _text(text: str) -> str:
    return escape(clean(str(text)))
