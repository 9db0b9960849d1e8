"""The chance that a site overflows within the coming N steps, from how its amax went so far. numpy and pandas only.

A history is x_i = log2(amax) at the recorded steps t_i. The model: a level that drifts, a random walk, and noise,

    x_i = a + b f(t_i) + w(t_i) + e_i,    w a random walk that is 0 at the last step, e_i of an extreme-value law.

f is the step or its logarithm: amax grows exponentially or like a power of the steps. amax is itself the
largest of very many magnitudes, so that its noise is near the law of extremes (generalised extreme value, GEV; Fisher
and Tippett 1928), and the largest of m further ones has the same law, moved. What is drift, walk or noise is not
decided: the trends and `_RATIOS` of walk to noise are weighted by their marginal likelihood (flat priors for a and b,
1/r for the noise variance r), so that a short history yields a wide forecast. The shape of the GEV comes from the
L-skewness of the residuals (Hosking, Wallis and Wood 1985), drawn towards Gumbel's where they are few.

No forecast (NaN) where the data do not carry one: fewer than 8 recorded steps, values that were not finite, an amax of
zero, a jump out of line with the rest, or a horizon of more than 20 times the recorded span (200 times where the
history is flat).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError
from ..formats import FloatFormat, get_format
from ..profiles import Profile
from ..sites import Role, Site

if TYPE_CHECKING:
    import pandas as pd

_LEAST, _MOST = 8, 200  # recorded steps: fewer carry no forecast, of more the last ones are read
_RATIOS = np.array([0.0, 0.003, 0.03, 0.1, 0.3, 1.0, 3.0, 30.0])  # variance of the walk per interval over that of noise
_TRENDS = ("linear", "power")  # a third, that levels off, was worse: sure of itself, and wrong where growth went on
_REACH, _FLAT_REACH = 20, 200  # horizon over recorded span
_OUTLIER = 6.0  # standard deviations
_DRAWS, _PATHS, _GRID = 128, 8, 24
_FLOOR = 2.0**-12  # of the noise, in binades: amax of bf16 and fp16 tensors moves in steps of this size or more
_ROLES = (Role.INPUT, Role.OUTPUT, Role.WEIGHT)
_COLUMNS = (
    "module", "role", "call", "amax_now", "limit", "headroom", "p_overflow", "p_lo", "p_hi", "headroom_ahead",
    "headroom_least",
)  # fmt: skip


@dataclass(frozen=True)
class Ahead:
    """A forecast of one history. now: log2 of the largest amax recorded. highest: samples of log2 of the largest amax
    of the coming steps, float64 [draws, paths]. chance: limit -> see `chance_beyond`."""

    now: float
    highest: NDArray[np.float64]
    _levels: NDArray[np.float64]  # [draws, paths, grid], binades
    _noise: NDArray[np.float64]  # [draws], scale of the GEV
    _shape: float
    _steps: float  # per grid point

    def chance_beyond(self, limit: float) -> tuple[float, float, float]:
        """(p, lo, hi): the chance that log2 amax exceeds `limit`, and the 5% and 95% points of what it could be, given
        what is not known of the model's parameters."""
        alpha, k = self._noise[:, None, None], self._shape
        y = (limit - self._levels - _location(alpha, k)) / alpha
        inner = np.maximum(1.0 - k * y, 0.0)
        with np.errstate(divide="ignore", over="ignore"):
            rate = np.exp(np.minimum(-y, 30.0)) if k == 0 else np.minimum(inner ** (1.0 / k), 1e13)
        p = -np.expm1(-self._steps * rate.sum(axis=2))  # [draws, paths]
        of_draw = p.mean(axis=1)
        return float(of_draw.mean()), float(np.quantile(of_draw, 0.05)), float(np.quantile(of_draw, 0.95))


