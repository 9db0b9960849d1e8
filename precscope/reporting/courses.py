"""How training runs went, as plain rows for a page: losses with their spread over seeds, differences from the baseline,
held-out losses, loss scale, throughput, what was skipped, and what the guard saw and did."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..events import NAME as EVENTS
from ..events import Event, read_events

if TYPE_CHECKING:
    import pandas as pd

    from ..comparison import Against, Comparison, CurvePoint
    from ..comparison.runs import Group, Run

POINTS = 400  # of a curve: more than a screen can show
MARKS = 2000  # marked steps and events of one run that a page carries

Band = tuple[int, float | None, float | None, float | None]
"""(step, mean, lower, upper); None where a seed has no finite loss, the last two also with one seed."""


@dataclass(frozen=True)
class Course:
    """One run over its steps.

    run: its name, a path where two have the same. seeds: runs behind `losses` and `difference`. losses: training loss,
    mean over seeds plus and minus their standard deviation. difference: from the baseline's with the interval of its
    mean; empty for the baseline and where the runs are no pair. against: what the comparison says of it. kind: see
    comparison.Against, "" for the baseline. held_out: (step, held-out loss). scale: (step, loss scale) where it
    changed, empty where there is none. rate: (step, steps per second). skipped, nonfinite: steps. events: of its guard.
    """

    run: str
    precision: str
    seeds: int
    losses: tuple[Band, ...]
    difference: tuple[Band, ...] = ()
    against: str = ""
    details: str = ""
    kind: str = ""
    held_out: tuple[tuple[int, float], ...] = ()
    scale: tuple[tuple[int, float], ...] = ()
    rate: tuple[tuple[int, float], ...] = ()
    skipped: tuple[int, ...] = ()
    nonfinite: tuple[int, ...] = ()
    events: tuple[Event, ...] = ()


def run_names(comparison: Comparison) -> tuple[str, ...]:
    """Directory names of the runs, or whole paths where two are the same."""
    return named(comparison.groups)


def named(groups: Sequence[Group]) -> tuple[str, ...]:
    """The same of any groups of runs."""
    names = [g.run.path.name for g in groups]
    return tuple(names if len(set(names)) == len(names) else [str(g.run.path) for g in groups])


def courses(comparison: Comparison) -> tuple[Course, ...]:
    """A row per run, in the comparison's order. Raises RunDirectoryError where a guard's file is damaged."""
    losses, differences = comparison.curves(), comparison.difference_curves()
    names = run_names(comparison)
    others = iter(comparison.pairs)
    made = []
    for group, name in zip(comparison.groups, names, strict=True):
        path = str(group.run.path)
        pair = None if path == comparison.baseline else next(others)
        log = group.run.log
        made.append(
            Course(
                run=name,
                precision=group.run.precision,
                seeds=max(len(group.seeds), 1),
                losses=_bands(losses[path]),
                difference=_bands(differences.get(path, ())),
                against=pair.verdict if pair is not None else "",
                details=_details(pair),
                kind=pair.kind if pair is not None else "",
                held_out=_held_out(log),
                scale=_scale(log),
                rate=_rate(group.run),
                skipped=_marked(log, "skipped"),
                nonfinite=_marked(log, "nonfinite"),
                events=run_events(group.run.path)[-MARKS:],
            )
        )
    return tuple(made)


def run_events(path: Path) -> tuple[Event, ...]:
    """What a run's guard saw and did, () where it had none."""
    return tuple(read_events(path)) if (path / EVENTS).is_file() else ()


def _details(pair: Against | None) -> str:
    """What a verdict rests on, "" where it says it itself."""
    from ..comparison.wording import evidence

    return evidence(pair) if pair is not None else ""


def _bands(points: Sequence[CurvePoint]) -> tuple[Band, ...]:
    return tuple((p.step, _known(p.mean), _known(p.lo), _known(p.hi)) for p in points)


def _known(x: float) -> float | None:
    return float(x) if math.isfinite(x) else None


def _held_out(log: pd.DataFrame) -> tuple[tuple[int, float], ...]:
    if "eval_loss" not in log:
        return ()
    rows = log[np.isfinite(log.eval_loss)]
    return tuple(zip(rows.step.tolist(), rows.eval_loss.tolist(), strict=True))[-POINTS:]


def _scale(log: pd.DataFrame) -> tuple[tuple[int, float], ...]:
    """The steps at which the loss scale changed, with the first and the last one; a page draws stairs."""
    if "scale" not in log or not len(log) or (log.scale == 1).all():
        return ()
    changed = (log.scale != log.scale.shift()).to_numpy(copy=True)
    changed[-1] = True
    rows = log[changed].tail(MARKS)
    return tuple(zip(rows.step.tolist(), rows.scale.tolist(), strict=True))


def _rate(run: Run) -> tuple[tuple[int, float], ...]:
    """Steps per second: the inverse of the median time of neighbouring steps. Recorded steps are left out, as in a
    comparison, where others are there."""
    log, every = run.log, run.about.get("every")
    plain = log[log.step % every != 0] if every and every > 1 else log
    rows = plain if len(plain) else log
    rows = rows[rows.time_ms > 0]
    if not len(rows):
        return ()
    groups = min(POINTS // 4, max(len(rows) // 5, min(len(rows), 12)))  # a few steps each: single ones scatter
    of = np.arange(len(rows)) * groups // len(rows)
    middle = rows.groupby(of).agg({"step": "first", "time_ms": "median"})
    return tuple((int(s), 1e3 / t) for s, t in zip(middle.step, middle.time_ms, strict=True))


def _marked(log: pd.DataFrame, column: str) -> tuple[int, ...]:
    return tuple(int(s) for s in log.step[log[column].astype(bool)].head(MARKS)) if column in log else ()
