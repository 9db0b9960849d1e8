"""Loss curves over seeds as plain rows: the mean and the spread of a run, and the paired difference of two.

Where a seed's loss is not finite, or its run has ended, the mean has no value: a run that diverged is not averaged away
by those that did not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .runs import Run

_SHARE, _LEAST = 10, 10  # the end of a curve: its last tenth, at least ten steps


@dataclass(frozen=True)
class CurvePoint:
    """One step of a curve over seeds. mean, lo, hi: NaN where a seed has no finite loss; lo and hi also with one seed.
    finite: seeds that have one."""

    step: int
    mean: float
    lo: float
    hi: float
    finite: int


def loss_table(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """(steps int64[T], losses float64[runs, T]) over all steps that any of the runs logged; NaN where one did not."""
    import pandas as pd

    columns = [r.log.drop_duplicates("step", keep="last").set_index("step").loss for r in runs]
    table = pd.concat(columns, axis=1).sort_index()
    return table.index.to_numpy(np.int64), table.to_numpy(np.float64).T


def common_losses(runs: Sequence[Run]) -> tuple[np.ndarray, np.ndarray]:
    """`loss_table` of the steps that all the runs logged."""
    steps, losses = loss_table(runs)
    logged = np.all([np.isin(steps, r.log.step.to_numpy()) for r in runs], axis=0)
    return steps[logged], losses[:, logged]


def spread(steps: np.ndarray, losses: np.ndarray, *, smooth: int = 1, points: int = 400) -> tuple[CurvePoint, ...]:
    """Mean over seeds, plus and minus one standard deviation of the seeds. losses [seeds, T].

    smooth: width, in steps, of the moving average that is taken of each seed first. points: at most so many rows.
    """
    return _curve(steps, losses, smooth, points, half_widths=lambda sd, n: sd)


def mean_interval(
    steps: np.ndarray, losses: np.ndarray, *, confidence: float, smooth: int = 1, points: int = 400
) -> tuple[CurvePoint, ...]:
    """Mean over seeds with Student's interval of that mean, step by step: a band of points, not a band for the curve as
    a whole. Arguments as in `spread`."""
    from scipy.special import stdtrit

    return _curve(
        steps, losses, smooth, points,
        half_widths=lambda sd, n: sd / np.sqrt(n) * stdtrit(n - 1, (1 + confidence) / 2) if n > 1 else sd,
    )  # fmt: skip


def _curve(
    steps: np.ndarray,
    losses: np.ndarray,
    smooth: int,
    points: int,
    *,
    half_widths: Callable[[np.ndarray, int], np.ndarray],
) -> tuple[CurvePoint, ...]:
    """half_widths: (standard deviations over seeds [T], seeds) -> half the width of the band [T]."""
    n = len(losses)
    shown = np.unique(np.linspace(0, len(steps) - 1, min(points, len(steps))).round().astype(int))
    smoothed = np.stack([moving_average(row, smooth) for row in losses])[:, shown]
    finite = np.isfinite(smoothed).sum(0)
    whole = np.where(finite == n, smoothed, np.nan)
    mean = whole.mean(0)
    half = half_widths(whole.std(0, ddof=1), n) if n > 1 else np.full(len(shown), np.nan)
    return tuple(
        CurvePoint(int(steps[i]), float(m), float(m - h), float(m + h), int(k))
        for i, m, h, k in zip(shown, mean, half, finite, strict=True)
    )


def moving_average(values: np.ndarray, width: int) -> np.ndarray:
    """Centred mean over `width` neighbours (fewer at the ends), float64[T]; NaN where one of them is not finite."""
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    bad = np.concatenate([[0], np.cumsum(~finite)])
    at = np.arange(len(values))
    lo, hi = np.maximum(at - (width - 1) // 2, 0), np.minimum(at + width // 2 + 1, len(values))
    mean = (sums[hi] - sums[lo]) / np.maximum(hi - lo, 1)
    return np.where(bad[hi] > bad[lo], np.nan, mean)


def end_of(losses: np.ndarray) -> np.ndarray:
    """Mean over the last tenth of the steps (at least ten of them) for each row of [rows, T]; NaN where T is 0."""
    if not losses.shape[1]:
        return np.full(len(losses), np.nan)
    count = max(losses.shape[1] // _SHARE, min(_LEAST, losses.shape[1]))
    return losses[:, -count:].mean(1)
