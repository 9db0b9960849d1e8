"""What a run leaves on disk besides its log: checkpoints to go on from, and the trainer's part of run.json."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..batches import seed_everything
from ..errors import RunDirectoryError, TrainingError, UsageError, first_line
from . import checkpoint, continuing, phases, weights
from .log import write_run_json

if TYPE_CHECKING:
    from .loop import Trainer


def check(trainer: Trainer) -> None:
    """Raises UsageError where what was asked to be kept cannot be."""
    config = trainer.config
    for name in ("keep_best", "save_model"):
        if getattr(config, name) and trainer.out is None:
            raise UsageError(f"{name}=True needs out=, the run directory to write to")
    if config.keep_best and trainer.task.eval_batches is None:
        raise UsageError("keep_best=True needs held-out batches to tell the best by: Task(eval_batches=...)")
    if config.save_model:
        weights.require()


def state_of(trainer: Trainer) -> dict[str, Any]:
    """All that the next step depends on. With several processes all must call it.

    What a task keeps outside the model's parameters and buffers (an average of weights in a closure, say) is not in it:
    such a task keeps it in a buffer, or in the model's get_extra_state.
    """
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
        "in_force": trainer.in_force,
        "repeated_until": trainer.repeated_until,
        "history": [dict(entry) for entry in trainer.history],
        "buffers": {name: module._buffers[key] for name, module, key in _hidden_buffers(trainer.model)},
        "unrounded": trainer.precision.unrounded() if engine.world == 1 else {},
        "stored": [str(dtype).removeprefix("torch.") for dtype in phases.dtypes_of(trainer.optimizer).values()],
        "world": engine.world,
        "task": trainer.task.name,
    }


def _hidden_buffers(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Buffers that a state_dict leaves out (persistent=False), which training may change all the same."""
    for prefix, module in model.named_modules():
        for key in sorted(module._non_persistent_buffers_set):
            if module._buffers.get(key) is not None:
                yield f"{prefix}.{key}".lstrip("."), module, key


def save(trainer: Trainer, step: int) -> None:
    """Save after `step` steps; where that fails, warn and train on: the previous checkpoint is still there."""
    if trainer.out is None:
        return
    state = state_of(trainer)
    with trainer.engine.main_alone() as main:
        if main:
            _save(trainer, trainer.out, step, state)


def _save(trainer: Trainer, out: Path, step: int, state: dict[str, Any]) -> None:
    try:
        trainer.log.flush()
        path = checkpoint.save(out, step, state, keep=trainer.config.keep, same_as=_of_step(trainer, step))
        trainer.saved = step, path
    except RunDirectoryError as error:
        warnings.warn(f"no checkpoint after step {step - 1}: {error}", RuntimeWarning, stacklevel=4)


def evaluated(trainer: Trainer, step: int, loss: float) -> None:
    """The held-out loss after `step` steps is `loss`: keep this state where it is the lowest so far."""
    if not trainer.config.keep_best:
        return
    best = trainer.best
    better = math.isfinite(loss) and (best is None or loss < best[2])
    if not trainer.engine.gather_objects(better)[0]:
        return
    assert trainer.out is not None
    state = state_of(trainer)
    with trainer.engine.main_alone() as main:
        if main:
            _save_best(trainer, trainer.out, step, state, loss)


def _save_best(trainer: Trainer, out: Path, step: int, state: dict[str, Any], loss: float) -> None:
    try:
        path = checkpoint.save_best(out, step, state, loss=loss, same_as=_of_step(trainer, step))
        trainer.best, trainer.saved = (path, step, loss), (step, path)
        write_run_json(out, {"best": {"step": step, "eval_loss": loss, "file": f"checkpoints/{path.name}"}})
    except RunDirectoryError as error:
        warnings.warn(f"the best checkpoint so far was not kept: {error}", RuntimeWarning, stacklevel=4)


def _of_step(trainer: Trainer, step: int) -> Path | None:
    """The file that this process has written of this very state."""
    return trainer.saved[1] if trainer.saved is not None and trainer.saved[0] == step else None


def latest(trainer: Trainer, *, resume: bool) -> dict[str, Any] | None:
    """The state to go on from, None where the run begins; what an earlier run left that is of no use is removed.

    Raises UsageError where the processes do not see the same checkpoints.
    """
    out = trainer.out
    if out is None:
        return None
    state = checkpoint.latest(out) if resume else None
    found = trainer.engine.gather_objects(state["step"] if state is not None else None)
    for rank, step in enumerate(found):
        if step != found[0]:
            first, other = (f"of {s} steps" if s is not None else "none" for s in (found[0], step))
            raise UsageError(
                f"the newest checkpoint in {out} is {first} for process 0 and {other} for process {rank}: put the run "
                "directory on a file system that all processes share"
            )
    if trainer.engine.main:
        if state is None:
            checkpoint.remove_all(out)  # of a run that is being overwritten
        checkpoint.remove_unfinished(out)
    return state


def in_force(state: dict[str, Any] | None) -> int:
    """The step whose entry of the plan was on the model when `state` was saved."""
    return 0 if state is None else state.get("in_force", max(state["step"] - 1, 0))


