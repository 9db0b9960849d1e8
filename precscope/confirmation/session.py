"""One confirmation from beginning to end."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from ..advice import Measured
from ..advice import recommend as predict
from ..formats import get_format
from ..plans import LayerPrecision, PrecisionPlan, Reason
from ..profiles import Profile
from ..tasks import Task
from .beyond import go_beyond
from .explanation import Explanation, explain
from .ground import Ground
from .judgement import Judgement
from .probe import Prober
from .search import Finding, find_high
from .timing import step_times
from .tolerance import Tolerance
from .trial import Trial, run_trial, state_kept

_TIGHTEN = (0.25, 0.5, 1.0)  # of what is low, given up in one round after the other where the whole does not hold
_PROGRESS, _KEEPS_UP = 0.3, 0.02  # of the largest loss that a trial must gain to tell; of that gain that may be lost

_NO_GAIN = "Every module stays in fp32: low precision gains nothing on this device ({})."


class Session:
    """Confirms what `predict(profile, **asked)` proposes on `task`. See `recommend` for the arguments.

    beyond: share of the step's time that leaving autocast must gain; None: it is not tried."""

    def __init__(
        self,
        task: Task,
        profile: Profile,
        asked: dict[str, Any],
        *,
        tolerance: Tolerance,
        batches: int,
        trial_steps: int,
        loss_scaling: bool,
        note: Callable[[str], None] | None,
        beyond: float | None = None,
    ) -> None:
        self.task, self.profile, self.asked = task, profile, asked
        self.policy = asked["policy"]
        self.inference = profile.run.get("mode") == "inference"
        self.trial_steps = 0 if self.inference else trial_steps
        self.loss_scaling, self.beyond = loss_scaling, beyond
        self.note = note or (lambda text: None)
        self.ground = Ground(task, profile, tolerance=tolerance, batches=batches, trial_steps=self.trial_steps)
        self.graph, self.states, self.yardstick = self.ground.graph, self.ground.states, self.ground.yardstick
        self.batches, self.confirming = self.ground.batches, self.ground.confirming
        self.measured = Measured()
        self.findings: dict[tuple[str, str], Finding] = {}
        self.trials: dict[str, Trial] = {}
        self._passes_before: dict[str, int] = {}
        self._keeps_up: dict[str, bool] = {}
        self._step_ms: dict[frozenset[tuple[str, str]], dict[str, float]] = {}

    def run(self) -> PrecisionPlan:
        """The confirmed plan, or the last one tried, which says that it is not confirmed."""
        with state_kept(self.task):
            self._prepare()
            for _ in range(2 * len(self._formats())):
                plan = self._predict(hopeful=True)
                new = sorted(f for f in _low_formats(plan) - self.measured.formats if get_format(f).bits == 16)
                if not new:
                    break
                for fmt in new:
                    self._measure(fmt)
            plan = self._confirm()
            return plan if self.beyond is None else go_beyond(self, plan, least_gain=self.beyond)

    def _prepare(self) -> None:
        """The states to try: as the model stands, and after the trial in fp32."""
        predicted = self._predict(hopeful=False)
        scale = predicted.loss_scale.get("initial", 2.0**16)
        exponent = int(np.clip(np.floor(np.log2(scale)), -14, 24)) if self.loss_scaling else None
        self.prober = Prober(self.task, policy=self.policy, inference=self.inference, scale_exponent=exponent)
        self.ground.prober = self.prober
        self.ground.begin()
        if self.trial_steps and len(self.batches) > 1:
            self.note(f"training {len(self.batches)} steps in fp32")
            self.states.go(self.ground.base)
            self.trials["fp32"] = run_trial(self.task, self.batches)
            if self.trials["fp32"].finite and "trained" not in self.states:
                self.states.keep("trained")
            self.states.go(self.ground.base)
        for state in self.states:
            self.ground.reference(state, 0)

    # measuring

    def _formats(self) -> list[str]:
        formats = self.asked["formats"]
        return formats.replace(",", " ").split() if isinstance(formats, str) else list(formats)

    def _predict(self, *, hopeful: bool) -> PrecisionPlan:
        """hopeful: formats that were not tried yet are taken to bear what only might harm them."""
        measured = self.measured
        if hopeful:
            low = {get_format(f).name for f in self._formats() if get_format(f).bits == 16}
            measured = Measured(measured.formats | low, measured.forbidden)
        return predict(self.profile, **self.asked, measured=measured)

    def _measure(self, fmt: str) -> None:
        """Find what cannot be `fmt`, at each state."""
        high = frozenset(self._certain(fmt))
        self._passes_before[fmt] = self.prober.passes if self.findings else 0
        for state in self.states:
            self.note(f"trying {fmt} on the model ({state})")
            finding = self._find(fmt, state, high)
            self.findings[fmt, state] = finding
            guilty = {u for u in finding.high - high if u in finding.alone and finding.alone[u].score > 0.5}
            explained = self._explain(fmt, state, guilty)
            for unit in sorted(finding.high - high):
                self._forbid(unit, fmt, self._reason(unit, fmt, state, finding, explained.get(unit)))
            high = finding.high
        self.measured.formats |= {fmt}

    def _forbid(self, unit: str, fmt: str, reason: Reason) -> None:
        """What is too coarse in a format with fp32's range is no better in one with fewer bits still."""
        self.measured.forbid(unit, fmt, reason)
        tried = get_format(fmt)
        for other in map(get_format, self._formats()):
            if tried.emax == get_format("fp32").emax and other.bits <= 8 and other.precision < tried.precision:
                self.measured.forbid(unit, other.name, reason)

    def _certain(self, fmt: str) -> list[str]:
        """Units that recorded values already forbid."""
        found = predict(
            self.profile, **{**self.asked, "formats": (fmt, "fp32")},
            measured=Measured(self.measured.formats | {fmt}, self.measured.forbidden),
        )  # fmt: skip
        return [u for u, layer in found.modules.items() if fmt in layer.evidence.get("forbidden", ())]

    def _find(self, fmt: str, state: str, start: frozenset[str]) -> Finding:
        batch, reference = self.confirming[0], self.ground.reference(state, 0)

        def holds(high: frozenset[str]) -> Judgement:
            self.states.go(state)
            judgement = self.ground.judge(reference, self.prober.planned(batch, self._plan_of(fmt, high)), state)
            if high == start and not judgement.passed and self._acquitted(fmt, start, judgement):
                return dataclasses.replace(judgement, score=judgement.visible)
            return judgement

        def alone(units: Collection[str]) -> Judgement:
            memory = self.ground.memory(fmt, state)
            self.states.go(state)
            return self.ground.judge(reference, self.prober.alone(batch, fmt, units, memory), state)

        names = [u.name for u in self.graph.units]
        budget = max(self.passes_left(fmt) - 2, 4)  # the last judgement may take three
        return find_high(names, holds, alone, start=start, budget=budget, spent=lambda: self.prober.passes)

    def _acquitted(self, fmt: str, high: frozenset[str], judgement: Judgement) -> bool:
        """Whether only gradients are off, and training does not mind: those of a saturated softmax can be wrong many
        times over and yet near zero. Judged by a trial in which fp32 makes progress and the format keeps up."""
        exact = self.trials.get("fp32")
        if judgement.visible > 1.0 or exact is None or not exact.finite:
            return False
        if fmt not in self._keeps_up:
            self.note(f"training {len(self.batches)} steps in {fmt}")
            self.states.go(self.ground.base)
            got = run_trial(self.task, self.batches, plan=self._plan_of(fmt, high), scaling=self.loss_scaling)
            progress = exact.losses[0] - exact.last
            moved = progress > _PROGRESS * max(map(abs, exact.losses))
            self._keeps_up[fmt] = moved and got.finite and got.last - exact.last <= _KEEPS_UP * progress
        return self._keeps_up[fmt]

    def passes_left(self, fmt: str) -> int:
        """Of 2n + 20 for this format, less what two rounds of confirming take."""
        allowed = 2 * len(self.graph.units) + 20 - 2 * len(self.confirming) * len(list(self.states))
        return allowed - (self.prober.passes - self._passes_before[fmt])

    def _plan_of(self, fmt: str, high: frozenset[str]) -> PrecisionPlan:
        def layer(unit: str) -> LayerPrecision:
            return LayerPrecision("fp32") if unit in high else LayerPrecision(fmt, policy=self.policy)

        modules = {u.name: layer(u.name) for u in self.graph.units}
        return PrecisionPlan(default=modules.get("", LayerPrecision(fmt, policy=self.policy)), modules=modules)

    def _explain(self, fmt: str, state: str, units: Collection[str]) -> dict[str, Explanation]:
        """Which op does the harm in each of `units`, as far as passes remain."""
        each = 2 if fmt == "fp16" and self.loss_scaling else 1  # where a loss scale is sought in vain
        units = sorted(units)[: max(0, (self.passes_left(fmt) - 1) // each)]
        if not units:
            return {}
        batch, memory = self.confirming[0], self.ground.memory(fmt, state)
        self.states.go(state)
        with self.prober.logged(units) as log:
            self.prober.reference(batch)
        exact, found = log.results, {}
        for unit in units:
            with self.prober.logged([unit]) as log:
                self.prober.alone(batch, fmt, [unit], memory)
            explanation = explain(exact[unit], log.results[unit], fmt)
            if explanation is not None:
                found[unit] = explanation
        return found

    def _reason(self, unit: str, fmt: str, state: str, finding: Finding, explanation: Explanation | None) -> Reason:
        judgement = finding.alone.get(unit)
        when = "" if state == "start" else " after some training"
        if judgement is not None and judgement.score > 0.5:
            text = f"measured{when}: with it alone in {fmt} and all else in fp32, {judgement.text}"
        else:
            text = f"measured{when}: with it in {fmt} as well, {finding.before.text}"
        numbers = {} if judgement is None else {k: float(v) for k, v in judgement.numbers.items()}
        if explanation is not None:
            text += f". {explanation.text}"
            text += f". Instead of fp32: {explanation.fix}" if explanation.fix else ""
            numbers |= explanation.numbers
        return Reason(code="measured", text=text, site=None, numbers=numbers)

    # confirming

    def _confirm(self) -> PrecisionPlan:
        """The program's plan, tightened until it holds on all batches and states, and in training."""
        for share in (*_TIGHTEN, 0.0):
            plan = self._settled(self._predict(hopeful=False))
            self.note("confirming the whole plan")
            judgement, where = self.try_plan(plan)
            trial = self.try_training(plan) if judgement.passed else None
            passed = judgement.passed and (trial is None or trial["passed"])
            text = judgement.text if not judgement.passed or trial is None else trial_text(trial)
            if passed or not self._tighten(plan, text, share):
                break
        return plan.replace(confirmed=self.confirmation(passed, judgement, where, trial))

    def _settled(self, plan: PrecisionPlan) -> PrecisionPlan:
        """Where costs were measured, the whole step decides: islands that only the times of single modules ask for must
        make it faster, and so must the plan beside fp32."""
        main = plan.made_from.get("main", "fp32")
        if get_format(main).bits != 16 or self.inference or plan.made_from["costs"] != "measured":
            return plan
        optional = [
            name
            for name, layer in plan.modules.items()
            if layer.compute != main and main not in layer.evidence.get("forbidden", (main,)) and layer.params == "fp32"
        ]
        rivals = {"plan": plan, "main": _with_format(plan, optional, main, self.policy, "") if optional else plan}
        if "fp32" in self._formats():
            rivals["fp32"] = _with_format(plan, list(plan.modules), "fp32", self.policy, "")
        key = frozenset((n, layer.compute) for n, layer in plan.modules.items())
        if key not in self._step_ms:
            self.note("timing whole steps")
            self.states.go(self.ground.base)
            seconds = step_times(self.task, self.confirming[0], list(rivals.values()))
            self._step_ms[key] = {word: 1e3 * s for word, s in zip(rivals, seconds, strict=True)}
        times = self._step_ms[key]
        best = min(times["plan"], times["main"])
        if times.get("fp32", math.inf) <= 1.02 * best:
            why = f"the whole step takes {times['fp32']:.3g} ms in fp32 and {best:.3g} ms with low precision"
            return _with_format(plan, list(plan.modules), "fp32", self.policy, why, says=_NO_GAIN.format(why), ms=times)
        if not optional or times["plan"] < 0.98 * times["main"]:
            return _with_format(plan, [], main, self.policy, "", ms=times)
        told = f"in fp32 this and its like would be faster alone, yet the whole step takes {times['plan']:.3g} ms so "
        told += f"and {times['main']:.3g} ms in {main} throughout"
        return _with_format(plan, optional, main, self.policy, told, ms=times)

    def try_plan(self, plan: PrecisionPlan) -> tuple[Judgement, str]:
        """The worst judgement over batches and states, and where."""
        worst, where = Judgement(0.0, "", {}), ""
        if not _low_formats(plan):
            return worst, where  # nothing but fp32 and tf32
        for state in self.states:
            for index, batch in enumerate(self.confirming):
                reference = self.ground.reference(state, index)
                self.states.go(state)
                judgement = self.ground.judge(reference, self.prober.planned(batch, plan), state)
                if any(self._keeps_up.get(fmt) for fmt in _low_formats(plan)):
                    judgement = dataclasses.replace(judgement, score=judgement.visible)
                if judgement.score >= worst.score:
                    worst, where = judgement, f"{state}, batch {index}"
                if not judgement.passed:
                    return worst, where
        return worst, where

    def try_training(self, plan: PrecisionPlan) -> dict[str, Any] | None:
        """The plan trained from the start on the batches of the fp32 trial."""
        exact = self.trials.get("fp32")
        if exact is None or not exact.finite or not _low_formats(plan):
            return None
        self.note(f"training {len(self.batches)} steps with the plan")
        self.states.go(self.ground.base)
        got = run_trial(self.task, self.batches, plan=plan, scaling=self.loss_scaling)
        self.states.go(self.ground.base)
        tolerance = self.yardstick.tolerance
        span = max(self.yardstick.loss_span, max(map(abs, exact.losses)))
        allowed = 2 * tolerance.loss * abs(exact.last) + 2 * tolerance.span * span
        passed = got.finite and got.skipped < len(self.batches) / 2 and got.last - exact.last <= allowed
        self.trials["plan"] = got
        return {
            "passed": bool(passed), "steps": len(self.batches), "loss_fp32": exact.last, "loss_plan": got.last,
            "skipped": got.skipped, "error": got.error,
        }  # fmt: skip

    def _tighten(self, plan: PrecisionPlan, why: str, share: float) -> bool:
        """Forbid the share of what is still low that harmed most. Returns whether there was anything."""
        low = {u.name: plan[u.name].compute for u in self.graph.units if plan[u.name].compute not in ("fp32", "tf32")}
        if not low or not share:
            return False

        def harm(unit: str) -> float:
            if get_format(low[unit]).bits <= 8:
                return math.inf  # not tried alone, and the coarsest of what is low
            found = [
                f.alone[unit].score for (fmt, _), f in self.findings.items() if fmt == low[unit] and unit in f.alone
            ]
            return max(found, default=0.0)

        ranked = sorted(low, key=lambda u: -harm(u))
        for unit in ranked[: max(1, math.ceil(len(ranked) * share))]:
            text = f"measured: the whole plan did not hold ({why}); of what was low this is among what does most harm"
            self.measured.forbid(unit, low[unit], Reason(code="measured", text=text, site=None, numbers={}))
        return True

    def confirmation(
        self, passed: bool, judgement: Judgement, where: str, trial: dict[str, Any] | None
    ) -> dict[str, Any]:
        score = judgement.score
        return {
            "passed": bool(passed),
            "score": float(score) if np.isfinite(score) else None,
            "worst": judgement.text,
            "where": where,
            "numbers": {k: float(v) for k, v in judgement.numbers.items() if np.isfinite(v)},
            "batches": len(self.confirming),
            "states": list(self.states),
            "acquitted": sorted(fmt for fmt, kept in self._keeps_up.items() if kept),
            "trial": trial,
            "forward_passes": self.prober.passes,
            "modules": len(self.graph.units),
            "tolerance": {k: getattr(self.yardstick.tolerance, k) for k in Tolerance.__dataclass_fields__},
        }


def _with_format(
    plan: PrecisionPlan,
    names: list[str],
    fmt: str,
    policy: str,
    why: str,
    *,
    says: str = "",
    ms: dict[str, float] | None = None,
) -> PrecisionPlan:
    """The plan with these modules in `fmt` as well. ms: measured times of whole steps, to keep."""
    reason = (Reason(code="cost", text=why, site=None, numbers={}),) if why else ()

    def changed(layer: LayerPrecision) -> LayerPrecision:
        params = fmt if policy == "cast" else "fp32"
        return LayerPrecision(
            fmt, policy=policy, params=params, reasons=(*reason, *layer.reasons), evidence=layer.evidence
        )

    chosen = set(names)
    modules = {n: changed(layer) if n in chosen else layer for n, layer in plan.modules.items()}
    default = changed(plan.default) if "" in chosen else plan.default
    made_from = dict(plan.made_from) | ({"step_ms": ms} if ms else {})
    if {layer.compute for layer in modules.values()} == {fmt} and policy == "autocast" and fmt != "fp32":
        says = f"Every module is {fmt}: plain {fmt} autocast is already right, the plan changes nothing."
    made_from["says"] = says or made_from.get("says", "")
    kept = {} if fmt == "fp32" and chosen >= set(plan.modules) else plan.loss_scale
    return plan.replace(modules=modules, default=default, made_from=made_from, loss_scale=kept)


def trial_text(trial: dict[str, Any]) -> str:
    """A trial that did not pass, in words."""
    if trial["error"]:
        return f"training with it raises {trial['error']}"
    return (
        f"after {trial['steps']} training steps the loss is {trial['loss_plan']:.4g}, in fp32 {trial['loss_fp32']:.4g}"
        + (f"; {trial['skipped']} steps were skipped" if trial["skipped"] else "")
    )


def _low_formats(plan: PrecisionPlan) -> frozenset[str]:
    used = {layer.compute for layer in plan.modules.values()} | {plan.default.compute}
    return frozenset(f for f in used if f not in ("fp32", "tf32"))
