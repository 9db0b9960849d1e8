"""What a guard does about a verdict: plans tried on the failing step itself, until it runs and is right.

Which format is safer is not taken from a table alone: the next one is put on the guilty module, the failing step is run
again under the tracer, and what then comes to light is promoted too. When every value is finite, the gradient is
compared with fp32's; where bf16 is not near enough, fp32 is tried in its place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from ...batches import RandomStates
from ...formats import get_format
from ...plans import PrecisionPlan
from .amending import EVERYTHING, Names, Promotion, amended, format_of, safer
from .config import GuardConfig
from .judging import Verdict, settled_look, target_of
from .looking import Look, error_of, look_in_fp32, run_plain

if TYPE_CHECKING:
    from ..loop import Trainer


_PRUNED = 6  # promotions up to which each is questioned once more


@dataclass
class Episode:
    """Promotions that were made together, and are taken back together. since: the step from which they hold. quiet:
    steps without alarm until the format before is tried again. trying: whether it is being tried since `since`."""

    promotions: list[Promotion]
    since: int
    quiet: int
    trying: bool = False

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"promotions": [p.to_list() for p in self.promotions], "since": self.since, "quiet": self.quiet,
                "trying": self.trying}  # fmt: skip

    @classmethod
    def from_dict(cls, state: dict[str, Any]) -> Episode:
        """Inverse of to_dict."""
        promotions = [Promotion.from_list(values) for values in state["promotions"]]
        return cls(promotions, state["since"], state["quiet"], state["trying"])


@dataclass
class Tried:
    """promotions: what was tried. scale, error: of the step with it; error is NaN where fp32 could not be run."""

    promotions: list[Promotion]
    scale: float
    error: float

    @property
    def text(self) -> str:
        """What was promoted, in words, and how good it is."""
        parts = [f"{p.target or '(root)'} to {p.compute}" for p in self.promotions]
        shown = ", ".join(parts[:4]) + (f" and {len(parts) - 4} more" if len(parts) > 4 else "")
        known = not math.isnan(self.error)
        return f"From here on {shown}" + (f": the gradient is within {self.error:.1%} of fp32's" if known else "")


class Planner:
    """The plan of a run: how it began, and the promotions in force. start: None until something is amended."""

    def __init__(self, config: GuardConfig) -> None:
        self.config = config
        self.start: PrecisionPlan | None = None
        self.episodes: list[Episode] = []

    def begin(self, trainer: Trainer) -> None:
        """Once the model is there."""
        self.names = Names(trainer.model)

    def plan(self, trainer: Trainer, more: Sequence[Promotion] = ()) -> PrecisionPlan:
        """The plan with the promotions in force and `more`."""
        if self.start is None:
            word = trainer.precision.word
            self.start = trainer.plan if trainer.plan is not None else PrecisionPlan.uniform(word)
        held = [p for e in self.episodes if not e.trying for p in e.promotions]
        return amended(self.start, [*held, *more], self.names)

    def put(self, trainer: Trainer, step: int, more: Sequence[Promotion] = (), *, tried: bool = False) -> None:
        """Train on with that. tried: it is not said yet that it stays."""
        trainer.switch(self.plan(trainer, more), step=step, why="" if tried else "guard")

    def all_high(self, trainer: Trainer) -> bool:
        """Whether nothing computes below fp32."""
        return not safer(format_of(self.plan(trainer).at_step(trainer.in_force), EVERYTHING))

    # a failing step

    def cure(
        self, trainer: Trainer, step: int, verdict: Verdict, *, scale: float, random: RandomStates | None
    ) -> Tried | None:
        """Promotions under which `step` runs and is right; they are in force then. None, and the plan as it was, where
        there are none. scale: the loss scale to run with."""
        true = verdict.true or look_in_fp32(trainer, step, random=random)
        self._step, self._random, self._true = step, random, true
        best: Tried | None = None
        for promotions in self._candidates(trainer, verdict, scale):
            tried = self._try(trainer, promotions, scale)
            if tried is None:
                continue
            if best is None or tried.error < 0.5 * best.error:
                best = tried
            if best.error <= self.config.tolerance:
                break
        self.put(trainer, step, best.promotions if best is not None else ())
        return best

    def _candidates(self, trainer: Trainer, verdict: Verdict, scale: float) -> Any:
        """Lists of promotions, the least change first. Each is tried before the next is asked for."""
        named = self._one_by_one(trainer, verdict, scale) if verdict.found is not None else []
        wide = [replace(p, compute="fp32") for p in named]
        if named:
            yield named
        if wide != named:
            yield wide
        error = verdict.error if verdict.kind == "harm" else 2 * self.config.tolerance
        more = self._by_halves(trainer, scale, error, wide)
        if more:
            yield [*wide, *more]
        now = format_of(self.plan(trainer).at_step(self._step), EVERYTHING)
        for compute in safer(now):
            yield [Promotion(EVERYTHING, compute, f"guard, step {self._step}: {verdict.text}")]

    def _one_by_one(self, trainer: Trainer, verdict: Verdict, scale: float) -> list[Promotion]:
        """What the tracer finds is promoted, until it finds nothing more; [] where it always finds more."""
        found, promotions = verdict.found, list[Promotion]()
        for _ in range(self.config.max_promotions):
            assert found is not None
            target = target_of(found)
            now = format_of(self.plan(trainer, promotions).at_step(self._step), target)
            if not safer(now):
                return []
            compute = safer(now)[0]
            end = get_format(compute).max
            reason = f"guard, step {self._step}: {found.place}: {found.cause}; {compute} ends at {end:.3g}"
            promotions.append(Promotion(target, compute, reason))
            self.put(trainer, self._step, promotions, tried=True)
            seen, _ = self._look(trainer, scale)
            if self._cured(trainer, seen):
                return self._needed(trainer, promotions, scale)
            # it cannot run so: two formats that do not mix, mostly; fp32 goes with all, if need be for all of them
            for count in (1, len(promotions)):
                if seen.found is None:
                    first = len(promotions) - count
                    promotions = [*promotions[:first], *(replace(p, compute="fp32") for p in promotions[first:])]
                    self.put(trainer, self._step, promotions, tried=True)
                    seen, _ = self._look(trainer, scale)
                    if self._cured(trainer, seen):
                        return self._needed(trainer, promotions, scale)
            found = seen.found
            if found is None:
                return []
        return []

    def _cured(self, trainer: Trainer, seen: Look) -> bool:
        """Whether nothing is left to promote: every value is finite, or what is not does no harm."""
        return seen.clean or (seen.ran and error_of(trainer, seen, self._true) <= self.config.tolerance)

    def _needed(self, trainer: Trainer, promotions: list[Promotion], scale: float) -> list[Promotion]:
        """Those of them without which it would not do."""
        for promotion in promotions[:-1] if len(promotions) <= _PRUNED else []:
            fewer = [p for p in promotions if p is not promotion]
            self.put(trainer, self._step, fewer, tried=True)
            if self._cured(trainer, self._look(trainer, scale)[0]):
                promotions = fewer
        return promotions

    def _by_halves(self, trainer: Trainer, scale: float, error: float, named: list[Promotion]) -> list[Promotion]:
        """No op to name, or not only that (code outside every module computes in the format of what modules hand to
        it): modules that besides `named` go to fp32, half of them, a quarter ..., as long as the gradient's error is
        below half of `error`."""

        def helps(names: list[str]) -> bool:
            self.put(trainer, self._step, [*named, *self._to_fp32(names)], tried=True)
            seen = run_plain(trainer, self._step, scale=scale, random=self._random)
            return error_of(trainer, seen, self._true) < 0.5 * error

        plan = self.plan(trainer, named).at_step(self._step)
        low = [n for n in self.names.every if safer(plan[n].compute)]
        found = low if helps(low) else []
        while len(found) > 1:
            half = len(found) // 2
            parts = [p for p in (found[:half], found[half:]) if helps(p)]
            if not parts:
                break
            found = parts[0]
        return self._to_fp32(found) if len(found) <= self.config.max_promotions else []

    def _to_fp32(self, names: list[str]) -> list[Promotion]:
        reason = f"guard, step {self._step}: with fp32 here the gradient is near that of fp32 throughout"
        return [Promotion(name, "fp32", reason) for name in names]

    def _try(self, trainer: Trainer, promotions: list[Promotion], scale: float) -> Tried | None:
        self.put(trainer, self._step, promotions, tried=True)
        seen, fit = self._look(trainer, scale)
        if not seen.ran:
            return None
        error = error_of(trainer, seen, self._true) if self._true.ran else math.nan
        return Tried(promotions, fit, error) if seen.clean or error < math.inf else None

    def _look(self, trainer: Trainer, scale: float) -> tuple[Look, float]:
        if trainer.scaler is None:
            scale = 1.0
        return settled_look(
            trainer, self._step, scale=scale, random=self._random, floor=self.config.scale_floor, keep=True
        )

    # state

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"start": self.start.to_json() if self.start is not None else None,
                "episodes": [e.to_dict() for e in self.episodes]}  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self.start = PrecisionPlan.from_json(state["start"]) if state["start"] is not None else None
        self.episodes = [Episode.from_dict(e) for e in state["episodes"]]


class NormLimit:
    """Leaves out steps whose gradient norm is far beyond the median of the last ones, without waiting for the device.

    ratio: see GuardConfig.skip_ratio. size: steps that the median is taken over; nothing is left out before as many.
    """

    def __init__(self, ratio: float, *, size: int = 64) -> None:
        self.ratio, self.size = ratio, size
        self._logs: torch.Tensor | None = None
        self._count = 0

    def allows(self, finite: torch.Tensor, norm: torch.Tensor) -> torch.Tensor:
        """Whether the step may be taken: bool scalar. finite: whether its gradients are; norm: their total 2-norm."""
        log = norm.detach().float().clamp(min=1e-38).log2()
        if self._logs is None:
            self._logs = torch.zeros(self.size, device=norm.device)
        self._logs = self._logs.to(norm.device)
        allowed, kept = finite, log
        if self._count >= self.size:
            usual = self._logs.median()
            spread = 1.4826 * (self._logs - usual).abs().median()
            limit = usual + torch.maximum(spread * 8, torch.full_like(spread, math.log2(self.ratio)))
            allowed = finite & (log <= limit)
            kept = torch.minimum(log, limit)  # a level that stays becomes usual, and inf never enters
        self._logs[self._count % self.size] = kept.nan_to_num(0.0, 0.0)
        self._count += 1
        return allowed

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"logs": self._logs.clone() if self._logs is not None else None, "count": self._count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Inverse of state_dict."""
        self._logs, self._count = state["logs"], state["count"]
