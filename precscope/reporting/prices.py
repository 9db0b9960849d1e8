"""What a page needs to say the loss noise of any tensor in any format and scale, as Profile.ask does: the
gradient-weighted histograms of the shadow steps, and what really rounding a parameter did in them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..histogram import EXP_LO
from ..profiles import Profile
from ..sites import Site


@dataclass(frozen=True)
class Price:
    """Tensors of one site that are answered alike; their variances add up.

    weights: sums of squared loss gradients per binade from 2^lo upwards, trimmed to the filled ones. source,
    source_exponent: the grid that the values lie on, as in StatsTable. alone: the magnitude that all elements have, 0
    where they differ. rounded: format -> mean squared change of the loss when the tensor was really rounded, unscaled.
    """

    lo: int
    weights: tuple[float, ...]
    source: str
    source_exponent: int
    alone: float = 0.0
    rounded: dict[str, float] = field(default_factory=dict)


def priced_steps(profile: Profile) -> int:
    """Over how many shadow steps the prices are means."""
    return len(profile.shadow.steps) if profile.shadow is not None else 0


def site_prices(
    profile: Profile, sites: Sequence[Site], merge: Callable[[Site], Site] | None = None
) -> list[tuple[Price, ...] | None]:
    """Per site (of one module, role and call) its prices; None where no gradient is known. merge: as in `site_rows`.

    Tensors whose rounding is answered alike are one price: most sites have a single one.
    """
    priced = profile if profile.shadow is None else profile.shadow
    weights = priced.table.weights
    if weights is None:
        return [None] * len(sites)
    found: dict[Site, dict[Any, Price]] = {}
    for i in np.flatnonzero(~np.isnan(weights).any(axis=1)).tolist():
        one = _price(priced, i, weights[i])
        own = bool(one.alone or one.rounded or not np.isfinite(weights[i]).all())
        key = i if own else (one.source, one.source_exponent)
        site = priced.sites[i]._replace(tensor="")
        of_site = found.setdefault(site if merge is None else merge(site), {})
        of_site[key] = _sum(of_site[key], one) if key in of_site else one
    return [tuple(found[site].values()) if site in found else None for site in sites]


def _price(priced: Profile, i: int, weights: NDArray[np.float64]) -> Price:
    table = priced.table
    lo, trimmed = _trimmed(weights)
    alone = float(table.amax[i]) if table.amax[i] == table.amin_nonzero[i] else 0.0
    rounded = {fmt: float(squares[i]) for fmt, squares in priced.rounded.items() if squares[i] == squares[i]}
    return Price(lo, trimmed, str(table.source[i]), int(table.source_exponent[i]), alone, rounded)


def _sum(a: Price, b: Price) -> Price:
    """Two prices on the same grid as one."""
    lo = min(a.lo, b.lo)
    total = np.zeros(max(p.lo + len(p.weights) for p in (a, b)) - lo)
    for p in (a, b):
        total[p.lo - lo :][: len(p.weights)] += p.weights
    return Price(lo, tuple(total.tolist()), a.source, a.source_exponent)


def _trimmed(weights: NDArray[np.float64]) -> tuple[int, tuple[float, ...]]:
    where = np.flatnonzero(weights)
    first, end = (int(where[0]), int(where[-1]) + 1) if len(where) else (0, 0)
    return first + EXP_LO, tuple(weights[first:end].tolist())