def restore(trainer: Trainer, state: dict[str, Any], *, back: bool = False) -> int:
    """Put the run where `state` (of `state_of`, with the step) left it; how many steps it has behind it.

    The precision that was in force must be on the model. back: the running run goes back to a checkpoint of its own;
    the guard then keeps what it has learnt, and checkpoints of later steps are removed.
    Raises RunDirectoryError where another model or optimizer made it, UsageError where the settings do not let the run
    go on (see continuing.py).
    """
    if not back:
        trainer.notes += continuing.check(trainer, state)
    _load_model(trainer, state)
    trainer.precision.load_state_dict(state["precision"])
    trainer.precision.load_unrounded(state.get("unrounded", {}))
    if not back and trainer.guard is not None and state.get("guard") is not None:
        trainer.guard.load_state_dict(state["guard"])
        if not trainer.guard.planner.episodes:
            trainer.guard.planner.start = None  # nothing is amended: what is trained with now is what there is to amend
    _set_random(trainer, state)
    trainer.task.reseed(state["data_seed"])
    trainer.readings.bad_in_a_row = state["bad_in_a_row"]
    trainer.repeated_until = state.get("repeated_until", 0)
    if back:
        drop_from(trainer, state["step"])
        if trainer.out is not None and trainer.engine.main:
            checkpoint.remove_after(trainer.out, state["step"])
    else:
        trainer.log.load_before(state["step"], trainer.out)
        trainer.history = _joined(list(state.get("history", [])), trainer.history[-1], state["step"])
        trainer.best = checkpoint.best(trainer.out) if trainer.out is not None else None
        trainer.evaluations = _evaluations(trainer)
    return state["step"]


def drop_from(trainer: Trainer, step: int) -> None:
    """The run goes back to `step`: what log and evaluations tell of the steps from there on is dropped."""
    trainer.log.cut(step)
    trainer.saved = None
    trainer.evaluations = _evaluations(trainer)


def _evaluations(trainer: Trainer) -> list[tuple[int, float]]:
    """Those that the log knows, but for that at the end of the run, which is made anew."""
    last = trainer.config.steps
    return [(r.step + 1, r.eval_loss) for r in trainer.log.rows if not math.isnan(r.eval_loss) and r.step + 1 < last]


def _joined(history: list[dict[str, Any]], now: dict[str, Any], step: int) -> list[dict[str, Any]]:
    """The phases up to the checkpoint, and that of `now` where the run goes on in another precision."""
    if history and history[-1]["precision"] != now["precision"]:
        history.append({**now, "from_step": step, "why": "resumed in another precision"})
    return history or [now]


def _load_model(trainer: Trainer, state: dict[str, Any]) -> None:
    """Model, with the buffers that no state_dict holds, and optimizer."""
    try:
        trainer.engine.load_state(trainer.model, trainer.optimizer, state["model"], state["optimizer"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise RunDirectoryError(
            f"the checkpoint in {trainer.out} was made with another model or optimizer ({first_line(error):.120}): "
            "resume with the task that made it, or choose another directory"
        ) from error
    saved = state.get("buffers", {})
    for name, module, key in _hidden_buffers(trainer.model):
        buffer = module._buffers[key]
        assert buffer is not None
        if name in saved and saved[name].shape == buffer.shape:
            buffer.copy_(saved[name])
        elif name in saved:
            module._buffers[key] = saved[name].to(buffer.device)
    if trainer.engine.world == 1 and "stored" in state:
        _put_back_dtypes(trainer.optimizer, state["optimizer"], state["stored"])


def _put_back_dtypes(optimizer: torch.optim.Optimizer, saved: dict[str, Any], stored: list[str]) -> None:
    """torch's load_state_dict casts all state to its parameter's dtype; state that had a dtype of its own gets it back.
    stored: dtype of each parameter when it was saved."""
    for index, (parameter, then) in enumerate(zip(phases.dtypes_of(optimizer), stored, strict=False)):
        state = optimizer.state.get(parameter, {})
        for key, value in saved["state"].get(index, {}).items():
            own = type(value) is torch.Tensor and not phases.follows(parameter, getattr(torch, then), key, value)
            if own and isinstance(state.get(key), torch.Tensor) and state[key].dtype is not value.dtype:
                state[key] = value.to(state[key].device, copy=True)


def _set_random(trainer: Trainer, state: dict[str, Any]) -> None:
    """The states of this process; of one that was not there, a stream of its own from this step on."""
    states, rank = state.get("random_by_rank", [state["random"]]), trainer.engine.rank
    if rank < len(states):
        checkpoint.set_random_states(states[rank])
    else:
        seed_everything(trainer.config.seed + 1000003 * rank + 7919 * state["step"])


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
            "note": "; ".join(trainer.said()),
            "phases": trainer.history,
            "loss_scale": described["loss_scale"],
            "seed": trainer.config.seed,
            "world_size": trainer.engine.world,
            "resumed_from": first or None,
            "train": trainer.config.to_dict(),
            "guard": asdict(trainer.guard.config) if trainer.guard is not None else None,
            "compile_config": asdict(trainer.compiler.config) if trainer.compiler.config is not None else None,
        },
    )
    if trainer.plan is not None:
        trainer.plan.save(trainer.out / "plan.json")


def switched(trainer: Trainer) -> None:
    """Note in run.json which precision is in force from now on."""
    if trainer.out is not None and trainer.engine.main:
        try:
            write_run_json(trainer.out, {"phases": trainer.history})
        except RunDirectoryError as error:  # the log's rows tell it, too
            warnings.warn(f"run.json does not name this phase: {error}", RuntimeWarning, stacklevel=2)


def save_model(trainer: Trainer) -> None:
    """The trained weights alone as model.safetensors, where asked for. Raises RunDirectoryError."""
    if not trainer.config.save_model:
        return
    assert trainer.out is not None
    state = trainer.engine.model_state(trainer.model)
    with trainer.engine.main_alone() as main:
        if main:
            about = {"made_by": "precscope", "task": trainer.task.name, "steps": str(trainer.config.steps)}
            weights.save(state, trainer.out / "model.safetensors", about=about)


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
