"""What a guard writes besides events.jsonl: the amended plan, and failing steps to be replayed."""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

from ...batches import RandomStates, preserved_rng
from ...errors import RunDirectoryError, TaskError
from ...events import Event, EventLog
from ...tracing.saved import plain, save_step
from .. import checkpoint

if TYPE_CHECKING:
    from ..loop import Trainer
    from .actions import Planner
    from .judging import Verdict


def remove_old(trainer: Trainer, log: EventLog) -> None:
    """Before a new run: no file of an earlier run's guard stays; a run that goes on says so in its events."""
    out = trainer.out
    assert out is not None and log.path is not None
    if trainer.first_step:
        if log.path.exists():
            log.write(Event(trainer.first_step, "resume", "none", f"the run goes on at step {trainer.first_step}"))
        if trainer.plan is None:
            (out / "plan.json").unlink(missing_ok=True)  # amended after the checkpoint that it goes on from
        return
    for pattern in (log.path.name, "plan-*.json", "failing-*.pt"):
        for path in out.glob(pattern):
            path.unlink(missing_ok=True)
    log.begin()


def save_plan(trainer: Trainer, planner: Planner) -> str:
    """Write the plan in force as plan.json and plan-<step>.json, and once the one of the beginning as plan-start.json;
    the name of the second, "" without a run directory."""
    out, plan = trainer.out, trainer.plan
    assert plan is not None and planner.start is not None
    if out is None:
        return ""
    name = f"plan-{trainer.next_step:08d}.json"
    if trainer.engine.main:
        try:
            if not (out / "plan-start.json").exists():
                planner.start.save(out / "plan-start.json")
            plan.save(out / name)
            plan.save(out / "plan.json")
        except RunDirectoryError as error:
            warnings.warn(f"the amended plan is in force and not on disk: {error}", RuntimeWarning, stacklevel=2)
    return name


def save_failing_step(trainer: Trainer, step: int, verdict: Verdict, random: RandomStates | None) -> bool:
    """Write failing-<step>.pt for ps.replay; whether it was. Not for several micro-batches or processes, nor for what
    such a file cannot hold."""
    if trainer.out is None or trainer.config.accumulate != 1 or trainer.engine.world != 1:
        return False
    with preserved_rng(cuda=True):
        if random is not None:
            random.put_back()
        states = checkpoint.random_states() if random is not None else None
        try:
            batch = plain(next(iter(trainer.micro_batches(step))))
        except TaskError:
            return False
    plan = trainer.precision.plan
    try:
        save_step(
            trainer.out / f"failing-{step:08d}.pt", trainer.model, batch, states,
            trainer.precision.word if plan is None else None, verdict.scale, plan=plan, step=step, found=verdict.found,
        )  # fmt: skip
    except RunDirectoryError as error:
        warnings.warn(f"the failing step was not saved: {error}", RuntimeWarning, stacklevel=2)
        return False
    return True
