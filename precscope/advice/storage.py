"""Where 16-bit parameters and buffers would harm training (policy "cast"): what storage swallows, and what it stops.

A parameter stored in 16 bits keeps an update only where it is at least half an ulp of the parameter. That harms where
most of what training does is lost, not where a few small updates are:

- trained tensors: the share of the *energy* of their updates (sum of squares over the run) that is swallowed. For SGD
  that is the share of the progress to first order, for Adam, whose updates are of one size, nearly the share of the
  updates. Updates that vanish as training converges hold no energy. What a tensor adds to the progress of the whole
  model is its weight: norms whose weights of 1 stay 1 in bf16 harm nobody where they add a hundredth.
- EMA copies, running statistics: how far storage would have left them behind, in ulps of the format. Running averages
  with momentum r stop up to 2^-p / r short of their goal: five ulps at the usual 0.1, hundreds at 0.001.
- weight decay: w (1 - lr wd) rounds back to w; what has no gradient then never decays.
- gradients summed over many backward passes: a sum stops growing at 2^(p+1) times one contribution.

What the optimizer's own state suffers in 16 bits is told by optimizer_state.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ..formats import FloatFormat, get_format
from ..histogram import swallowed_share
from ..plans import Reason
from ..profiles import Profile
from ..sites import Role, Site
from .evidence import Evidence, Finding
from .optimizer_state import decay_of, judge_state, optimizer_settings
from .updates import KEEPING, advised_state, advised_updates, sentence

_STUCK_SHARE = 0.25  # of the elements of an untrained tensor
_STUCK_ULPS = 8.0  # twice what a momentum of 0.1 leaves at worst, on average over a binade
_DEAD_SHARE = 0.25  # of the gradient elements that are exactly zero
_DECAYED = 0.05  # of the weights, over the recorded steps: less is no harm yet
_MOSTLY = 0.5  # of a tensor's update energy: what loses less still trains
_STEPS_AHEAD = 1000  # that a counter or a running average should go on for
_DECAY_AHEAD = 200  # that weight decay should work for
_TOLD = ("accumulation", "frozen", "eps")  # codes of reasons that are warnings for the optimizer, too
_FIX = "fp32 master weights or stochastic rounding"


def storage_reasons(
    profile: Profile, compute: Mapping[str, str], *, swallowed: float, flushed_state: float, updates: str | None = None
) -> dict[str, list[Reason]]:
    """Units whose tensors must stay fp32, and why: unit -> reasons, one of each code. No torch is needed.

    compute: unit -> format its tensors would be stored in; wider ones than 16 bits are not judged. Name all of
    `stored_modules` there, also those that never ran, such as an EMA copy. swallowed: share of the
    model's progress that storage may lose, to first order (of each tensor's updates, where the run was recorded
    without energies). flushed_state: share of the non-zero elements of an optimizer state that may be flushed to zero.
    updates: how the optimizer writes parameters (see updates.py); None: rounded to nearest, with state in their format.

    Codes: "swallowed", "decay", "accumulation", "frozen" (a counter that stops; a second moment that cannot decay),
    "eps", "state". Units without recorded updates are not judged.
    """
    low = {unit: get_format(fmt) for unit, fmt in compute.items() if get_format(fmt).bits == 16}
    evidence = Evidence(profile)
    worst: dict[tuple[str, str], Finding] = {}
    for finding in _judge(evidence, low, swallowed, flushed_state, updates):
        key = finding.unit, finding.reason.code
        if key not in worst or worst[key].badness < finding.badness:
            worst[key] = finding
    reasons: dict[str, list[Reason]] = {}
    for (unit, _), finding in worst.items():
        reasons.setdefault(unit, []).append(finding.reason)
    return reasons


def stored_modules(profile: Profile) -> list[str]:
    """Modules that own tensors which some recorded step changed, or tried to, whether or not they ran."""
    return list(dict.fromkeys(s.module for s in profile.sites if s.role is Role.UPDATE))


def optimizer_advice(
    profile: Profile,
    compute: Mapping[str, str],
    reasons: Mapping[str, list[Reason]] | None = None,
    *,
    updates: str | None = None,
    flushed_state: float = 0.01,
) -> dict[str, Any]:
    """For PrecisionPlan.optimizer: {"groups": [{"class", "parameters", "state", "eps"}], "warnings": [sentences]}.

    compute: unit -> format its parameters would be stored in, before `reasons` (of `storage_reasons`) keep some fp32.
    A group's "state" is "fp32" where one of its parameters needs that, else the widest format of its parameters; "eps"
    is what the optimizer should use where its own is lost in that format. {} where all is stored in fp32.

    updates: how the optimizer writes parameters; then "updates" and "state" are there for the trainer to follow, state
    "bf16" where the run allows it (flushed_state: as for `storage_reasons`). None: where that would let more parameters
    be low, "advised_updates" names one, and a warning says so.
    """
    low = {unit: get_format(fmt) for unit, fmt in compute.items() if get_format(fmt).bits == 16}
    if not low:
        return {}
    evidence = Evidence(profile)
    groups, warnings = optimizer_settings(evidence, low, reasons or {})
    told = [f"{u or '(root)'}: {r.text}" for u, found in (reasons or {}).items() for r in found if r.code in _TOLD]
    if updates is not None:
        state = advised_state(profile, low, flushed_state)
        groups = [{**{k: v for k, v in group.items() if k != "eps"}, "state": state} for group in groups]
        return {"updates": updates, "state": state, "groups": groups, "warnings": list(dict.fromkeys(told))}
    advised = advised_updates(profile, low, reasons or {})
    hint = sentence(advised, reasons or {}, low)
    advice = {"groups": groups, "warnings": list(dict.fromkeys([*warnings, *told, *([hint] if hint else [])]))}
    return {**advice, "advised_updates": advised} if hint else advice


def _judge(
    evidence: Evidence, low: Mapping[str, FloatFormat], swallowed: float, flushed_state: float, updates: str | None
) -> Iterator[Finding]:
    keeps = updates in KEEPING
    for site in evidence.updated():
        fmt = low.get(site.module)
        if fmt is None:
            continue
        if evidence.is_trained(site) or not evidence.knows_swallowed:
            if not keeps:
                yield from _decay(evidence, site, fmt)
            yield from _accumulation(evidence, site, fmt)
        else:
            yield from _left_behind(evidence, site, fmt)
            yield from _counter(evidence, site, fmt)
    for site in evidence.summed():  # without an optimizer there are no updates, yet .grad is summed
        if site.module in low and evidence.row(site, Role.UPDATE) is None:
            yield from _accumulation(evidence, site._replace(role=Role.UPDATE), low[site.module])
    if not keeps:
        yield from _swallowed(evidence, low, swallowed)
    if updates is None:
        yield from judge_state(evidence, low, flushed_state)


def _swallowed(evidence: Evidence, low: Mapping[str, FloatFormat], limit: float) -> Iterator[Finding]:
    """Trained tensors whose updates are lost, those that matter most first, until hardly any progress is lost."""
    sites = [s for s in evidence.updated() if s.module in low]
    if not evidence.knows_swallowed:
        for site in sites:
            reason = _swallowed_reason(evidence, site, low[site.module], None, limit)
            if reason.numbers["lo"] > limit:
                yield Finding(site.module, reason.numbers["lo"], reason)
        return
    standing = evidence.standing()
    lost = {s: evidence.swallowed_energy(s, low[s.module]) for s in sites if s in standing}
    lost = {s: standing[s] * share for s, share in lost.items() if share > _MOSTLY}
    left = sum(lost.values())
    if left <= limit:
        return
    for site in sorted(lost, key=lost.__getitem__, reverse=True):
        if left <= limit / 10:
            return
        reason = _swallowed_reason(evidence, site, low[site.module], lost[site], limit)
        yield Finding(site.module, lost[site], reason)
        left -= lost[site]


def _swallowed_reason(evidence: Evidence, site: Site, fmt: FloatFormat, lost: float | None, limit: float) -> Reason:
    counts, unchanged, from_zero = evidence.profile.ratios[evidence.index[site]]
    lo, hi = (float(x) for x in swallowed_share(counts, fmt.precision, unchanged=unchanged, from_zero=from_zero))
    text = (
        f"params fp32: {lo:.0%} to {hi:.0%} of the updates of {site.tensor} are below half an ulp in {fmt} and would "
        "be swallowed"
    )
    numbers = {"lo": lo, "hi": hi}
    if lost is None:
        text += f"; {limit:.0%} are tolerated"
    else:
        energy = evidence.swallowed_energy(site, fmt)
        text += f", {energy:.0%} of their energy, which holds {lost:.1%} of the whole model's progress"
        numbers |= {"energy": energy, "progress": lost}
    text += f"; {_FIX} would keep them, and so would a larger learning rate"
    return Reason(code="swallowed", text=text, site=str(site), numbers=numbers)


def _left_behind(evidence: Evidence, site: Site, fmt: FloatFormat) -> Iterator[Finding]:
    """An EMA copy or a running statistic that would stop moving."""
    stuck = evidence.stuck(site, fmt, ahead=_STEPS_AHEAD)
    if stuck.share < _STUCK_SHARE or max(stuck.ulps, stuck.ulps_ahead) < _STUCK_ULPS:
        return
    when = f"by {stuck.ulps:.0f} ulps (rms)"
    if stuck.ulps < _STUCK_ULPS:
        when += f", and at this pace by {stuck.ulps_ahead:.0f} in {_STEPS_AHEAD} steps more"
    text = (
        f"kept fp32: {site.tensor} moves in steps below half an ulp of {fmt}; stored in it, {stuck.share:.0%} of its "
        f"elements would have been left behind in the recorded steps, {when}; {_STUCK_ULPS:g} are tolerated; keep it "
        "in fp32, or round stochastically"
    )
    numbers = {"share": stuck.share, "ulps": stuck.ulps}
    yield Finding(site.module, stuck.ulps, Reason(code="swallowed", text=text, site=str(site), numbers=numbers))


def _counter(evidence: Evidence, site: Site, fmt: FloatFormat) -> Iterator[Finding]:
    """A tensor that grows by one and the same amount each step stops at 2^(p+1) times that amount."""
    table, row = evidence.profile.table, evidence.index[site]
    step, rows = float(table.amax[row]), evidence.history(site)
    if len(rows) < 3 or table.zeros[row] or step == 0 or table.amin_nonzero[row] != step:
        return
    end = step * 2 ** (fmt.precision + 1)
    weights = evidence.history(site._replace(role=Role.WEIGHT))
    left = (end - float(weights.amax.iloc[-1])) / step if len(weights) else end / step
    if abs(float(table.sum[row])) < 0.999 * step * table.count[row] or left > max(_STEPS_AHEAD, 10 * evidence.span):
        return
    text = (
        f"kept fp32: {site.tensor} counts by {step:g} a step, and {fmt} stops counting at {end:g}; keep it in fp32 or "
        "as an integer"
    )
    yield Finding(site.module, 1.0, Reason(code="frozen", text=text, site=str(site), numbers={"limit": end}))


def _decay(evidence: Evidence, site: Site, fmt: FloatFormat) -> Iterator[Finding]:
    """Weight decay that rounds away, on elements that nothing else moves."""
    rate = decay_of(evidence.settings(site.module, site.tensor))
    gradient = evidence.row(site, Role.GRAD_WEIGHT)
    if gradient is None or not 0 < rate < 2.0 ** -(fmt.precision + 1):
        return
    table = evidence.profile.table
    dead = float(table.zeros[gradient] / max(table.count[gradient], 1))
    steps = max(evidence.span, _DECAY_AHEAD)
    if dead < _DEAD_SHARE or rate * steps < _DECAYED:
        return
    text = (
        f"params fp32: weight decay takes lr * weight_decay = {rate:.3g} of {site.tensor} per step, below half an ulp "
        f"in {fmt} ({2.0 ** -(fmt.precision + 1):.3g}), so that it rounds back; {dead:.0%} of its gradient is zero and "
        f"those elements would not decay at all ({1 - (1 - rate) ** steps:.0%} over {steps} steps "
        f"in fp32); {_FIX} would"
    )
    numbers = {"rate": rate, "dead": dead, "limit": 2.0 ** -(fmt.precision + 1)}
    yield Finding(site.module, dead, Reason(code="decay", text=text, site=str(site), numbers=numbers))


def _accumulation(evidence: Evidence, site: Site, fmt: FloatFormat) -> Iterator[Finding]:
    """A gradient that is the sum of more contributions than its format can add up."""
    additions = evidence.additions(site)
    limit = 2.0 ** (fmt.precision + 1)
    if additions <= limit:
        return
    growth = evidence.growth(site, additions)
    if growth <= limit:  # NaN, where the run has no sums: contributions may point one way
        return
    reach = f"grows to {growth:.0f} times one contribution" if growth == growth else "may grow as many times"
    text = (
        f"params fp32: {additions} backward passes a step add up in the gradient of {site.tensor}, which {reach}; in "
        f"{fmt} a sum stops growing at {limit:g} to {2 * limit:g} times; accumulate in an fp32 buffer (main_grad), or "
        "over fewer passes"
    )
    numbers = {"additions": float(additions), "limit": limit} | ({"growth": growth} if growth == growth else {})
    yield Finding(site.module, numbers.get("growth", limit), Reason(
        code="accumulation", text=text, site=str(site), numbers=numbers))  # fmt: skip
