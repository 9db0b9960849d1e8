"""The verdict in GitHub's Markdown, for a pull request: what to know first, the rest folded away.

Names and reasons are text: nothing in them is markup, a link or a mention. GitHub refuses comments beyond 65,536
characters; long tables are cut before that, and say so.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import RunDirectoryError
from .numbers import MISSING, bytes_text, count_text, figure, percent, plural
from .rows import PlanRow, Statement, group_rows
from .text import clean, signed

if TYPE_CHECKING:
    from .view import View

_MARKS = {"good": "✅", "care": "⚠️", "bad": "❌", "note": "ℹ️"}
_ORDER = ("bad", "care")  # what is told at once; the rest is folded
_KEPT, _PLANNED = 25, 150  # rows of the tables
_CELL = 300  # characters of a reason
_MOST = 60_000  # characters of a comment


def markdown(view: View) -> str:
    """Verdict, headline figures, layers kept high with their reasons and the comparison; folded: what else was found,
    the whole plan, where it all comes from."""
    state = {None: "", True: " Confirmed by running it.", False: " Predicted, not yet confirmed."}[view.confirmed]
    lines = [f"## {_md(view.title)}", "", f"**{_md(view.lead)}**{state}", "", _md(view.subtitle), ""]
    lines += _facts(view)
    kept = group_rows([row for row in view.plan if not row.low])
    shown = [s for s in view.statements if not (kept and _is_kept_high(s))]
    told = [s for kind in _ORDER for s in shown if s.kind == kind]
    told += [s for s in shown if s.kind == "good" and s.text.startswith("Trained with the plan")]
    lines += _statements(told)
    if kept:
        lines += _kept(kept)
    if view.runs:
        lines += ["", "### Training", "", *_runs(view)]
    rest = [s for s in shown if s not in told]
    if rest:
        lines += ["", *_folded(f"What else was found ({len(rest)})", _statements(rest))]
    last = [
        f"Next: {_md(view.next_step[0].lower() + view.next_step[1:])}, `{clean(view.next_command).replace('`', '')}`"
    ]
    source = _folded("Where this comes from", _provenance(view)) if view.provenance else []
    room = _MOST - sum(len(line) + 1 for line in [*lines, *source, *last])
    if view.plan:
        lines += ["", *_plan(view, room)]
    lines += ["", *source, "", *last]
    return "\n".join(line for i, line in enumerate(lines) if line or i == 0 or lines[i - 1]) + "\n"


def save_markdown(view: View, path: str | Path) -> Path:
    """Write `markdown` to a file, whole or not at all. Raises RunDirectoryError where it cannot be written."""
    from ..store import replacing

    path = Path(path)
    if path.is_dir():
        raise RunDirectoryError(f"{path} is a directory: name a file, for example {path / 'report.md'}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirectoryError(f"cannot write {path} ({error.strerror or error}): choose another place") from error
    with replacing(path) as temporary:
        temporary.write_text(markdown(view), encoding="utf-8")
    return path


def _facts(view: View) -> list[str]:
    if not view.facts:
        return []
    head = [_cell(f.label) for f in view.facts]
    body = [f"**{_cell(f.value)}**" + (f"<br>{_cell(f.note)}" if f.note else "") for f in view.facts]
    return ["| " + " | ".join(head) + " |", "|" + "|".join(["---"] * len(head)) + "|", "| " + " | ".join(body) + " |",
            ""]  # fmt: skip


def _statements(statements: Iterable[Statement]) -> list[str]:
    lines = []
    for s in statements:
        lines.append(f"- {_MARKS[s.kind]} {_md(s.text)}")
        lines += [f"  - {_md(item)}" for item in s.items]
    return lines


def _is_kept_high(statement: Statement) -> bool:
    """The sentence that lists what the table has."""
    return bool(statement.items) and (" compute in " in statement.text or " computes in " in statement.text)


def _kept(rows: Sequence[PlanRow]) -> list[str]:
    """The layers that do not run low, those that must not first."""
    forbidden = [any(reason.startswith("not ") for reason in row.reasons) for row in rows]
    order = sorted(range(len(rows)), key=lambda i: (not forbidden[i], -(rows[i].flops_share or 0.0)))
    total = sum(row.count for row in rows)
    must = sum(row.count for row, no in zip(rows, forbidden, strict=True) if no)
    title = f"### Kept in high precision: {plural(total, 'module')}" + (f", {must} of them must be" if must else "")
    body = [
        (rows[i].label, rows[i].compute, percent(rows[i].flops_share), _why(rows[i])) for i in order[:_KEPT]
    ]  # fmt: skip
    lines = ["", title, "", *_table(("module", "computes in", "FLOPs %", "why"), body, numeric=(2,))]
    left = sum(rows[i].count for i in order[_KEPT:])
    return [*lines, "", f"and {plural(left, 'more module')}: see the plan"] if left else lines


def _why(row: PlanRow) -> str:
    """What forbids, then what else is said."""
    ranked = sorted(row.reasons, key=lambda reason: not reason.startswith("not "))
    return "; ".join(ranked[:2])


def _runs(view: View) -> list[str]:
    head = ("run", "precision", "train loss", "held-out loss", "ms/step", "speed", "memory", "skipped", "non-finite")
    body = [
        (
            r.run, r.precision, figure(r.train_loss),
            figure(r.eval_loss) + ("" if r.run == view.baseline else f" ({signed(r.eval_change)})"),
            figure(r.step_time_ms), f"{r.speed:.2f}x" if r.speed == r.speed else MISSING,
            bytes_text(r.peak_memory_bytes), str(r.skipped_steps), str(r.nonfinite_steps),
        )
        for r in view.runs
    ]  # fmt: skip
    return _table(head, body, numeric=range(2, len(head)))


def _plan(view: View, room: int) -> list[str]:
    """The whole plan, folded; as many rows as there is room for."""
    state = "confirmed" if view.confirmed else "predicted, not confirmed"
    summary = f"Plan ({state}): " + ", ".join(f"{f} {percent(x)}%" for f, x in view.shares.items())
    groups = group_rows(view.plan)
    body = [
        (
            r.label, r.type, r.compute, f"{count_text(r.parameters)} {r.params}" if r.parameters else "",
            percent(r.flops_share), r.reasons[0] if r.reasons else "",
        )
        for r in groups[:_PLANNED]
    ]  # fmt: skip
    table = _table(("module", "type", "computes in", "parameters", "FLOPs %", "why"), body, numeric=(4,))
    fitting, used = 2, 300 + len(table[0]) + len(table[1])
    while fitting < len(table) and used + len(table[fitting]) < room:
        used += len(table[fitting]) + 1
        fitting += 1
    left = len(groups) - (fitting - 2)
    note = ["", f"and {plural(left, 'more row')}: see plan.json, or precscope report --text"] if left else []
    return _folded(summary, [*table[:fitting], *note])


def _provenance(view: View) -> list[str]:
    lines = []
    for heading, pairs in view.provenance:
        lines.append(f"- **{_md(heading)}**")
        lines += [f"  - {_md(key)}: {_md(value[:_CELL])}" for key, value in pairs]
    return lines


def _folded(summary: str, lines: Sequence[str]) -> list[str]:
    return [f"<details><summary>{_md(summary)}</summary>", "", *lines, "", "</details>"]


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], *, numeric: Iterable[int]) -> list[str]:
    right = set(numeric)
    rule = "|".join("---:" if i in right else "---" for i in range(len(head)))
    return ["| " + " | ".join(head) + " |", f"|{rule}|", *("| " + " | ".join(map(_cell, row)) + " |" for row in rows)]


def _cell(text: str) -> str:
    return _md(text if len(text) <= _CELL else text[: _CELL - 1] + "…")


def _md(text: str) -> str:
    """Text that Markdown and HTML leave alone: no emphasis, no link, no mention, no issue number."""
    for c in "\\`*_[]|~":
        text = text.replace(c, "\\" + c)
    text = clean(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return text.replace("#", "&#35;").replace("@", "&#64;").replace("://", "&#58;//")
