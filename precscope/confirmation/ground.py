"""What advice is tried on: the model at its states, batches that were not recorded, and fp32 to compare with."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..advice.units import ModelGraph
from ..attribution import unwrap
from ..errors import TaskError, nearest
from ..profiles import Profile
from ..sites import Role
from ..tasks import Task
from .judgement import Judgement, Yardstick
from .probe import Outcome, Prober
from .states import States
from .substitution import Memory
from .tolerance import Tolerance


class Ground:
    """The task's model, its states and batches. batches: after the recorded ones, for trials; confirming: the first of
    them. base: the state that trials start from.

    `prober` must be made before `begin`. Raises TaskError where the model is not the one that was recorded.
    """

    prober: Prober

    def __init__(self, task: Task, profile: Profile, *, tolerance: Tolerance, batches: int, trial_steps: int) -> None:
        self.task = task
        self.graph = ModelGraph.of(profile)
        _check_model(task, self.graph)
        self.yardstick = Yardstick(tolerance, _loss_span(profile), _usual_gradients(profile))
        self.states = States(unwrap(task.model))
        self.batches = self._fresh_batches(profile, batches, trial_steps)
        self.confirming = self.batches[:batches] or [task.batch(0)]
        self.base = "start"
        self._references: dict[tuple[str, int], Outcome] = {}
        self._memories: dict[tuple[str, str], Memory] = {}

    def _fresh_batches(self, profile: Profile, count: int, trial_steps: int) -> list[Any]:
        steps = profile.steps
        trained = profile.run.get("train")
        per_step = int(trained.get("accumulate") or 1) if isinstance(trained, dict) else 1
        first = (steps[-1] + 1 if steps else 0) * per_step
        found: list[Any] = []
        for index in range(max(count, trial_steps)):
            try:
                found.append(self.task.batch(first + index))
            except Exception:  # a generator that is used up, a function of steps that go no further
                break
        return found

    def begin(self) -> None:
        """Where `ps.profile` trained this very model, it left what the model was before: then both are tried, unless
        that training has broken the model. base: the state that trials start from."""
        started = self.task.start_state
        if started is None:
            self.states.keep("start")
            return
        self.states.keep("trained")
        self.states.adopt("start", started)
        outcome = self.prober.reference(self.confirming[0])
        if outcome.error or not outcome.finite:
            self.states.drop("trained")
            return
        self._references["trained", 0] = outcome
        self.base = "trained"

    def reference(self, state: str, index: int) -> Outcome:
        """fp32 on a batch. Raises TaskError where that does not run."""
        key = state, index
        if key not in self._references:
            self.states.go(state)
            outcome = self.prober.reference(self.confirming[index])
            if outcome.error:
                raise TaskError(f"the task does not run in fp32: {outcome.error}")
            if not outcome.finite:
                raise TaskError("the task's loss, output or gradients are not finite in fp32: mend that first")
            self._references[key] = outcome
        return self._references[key]

    def memory(self, fmt: str, state: str) -> Memory:
        """Which dtypes each call meets at a state when everything is low."""
        key = fmt, state
        if key not in self._memories:
            _, self._memories[key] = self.prober.all_low(self.confirming[0], fmt)
        return self._memories[key]

    def judge(self, reference: Outcome, outcome: Outcome, state: str) -> Judgement:
        """A model that is yet to be trained may give nearly the same for everything: its outputs need no order."""
        return self.yardstick.judge(reference, outcome, order=state != "start" or "trained" not in self.states)


def _check_model(task: Task, graph: ModelGraph) -> None:
    names = {name for name, _ in unwrap(task.model).named_modules(remove_duplicate=False)}
    missing = [u.name for u in graph.units if u.name not in names]
    if missing:
        hint = nearest(missing[0], names)
        raise TaskError(
            f"the task's model has no module {missing[0]!r}{f' (did you mean {hint}?)' if hint else ''}, which ran in "
            "the recorded run: give the task that was profiled, or profile this one"
        )


def _loss_span(profile: Profile) -> float:
    train = profile.train
    losses = np.abs(np.asarray(train.loss, float)) if train is not None and "loss" in train else np.zeros(0)
    losses = losses[np.isfinite(losses)]
    return float(losses.max()) if len(losses) else 0.0


def _usual_gradients(profile: Profile) -> dict[str, float]:
    """Parameter -> root mean square over the recorded steps of the norm of its gradient."""
    rows = profile.history(("step", "module", "tensor", "sumsq"), roles=[Role.GRAD_WEIGHT.value])
    if not len(rows):
        return {}
    modules, tensors = rows.module.astype(str), rows.tensor.astype(str)
    names = (modules + "." + tensors).str.lstrip(".")
    per_step = rows.sumsq.groupby([names, rows.step]).sum()
    return {str(k): float(v) ** 0.5 for k, v in per_step.groupby(level=0).mean().items()}
