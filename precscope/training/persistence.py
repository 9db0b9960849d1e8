"""What a run leaves on disk besides its log: checkpoints to go on from, and the trainer's part of run.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from ..errors import RunDirectoryError, TrainingError
from . import checkpoint
from .log import write_run_json

if TYPE_CHECKING:
    from .loop import Trainer


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that the next step depends on. With several processes all must call it."""
    engine, config = trainer.engine, trainer.config.to_dict()
    return {
        "model": engine.model_state(trainer.model),
        "optimizer": engine.optimizer_state(trainer.model, trainer.optimizer),
        "precision": trainer.precision.state_dict(),
        "plan": trainer.plan.to_json() if trainer.plan is not None else None,
        "guard": trainer.guard.state_dict() if trainer.guard is not None else None,
        "random": checkpoint.random_states(),  # of the first process
        "random_by_rank": engine.gather_objects(checkpoint.random_states()),
        "data_seed": trainer.task.seed,
        "bad_in_a_row": trainer.readings.bad_in_a_row,
        "config": {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()},
        "word": trainer.precision.word,
    }


def save(trainer: Trainer, step: int) -> None:
    """Save after `step` steps; where that fails, warn and train on: the previous checkpoint is still there."""
    if trainer.out is None:
        return
    state = state_of(trainer)
    if not trainer.engine.main:
        return
    try:
        trainer.log.flush()
        checkpoint.save(trainer.out, step, state, keep=trainer.config.keep)
    except RunDirectoryError as error:
        warnings.warn(f"no checkpoint after step {step - 1}: {error}", RuntimeWarning, stacklevel=2)


def restore(trainer: Trainer, state: dict[str, Any]) -> int:
    """Put the run where `state` (of `state_of`, with the step) left it; how many steps it has behind it.

    The precision of that step must be on the model. Raises RunDirectoryError where another model or optimizer made it.
    """
    try:
        trainer.engine.load_state(trainer.model, trainer.optimizer, state["model"], state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise RunDirectoryError(
            f"the checkpoint in {trainer.out} was made with another model or optimizer ({reason:.120}): "
            "resume with the task that made it, or choose another directory"
        ) from error
    trainer.precision.load_state_dict(state["precision"])
    if trainer.guard is not None and state.get("guard") is not None:
        trainer.guard.load_state_dict(state["guard"])
    checkpoint.set_random_states(state["random_by_rank"][trainer.engine.rank])
    trainer.task.reseed(state["data_seed"])
    trainer.readings.bad_in_a_row = state["bad_in_a_row"]
    trainer.log.load_before(state["step"])
    trainer.evaluations = [
        (row.step + 1, row.eval_loss)
        for row in trainer.log.rows
        if not math.isnan(row.eval_loss) and row.step + 1 < trainer.config.steps
    ]
    return state["step"]


def announce(trainer: Trainer, first: int) -> None:
    """Write into run.json what runs, and plan.json."""
    if trainer.out is None or not trainer.engine.main:
        return
    from ..recording.provenance import provenance

    described = trainer.precision.describe()
    write_run_json(
        trainer.out,
        {
            **provenance(trainer.model),
            "status": "running",
            "task": trainer.task.name,
            "task_ref": trainer.task.reference,
            "precision": described["word"],
            "note": "; ".join(described["notes"]),
            "loss_scale": described["loss_scale"],
            "seed": trainer.config.seed,
            "world_size": trainer.engine.world,
            "resumed_from": first or None,
            "train": trainer.config.to_dict(),
        },
    )
    if trainer.plan is not None:
        trainer.plan.save(trainer.out / "plan.json")


@contextmanager
def outcome(trainer: Trainer) -> Iterator[None]:
    """Write status done or failed into run.json, and on failure all that was logged."""
    out = trainer.out if trainer.engine.main else None
    try:
        yield
    except BaseException as error:
        reason = f"{type(error).__name__}: {error}"
        trainer.guard = None  # nothing is to be acted on any more
        try:
            trainer.readings.read()
            trainer.log.flush()
        except (TrainingError, RunDirectoryError, RuntimeError) as second:
            error.add_note(f"the log's last rows were lost: {second}")
        with suppress(RunDirectoryError):  # a full disk; the error under way says so
            write_run_json(out, {"status": "failed", "error": reason})
        raise
    write_run_json(out, {"status": "done"})
