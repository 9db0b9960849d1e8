"""The loss scales that keep fp16 gradients inside fp16, and the sites that bind them.

A gradient site tolerates scales 2^k with lo <= k <= hi: above hi its largest magnitude, with `headroom` binades to
spare, overflows; below lo more than `tolerance` of its energy sum(g^2) is flushed to zero (estimated from the binades,
values spread evenly over each, and a tenth added: what the spread can be wrong by). One scale serves all sites,
so the interval of the model is [max lo, min hi]; where it is empty, no single scale works for these sites together.

Which gradients are computed in fp16: under policy "autocast" those of a matrix product (its output, its input and its
weight) and, to be safe, those of every output; under "cast" all of a module in fp16.

Of a run on W processes the recorded gradients are those of the loss's mean over them. What each process computes, in
fp16, are gradients of its own loss, W times larger: the scales that fit are lower by log2 W, for as many processes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..formats import FloatFormat, get_format
from ..histogram import BINS, EXP_LO
from ..plans import Reason
from ..profiles import Profile
from ..sites import Role, Site
from ..stats import StatsTable
from .units import Unit

_NEVER = 10_000
_MARGIN = 1.1  # on flushed energy: a binade's mean square is 7/3 4^e where even, 2.16 to 2.5 where not


@dataclass(frozen=True)
class ScaleInterval:
    """Exponents k of the loss scale 2^k that fit all sites: lo <= k <= hi; empty where lo > hi.

    lo_site, hi_site: the sites that bind the ends (None where there is no gradient at all).
    """

    lo: int
    hi: int
    lo_site: Site | None
    hi_site: Site | None

    @property
    def empty(self) -> bool:
        """Whether no single scale works."""
        return self.lo > self.hi

    @property
    def recommended(self) -> int:
        """2^16 where that is inside, else the nearest end; the middle rounded down where the interval is empty."""
        return (self.lo + self.hi) // 2 if self.empty else max(self.lo, min(self.hi, 16))


def in_words(scale: ScaleInterval, *, tolerance: float = 1e-3) -> str:
    """What an interval comes to, in a sentence or two: the range with what binds it, or that no scale works and why."""
    if scale.lo_site is None or scale.hi_site is None:
        return "No gradient is computed in fp16: no loss scale is needed."
    low = f"{scale.lo_site} needs at least 2^{scale.lo} to keep {1 - tolerance:.1%} of its energy"
    high = f"{scale.hi_site} overflows beyond 2^{scale.hi}"
    if scale.empty:
        return (
            f"No single loss scale works for these gradients in fp16: {low}, and {high}. Keep one of the two in fp32 "
            "or bf16, or clip or rescale what makes the large one; until then start at "
            f"2^{scale.recommended} and let the scale adapt."
        )
    return (
        f"Loss scales from 2^{scale.lo} to 2^{scale.hi} suit all gradients in fp16: {low}, and {high}. Start at "
        f"2^{scale.recommended} and do not let it fall below 2^{scale.lo}."
    )


def site_bounds(
    table: StatsTable, fmt: str | FloatFormat = "fp16", *, headroom: int = 1, tolerance: float = 1e-3
) -> tuple[np.ndarray, np.ndarray]:
    """(lo, hi) int64[S]: the scale exponents that each row of gradient statistics tolerates on its own.

    headroom: binades to spare at both ends: above, for larger gradients to come; below, for what is flushed between
    the tensors that were recorded. Rows that are all zero tolerate everything: lo = -10000, hi = 10000.
    """
    fmt = get_format(fmt)
    lo = np.full(len(table.zeros), -_NEVER, np.int64)
    hi = np.full(len(table.zeros), _NEVER, np.int64)
    exponents = EXP_LO + np.arange(BINS)
    energy = table.counts * (7 / 3 * np.exp2(2.0 * exponents))
    flushed = _MARGIN * np.cumsum(energy, axis=1)  # up to and with each binade
    for row in np.flatnonzero(table.counts.any(1)):
        hi[row] = largest_scale(float(table.amax[row]), fmt) - headroom
        kept_from = int(np.argmax(flushed[row] > tolerance * table.sumsq[row]))  # first binade that must survive
        lo[row] = fmt.emin - fmt.precision - 1 - int(exponents[kept_from]) + headroom
    return lo, hi


def largest_scale(amax: float, fmt: FloatFormat) -> int:
    """Largest k for which amax * 2^k does not overflow `fmt`."""
    mantissa, exponent = math.frexp(amax)
    k = fmt.emax + 1 - exponent
    return k - 1 if fmt.overflows(math.ldexp(mantissa, fmt.emax + 1)) else k


def interval(sites: Sequence[Site], lo: np.ndarray, hi: np.ndarray) -> ScaleInterval:
    """The interval shared by `sites`, whose own bounds are `lo` and `hi`."""
    live = np.flatnonzero(hi < _NEVER)
    if not len(live):
        return ScaleInterval(0, 24, None, None)
    worst_lo, worst_hi = live[np.argmax(lo[live])], live[np.argmin(hi[live])]
    return ScaleInterval(int(lo[worst_lo]), int(hi[worst_hi]), sites[worst_lo], sites[worst_hi])


def best_common_scale(lo: np.ndarray, hi: np.ndarray, weight: np.ndarray) -> int:
    """The exponent that leaves the least `weight` of sites outside their own bounds; the larger of equals, since
    GradScaler climbs until something overflows."""
    live = hi < _NEVER
    if not live.any():
        return 16
    candidates = np.unique(np.concatenate([lo[live], hi[live]]))
    outside = [
        (weight[live] * ((candidates_k < lo[live]) | (candidates_k > hi[live]))).sum() for candidates_k in candidates
    ]
    best = np.flatnonzero(np.asarray(outside) == np.min(outside))
    return int(candidates[best[-1]])


def judge_gradients(
    profile: Profile, units: Sequence[Unit], *, policy: str, headroom: int, tolerance: float
) -> list[tuple[str, Reason]]:
    """(unit, reason) for the units whose gradients do not bear the loss scale that suits most of the work of `units`,
    the candidates for fp16."""
    sites, table = _gradients(profile, units, policy)
    if not sites:
        return []
    flops = {u.name: u.flops for u in units}
    lo, hi = own_bounds(profile, *site_bounds(table, "fp16", headroom=headroom, tolerance=tolerance))
    k = best_common_scale(lo, hi, np.asarray([1.0 + flops[s.module] for s in sites]))
    found = []
    for i in np.flatnonzero((lo > k) | (hi < k)):
        site = sites[i]
        if lo[i] > k:
            text = (
                f"{site.role.value} needs a loss scale of at least 2^{lo[i]} to keep {1 - tolerance:.1%} "
                f"of its energy in fp16, the other layers bear 2^{k}"
            )
        else:
            text = (
                f"{site.role.value} reaches {table.amax[i]:.3g} and bears a loss scale of at most 2^{hi[i]} in fp16, "
                f"the other layers need 2^{k}"
            )
        numbers = {"lo": float(lo[i]), "hi": float(hi[i]), "scale_exponent": float(k)}
        found.append((site.module, Reason(code="gradient", text=text, site=str(site), numbers=numbers)))
    return found


def common_interval(
    profile: Profile, units: Sequence[Unit], *, policy: str, headroom: int, tolerance: float
) -> ScaleInterval | None:
    """The loss scales that suit `units`, those that compute in fp16; None where they have no gradient."""
    sites, table = _gradients(profile, units, policy)
    if not sites:
        return None
    return interval(sites, *own_bounds(profile, *site_bounds(table, "fp16", headroom=headroom, tolerance=tolerance)))


def own_bounds(profile: Profile, lo: np.ndarray, hi: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Bounds of recorded gradients as bounds of those that one of the run's processes computed: lower by log2 W,
    rounded to the safe side. Rows that tolerate everything still do."""
    world = int(profile.run.get("merged_over", 1))
    up, down = (world - 1).bit_length(), world.bit_length() - 1
    live = hi < _NEVER
    return np.where(live, lo - down, lo), np.where(live, hi - up, hi)


def _gradients(profile: Profile, units: Sequence[Unit], policy: str) -> tuple[list[Site], StatsTable]:
    """The gradients that `units` would compute in fp16."""
    known = {u.name: u for u in units}
    sites, table = profile.merged()

    def concerns(site: Site) -> bool:
        unit = known.get(site.module)
        if unit is None or not site.role.is_gradient:
            return False
        return site.role is Role.GRAD_OUTPUT or unit.matmul or policy == "cast"

    rows = [i for i, s in enumerate(sites) if concerns(s)]
    return [sites[i] for i in rows], table.take(np.asarray(rows, np.int64))
