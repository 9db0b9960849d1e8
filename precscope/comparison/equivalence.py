"""Is a difference of losses small enough? Intervals and two one-sided tests (TOST) over seeds.

The sample is the seed: n pairs of runs give n differences, whose mean has Student's t interval with n - 1 degrees of
freedom. Steps of one run depend on each other and are never taken for a sample.

To find "no significant difference" proves nothing: few seeds always find none. Equivalence is shown by refuting both
"worse by the margin or more" and "better by the margin or more", each at the level 1 - confidence (Schuirmann 1987, J.
Pharmacokinet. Biopharm. 15:657), which is the same as the interval at 2 confidence - 1 (90% for 0.95) lying within the
margin.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError

NAN = float("nan")


@dataclass(frozen=True)
class Difference:
    """The mean of a loss less the baseline's, over seeds; in the loss's own unit. A loss that is higher is worse.

    mean: of run - baseline. baseline: mean of the baseline's loss. sizes: runs on each side (equal where paired). se:
    standard error of `mean`, and df its degrees of freedom; NaN and 0 where a side has one run. margin: as a share of
    |baseline|, which is taken as known: its own scatter over seeds moves the margin, and is not in the interval.
    confidence: see the module.
    """

    mean: float
    baseline: float
    se: float
    df: float
    sizes: tuple[int, int]
    paired: bool
    margin: float
    confidence: float

    @property
    def share(self) -> float:
        """The difference relative to the baseline's loss."""
        return self.relative(self.mean)

    @property
    def bound(self) -> float:
        """The margin in the loss's unit."""
        return self.margin * abs(self.baseline)

    @property
    def interval(self) -> tuple[float, float]:
        """Two-sided interval of the mean at `confidence`; NaN where a side has one run."""
        return t_interval(self.mean, self.se, self.df, self.confidence)

    @property
    def inner_interval(self) -> tuple[float, float]:
        """The interval of the two one-sided tests, at 2 confidence - 1: within the margin where both refute."""
        return t_interval(self.mean, self.se, self.df, 2 * self.confidence - 1)

    @property
    def p_equivalence(self) -> float:
        """p-value of "at least the margin apart" (the larger of the two one-sided tests); NaN without an interval."""
        return tost(self.mean, self.se, self.df, self.bound)

    @property
    def within(self) -> bool:
        """Whether the difference itself, certain or not, lies within the margin."""
        return abs(self.mean) <= self.bound

    @property
    def kind(self) -> str:
        """ "equivalent", "worse", "better", "undecided"; "one seed" without an interval.

        Equivalent goes first: a difference that is sure and smaller than the margin is what the margin is for.
        """
        if not self.df:
            return "one seed"
        if self.p_equivalence < 1 - self.confidence:
            return "equivalent"
        lo, hi = self.interval
        return "worse" if lo > 0 else "better" if hi < 0 else "undecided"

    def relative(self, x: float) -> float:
        """`x` as a share of |baseline|; NaN where that is 0."""
        return x / abs(self.baseline) if self.baseline else NAN


def paired(run: Sequence[float], baseline: Sequence[float], *, margin: float, confidence: float) -> Difference:
    """Of losses that belong together one by one: same seed, same data."""
    differences = np.subtract(run, baseline, dtype=np.float64)
    n = len(differences)
    se = float(differences.std(ddof=1)) / math.sqrt(n) if n > 1 else NAN
    sizes = (n, n)
    return Difference(float(differences.mean()), float(np.mean(baseline)), se, n - 1, sizes, True, margin, confidence)


def unpaired(run: Sequence[float], baseline: Sequence[float], *, margin: float, confidence: float) -> Difference:
    """Of two independent samples: Welch's interval, for variances that may differ (Welch 1947, Biometrika 34:28)."""
    a, b = np.asarray(run, np.float64), np.asarray(baseline, np.float64)
    se, df = NAN, 0.0
    if min(len(a), len(b)) > 1:
        va, vb = float(a.var(ddof=1)) / len(a), float(b.var(ddof=1)) / len(b)
        se = math.sqrt(va + vb)
        spread = va**2 / (len(a) - 1) + vb**2 / (len(b) - 1)
        df = (va + vb) ** 2 / spread if spread else float(len(a) + len(b) - 2)
    mean = float(a.mean() - b.mean())
    return Difference(mean, float(b.mean()), se, df, (len(a), len(b)), False, margin, confidence)


def t_interval(mean: float, se: float, df: float, level: float) -> tuple[float, float]:
    """Student's two-sided interval of a mean; NaN where df is 0."""
    from scipy.special import stdtrit

    if not df:
        return NAN, NAN
    half = float(stdtrit(df, (1 + level) / 2)) * se
    return mean - half, mean + half


def tost(mean: float, se: float, df: float, bound: float) -> float:
    """p-value of "|difference| >= bound"; equal runs (se 0) decide it at once. NaN where df is 0."""
    from scipy.special import stdtr

    if not df:
        return NAN
    if se == 0:
        return 0.0 if mean == 0 or abs(mean) < bound else 1.0
    return float(max(stdtr(df, -(mean + bound) / se), stdtr(df, (mean - bound) / se)))


@dataclass(frozen=True)
class Ratio:
    """Geometric mean of a ratio over pairs, and its interval at `confidence` (on the logarithm); NaN with one pair."""

    mean: float
    interval: tuple[float, float]
    n: int


def ratio(values: Sequence[float], *, confidence: float) -> Ratio:
    """Of positive ratios; those that are not known (NaN, 0) are left out, and `n` counts the rest."""
    logs = np.log([v for v in values if v > 0 and math.isfinite(v)])
    n = len(logs)
    if not n:
        return Ratio(NAN, (NAN, NAN), 0)
    se = float(logs.std(ddof=1)) / math.sqrt(n) if n > 1 else NAN
    lo, hi = t_interval(float(logs.mean()), se, n - 1, confidence)
    return Ratio(float(np.exp(logs.mean())), (float(np.exp(lo)), float(np.exp(hi))), n)


def check_levels(margin: float, confidence: float) -> None:
    """Raises UsageError for a margin or a confidence that says nothing."""
    if not (isinstance(margin, int | float) and 0 < margin < 1):
        raise UsageError(
            f"margin must be a share of the baseline's loss between 0 and 1, for example 0.02 for 2%, not {margin!r}"
        )
    if not (isinstance(confidence, int | float) and 0.5 < confidence < 1):
        raise UsageError(f"confidence must lie between 0.5 and 1, for example 0.95, not {confidence!r}")
