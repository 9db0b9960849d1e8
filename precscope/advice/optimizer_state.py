"""What the state of optimizers suffers in a 16-bit format, and what an optimizer's settings should be there.

State follows the dtype of its parameter. Adam's second moment v holds squares of gradients, which fp16 flushes to zero
from |g| of about 5e-3 sqrt(1 - beta2) down; the update m / (sqrt(v) + eps) is then m / eps, and eps = 1e-8 itself is 0
in fp16: 0/0 or m/0 in every element whose gradient is small or zero. With an eps of the size of the square root of the
smallest subnormal the same flushing changes steps by a small factor only. In bf16 v can hold any square, but with
beta2 = 0.999 it cannot decay: v (1 - 0.001) rounds back to v.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from ..formats import FloatFormat
from ..plans import Reason
from ..sites import Role, Site
from .evidence import Evidence, Finding, flushed_energy

_ADAM_EPS, _ADAM_BETAS = 1e-8, (0.9, 0.999)  # defaults of torch.optim.Adam and AdamW
_SQUARES = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "exp_avg_sq_row", "exp_avg_sq_col")
_SLOWED = 4.0  # times smaller the steps may get where v is flushed but eps is not
_FROZEN = 4.0  # times its present value that a second moment may have had: steps are then half as long


def judge_state(evidence: Evidence, low: Mapping[str, FloatFormat], limit: float) -> Iterator[Finding]:
    """What formats do to the state of the parameters of each unit of `low`. limit: share flushed that is tolerated."""
    table = evidence.profile.table
    for fmt in dict.fromkeys(low.values()):
        sites = [s for s in evidence.states() if low.get(s.module) == fmt]
        rows = np.asarray([evidence.index[s] for s in sites], np.int64)
        answer = table.take(rows).ask(fmt)
        for i, site in enumerate(sites):
            tensor, _, key = site.tensor.rpartition(".")
            settings = evidence.settings(site.module, tensor)
            row = rows[i]
            if answer["overflow_hi"][i] > 0:
                yield Finding(site.module, math.inf, _overflowing(site, float(table.amax[row]), fmt))
                continue
            nonzero = max(int(table.count[row] - table.zeros[row]), 1)
            share = float(answer["flushed"][i]) * int(table.count[row]) / nonzero
            if key in _SQUARES:
                yield from _square(evidence, site, fmt, settings, share, limit)
                yield from _frozen(evidence, site, fmt, settings)
            elif share > limit and _matters(evidence, site, fmt, settings, limit):
                yield Finding(site.module, share, _flushed(site, share, fmt, limit))


def _matters(evidence: Evidence, site: Site, fmt: FloatFormat, settings: Mapping[str, Any], limit: float) -> bool:
    """Whether flushing a first moment or a momentum is felt: small ones matter where Adam divides them by their size,
    not where the update is proportional to them or eps is what they are divided by."""
    row = evidence.index[site]
    energy = flushed_energy(evidence.profile.table.counts[row], float(evidence.profile.table.sumsq[row]), fmt)
    if energy > limit:
        return True
    normalised = any(
        evidence.row(site, Role.STATE, f"{site.tensor.rpartition('.')[0]}.{k}") is not None for k in _SQUARES
    )
    return normalised and _eps(settings) < fmt.flush_below


def _square(
    evidence: Evidence, site: Site, fmt: FloatFormat, settings: Mapping[str, Any], share: float, limit: float
) -> Iterator[Finding]:
    """A second moment: flushed values, and zeros, are divided by eps alone."""
    table, row, eps = evidence.profile.table, evidence.index[site], _eps(settings)
    lost = float(table.amin_nonzero[row]) <= fmt.flush_below
    if eps <= fmt.flush_below:
        if table.zeros[row] or lost:
            yield Finding(site.module, 1.0 + share, _no_eps(site, eps, share, int(table.zeros[row]), fmt))
    elif share > limit and _slowest(eps, fmt) > _SLOWED:
        yield Finding(site.module, share, _flushed(site, share, fmt, limit, eps))


def _slowest(eps: float, fmt: FloatFormat) -> float:
    """How many times longer a step gets, at most, where v is flushed: (sqrt(v) + eps) / eps."""
    return (math.sqrt(fmt.flush_below) + eps) / eps


def _frozen(evidence: Evidence, site: Site, fmt: FloatFormat, settings: Mapping[str, Any]) -> Iterator[Finding]:
    """A second moment whose decay rounds away, and that did decay in the recorded run."""
    rate = _rate(settings)
    if rate >= 2.0 ** -(fmt.precision + 1):
        return
    rows = evidence.history(site)
    mean = rows["sum"].to_numpy() / rows["count"].to_numpy()
    fell = float(mean.max() / mean[-1]) if len(mean) and mean[-1] > 0 else 1.0
    if fell > _FROZEN:
        text = (
            f"params fp32: {site.tensor} fell {fell:.1f} times in the recorded run; in {fmt} it cannot fall, since "
            f"1 - beta2 = {rate:.3g} of it is below half an ulp ({2.0 ** -(fmt.precision + 1):.3g}), and steps would "
            f"be {math.sqrt(fell):.1f} times too short; keep the state in fp32, or take a smaller beta2"
        )
        yield Finding(site.module, fell, Reason(code="frozen", text=text, site=str(site), numbers={"fell": fell}))


def optimizer_settings(
    evidence: Evidence, low: Mapping[str, FloatFormat], reasons: Mapping[str, list[Reason]]
) -> tuple[list[dict[str, Any]], list[str]]:
    """(groups, warnings) of optimizer_advice."""
    groups, warnings = [], []
    for optimizer in evidence.profile.run.get("optimizers", []):
        for group in optimizer.get("groups", []):
            units = {name.rpartition(".")[0] for name in group.get("parameters", [])}
            formats = {low[u] for u in units if u in low and not reasons.get(u)}
            state = "fp32" if units & set(reasons) or not units & set(low) else str(max(formats, key=lambda f: f.emax))
            advice = {"class": optimizer["class"], "parameters": list(group.get("parameters", [])), "state": state}
            settings = {**group, "class": optimizer["class"]}
            for fmt in dict.fromkeys(f for u, f in low.items() if u in units):
                warnings += _warnings(settings, fmt)
                if "betas" in group and _eps(settings) <= fmt.flush_below:
                    advice["eps"] = _enough_eps(fmt)
            groups.append(advice)
    return groups, warnings


def _warnings(settings: Mapping[str, Any], fmt: FloatFormat) -> Iterator[str]:
    name, half_ulp = settings["class"], 2.0 ** -(fmt.precision + 1)
    eps, rate, decay = _eps(settings), _rate(settings), decay_of(settings)
    if "betas" in settings and eps <= fmt.flush_below:
        yield f"{name}: eps={eps:g} is 0 in {fmt}; with state in {fmt} use eps={_enough_eps(fmt):g}"
    if "betas" in settings and rate < half_ulp:
        yield (
            f"{name}: with beta2={1 - rate:g} the second moment cannot decay in {fmt} (1 - beta2 is below half an ulp, "
            f"{half_ulp:.3g}): steps stay too short after gradients shrink; keep the state in fp32"
        )
    if 0 < decay < half_ulp:
        yield (
            f"{name}: weight decay of lr * weight_decay = {decay:.3g} per step rounds away on {fmt} parameters (half "
            f"an ulp is {half_ulp:.3g}); keep fp32 master weights, or round stochastically"
        )


def decay_of(settings: Mapping[str, Any]) -> float:
    """The share of itself that weight decay takes of a parameter per step on its own: lr * weight_decay, 0 where the
    decay goes through Adam's normalisation, or where the settings are not known."""
    decoupled = settings.get("decoupled_weight_decay", str(settings.get("class", "")).endswith("W"))
    if "betas" in settings and not decoupled:
        return 0.0
    return float(settings.get("lr", 0.0)) * float(settings.get("weight_decay", 0.0) or 0.0)


