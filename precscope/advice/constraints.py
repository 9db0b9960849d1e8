"""What the recorded ranges forbid, in words and numbers.

For each unit and low format: values that the format must hold without overflow (with head-room), activation energy that
it must not flush, weights likewise, and gradients under one loss scale for the whole model. Ranges do not see
cancellation, long sums or what a module hides between its input and its output: a plan made from them alone says
"predicted".
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..formats import FloatFormat, get_format
from ..plans import Reason
from ..profiles import Profile
from ..sites import Role, Site
from .loss_scale import ScaleInterval, best_common_scale, interval, largest_scale, site_bounds
from .units import ModelGraph, Unit


@dataclass(frozen=True)
class Limits:
    """Tolerances of the range rules.

    headroom: binades between the largest recorded magnitude and the format's end. flushed_energy: share of sum(x^2)
    that may round to zero. min_sqnr_db: least signal-to-quantisation-noise ratio of an activation. swallowed: share of
    updates that low-precision storage may lose before fp32 master weights are advised.
    """

    headroom: int = 2
    flushed_energy: float = 1e-3
    min_sqnr_db: float = 15.0
    swallowed: float = 0.1
    gradient_headroom: int = 1


@dataclass(frozen=True)
class Verdicts:
    """forbidden: (unit, format) -> reasons. scale: loss-scale interval of the fp16 gradients that remain allowed."""

    forbidden: dict[tuple[str, str], list[Reason]]
    scale: ScaleInterval | None

    def allows(self, unit: str, fmt: str) -> bool:
        """Whether nothing forbids `fmt` for `unit`."""
        return (unit, fmt) not in self.forbidden


def judge(profile: Profile, graph: ModelGraph, formats: tuple[str, ...], *, limits: Limits, policy: str) -> Verdicts:
    """Apply the range rules to every unit and every format narrower than fp32."""
    forbidden: dict[tuple[str, str], list[Reason]] = {}
    units = {u.name: u for u in graph.units}
    for name in formats:
        fmt = get_format(name)
        if fmt.bits >= 32 or fmt.name == "tf32":
            continue
        for unit, reason in _activation_reasons(profile, units, fmt, limits, policy):
            forbidden.setdefault((unit, name), []).append(reason)
        if fmt.bits <= 8:
            for unit in graph.units:
                if not unit.matmul:
                    reason = Reason(code="cost", text=f"{name} pays for matrix products only", site=None, numbers={})
                    forbidden.setdefault((unit.name, name), []).append(reason)
    scale = None
    if "fp16" in formats:
        scale = _judge_gradients(profile, units, forbidden, limits)
    return Verdicts(forbidden, scale)


def _activation_reasons(
    profile: Profile, units: dict[str, Unit], fmt: FloatFormat, limits: Limits, policy: str
) -> list[tuple[str, Reason]]:
    """Reasons against `fmt` from inputs, outputs and weights. An 8-bit tensor carries a scale of its own, chosen from
    its amax, so that only its spread can harm it."""
    sites, table = profile.merged()
    rows = [i for i, s in enumerate(sites) if s.module in units and _concerns(units[s.module], s.role, policy)]
    if not rows:
        return []
    sites, table = [sites[i] for i in rows], table.take(np.asarray(rows))
    if fmt.bits <= 8:
        table = table.shift(np.asarray([largest_scale(a, fmt) if a > 0 else 0 for a in table.amax], np.int64))
    now = table.ask(fmt)
    ahead = table.ask(fmt, scale_exponent=0 if fmt.bits <= 8 else limits.headroom)
    nonfinite = (table.pos_inf + table.neg_inf + table.nan) / np.maximum(table.count, 1)
    found = []
    for i, site in enumerate(sites):
        if nonfinite[i] > 0:
            found.append((site.module, _nonfinite(site, nonfinite[i])))
        elif ahead["overflow_hi"][i] > 0:
            found.append((site.module, _overflow(site, table.amax[i], fmt, limits)))
        elif now["sqnr_db"][i] < limits.min_sqnr_db:
            found.append((site.module, _noise(site, now["sqnr_db"][i], now["flushed"][i], fmt, limits)))
    return found


def _concerns(unit: Unit, role: Role, policy: str) -> bool:
    """Inputs and weights are cast only where the module multiplies matrices, or everywhere under policy "cast"; an
    output that the format cannot hold is its producer's concern."""
    if role in (Role.INPUT, Role.WEIGHT):
        return policy == "cast" or unit.matmul
    return role is Role.OUTPUT


