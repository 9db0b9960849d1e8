"""The chance that a site overflows within the coming N steps, from how its amax went so far. numpy and pandas only.

A history is x_i = log2(amax) at the recorded steps t_i. The model: a level with a constant drift, a random walk, and
noise from step to step,

    x_i = a + b (t_i - t_n) + w(t_i) + e_i,    w a random walk with w(t_n) = 0,    e_i of an extreme-value law.

amax is itself the largest of very many magnitudes, so that its noise is near the law of extremes (generalised extreme
value, GEV; Fisher and Tippett 1928), and the largest of m further ones has the same law, moved. How much of the
scatter is walk and how much is noise is not decided: `_RATIOS` of the two are weighted by their marginal likelihood
(flat priors for a and b, 1/r for the noise variance r), so that a short history yields a wide forecast. The shape of
the GEV comes from the L-skewness of the residuals (Hosking, Wallis and Wood 1985), drawn towards Gumbel's where they
are few. Constant growth in binades per step is exponential growth of amax.

No forecast (NaN) where the data do not carry one: fewer than 8 recorded steps, values that were not finite, an amax of
zero, a jump out of line with the rest, or a horizon of more than 20 times the recorded span (200 times where the
history is flat).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
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
_REACH, _FLAT_REACH = 20, 200  # horizon over recorded span
_OUTLIER = 6.0  # standard deviations
_DRAWS, _PATHS, _GRID = 128, 16, 24
_FLOOR = 2.0**-12  # of the noise, in binades: amax of bf16 and fp16 tensors moves in steps of this size or more
_ROLES = (Role.INPUT, Role.OUTPUT, Role.WEIGHT)


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
            rate = np.exp(np.minimum(-y, 700.0)) if k == 0 else inner ** (1.0 / k)
        p = 1.0 - np.exp(-np.minimum(self._steps * rate, 700.0).sum(axis=2))  # [draws, paths]
        of_draw = p.mean(axis=1)
        return float(of_draw.mean()), float(np.quantile(of_draw, 0.05)), float(np.quantile(of_draw, 0.95))


def extrapolate(steps: NDArray[np.float64], amax: NDArray[np.float64], horizon: int, *, seed: int = 0) -> Ahead | None:
    """Forecast the largest amax of the `horizon` steps after the last of `steps`; None where the data carry none.

    steps: ascending. amax: positive and finite. Deterministic for a seed.
    """
    steps, amax = np.asarray(steps, float)[-_MOST:], np.asarray(amax, float)[-_MOST:]
    if len(steps) < _LEAST or not (np.isfinite(amax) & (amax > 0)).all():
        return None
    x, span = np.log2(amax), steps[-1] - steps[0]
    fits = [_fit(steps, x, float(ratio)) for ratio in _RATIOS]
    weight = np.exp(np.array([f.evidence for f in fits]) - max(f.evidence for f in fits))
    weight /= weight.sum()
    best = fits[int(np.argmax(weight))]
    if np.abs(best.whitened).max() > _OUTLIER or horizon > _reach(fits, weight) * span:
        return None
    return _simulate(fits, weight, _shape(best.whitened), float(x.max()), horizon, span / (len(x) - 1), seed)


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
        row: dict[str, Any] = {"module": site.module, "role": site.role.value, "call": site.call, "amax_now": now,
                               "limit": fmt.overflow_from, "headroom": limit - math.log2(now) if now > 0 else math.inf}  # fmt: skip
        ahead = extrapolate(steps, amax, _horizon(horizon, steps)) if finite else None
        if fmt.overflows(now):
            row |= {"p_overflow": 1.0, "p_lo": 1.0, "p_hi": 1.0}
        elif ahead is not None:
            row |= dict(zip(("p_overflow", "p_lo", "p_hi"), ahead.chance_beyond(limit), strict=True))
        if ahead is not None:
            row |= {"headroom_ahead": limit - float(np.median(ahead.highest)),
                    "headroom_least": limit - float(np.quantile(ahead.highest, 0.95))}  # fmt: skip
        rows.append(row)
    names = ["module", "role", "call", "amax_now", "limit", "headroom", "p_overflow", "p_lo", "p_hi", "headroom_ahead",
             "headroom_least"]  # fmt: skip
    return pd.DataFrame(rows, columns=names)


def required_headroom(
    profile: Profile, horizon: int | None = None, *, quantile: float = 0.99, roles: Iterable[str] = _ROLES
) -> dict[Site, float]:
    """Binades that each site (tensors of one module, role and call together) must leave above its largest recorded amax
    to get through the coming `horizon` steps with a chance of `quantile`; NaN where the data carry no forecast."""
    needed = {}
    for site, steps, amax, finite in _histories(profile, roles):
        ahead = extrapolate(steps, amax, _horizon(horizon, steps)) if finite else None
        needed[site] = math.nan if ahead is None else max(float(np.quantile(ahead.highest, quantile)) - ahead.now, 0.0)
    return needed


def _histories(
    profile: Profile, roles: Iterable[str]
) -> Iterable[tuple[Site, NDArray[np.float64], NDArray[np.float64], bool]]:
    """(site, steps, amax, whether all values were finite) of each (module, role, call), in the order of recording."""
    wanted = [Role(r).value for r in roles]
    history = profile.history()
    rows = history[history.role.isin(wanted)]
    rows = rows.assign(bad=rows.pos_inf + rows.nan)  # -inf is what masks write
    keys = ["module", "role", "call"]
    series = rows.groupby([*keys, "step"], observed=True, sort=False)[["amax", "bad"]].agg(
        {"amax": "max", "bad": "sum"}
    )
    for (module, role, call), part in series.reset_index().groupby(keys, observed=True, sort=False):
        part = part.sort_values("step")
        yield (
            Site(module, Role(role), int(call)), part.step.to_numpy(float), part.amax.to_numpy(float),
            not part.bad.any(),
        )  # fmt: skip


def _horizon(horizon: int | None, steps: NDArray[np.float64]) -> int:
    if horizon is None:
        return max(int(steps[-1] - steps[0]), 1)
    if horizon < 1:
        raise UsageError(f"horizon must be 1 step or more, not {horizon}")
    return horizon


@dataclass(frozen=True)
class _Fit:
    """Generalised least squares for one ratio of walk to noise. ratio: per interval. coefficients: (a, b). covariance:
    of those, over the noise variance. rss: weighted residual sum of squares. whitened: residuals, unit variance."""

    ratio: float
    coefficients: NDArray[np.float64]
    covariance: NDArray[np.float64]
    rss: float
    n: int
    evidence: float
    whitened: NDArray[np.float64]


def _fit(steps: NDArray[np.float64], x: NDArray[np.float64], ratio: float) -> _Fit:
    n, back = len(steps), steps - steps[-1]
    interval = -back[0] / (n - 1)
    walk = np.minimum(-back[:, None], -back[None, :]) / interval
    lower = np.linalg.cholesky(np.eye(n) + ratio * walk)
    design = np.linalg.solve(lower, np.stack([np.ones(n), back], 1))
    y = np.linalg.solve(lower, x)
    normal = design.T @ design
    coefficients = np.linalg.solve(normal, design.T @ y)
    residual = y - design @ coefficients
    rss = float(residual @ residual) + n * _FLOOR**2
    evidence = -np.log(np.diag(lower)).sum() - 0.5 * np.linalg.slogdet(normal)[1] - 0.5 * (n - 2) * math.log(rss)
    return _Fit(
        ratio, coefficients, np.linalg.inv(normal), rss, n, float(evidence), residual / math.sqrt(rss / (n - 2))
    )


def _reach(fits: list[_Fit], weight: NDArray[np.float64]) -> int:
    """How many recorded spans ahead may be looked at: further where there is neither drift nor walk."""
    still = fits[0]
    error = math.sqrt(still.covariance[1, 1] * still.rss / (still.n - 2))
    flat = abs(still.coefficients[1]) <= 2 * error and weight[_RATIOS <= 0.03].sum() > 0.5
    return _FLAT_REACH if flat else _REACH


def _shape(residuals: NDArray[np.float64]) -> float:
    """Hosking's k of the GEV (0 is Gumbel's, above it bounded) from the L-skewness, drawn towards 0 where n is small."""
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
    if k == 0:
        return -np.euler_gamma * alpha
    return -alpha / k * (1 - math.gamma(1 + k))


def _simulate(
    fits: list[_Fit], weight: NDArray[np.float64], k: float, now: float, horizon: int, interval: float, seed: int
) -> Ahead:
    """Parameters from their posterior, levels from the parameters, the largest noise of each stretch of the grid."""
    rng = np.random.default_rng(seed)
    points = min(_GRID, horizon)
    stretch = horizon / points
    pick = rng.choice(len(fits), size=_DRAWS, p=weight)
    fit = [fits[i] for i in pick]
    noise = np.array([f.rss for f in fit]) / rng.chisquare(fits[0].n - 2, _DRAWS)  # variance r
    normal = rng.standard_normal((_DRAWS, 2))
    roots = {id(f): np.linalg.cholesky(f.covariance + 1e-15 * np.eye(2) * f.covariance[1, 1]) for f in fits}
    drawn = np.stack(
        [f.coefficients + math.sqrt(r) * (roots[id(f)] @ z) for f, r, z in zip(fit, noise, normal, strict=True)]
    )
    walk = np.sqrt(noise * np.array([f.ratio for f in fit]) / interval * stretch)
    steps = rng.standard_normal((_DRAWS, _PATHS, points)) * walk[:, None, None]
    at = stretch * np.arange(1, points + 1)
    levels = drawn[:, 0, None, None] + drawn[:, 1, None, None] * at + np.cumsum(steps, axis=2)
    variance = (math.gamma(1 + 2 * k) - math.gamma(1 + k) ** 2) / k**2 if k else math.pi**2 / 6
    alpha = np.sqrt(noise / variance)
    each = rng.exponential(size=levels.shape) / stretch
    spread = -np.log(each) if k == 0 else (1 - each**k) / k
    scale = alpha[:, None, None]
    highest = (levels + _location(scale, k) + scale * spread).max(axis=2)
    return Ahead(now, highest, levels, alpha, k, stretch)