def extrapolate(steps: NDArray[np.float64], amax: NDArray[np.float64], horizon: int) -> Ahead | None:
    """Forecast the largest amax of the `horizon` steps after the last of `steps`; None where the data carry none.

    steps: ascending. amax: positive and finite. The same input gives the same answer.
    """
    steps, amax = np.asarray(steps, float)[-_MOST:], np.asarray(amax, float)[-_MOST:]
    if len(steps) < _LEAST or not (np.isfinite(amax) & (amax > 0)).all():
        return None
    x = np.log2(amax)
    fits = [_fit(design, x) for design in _designs(tuple(steps.tolist()))]
    weight = np.exp(np.array([f.evidence for f in fits]) - max(f.evidence for f in fits))
    weight /= weight.sum()
    best = fits[int(np.argmax(weight))]
    if np.abs(best.residuals).max() > _OUTLIER or horizon > _reach(fits, weight) * (steps[-1] - steps[0]):
        return None
    return _simulate(fits, weight, _shape(best.residuals), float(x.max()), horizon)


def forecast(
    profile: Profile,
    format: str | FloatFormat,
    *,
    horizon: int | None = None,
    roles: Iterable[str] = _ROLES,
) -> pd.DataFrame:
    """For each site, the chance that its amax passes the end of `format` within the coming `horizon` steps.

    horizon: None takes as many steps as were recorded from first to last. roles: gradients are left out by default:
    the loss scale moves them (see loss_scale.py). Columns: module, role, call, amax_now (the largest recorded), limit
    (first magnitude that overflows), headroom (binades from amax_now to it), p_overflow, p_lo, p_hi (5% and 95% points
    of what the chance could be), headroom_ahead (binades expected to be left: median), headroom_least (5% point);
    NaN where the data carry no forecast. A site that has overflowed the limit already has a chance of 1.

    Raises UsageError for a horizon below 1.
    """
    import pandas as pd

    fmt = get_format(format)
    limit = math.log2(fmt.overflow_from)
    rows = []
    for site, steps, amax, finite in _histories(profile, roles):
        now = float(amax.max())
        left = limit - math.log2(now) if now > 0 else math.inf
        known = (site.module, site.role.value, site.call, now, fmt.overflow_from, left)
        row: dict[str, Any] = dict(zip(_COLUMNS, known, strict=False))
        ahead = extrapolate(steps, amax, _horizon(horizon, steps)) if finite else None
        chance = (1.0, 1.0, 1.0) if fmt.overflows(now) else ahead.chance_beyond(limit) if ahead is not None else ()
        row |= dict(zip(_COLUMNS[6:9], chance, strict=False))
        if ahead is not None:
            row |= {"headroom_ahead": limit - float(np.median(ahead.highest)),
                    "headroom_least": limit - float(np.quantile(ahead.highest, 0.95))}  # fmt: skip
        rows.append(row)
    return pd.DataFrame(rows, columns=list(_COLUMNS))


def required_headroom(
    profile: Profile,
    horizon: int | None = None,
    *,
    quantile: float = 0.99,
    roles: Iterable[str] = _ROLES,
    among: Collection[Site] | None = None,
) -> dict[Site, float]:
    """Binades that each site (tensors of one module, role and call together) must leave above its largest recorded amax
    to get through the coming `horizon` steps with a chance of `quantile`; NaN where the data carry no forecast.

    among: these sites alone (with tensor ""); a forecast takes a millisecond or two.
    """
    needed = {}
    for site, steps, amax, finite in _histories(profile, roles, among):
        ahead = extrapolate(steps, amax, _horizon(horizon, steps)) if finite else None
        needed[site] = math.nan if ahead is None else max(float(np.quantile(ahead.highest, quantile)) - ahead.now, 0.0)
    return needed