def _overflow(site: Site, amax: float, fmt: FloatFormat, limits: Limits) -> Reason:
    spare = np.log2(fmt.max / amax) if amax > 0 else np.inf
    where = f"{site.role.value} reaches {amax:.4g}"
    if spare < 0:
        text = f"{where}, {fmt} ends at {fmt.max:g}"
    else:
        text = f"{where}, {spare:.1f} binades below the end of {fmt} ({fmt.max:g}); {limits.headroom} are asked for"
    return Reason(code="overflow", text=text, site=str(site), numbers={"amax": amax, "limit": fmt.max})


def _noise(site: Site, sqnr_db: float, flushed: float, fmt: FloatFormat, limits: Limits) -> Reason:
    text = (
        f"{site.role.value} keeps {sqnr_db:.1f} dB of signal over rounding noise in {fmt} "
        f"({flushed:.1%} of the values flushed to zero); {limits.min_sqnr_db:g} dB are asked for"
    )
    numbers = {"sqnr_db": float(sqnr_db), "flushed": float(flushed)}
    return Reason(code="flushed", text=text, site=str(site), numbers=numbers)


def _nonfinite(site: Site, share: float) -> Reason:
    text = f"{site.role.value} held inf or NaN in the recorded run ({share:.2%} of the values)"
    return Reason(code="nonfinite", text=text, site=str(site), numbers={"nonfinite": float(share)})


def _judge_gradients(
    profile: Profile,
    units: dict[str, Unit],
    forbidden: dict[tuple[str, str], list[Reason]],
    limits: Limits,
) -> ScaleInterval | None:
    """Choose the loss scale that suits most of the work, forbid fp16 where it does not, return what remains."""
    sites, table = profile.merged()
    rows = [
        i
        for i, s in enumerate(sites)
        if s.role in (Role.GRAD_OUTPUT, Role.GRAD_WEIGHT)
        and s.module in units
        and (s.module, "fp16") not in forbidden
        and (units[s.module].matmul or s.role is Role.GRAD_OUTPUT)
    ]
    if not rows:
        return None
    sites = [sites[i] for i in rows]
    table = table.take(np.asarray(rows))
    lo, hi = site_bounds(table, "fp16", headroom=limits.gradient_headroom, tolerance=limits.flushed_energy)
    weight = np.asarray([1.0 + units[s.module].flops for s in sites])
    k = best_common_scale(lo, hi, weight)
    inside = (lo <= k) & (k <= hi)
    for i in np.flatnonzero(~inside):
        site = sites[i]
        if lo[i] > k:
            text = (
                f"{site.role.value} needs a loss scale of at least 2^{lo[i]} to keep {1 - limits.flushed_energy:.1%} "
                f"of its energy in fp16, the other layers bear 2^{k}"
            )
        else:
            text = (
                f"{site.role.value} reaches {table.amax[i]:.3g} and bears a loss scale of at most 2^{hi[i]} in fp16, "
                f"the other layers need 2^{k}"
            )
        numbers = {"lo": float(lo[i]), "hi": float(hi[i]), "scale_exponent": float(k)}
        forbidden.setdefault((site.module, "fp16"), []).append(
            Reason(code="gradient", text=text, site=str(site), numbers=numbers)
        )
    kept = [i for i in np.flatnonzero(inside) if (sites[i].module, "fp16") not in forbidden]
    return interval([sites[i] for i in kept], lo[kept], hi[kept]) if kept else None
