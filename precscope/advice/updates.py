"""How an optimizer should write parameters that are stored in 16 bits, by the size of the updates that were recorded.

What counts is the size of updates in ulps of their parameters, which the statistics of a run tell for every format:

- rounding to nearest keeps it from half an ulp on;
- stochastic rounding keeps the mean of any update, and adds noise of variance |dw| ulp to each: over T steps of one
  direction the noise is sqrt(ulp / (T |dw|)) of the way gone. It costs no memory;
- Kahan compensation keeps the rest without noise, for 2 bytes: all of it for bf16, down to 2^-9 ulp for fp16;
- fp32 master weights keep what fp32 keeps, for 4 bytes.

State under these optimizers is fp32, whatever the parameters are; where it may be bf16 is judged like any format, save
that it is rounded stochastically there and so can decay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from ..errors import UsageError
from ..formats import FloatFormat, get_format
from ..histogram import rounding_table
from ..plans import Reason
from ..profiles import Profile
from ..sites import Role
from .evidence import Evidence
from .optimizer_state import judge_state

UPDATES = ("nearest", "stochastic", "kahan", "master")
KEEPING = UPDATES[1:]
"""Those under which small updates are not swallowed."""

_STOCHASTIC_FROM = -8  # log2 of an update in ulps: half of what a thousand steps of one direction go is noise there
_BYTES = {"nearest": 2, "stochastic": 2, "kahan": 4, "master": 6}


def check_updates(updates: str | None) -> None:
    """Raises UsageError where `updates` is neither None, "auto" nor a way to write updates."""
    if updates not in (None, "auto", *UPDATES):
        raise UsageError(f"updates must be one of {', '.join(UPDATES)}, 'auto' or None, not {updates!r}")


def advised_updates(profile: Profile, low: Mapping[str, FloatFormat], reasons: Mapping[str, list[Reason]]) -> str:
    """The least that keeps the updates of the parameters of `low` (unit -> format it would be stored in).

    reasons: of `storage_reasons` without an optimizer that keeps them; where none is a swallowed update or decay,
    "nearest" will do.
    """
    if not any(_is_swallowed(r) for found in reasons.values() for r in found):
        return "nearest"
    size = _in_ulps(Evidence(profile), low)
    if size >= _STOCHASTIC_FROM:
        return "stochastic"
    return "kahan" if size >= -9 or all(fmt.name == "bf16" for fmt in low.values()) else "master"


def kept_by(updates: str, reasons: list[Reason]) -> list[Reason]:
    """What a plan says of a module whose parameters are stored low after all, since the optimizer keeps its updates."""
    said = []
    for reason in reasons:
        told = reason.text.removeprefix("params fp32: ").partition(";")[0]
        text = f"low parameters: {told}; the optimizer keeps them (updates={updates!r})"
        said.append(Reason(code="updates", text=text, site=reason.site, numbers=reason.numbers))
    return said


def sentence(updates: str, reasons: Mapping[str, list[Reason]], low: Mapping[str, FloatFormat]) -> str:
    """What to do about modules that must be fp32 only since plain storage swallows their updates; "" for none."""
    units = [u for u, found in reasons.items() if u in low and found and all(_is_swallowed(r) for r in found)]
    if not units or updates not in KEEPING:
        return ""
    formats = " and ".join(dict.fromkeys(str(low[u]) for u in units))
    return (
        f"{len(units)} modules keep fp32 parameters since plain {formats} storage would swallow their updates; with "
        f"updates={updates!r} ({_BYTES[updates]} bytes per parameter) they can be {formats}: "
        f"precscope.recommend(..., policy='cast', updates={updates!r})"
    )


def advised_state(profile: Profile, units: Mapping[str, Any], limit: float) -> str:
    """What the optimizer's state can be stored in: "bf16" where nothing recorded speaks against it, else "fp32".

    limit: share of the non-zero values of a state that may be flushed.
    """
    evidence, bf16 = Evidence(profile), get_format("bf16")
    if not any(s.module in units for s in evidence.states()):
        return "fp32"  # there is none
    found = judge_state(evidence, dict.fromkeys(units, bf16), limit)
    return "fp32" if any(f.reason.code != "frozen" for f in found) else "bf16"


def _is_swallowed(reason: Reason) -> bool:
    return reason.code in ("swallowed", "decay") and reason.text.startswith("params fp32")


def _in_ulps(evidence: Evidence, low: Mapping[str, FloatFormat]) -> float:
    """log2 of the rms update in rms ulps, averaged over trained parameters by what each adds to the progress of the
    model; 0 where no update was recorded."""
    table, total, weight = evidence.profile.table, 0.0, 0.0
    for site, share in evidence.standing().items():
        update, values = evidence.index[site], evidence.row(site, Role.WEIGHT)
        if site.module not in low or values is None or not table.sumsq[update] > 0:
            continue
        ulps = 12.0 * float(table.counts[values] @ rounding_table(low[site.module]).error) / int(table.count[values])
        if ulps > 0:
            moved = float(table.sumsq[update]) / int(table.count[update])
            total += share * 0.5 * math.log2(moved / ulps)
            weight += share
    return total / weight if weight else 0.0
