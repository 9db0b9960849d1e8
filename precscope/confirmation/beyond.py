"""Beyond autocast: a confirmed bf16 plan with its modules in bf16 throughout, where that is faster and holds.

Autocast keeps norms, residual streams and what its lists name in fp32 and casts between. bf16 has the range of fp32, so
nothing overflows without it; what its 8 bits lose shows in the same probes and the same trial that confirmed the plan.
Variants are timed first, whole steps in turn, since most models gain nothing on most devices. The best one is tried;
where it does not hold, the modules that do the harm stay under autocast. Its fp32 master weights stay.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from ..plans import LayerPrecision, PrecisionPlan, Reason
from .casting import Seen, Watch
from .judgement import Judgement
from .search import find_high
from .timing import Comparison, round_times
from .trial import Trial

if TYPE_CHECKING:
    from .session import Session

_FORMAT = "bf16"
_SCREENED = 3  # rounds of timing all variants
_DUEL = (5, 4, 4, 4)  # of the best against the plan: again while it is not clear
_TRIED = 2  # variants that are tried on the model
_KEEPS_UP = 0.02  # of the gain of the trial in fp32 that may be lost against the plan
_OWN_SHARE = 0.03  # of the time of the model that a type of module must take beside its children to be varied


def go_beyond(session: Session, plan: PrecisionPlan, *, least_gain: float) -> PrecisionPlan:
    """`plan`, or the same with modules in bf16 throughout where that is confirmed and gains a share `least_gain` of the
    step's time. made_from["beyond_autocast"] says what was compared. Plans that are not confirmed, store parameters
    low, infer, or whose costs were not measured on this device are given back as they are."""
    wanted = plan.status == "confirmed" and session.policy == "autocast" and not session.inference
    if not wanted or plan.made_from.get("costs") != "measured" or session.asked.get("updates") is not None:
        return plan
    low = [name for name, layer in plan.modules.items() if _under_autocast(layer)]
    return _Beyond(session, plan, low, least_gain).run() if low else plan


def _under_autocast(layer: LayerPrecision) -> bool:
    return layer.precision == (_FORMAT, "autocast", "fp32")


class _Beyond:
    """low: modules that run in bf16 under autocast."""

    def __init__(self, session: Session, plan: PrecisionPlan, low: list[str], least_gain: float) -> None:
        self.session, self.plan, self.low, self.least_gain = session, plan, low, least_gain
        self.trained: Trial | None = session.trials.get("plan")  # the plan's; the next trial takes its place
        self.found: dict[str, Any] = {"taken": False, "least_gain": least_gain}
        self.most_passes = session.prober.passes + 2 * len(session.graph.units) + 20
        self.kept: dict[str, str] = {}  # module -> why it stays under autocast

    def run(self) -> PrecisionPlan:
        session = self.session
        session.note(f"trying {_FORMAT} without autocast")
        before, after = self._losses_kept()
        self.found["cast_elements"] = {"autocast": before.casts, "cast": after.casts}
        variants = self._variants()
        session.states.go(session.ground.base)
        times = round_times(session.task, session.confirming[0], [self.plan, *variants.values()], rounds=_SCREENED)
        screened = {word: Comparison.of(times[0], t) for word, t in zip(variants, times[1:], strict=True)}
        self.found["screened"] = {word: c.ratio for word, c in screened.items()}
        faster = sorted((c.ratio, word) for word, c in screened.items() if c.may_gain(self.least_gain))
        if not faster:
            best = min(c.ratio for c in screened.values())
            return self._stays(f"it is not faster here: at best {best:.2f} of the time per step")
        for _, word in faster[:_TRIED]:
            chosen = self._tried(word, variants[word], before, after)
            if chosen is not None:
                return chosen
        return self._stays(self.found.get("why", ""))

    def _stays(self, why: str) -> PrecisionPlan:
        return self.plan.replace(made_from=dict(self.plan.made_from) | {"beyond_autocast": self.found | {"why": why}})

    # variants

    def _losses_kept(self) -> tuple[Seen, Seen]:
        """Modules that would return a low scalar stay under autocast: that is a loss, whose value must not be rounded.
        What the plan and its cast twin do."""
        before = self._watched(self.plan)
        for _ in range(4):
            after = self._watched(self._cast())
            made = after.innermost_scalars() - self.kept.keys()
            if not made:
                break
            for name in made & set(self.low):
                self.kept[name] = f"it makes a single number, a loss perhaps, which {_FORMAT} would round"
        return before, after

    def _watched(self, plan: PrecisionPlan) -> Seen:
        session = self.session
        session.states.go(session.ground.base)
        with Watch(session.prober.model) as watch:
            watch.seen.low_loss = session.prober.planned(session.confirming[0], plan).low_loss
        return watch.seen

    def _variants(self) -> dict[str, PrecisionPlan]:
        """Word -> plan: everything cast, and with the own code of what costs most under autocast or in fp32."""
        variants = {"cast": self._cast()}
        kind, names = self._costliest()
        if names:
            islands = {n: LayerPrecision("fp32") for n in names}
            variants[f"cast, {kind} under autocast"] = self._cast(names)
            variants[f"cast, {kind} in fp32"] = self._cast(names, islands)
            variants[f"{kind} in fp32"] = self.plan.replace(modules=_merged(self.plan.modules, islands))
        return variants

    def _cast(self, keep: Collection[str] = (), instead: dict[str, LayerPrecision] | None = None) -> PrecisionPlan:
        """The plan with what is low cast, but for `keep`; those of `instead` as it says."""
        chosen = set(self.low) - set(keep) - self.kept.keys()
        modules = {n: _casting(layer) if n in chosen else layer for n, layer in self.plan.modules.items()}
        root = modules.get("", self.plan.default)
        default = self.plan.default
        if _under_autocast(default) and ("" not in modules or root.policy == "cast"):
            default = LayerPrecision(_FORMAT, policy="cast", params="fp32")
        return self.plan.replace(modules=_merged(modules, instead or {}), default=default)

    def _costliest(self) -> tuple[str, list[str]]:
        """The type of module without a matrix of its own that takes most time beside its children, such as attention,
        and the low modules of that type; none where that is little."""
        table = self.session.profile.cost
        taken = table[table.format == _FORMAT].set_index("module").time_ms
        units = {u.name: u for u in self.session.graph.units}
        own: dict[str, float] = defaultdict(float)
        for name in self.low:
            if name and not units[name].leaf and not units[name].matmul:
                own[units[name].type] += float(taken.get(name, 0.0))
        kind = max(own, key=lambda k: own[k], default="")
        if not kind or own[kind] < _OWN_SHARE * float(taken.sum()):
            return "", []
        return kind, [n for n in self.low if units[n].type == kind]

    # trying

    def _tried(self, word: str, variant: PrecisionPlan, before: Seen, after: Seen) -> PrecisionPlan | None:
        """The variant, confirmed and faster, or with less of it cast; None where neither is to be had."""
        session = self.session
        judgement, where = self._try(variant, before)
        if not judgement.passed:
            session.note("seeking what must stay under autocast")
            variant, held = self._lessened(variant, judgement)
            if not held:
                self.found["why"] = f"{word}: {judgement.text}"
                return None
            judgement, where = self._try(variant, before)
        if not judgement.passed:
            self.found["why"] = f"{word}: {judgement.text}"
            return None
        duel = self._duel(variant)
        if not duel.gains(self.least_gain):
            self.found["why"] = f"{word}: {duel.ratio:.3f} of the time per step, give or take {2 * duel.noise:.3f}"
            return None
        trial = session.try_training(variant)
        behind = self._behind(trial)
        if behind:
            self.found["why"] = f"{word}: {behind}"
            return None
        confirmed = session.confirmation(True, judgement, where, trial)
        return self._written(word, variant, duel, before, after).replace(confirmed=confirmed)

    def _duel(self, variant: PrecisionPlan) -> Comparison:
        """The variant's time against the plan's."""
        session, times = self.session, ([], [])
        session.states.go(session.ground.base)
        for rounds in _DUEL:
            for kept, new in zip(
                times,
                round_times(session.task, session.confirming[0], [self.plan, variant], rounds=rounds),
                strict=True,
            ):
                kept += new
            duel = Comparison.of(*times)
            if duel.gains(self.least_gain) or not duel.may_gain(self.least_gain):
                break
        return duel

    def _try(self, variant: PrecisionPlan, before: Seen) -> tuple[Judgement, str]:
        """On all states and batches; a loss that autocast gave in fp32 must be fp32."""
        if not before.low_loss and self._watched(variant).low_loss:
            text = f"the loss itself would be rounded to {_FORMAT}"
            return Judgement(float("inf"), text, {}, float("inf")), ""
        return self.session.try_plan(variant)

    def _behind(self, trial: dict[str, Any] | None) -> str:
        """Why it does not train as the plan does, "" where it does."""
        if trial is None:
            return ""
        exact, plan = self.session.trials["fp32"], self.trained
        if not trial["passed"]:
            return f"after {trial['steps']} training steps the loss is {trial['loss_plan']:.4g}" + trial["error"]
        gained = max(exact.losses[0] - exact.last, _KEEPS_UP * abs(exact.last))
        if plan is not None and trial["loss_plan"] - plan.last > _KEEPS_UP * gained:
            return f"after {trial['steps']} steps its loss is {trial['loss_plan']:.4g}, under autocast {plan.last:.4g}"
        return ""

    def _lessened(self, variant: PrecisionPlan, failed: Judgement) -> tuple[PrecisionPlan, bool]:
        """The variant with as few modules as possible left under autocast for it to hold on one batch, and whether it
        does. At each state, as far as passes remain."""
        session = self.session
        cast = [n for n, layer in variant.modules.items() if layer.policy == "cast" and layer.compute == _FORMAT]
        high: frozenset[str] = frozenset()
        for state in session.states:

            def holds(high: frozenset[str], state: str = state) -> Judgement:
                return self._judged(self._with(variant, high), state)

            def alone(units: Collection[str], state: str = state) -> Judgement:
                return self._judged(self._with(variant, frozenset(cast) - frozenset(units)), state)

            budget = self.most_passes - session.prober.passes
            if budget < 4 or not cast:
                return variant, False
            found = find_high(
                cast, holds, alone, start=high, budget=budget, spent=lambda: session.prober.passes
            )  # fmt: skip
            if not found.after.passed:
                return variant, False
            high = found.high
        for name in high:
            self.kept[name] = f"with it cast as well, {failed.text}"
        return self._with(variant, high), len(high) < len(cast)

    def _with(self, variant: PrecisionPlan, high: frozenset[str]) -> PrecisionPlan:
        modules = _merged(variant.modules, {n: self.plan.modules[n] for n in high})
        return variant.replace(modules=modules, default=self.plan.default if "" in high else variant.default)

    def _judged(self, plan: PrecisionPlan, state: str) -> Judgement:
        session = self.session
        reference = session.ground.reference(state, 0)
        session.states.go(state)
        return session.ground.judge(reference, session.prober.planned(session.confirming[0], plan), state)

    # saying

    def _written(self, word: str, variant: PrecisionPlan, duel: Comparison, before: Seen, after: Seen) -> PrecisionPlan:
        ms = dict(zip(("autocast", "cast"), duel.ms, strict=True))
        numbers = {"ratio": duel.ratio, "noise": duel.noise, "ms_autocast": duel.ms[0], "ms_cast": duel.ms[1]}
        timed = (
            f"{duel.ratio:.2f} of the time per step ({duel.ms[1]:.4g} ms, under autocast {duel.ms[0]:.4g} ms, in turn)"
        )
        modules = {}
        for name, layer in variant.modules.items():
            reasons: list[Reason] = []
            if layer.precision[1] == "cast":
                text = f"{_FORMAT} without autocast: {timed}{self._changed(name, before, after)}{self._noise(layer)}"
                reasons = [Reason(code="cast", text=text, numbers=numbers)]
            elif name in self.kept:
                reasons = [Reason(code="measured", text=f"under autocast still: {self.kept[name]}")]
            elif layer.precision != self.plan.modules[name].precision:
                text = f"its own code in {layer.compute}, what it calls in {_FORMAT}: {timed}"
                reasons = [Reason(code="cost", text=text, numbers=numbers)]
            old = self.plan.modules[name]
            modules[name] = layer.model_copy(
                update={"reasons": (*reasons, *old.reasons), "evidence": old.evidence}
            )  # fmt: skip
        count = sum(layer.precision[1] == "cast" for layer in modules.values())
        who = f"{count} of {len(modules)} modules run in {_FORMAT} without autocast" if count else "Islands are fp32"
        says = (
            f"{who} ({word}): {duel.ratio:.2f} of the time per step under autocast, measured in turn, and it trains "
            "as well."
        )
        found = self.found | {"taken": True, "variant": word, "step_ms": ms, "kept": sorted(self.kept)} | numbers
        return variant.replace(
            modules=modules, made_from=dict(self.plan.made_from) | {"says": says, "beyond_autocast": found}
        )

    def _changed(self, name: str, before: Seen, after: Seen) -> str:
        old, new = before.outputs.get(name), after.outputs.get(name)
        if old == new or not old or not new:
            return ""
        return f"; its output is {' and '.join(sorted(new))}, under autocast {' and '.join(sorted(old))}"

    def _noise(self, layer: LayerPrecision) -> str:
        """The share of the allowed loss noise, in variance, that rounding its output takes."""
        budget = (self.plan.made_from.get("loss_noise") or {}).get("budget")
        own = layer.evidence.get("loss_noise", {}).get(_FORMAT)
        if not budget or own is None:
            return ""
        return f"; rounding its output takes {own**2 / budget**2:.2g} of the loss noise allowed"


def _casting(layer: LayerPrecision) -> LayerPrecision:
    return layer.model_copy(update={"policy": "cast", "params": "fp32"})


def _merged(modules: Any, changed: dict[str, LayerPrecision]) -> dict[str, LayerPrecision]:
    """With those layers' formats, and the reasons and evidence there were."""
    return {
        n: layer.model_copy(update={k: getattr(changed[n], k) for k in ("compute", "policy", "params")})
        if n in changed
        else layer
        for n, layer in modules.items()
    }