def _histories(
    profile: Profile, roles: Iterable[str], among: Collection[Site] | None = None
) -> Iterable[tuple[Site, NDArray[np.float64], NDArray[np.float64], bool]]:
    """(site, steps, amax, whether all values were finite) of each (module, role, call), in the order of recording."""
    known = [r.value for r in Role]
    wanted = [str(r) for r in roles]
    for role in wanted:
        if role not in known:
            raise UsageError(f"unknown role {role!r}; roles are {', '.join(known)}")
    peaks = profile.peaks
    at = peaks.steps.astype(float)
    for i, site in enumerate(peaks.sites):
        if site.role.value in wanted and (among is None or site in among):
            seen = ~np.isnan(peaks.amax[i])
            if seen.any():
                yield site, at[seen], peaks.amax[i, seen], not (peaks.broken[i, seen] > 1).any()


def _horizon(horizon: int | None, steps: NDArray[np.float64]) -> int:
    if horizon is None:
        return max(int(steps[-1] - steps[0]), 1)
    if horizon < 1:
        raise UsageError(f"horizon must be 1 step or more, not {horizon}")
    return horizon


@dataclass(frozen=True)
class _Design:
    """A trend and a ratio of walk to noise at given steps. whiten: float64 [n, n], makes the errors independent.
    columns: whitened (1, f) [n, 2]; f is 0 at the last step and -1 at the first. ahead: f at steps after the last."""

    trend: str
    ratio: float
    whiten: NDArray[np.float64]
    columns: NDArray[np.float64]
    covariance: NDArray[np.float64]
    root: NDArray[np.float64]
    log_weight: float
    first: float
    interval: float

    def ahead(self, after: NDArray[np.float64]) -> NDArray[np.float64]:
        """f at `after` steps from the last one."""
        return _trend(self.trend, after, -self.first, self.interval)


def _trend(name: str, after: NDArray[np.float64], span: float, interval: float) -> NDArray[np.float64]:
    """f at `after` steps from the last recorded one (negative: before it): 0 there, -1 at the first."""
    if name == "linear":
        return after / span
    return np.log1p(after / (span + interval)) / math.log1p(span / interval)


@lru_cache(maxsize=8)
def _designs(steps: tuple[float, ...]) -> list[_Design]:
    """All that is fitted to histories at `steps`; one factorisation serves every site of a run."""
    n, back = len(steps), np.asarray(steps) - steps[-1]
    interval = -back[0] / (n - 1)
    walk = np.minimum(-back[:, None], -back[None, :]) / interval
    trends = {name: _trend(name, back, float(-back[0]), float(interval)) for name in _TRENDS}
    designs = []
    for ratio in _RATIOS:
        lower = np.linalg.cholesky(np.eye(n) + ratio * walk)
        whiten = np.linalg.inv(lower)
        for trend, f in trends.items():
            columns = whiten @ np.stack([np.ones(n), f], 1)
            covariance = np.linalg.inv(columns.T @ columns)
            log_weight = -np.log(np.diag(lower)).sum() + 0.5 * np.linalg.slogdet(covariance)[1]
            designs.append(_Design(trend, float(ratio), whiten, columns, covariance, np.linalg.cholesky(covariance),
                                   float(log_weight), float(back[0]), float(interval)))  # fmt: skip
    return designs


@dataclass(frozen=True)
class _Fit:
    """Generalised least squares. coefficients: (a, b). rss: weighted residual sum of squares. residuals: whitened, of
    unit variance. evidence: log of the marginal likelihood, up to a constant."""

    design: _Design
    coefficients: NDArray[np.float64]
    rss: float
    residuals: NDArray[np.float64]
    evidence: float


def _fit(design: _Design, x: NDArray[np.float64]) -> _Fit:
    n, y = len(x), design.whiten @ x
    coefficients = design.covariance @ (design.columns.T @ y)
    residual = y - design.columns @ coefficients
    rss = float(residual @ residual) + n * _FLOOR**2
    evidence = design.log_weight - 0.5 * (n - 2) * math.log(rss)
    return _Fit(design, coefficients, rss, residual / math.sqrt(rss / (n - 2)), evidence)


