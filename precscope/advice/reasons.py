"""Why a unit computes in its format, in words: what ranges forbid, then what the times say."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from ..formats import get_format
from ..plans import Reason
from .constraints import Verdicts
from .cost import CostTable
from .noise import Noise
from .units import ModelGraph

_HOW = {
    "measured": "measured",
    "emulated": "measured, emulated formats at fp32's time",
    "model": "by the FLOP/byte model",
}


@dataclass(frozen=True)
class Choice:
    """What the reasons speak about. main: the 16-bit format of the plan, "fp32" where fp32 throughout won.
    threshold_ms: unit -> what leaving the main format must gain; 0 where the main format is forbidden."""

    formats: Sequence[str]
    main: str
    threshold_ms: dict[str, float]
    verdicts: Verdicts
    costs: CostTable
    graph: ModelGraph
    noise: Noise = field(default_factory=Noise)

    def allowed(self, unit: str) -> list[str]:
        """Formats that ranges allow."""
        return [f for f in self.formats if self.verdicts.allows(unit, f)]


def reasons_for(unit: str, compute: str, choice: Choice) -> list[Reason]:
    """What forbids the other formats, then why `compute` among those that remain, then what is not known of it."""
    reasons: list[Reason] = []
    for fmt in choice.formats:
        found = choice.verdicts.forbidden.get((unit, fmt), ())
        for reason in sorted(found, key=lambda r: -r.numbers.get("amax", 0.0))[:2]:
            if reason.code != "cost":
                reasons.append(reason.model_copy(update={"text": f"not {fmt}: {reason.text}"}))
    reasons.append(_cost_reason(unit, compute, choice))
    reasons += choice.verdicts.doubts.get((unit, compute), ())[:2]
    return reasons


def _cost_reason(unit: str, compute: str, choice: Choice) -> Reason:
    """Why `compute` among the formats that are allowed."""
    allowed = choice.allowed(unit)
    times = {f: choice.costs.time_ms[unit, f] for f in allowed}
    if len(allowed) == 1:
        return Reason(code="only", text=f"{compute} is what remains", site=None, numbers={})
    word = _HOW[choice.costs.how[unit, compute]]
    listed = ", ".join(f"{f} {times[f]:.3g}" for f in sorted(allowed, key=times.__getitem__))
    best = min(times.values())
    if max(times.values()) == best:
        text = f"as its neighbours: it does nothing itself that is faster in one of {', '.join(allowed)}"
    elif times[compute] == best:
        text = f"fastest allowed ({listed} ms, {word})"
    elif times[compute] <= 1.02 * best:
        text = f"within 2% of the fastest allowed ({listed} ms, {word})"
    else:
        text = f"{_why_not_fastest(unit, compute, times, choice)} ({listed} ms, {word})"
    return Reason(code="cost", text=text, site=None, numbers={f"time_ms_{f}": t for f, t in times.items()})


def _why_not_fastest(unit: str, compute: str, times: dict[str, float], choice: Choice) -> str:
    """What keeps out the fastest format that is allowed."""
    fastest = min(times, key=times.__getitem__)
    gain = times[compute] - times[fastest]
    partners = [n for group in choice.graph.groups if unit in group for n in group if n != unit]
    main, threshold = choice.main, choice.threshold_ms.get(unit, 0.0)
    if get_format(main).bits > 16 and len(choice.formats) > 1:
        return f"{main} throughout: no mix of formats gains 2% over it in all; {fastest} would save {gain:.2g} ms here"
    if choice.noise.known and choice.noise.of(unit, fastest) > 0.02 * choice.noise.budget and gain > threshold:
        return (
            f"{fastest} here would add loss noise of {choice.noise.of(unit, fastest) ** 0.5:.2g} (standard deviation), "
            f"the whole plan may have {choice.noise.budget**0.5:.2g}; it would save {gain:.2g} ms"
        )
    if partners:
        return f"one format with {', '.join(partners[:3])}, whose weights are tied to it"
    if get_format(fastest).bits == 16 and fastest != main and main in times:
        return f"one 16-bit format per plan, here {main}: {fastest} would save {gain:.2g} ms here"
    if compute == main and gain <= threshold:
        return (
            f"as its neighbours: {fastest} would save {gain:.2g} ms here, within the noise of such times "
            f"({threshold:.2g} ms)"
        )
    if compute == main and threshold:
        return f"as its neighbours: {fastest} would save {gain:.2g} ms here, less than its casts and the noise cost"
    return f"as its neighbours: {fastest} would save {gain:.2g} ms here, less than its casts cost"
