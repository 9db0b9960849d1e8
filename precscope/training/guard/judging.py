"""Whose fault a failing step is: a module's, the loss scale's, the data's, the weights', or nobody's in particular."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ...batches import RandomStates
from ...tracing import Finding
from .amending import OUTSIDE
from .config import GuardConfig
from .looking import Look, error_of, finite, look, look_in_fp32, run_plain
from .signals import Signal

if TYPE_CHECKING:
    from ..loop import Trainer

_LOOKS = 6  # at ever smaller loss scales
_FINITE = ("spike", "suspect", "replay")  # signals of steps that may be right
_WRONG = 5.0  # times the tolerance: where no op is at fault, noise of a small gradient is no harm yet


@dataclass(frozen=True)
class Verdict:
    """kind: "module" (a format is to blame, found says where), "scale" (too high a loss scale), "data" (the batch is
    not finite), "weights" (a parameter or buffer is not), "everywhere" (fp32 fails, too), "sound" (the step is as in
    fp32), "harm" (finite, yet the gradient is not fp32's: no single op to name), "unexplained". scale: at which it
    shows. true: the same step in fp32. error: of the gradient against it, NaN where not measured."""

    kind: str
    text: str
    found: Finding | None = None
    scale: float = 1.0
    true: Look | None = None
    error: float = math.nan

    @property
    def module(self) -> str:
        """At fault, "" where none is known."""
        return (
            target_of(self.found) if self.found is not None and self.kind in ("module", "scale", "everywhere") else ""
        )

    @property
    def op(self) -> str:
        """Of the finding."""
        return self.found.op if self.found is not None else ""


def target_of(found: Finding) -> str:
    """What to promote for a finding."""
    return found.module if found.inside or found.module else OUTSIDE


def by_scale(found: Finding) -> bool:
    """Whether it is an overflow in backward that a smaller loss scale avoids."""
    return bool(found.loss_scale) and found.wide_amax is not None and "smaller scale" in found.cause


def fitting(found: Finding, scale: float) -> float:
    """The largest power-of-two fraction of `scale` at which an overflow by scale should be gone, one binade below."""
    assert found.wide_amax is not None
    return scale * 2.0 ** -(math.ceil(math.log2(max(found.wide_amax / found.limit, 1.0))) + 1)


def settled_look(
    trainer: Trainer, step: int, *, scale: float, random: RandomStates | None, floor: float, keep: bool = False
) -> tuple[Look, float]:
    """A look at the step at `scale`, or at the largest smaller one (not below `floor`) at which no finding is the
    scale's; and that scale."""
    for _ in range(_LOOKS):
        seen = look(trainer, step, scale=scale, random=random, keep=keep)
        if seen.found is None or not by_scale(seen.found) or fitting(seen.found, scale) < floor:
            break
        scale = fitting(seen.found, scale)
    return seen, scale


def judge(trainer: Trainer, signal: Signal, config: GuardConfig, random: RandomStates | None) -> Verdict:
    """Run the step again and say what it was. All processes come to the same verdict."""
    step, scale = signal.step, signal.scale
    true, error = None, math.inf
    if signal.kind in _FINITE:  # two steps, and the tracer only where they differ
        true = look_in_fp32(trainer, step, random=random)
        error = error_of(trainer, run_plain(trainer, step, scale=scale, random=random), true)
        if error <= config.tolerance:
            return Verdict("sound", f"the gradient is within {error:.1%} of fp32's", None, scale, true, error)
    seen = look(trainer, step, scale=scale, random=random)
    if seen.missed or seen.error:
        return Verdict("unexplained", f"the step cannot be run again: {seen.error}")
    first = seen.found
    if first is None:
        return _of_finite(trainer, signal, true, random, config)
    if first.kind == "held":
        return Verdict("data" if first.op else "weights", first.cause, first, scale)
    if by_scale(first):
        seen, fit = settled_look(trainer, step, scale=scale, random=random, floor=config.scale_floor, keep=True)
        if seen.clean:
            return _of_scale(trainer, signal, first, seen, fit, random, config)
        first, scale = seen.found or first, fit
    true = true or look_in_fp32(trainer, step, random=random)
    if not true.error and not finite(trainer, true):
        return Verdict("everywhere", f"{first.place}: {first.cause}; fp32 is not finite there either", first, scale)
    text = f"{first.place}: {first.cause}"
    if by_scale(first):
        text += f"; no loss scale of {config.scale_floor:g} or more is small enough"
    return Verdict("module", text, first, scale, true)


def _of_scale(
    trainer: Trainer, signal: Signal, first: Finding, seen: Look, fit: float, random: RandomStates | None,
    config: GuardConfig,
) -> Verdict:  # fmt: skip
    """Too high a scale is no module's fault, unless the one that fits leaves too little of the other gradients."""
    text = f"{first.place}: {first.cause}; the loss scale {signal.scale:g} is too high, {fit:g} fits"
    if fit == signal.scale or "falls" not in signal.numbers or signal.numbers["falls"] < config.scale_falls:
        return Verdict("scale", text, first, fit)
    true = look_in_fp32(trainer, signal.step, random=random)
    error = error_of(trainer, seen, true)
    if true.clean and error > config.tolerance:
        text += f", but there the whole gradient is {error:.0%} off fp32's: small gradients are lost"
        return Verdict("module", text, first, fit, true, error)
    return Verdict("scale", f"{text}, and the gradient is within {error:.1%} of fp32's", first, fit, true, error)


def _of_finite(
    trainer: Trainer, signal: Signal, true: Look | None, random: RandomStates | None, config: GuardConfig
) -> Verdict:
    """Nothing overflows when the step is run again: is it at least right?"""
    true = true or look_in_fp32(trainer, signal.step, random=random)
    if not true.clean:
        return Verdict("unexplained" if true.error else "everywhere", f"fp32: {true.error or 'not finite either'}")
    error = error_of(trainer, run_plain(trainer, signal.step, scale=signal.scale, random=random), true)
    if error > _WRONG * config.tolerance:
        text = f"every value is finite, and the whole gradient is {error:.0%} off that of fp32"
        return Verdict("harm", text, None, signal.scale, true, error)
    again = "" if signal.kind in _FINITE else "run again every value is finite, and "
    return Verdict("sound", f"{again}the gradient is within {error:.1%} of fp32's", None, signal.scale, true, error)