def _eps(settings: Mapping[str, Any]) -> float:
    eps = settings.get("eps", _ADAM_EPS)
    return float(eps[0] if isinstance(eps, list) else eps if eps is not None else _ADAM_EPS)


def _rate(settings: Mapping[str, Any]) -> float:
    """1 - beta2, or RMSprop's 1 - alpha."""
    if "alpha" in settings and "betas" not in settings:
        return 1.0 - float(settings["alpha"])
    return 1.0 - float(settings.get("betas", _ADAM_BETAS)[-1])


def _enough_eps(fmt: FloatFormat) -> float:
    """The power of ten that keeps steps within _SLOWED where the second moment is flushed: 1e-4 for fp16."""
    return 10.0 ** math.ceil(math.log10(math.sqrt(fmt.flush_below) / (_SLOWED - 1)))


def _overflowing(site: Site, amax: float, fmt: FloatFormat) -> Reason:
    text = f"params fp32: the optimizer state {site.tensor} reaches {amax:.4g}, {fmt} ends at {fmt.max:g}"
    return Reason(code="state", text=text, site=str(site), numbers={"amax": amax, "limit": fmt.max})


def _no_eps(site: Site, eps: float, share: float, zeros: int, fmt: FloatFormat) -> Reason:
    values = f"{share:.0%} of its non-zero values are flushed to zero in {fmt}"
    if zeros:
        values += f" and {zeros} were zero as recorded"
    text = (
        f"params fp32: Adam divides by sqrt({site.tensor}) + eps, {values}, and eps={eps:g} is itself 0 in {fmt} "
        f"(half its smallest subnormal is {fmt.flush_below:.3g}): 0/0 or m/0; keep fp32 master weights and state, or "
        f"take eps={_enough_eps(fmt):g}"
    )
    return Reason(
        code="eps", text=text, site=str(site), numbers={"flushed": share, "eps": eps, "limit": fmt.flush_below}
    )


def _flushed(site: Site, share: float, fmt: FloatFormat, limit: float, eps: float | None = None) -> Reason:
    text = (
        f"params fp32: {share:.0%} of the non-zero values of the optimizer state {site.tensor} are flushed to zero in "
        f"{fmt}; {limit:.0%} are tolerated"
    )
    if eps is not None:
        text += f"; Adam then divides by eps={eps:g} alone, and steps get up to {_slowest(eps, fmt):.0f} times longer"
    text += f"; keep the state in fp32{'' if eps is None else f', or take eps={_enough_eps(fmt):g}'}"
    return Reason(code="state", text=text, site=str(site), numbers={"flushed": share})
