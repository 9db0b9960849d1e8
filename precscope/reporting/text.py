"""Tables and verdicts as plain text: good in 80 columns, in a pipe and in CI logs.

No colour codes and no cut figures: where a table is too wide, names lose their middle and reasons wrap.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from .material import site_name
from .numbers import MISSING, bytes_text, figure, fixed, interval, number, percent, plural, shorten
from .rows import PlanRow, group_rows

if TYPE_CHECKING:
    import pandas as pd

    from ..comparison import RunRow
    from ..plans import PrecisionPlan
    from .view import View

_HALVES = (0, 1, 2, 3, 4, 5), (0, 6, 7, 8, 9)  # columns of the table of runs, where the terminal is narrow
_MARKS = {"good": "+", "care": "!", "bad": "X", "note": "-"}


def compare_table(rows: Iterable[RunRow], *, width: int | None = None) -> str:
    """Training runs side by side: final losses, time per step, speed against the baseline, memory, trouble.

    width: columns to fill at most; default the terminal's, 80 where there is none.
    """
    rows = list(rows)
    head = ("run", "train", "held-out", "change", "ms/step", "speed", "memory", "skip", "inf", "low")
    body = [
        (
            r.run if r.status in ("done", "?") else f"{r.run} ({r.status})",
            figure(r.train_loss),
            figure(r.eval_loss),
            signed(r.eval_change),
            figure(r.step_time_ms),
            f"{r.speed:.2f}x" if r.speed == r.speed else MISSING,
            bytes_text(r.peak_memory_bytes),
            str(r.skipped_steps),
            str(r.nonfinite_steps),
            f"{100 * r.low_precision_flops:.0f}%" if r.low_precision_flops == r.low_precision_flops else MISSING,
        )
        for r in rows
    ]
    notes = [f"{r.run}: {r.note}" for r in rows if r.note]
    key = "train, held-out: final losses; skip, inf: skipped and non-finite steps; low: FLOPs in low precision"
    lines = columns(head, body, width=width)
    if max(map(len, lines)) > line_width(width):  # no column is left out, and no figure is cut: two tables
        lines = [line for part in _HALVES for line in _part(head, body, part, width)]
    return "\n".join([*lines, *_wrapped([*notes, key], width)])


def _part(head: Sequence[str], body: Sequence[Sequence[str]], part: Sequence[int], width: int | None) -> list[str]:
    return columns([head[i] for i in part], [[row[i] for i in part] for row in body], width=width)


def ask_table(table: pd.DataFrame, *, total: int | None = None, width: int | None = None) -> str:
    """The rows of Profile.ask as text, in their order. Shares are percent of all values.

    total: rows there are in all, where `table` holds the first of them. width: as in compare_table.
    """
    if not len(table):
        return "no recorded tensor matches"
    priced = bool(table.loss_noise.notna().any())
    small = priced and line_width(width) < 72  # no room for all columns
    head = ["tensor", "amax", "overflow", "flushed", "subnorm", "SQNR", "noise"]
    body = [
        [
            site_name(row), number(row.amax), interval(row.overflow_lo, row.overflow_hi), percent(row.flushed),
            percent(row.subnormal), fixed(row.sqnr_db), number(row.loss_noise),
        ]
        for row in table.itertuples(index=False)
    ]  # fmt: skip
    left_out = {name for name, gone in (("subnorm", small), ("noise", not priced)) if gone}
    shown = [i for i, name in enumerate(head) if name not in left_out]
    lines = columns([head[i] for i in shown], [[row[i] for i in shown] for row in body], width=width)
    lines.append(f"overflow, flushed{'' if small else ', subnorm'}: % of all values; SQNR in dB")
    if priced:
        lines += _wrapped(["noise: standard deviation of one step's loss if this tensor alone were rounded"], width)
    if (total or 0) > len(table):
        lines.append(f"the first {len(table)} of {total} tensors; --rows 0 prints all")
    broken = int((table.nonfinite > 0).sum())
    if broken:
        lines.append(
            f"inf or NaN was recorded in {plural(broken, 'of these tensors') if broken > 1 else '1 of these tensors'}"
        )
    return "\n".join(lines)


def plan_table(plan: PrecisionPlan | Sequence[PlanRow], *, width: int | None = None) -> str:
    """A plan as text: module, compute, and the first reason of each; siblings that agree share a row.

    plan: a PrecisionPlan (its own entries, with parameters) or the rows of View.plan (all modules, with FLOPs).
    """
    from ..plans import PrecisionPlan

    if isinstance(plan, PrecisionPlan):
        entries = [
            PlanRow(n, "", p.compute, p.params, p.policy, None, None, tuple(map(str, p.reasons)))
            for n, p in plan.modules.items()
        ]
        body = [(r.label, r.compute, r.params, _first(r.reasons)) for r in group_rows(entries)]
        body.insert(0, ("default", plan.default.compute, plan.default.params, _first(plan.default.reasons)))
        return "\n".join(columns(("module", "compute", "params", "why"), body, left=(0, 1, 2, 3), wrap=3, width=width))
    rows = [(r.label, r.compute, percent(r.flops_share), r.reasons[0] if r.reasons else "") for r in group_rows(plan)]
    return "\n".join(columns(("module", "compute", "FLOPs %", "why"), rows, left=(0, 1, 3), wrap=3, width=width))


def verdict_text(view: View, *, width: int | None = None) -> str:
    """The verdict and the comparison as text."""
    width = line_width(width)
    lines = [clean(view.title), "=" * min(len(view.title), width), *textwrap.wrap(clean(view.subtitle), width), ""]
    lines += [*textwrap.wrap(clean(view.lead), width), ""]
    if view.facts:
        lines += [*_facts(view, width), ""]
    for s in view.statements:
        lines += textwrap.wrap(clean(s.text), width, initial_indent=f"{_MARKS[s.kind]} ", subsequent_indent="  ")
        for item in s.items:
            lines += textwrap.wrap(
                clean(item), width, initial_indent="    ", subsequent_indent="      ", break_long_words=True
            )
    if view.runs:
        lines += ["", compare_table(view.runs, width=width)]
    lines += ["", f"next ({view.next_step[0].lower()}{view.next_step[1:]}):", f"  {clean(view.next_command)}"]
    return "\n".join(lines)


def _facts(view: View, width: int) -> list[str]:
    """The headline figures, a line each where it fits."""
    label, value = (max(map(len, column)) for column in zip(*((f.label, f.value) for f in view.facts), strict=True))
    lines = []
    for fact in view.facts:
        said = clean(f"{fact.label:<{label}}  {fact.value:>{value}}  {fact.note}".rstrip())
        lines += textwrap.wrap(said, width, subsequent_indent="    ", drop_whitespace=True) or [""]
    return lines


def columns(
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    left: Sequence[int] = (0,),
    wrap: int | None = None,
    width: int | None = None,
) -> list[str]:
    """Lines of a table. Column 0 holds names and is shortened in the middle where the width does not suffice; column
    `wrap` breaks into lines; all others are printed in full. left: columns that are aligned to the left."""
    width = line_width(width)
    rows = [[clean(c) for c in row] for row in rows]
    sizes = [max(len(h), *(len(r[i]) for r in rows)) if rows else len(h) for i, h in enumerate(head)]
    room = width - 2 * (len(head) - 1) - sum(s for i, s in enumerate(sizes) if i not in (0, wrap))
    if wrap is None:
        sizes[0] = max(min(sizes[0], room), 8)
    else:
        sizes[0] = max(min(sizes[0], room * 45 // 100), 8)
        sizes[wrap] = max(min(sizes[wrap], room - sizes[0]), 16)
    lines = [_line(head, sizes, left), "  ".join("-" * s for s in sizes)]
    for row in rows:
        cells = [shorten(row[0], sizes[0]), *row[1:]]
        said = textwrap.wrap(row[wrap], sizes[wrap]) or [""] if wrap is not None else [""]
        for n, part in enumerate(said):
            shown = cells if n == 0 else [""] * len(cells)
            if wrap is not None:
                shown = [part if i == wrap else c for i, c in enumerate(shown)]
            lines.append(_line(shown, sizes, left))
    return lines


def _line(cells: Sequence[str], sizes: Sequence[int], left: Sequence[int]) -> str:
    aligned = [c.ljust(n) if i in left else c.rjust(n) for i, (c, n) in enumerate(zip(cells, sizes, strict=True))]
    return "  ".join(aligned).rstrip()


def line_width(width: int | None = None, *, most: int = 120) -> int:
    """The width asked for, else the terminal's between 60 and `most`, 80 where there is none."""
    return width if width is not None else min(max(shutil.get_terminal_size((80, 24)).columns, 60), most)


def _wrapped(lines: Iterable[str], width: int | None) -> list[str]:
    return [part for line in lines for part in textwrap.wrap(clean(line), line_width(width), subsequent_indent="  ")]


def clean(text: str) -> str:
    """One line without control characters: a name cannot move the cursor or forge a row."""
    return "".join(c if c.isprintable() else "?" for c in text)


def _first(reasons: Sequence[Any]) -> str:
    return str(reasons[0]) if reasons else ""


def signed(change: float) -> str:
    return f"{100 * change:+.2f}%" if change == change else MISSING
