"""May a run go on from this checkpoint with these settings? What changed is refused, or allowed and said."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from .loop import Trainer

_WITHOUT_EFFECT = frozenset(
    {"keep", "keep_best", "save_model", "checkpoint_every", "eval_every", "eval_limit", "sync_every", "flush_seconds",
     "nonfinite_limit", "min_scale"}
)  # fmt: skip
"""Settings that change no weight."""
_ALLOWED = ("steps", "lr", "schedule", "warmup", "min_lr", "grad_clip")
"""Settings of the step to come; all others are in what the checkpoint holds, or decide which batches come."""


def check(trainer: Trainer, state: dict[str, Any]) -> list[str]:
    """What is not as it was when `state` was saved, in words. Raises UsageError where the run cannot go on so."""
    step, before = state["step"], _plain(state.get("config", {}))
    now = _plain(trainer.config.to_dict())
    changed = {k: (before[k], now[k]) for k in now if k in before and before[k] != now[k]}
    for name in _WITHOUT_EFFECT:
        changed.pop(name, None)
    if trainer.config.steps < step:
        raise UsageError(
            f"the checkpoint in {trainer.out} is of {step} steps, and steps={trainer.config.steps} asks for fewer: "
            f"give at least {step}, or train anew in another directory"
        )
    notes = _processes(trainer, state, changed)
    free = "none" not in (before.get("schedule"), now["schedule"])  # else the optimizer's own lr is what counts
    allowed = {name for name in _ALLOWED if free or name not in ("lr", "schedule")}
    refused = [_said(name, *changed[name]) for name in changed if name not in allowed]
    if refused:
        raise UsageError(
            f"the run in {trainer.out} cannot go on with {' and '.join(refused)}: give the old value, or train anew "
            f"in another directory; what may change on the way: {', '.join(_ALLOWED)}"
        )
    if changed:
        notes.append(f"from step {step} on with " + ", ".join(_said(name, *changed[name]) for name in changed))
    task = state.get("task")
    if task is not None and task != trainer.task.name:
        notes.append(f"the checkpoint was made by task {task!r}, this is {trainer.task.name!r}")
    if state["word"] != trainer.precision.word:
        notes.append(f"from step {step} on in {trainer.precision.word} (was {state['word']})")
    elif trainer.plan is not None and state["plan"] != trainer.plan.to_json():
        notes.append(f"from step {step} on with another plan than before")
    return notes


def plan(trainer: Trainer, state: dict[str, Any]) -> PrecisionPlan | None:
    """The plan to go on with: the trainer's own, or what a guard had made of it when `state` was saved.

    Raises UsageError where a guard had amended another plan than the one that is given now, and is to go on.
    """
    from ..plans import PrecisionPlan

    given, planner = trainer.plan, (state.get("guard") or {}).get("planner") or {}
    if planner.get("start") is None or state["plan"] is None:
        return given
    if (given or PrecisionPlan.uniform(trainer.precision.word)).to_json() == planner["start"]:
        return PrecisionPlan.from_json(state["plan"])
    if trainer.guard is None or not planner["episodes"]:
        return given
    raise UsageError(
        f"the guard of the run in {trainer.out} has amended another plan (or precision) than the one given now: give "
        "the old one, leave guard= out to train on with the new one, or train anew in another directory"
    )


def _processes(trainer: Trainer, state: dict[str, Any], changed: dict[str, Any]) -> list[str]:
    """Another number of processes is allowed where the optimizer's steps still take the same batches."""
    world, now = state.get("world", 1), trainer.engine.world
    if world == now:
        return []
    before, here = (f"{n} process{'es' if n > 1 else ''}" for n in (world, now))
    each = changed.get("accumulate", (trainer.config.accumulate,))[0]
    if each * world != trainer.config.accumulate * now:
        fitting = each * world // now if each * world % now == 0 else None
        raise UsageError(
            f"the run in {trainer.out} was on {before} with accumulate={each}, {each * world} micro-batches to a step, "
            f"and {here} with accumulate={trainer.config.accumulate} would take "
            f"{trainer.config.accumulate * now}: "
            + (f"give accumulate={fitting}" if fitting else f"start {before} again (torchrun --nproc-per-node {world})")
        )
    changed.pop("accumulate", None)
    return [
        f"on {here} (was {before}): the same batches to a step, but sums are formed in another order and random draws "
        "such as dropout are others"
    ]


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()}


def _said(name: str, before: Any, now: Any) -> str:
    return f"{name}={now!r} (was {before!r})"
