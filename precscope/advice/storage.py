"""Where 16-bit parameters would harm the optimizer (policy "cast"): updates below half an ulp, and state out of range.

Parameters stored in a 16-bit format have optimizer state of that format too. Adam's exp_avg_sq holds squares of
gradients, which fp16 flushes to zero from |g| of about 5e-3 sqrt(1 - beta2) down; Adam then divides by eps alone, and
eps = 1e-8 itself is 0 in fp16.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from ..formats import FloatFormat, get_format
from ..histogram import swallowed_share
from ..plans import Reason
from ..profiles import Profile
from ..sites import Role, Site

_ADAM_EPS = 1e-8  # default of torch.optim.Adam and AdamW


def storage_reasons(
    profile: Profile, compute: Mapping[str, str], *, swallowed: float, flushed_state: float
) -> dict[str, list[Reason]]:
    """Units whose parameters must stay fp32, and why: unit -> reasons. Units without recorded updates are not judged.

    compute: unit -> format its parameters would be stored in; wider ones than 16 bits are not judged. swallowed: share
    of updates that storage may lose. flushed_state: share of the non-zero elements of an optimizer state that it may
    flush to zero.
    """
    low = {unit: get_format(fmt) for unit, fmt in compute.items() if get_format(fmt).bits == 16}
    worst: dict[str, tuple[float, Reason]] = {}
    for index, (counts, unchanged, from_zero) in profile.ratios.items():
        site = profile.sites[index]
        fmt = low.get(site.module)
        if fmt is None:
            continue
        lo, hi = swallowed_share(counts, fmt.precision, unchanged=unchanged, from_zero=from_zero)
        if lo > max(swallowed, worst[site.module][0] if site.module in worst else 0.0):
            worst[site.module] = float(lo), _swallowed(site, float(lo), float(hi), fmt, swallowed)
    reasons = {unit: [reason] for unit, (_, reason) in worst.items()}
    for unit, reason in _state(profile, low, flushed_state):
        reasons.setdefault(unit, []).append(reason)
    return reasons


def _swallowed(site: Site, lo: float, hi: float, fmt: FloatFormat, limit: float) -> Reason:
    text = (
        f"params fp32: {lo:.0%} to {hi:.0%} of the updates of {site.tensor} are below half an ulp in {fmt} "
        f"and would be swallowed; {limit:.0%} are tolerated"
    )
    return Reason(code="swallowed", text=text, site=str(site), numbers={"lo": lo, "hi": hi})


def _state(profile: Profile, low: Mapping[str, FloatFormat], limit: float) -> list[tuple[str, Reason]]:
    """The worst state tensor of each unit that its format cannot hold."""
    sites, table = profile.merged(by="tensor")
    worst: dict[str, tuple[float, Reason]] = {}
    for fmt in dict.fromkeys(low.values()):
        rows = [i for i, s in enumerate(sites) if s.role is Role.STATE and low.get(s.module) == fmt]
        state = table.take(np.asarray(rows, np.int64))
        answer = state.ask(fmt)
        nonzero = np.maximum(state.count - state.zeros, 1)
        flushed = answer["flushed"] * state.count / nonzero
        for i, row in enumerate(rows):
            site, over = sites[row], float(answer["overflow_hi"][i])
            badness = 1.0 + over if over > 0 else float(flushed[i])
            if badness > max(limit, worst[site.module][0] if site.module in worst else 0.0):
                reason = (
                    _overflowing(site, float(state.amax[i]), fmt) if over > 0 else _flushed(site, badness, fmt, limit)
                )
                worst[site.module] = badness, reason
    return [(unit, reason) for unit, (_, reason) in worst.items()]


def _overflowing(site: Site, amax: float, fmt: FloatFormat) -> Reason:
    text = f"params fp32: the optimizer state {site.tensor} reaches {amax:.4g}, {fmt} ends at {fmt.max:g}"
    return Reason(code="state", text=text, site=str(site), numbers={"amax": amax, "limit": fmt.max})


def _flushed(site: Site, share: float, fmt: FloatFormat, limit: float) -> Reason:
    text = (
        f"params fp32: {share:.0%} of the non-zero values of the optimizer state {site.tensor} are flushed to zero in "
        f"{fmt}; {limit:.0%} are tolerated"
    )
    if site.tensor.endswith("exp_avg_sq"):
        text += "; Adam then divides by eps alone"
        if fmt.flush_below >= _ADAM_EPS:
            text += f", and eps={_ADAM_EPS:g} is itself 0 in {fmt}"
    return Reason(code="state", text=text, site=str(site), numbers={"flushed": share})
