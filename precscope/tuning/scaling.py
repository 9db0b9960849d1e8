"""The loss scale's start and its growth interval, from recorded gradients.

A scale that doubles every n steps skips one step each time it has gone too far: at most one in n + 1. It must double
fast enough to follow gradients that shrink as training goes on, and to come back within a run after a fall.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np

from ..advice.loss_scale import largest_scale
from ..formats import get_format
from ..plans import PrecisionPlan
from ..profiles import Profile

LONGEST, SHORTEST = 2000, 20  # steps between doublings; GradScaler's own is 2000
_DOUBLINGS = 10  # that a run should have time for
_LEAST_DRIFT = 1.0  # binades over the recorded steps: less is scatter


@dataclass(frozen=True)
class GrowthChoice:
    """interval: steps without overflow before the scale doubles. drift: binades per step by which the largest scale
    that fits rose over the recorded steps (gradients shrank), 0 where that is scatter. text: why, in words."""

    interval: int
    drift: float
    text: str


def choose_growth(profile: Profile, modules: Collection[str], *, steps: int) -> GrowthChoice:
    """For a run of `steps` steps whose `modules` compute in fp16."""
    at, fits = largest_scales(profile, modules)
    drift = _drift(at, fits)
    interval = min(LONGEST, max(SHORTEST, steps // _DOUBLINGS))
    text = f"a run of {steps} steps has time for {steps // interval} doublings of {interval} steps"
    if drift > 0 and 0.5 / drift < interval:
        interval = max(SHORTEST, int(0.5 / drift))
        text = (
            f"the largest scale that fits rose from 2^{fits[0]} to 2^{fits[-1]} between steps {at[0]} and {at[-1]}, "
            f"one doubling in {1 / drift:.0f} steps"
        )
    elif interval == LONGEST:
        stayed = f"the largest scale that fits stayed near 2^{int(np.median(fits))}"
        text = stayed if fits else "no recorded gradient speaks against it"
    text += f"; doubling every {interval} steps costs at most one skipped step in {interval + 1}"
    return GrowthChoice(interval, drift, text)


def largest_scales(profile: Profile, modules: Collection[str]) -> tuple[list[int], list[int]]:
    """(recorded steps, exponent of the largest loss scale that no gradient of `modules` overflows fp16 with)."""
    peaks, wanted = profile.peaks, set(modules)
    rows = [i for i, s in enumerate(peaks.sites) if s.role.is_gradient and s.module in wanted]
    amax = np.nan_to_num(peaks.amax[rows], nan=0.0).max(0, initial=0.0)
    keep = np.isfinite(amax) & (amax > 0)
    fmt = get_format("fp16")
    return peaks.steps[keep].tolist(), [largest_scale(float(a), fmt) for a in amax[keep]]


def _drift(at: list[int], fits: list[int]) -> float:
    if len(at) < 3 or fits[-1] - fits[0] < _LEAST_DRIFT:
        return 0.0
    slope = float(np.polyfit(at, fits, 1)[0])
    return max(slope, 0.0) if slope * (at[-1] - at[0]) >= _LEAST_DRIFT else 0.0


def half_modules(profile: Profile, plan: PrecisionPlan) -> list[str]:
    """Modules of the recorded run that `plan` computes in fp16."""
    return [n for n, layer in plan.resolve(profile.modules).items() if layer.compute == "fp16"]
