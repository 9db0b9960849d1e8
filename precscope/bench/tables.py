"""The result of a benchmark as text."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..reporting.numbers import percent, plural
from ..reporting.text import columns, line_width
from .scoring import LARGEST_SHARE, Score

if TYPE_CHECKING:
    from .zoo import ZooResult

_WORST = 5
_HEAD = ("case", "fmt", "fp32", "low", "plan", "high", "excess", "s", "verdict")
_FROM_WIDTH = {"fp32": 76, "low": 76, "s": 90}  # narrower tables do without these columns
_KEY = (
    "fp32, low, plan: how the runs ended (final loss or the case's own figure, relative error for inference; "
    "! not usable); high: leaf modules kept out of the format, of all; excess: % of leaves kept high without need; "
    "s: seconds (in wide tables)"
)


def result_text(result: ZooResult, *, width: int | None = None) -> str:
    """A row per pair, why modules are kept high, the worst pairs, the summary."""
    width = line_width(width)
    kept = [i for i, h in enumerate(_HEAD) if width >= _FROM_WIDTH.get(h, 0)]
    head, *rows = [[row[i] for i in kept] for row in (_HEAD, *map(_row, result.scores))]
    lines = columns(head, rows, left=(0, 1, len(kept) - 1), width=width)
    lines += textwrap.wrap(_KEY, width, subsequent_indent="  ")
    reasons = [line for s in result.scores for line in _reasons(s, width)]
    if reasons:
        lines += ["", "kept high, and why:", *reasons]
    return "\n".join([*lines, "", *_summary(result, width)])


def _row(s: Score) -> tuple[str, ...]:
    high = f"{s.high_leaves}/{s.leaves}" if s.error is None else ""
    planned = "error" if s.planned and not _is_figure(s.planned) else s.planned
    verdict = s.verdict if s.low_fails == s.failing else f"{s.verdict} ?"
    return (
        s.case, s.format, s.fp32, s.low, planned, high, percent(s.share) if s.error is None else "",
        f"{s.seconds:.1f}", verdict,
    )  # fmt: skip


def _is_figure(text: str) -> bool:
    try:
        float(text.rstrip("!"))
    except ValueError:
        return False
    return True


def _reasons(s: Score, width: int) -> Iterator[str]:
    said = s.error or ("" if _is_figure(s.planned) else f"the planned run raised {s.planned}")
    if said:
        yield from _wrap(f"{s.case} {s.format}: {said}", width)
    needless = set(s.needless)
    for module, reason in s.high.items():
        mark = " (needless)" if module in needless else ""
        yield from _wrap(f"{s.case} {s.format}, {module or '(root)'}{mark}: {reason or 'no reason given'}", width)


def _wrap(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width, initial_indent="  ", subsequent_indent="    ")


def _summary(result: ZooResult, width: int) -> list[str]:
    total = result.summary
    parts = []
    if total.failing:
        parts.append(
            f"cured {total.cured} of {plural(total.failing, 'failing pair')}, excess {percent(total.share)}% on "
            f"average (at most {percent(LARGEST_SHARE)}%)"
        )
    if total.passing:
        parts.append(f"quiet on {total.quiet} of {plural(total.passing, 'harmless pair')}")
    lines = textwrap.wrap("; ".join(parts) + f"; {result.seconds:.0f} s in all, seed {result.seed}.", width)
    doubtful = [f"{s.case} {s.format}" for s in result.scores if s.low_fails != s.failing]
    if doubtful:
        lines += textwrap.wrap(
            f"? : the plain run in the format did not end here as the case says: {', '.join(doubtful)}.", width
        )
    if total.missing:
        lines += ["worst:"]
        worst = sorted((s for s in result.scores if not s.good), key=lambda s: (not s.failing, -s.share))
        for s in worst[:_WORST]:
            lines += _wrap(f"{s.case} {s.format}: {s.verdict}, excess {percent(s.share)}%", width)
        if len(worst) > _WORST:
            lines.append(f"  and {len(worst) - _WORST} more")
    return lines
