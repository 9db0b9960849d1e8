"""Tables of ops and of forecasts as plain text: the rules of text.py."""

from __future__ import annotations

import textwrap
from typing import TYPE_CHECKING

from ..formats import get_format
from .material import site_name
from .numbers import MISSING, fixed, interval, number, percent, plural, shorten
from .text import columns, line_width

if TYPE_CHECKING:
    import pandas as pd

_WIDE = 72  # columns from which the last figure of a table has room
_PHASES = {"forward": "fwd", "backward": "bwd"}


def ops_table(table: pd.DataFrame, *, total: int | None = None, width: int | None = None) -> str:
    """The rows of OpRecords.ask as text, in their order. Shares are percent of all values.

    total: rows there are in all, where `table` holds the first of them. width: as in text.compare_table.
    """
    width = line_width(width)
    head = ("module", "phase", "op", "amax", "overflow", "flushed", "SQNR")
    body = [
        [
            row.module or "(root)", _PHASES.get(row.phase, row.phase), f"{row.op}#{row.index}" if row.index else row.op,
            number(row.amax), interval(row.overflow_lo, row.overflow_hi), percent(row.flushed), fixed(row.sqnr_db),
        ]
        for row in table.itertuples(index=False)
    ]  # fmt: skip
    if not body:
        return "no recorded op matches"
    if width < _WIDE:
        head, body = head[:-1], [row[:-1] for row in body]
    sizes = [max(len(head[i]), *(len(r[i]) for r in body)) for i in range(len(head))]
    modules, room = max(sizes[0], 8), width - 2 * (len(head) - 1) - sizes[1] - sum(sizes[3:])
    for row in body:
        row[2] = shorten(row[2], max(room - min(modules, room // 2), 8))
    lines = columns(head, body, left=(0, 1, 2), width=width)
    key = "overflow, flushed: % of all values" + ("; SQNR in dB" if width >= _WIDE else "")
    notes = [f"{key}; #1: the second op of its name in a call of the module"]
    if (total or 0) > len(table):
        notes.append(f"the first {len(table)} of {total} ops; --rows 0 prints all")
    return "\n".join([*lines, *_notes(notes, width)])


def likeliest_first(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of advice.forecast by their chance of overflow, largest first; equals, and those without a forecast
    (which come last), by the head-room they have now."""
    return table.sort_values(
        ["p_overflow", "p_hi", "headroom"], ascending=[False, False, True], na_position="last", kind="stable"
    )


def forecast_table(
    table: pd.DataFrame, *, of: pd.DataFrame, format: str, horizon: int, width: int | None = None
) -> str:
    """The rows of advice.forecast as text, in their order.

    of: the rows there are in all, of which `table` holds the first. horizon: steps they look ahead. width: as in
    text.compare_table.
    """
    if not len(of):
        return "no recorded tensor matches"
    width = line_width(width)
    head = ("tensor", "amax", "room", "in half", "at least", "chance", "from..to")
    body = [
        (
            site_name(row), number(row.amax_now),
            fixed(row.headroom), fixed(row.headroom_ahead), fixed(row.headroom_least), _chance(row.p_overflow),
            MISSING if row.p_lo != row.p_lo else f"{_chance(row.p_lo)}..{_chance(row.p_hi)}",
        )
        for row in table.itertuples(index=False)
    ]  # fmt: skip
    if width < _WIDE:
        head, body = head[:-1], [row[:-1] for row in body]
    fmt, unknown = get_format(format), int(of.p_overflow.isna().sum())
    title = f"{fmt} (largest finite value {number(fmt.max)}), the next {plural(horizon, 'step')}"
    key = "room: binades from amax to the end of the format; in half, at least: what is left of them then, in half of "
    key += "the cases and in all but 5%; chance: of an overflow, in %"
    notes = [key + (", with the 5% and 95% points of what it could be" if width >= _WIDE else "")]
    if len(of) > len(table):
        notes.append(f"the first {len(table)} of {len(of)} tensors; --rows 0 prints all")
    if unknown:
        notes.append(
            f"no forecast for {unknown} of {plural(len(of), 'tensor')}: one needs 8 recorded steps or more, all "
            "finite and without a jump, and a horizon not too far beyond them"
        )
    return "\n".join([title, *columns(head, body, width=width), *_notes(notes, width)])


def _chance(p: float) -> str:
    """A chance in percent; two digits say all that is known of it."""
    if p != p:
        return MISSING
    if p < 0.0005:
        return "0" if p == 0 else "<0.1"
    return f"{100 * p:.1f}" if p < 0.1 else ">99" if 0.995 <= p < 1 else f"{100 * p:.0f}"


def _notes(notes: list[str], width: int) -> list[str]:
    return [part for note in notes for part in textwrap.wrap(note, width, subsequent_indent="  ")]