def _reach(fits: list[_Fit], weight: NDArray[np.float64]) -> int:
    """How many recorded spans ahead may be looked at: further where there is neither drift nor walk."""
    still = fits[0]
    error = math.sqrt(still.design.covariance[1, 1] * still.rss / (len(still.residuals) - 2))
    quiet = sum(w for f, w in zip(fits, weight, strict=True) if f.design.ratio <= 0.03)
    return _FLAT_REACH if abs(still.coefficients[1]) <= 2 * error and quiet > 0.5 else _REACH


def _shape(residuals: NDArray[np.float64]) -> float:
    """Hosking's k of the GEV (0: Gumbel's; above, it is bounded) from the L-skewness, near 0 where few."""
    x, n = np.sort(residuals), len(residuals)
    i = np.arange(n)
    b0, b1 = x.mean(), (i * x).sum() / (n * (n - 1))
    b2 = (i * (i - 1) * x).sum() / (n * (n - 1) * (n - 2))
    second = 2 * b1 - b0
    if second <= 0:
        return 0.0
    c = 2 / (3 + (6 * b2 - 6 * b1 + b0) / second) - math.log(2) / math.log(3)
    k = float(np.clip((7.859 * c + 2.9554 * c * c) * n / (n + 30), -0.2, 0.3))
    return k if abs(k) > 1e-3 else 0.0


def _location(alpha: NDArray[np.float64], k: float) -> NDArray[np.float64]:
    """Location of a GEV of scale `alpha` and mean 0."""
    return -np.euler_gamma * alpha if k == 0 else -alpha / k * (1 - math.gamma(1 + k))


@lru_cache(maxsize=4)
def _random(n: int, points: int) -> tuple[NDArray[np.float64], ...]:
    """Random numbers that all sites share: which fit, chi-square, coefficients, walk (summed), noise."""
    rng = np.random.default_rng(0)
    which, chi = (np.arange(_DRAWS) + 0.5) / _DRAWS, rng.chisquare(n - 2, _DRAWS)
    walk = np.cumsum(rng.standard_normal((_DRAWS, _PATHS, points)), axis=2)
    return which, chi, rng.standard_normal((_DRAWS, 2)), walk, rng.exponential(size=walk.shape)


def _simulate(fits: list[_Fit], weight: NDArray[np.float64], k: float, now: float, horizon: int) -> Ahead:
    """Parameters from their posterior, levels from the parameters, the largest noise of each stretch of the grid."""
    points = min(_GRID, horizon)
    stretch = horizon / points
    which, chi, normal, walk, exponential = _random(len(fits[0].residuals), points)
    pick = np.searchsorted(np.cumsum(weight), which).clip(max=len(fits) - 1)
    noise = np.array([fits[i].rss for i in pick]) / chi  # variance r
    at = stretch * np.arange(1, points + 1)
    drift = np.empty((_DRAWS, points))
    per_stretch = np.empty(_DRAWS)
    for i in np.unique(pick):
        rows, fit = pick == i, fits[i]
        drawn = fit.coefficients + np.sqrt(noise[rows])[:, None] * (normal[rows] @ fit.design.root.T)
        drift[rows] = drawn[:, :1] + drawn[:, 1:] * fit.design.ahead(at)
        per_stretch[rows] = np.sqrt(noise[rows] * fit.design.ratio / fit.design.interval * stretch)
    levels = drift[:, None, :] + per_stretch[:, None, None] * walk
    variance = (math.gamma(1 + 2 * k) - math.gamma(1 + k) ** 2) / k**2 if k else math.pi**2 / 6
    alpha = np.sqrt(noise / variance)
    each = exponential / stretch
    scale = alpha[:, None, None]
    highest = (levels + _location(scale, k) + scale * (-np.log(each) if k == 0 else (1 - each**k) / k)).max(axis=2)
    return Ahead(now, highest, levels, alpha, k, stretch)
