"""`ps.train`: from arguments to a Trainer that runs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..errors import UsageError
from ..tasks import Task, TaskRef, make_task
from .compiling import CompileConfig
from .config import make_config
from .devices import pick_device
from .engine import Engine
from .loop import Progress, Trainer
from .optim import storage_plan
from .precision import make_precision
from .result import TrainResult
from .shadowing import Recorder, shadow_recorder

if TYPE_CHECKING:
    from ..plans import PrecisionPlan
    from .guard import GuardConfig


def train(
    task: Task | TaskRef | str | Callable[[], Task],
    *,
    steps: int,
    plan: PrecisionPlan | str | Path | None = None,
    precision: str | None = None,
    out: str | Path | None = None,
    exist: str = "error",
    resume: bool = False,
    device: str | torch.device | None = None,
    strategy: str | None = None,
    compile: bool | CompileConfig = False,
    guard: GuardConfig | str | None = None,
    recorder: Recorder | Callable[[Trainer], AbstractContextManager[Recorder]] | None = None,
    progress: Progress | None = None,
    initial_scale: float | None = None,
    shadow_every: int | None = None,
    **settings: Any,
) -> TrainResult:
    """Train the task's model in place.

    task: a Task, or what `make_task` takes ("gpt", "my_task.py:make", a function), made under `seed`. plan: a
    PrecisionPlan or the path of one, phases included; precision: "fp32" (default), "tf32", "bf16" or "fp16" where there
    is no plan. out: run directory for train.parquet, run.json, events.jsonl and checkpoints. exist: what to do with a
    run that is there: "error" or "overwrite". resume: go on from the newest checkpoint in `out`, or start where there
    is none. device: None takes the model's own, or the first GPU where the model is on the CPU. strategy: "ddp" or
    "fsdp" on several processes; None: "ddp" where torchrun started more than one. compile: run the model under
    torch.compile; True or a CompileConfig. guard: what to do when the run goes wrong, "warn", "skip", "promote" or
    "rollback", or a GuardConfig; None: stop where it is not finite any more. recorder: an entered one that has step()
    (ps.Recorder; `out` is then the directory it made), or a function of the Trainer (forward_model, optimizer, scaler
    are there) that returns a context manager giving one. progress: see Progress. initial_scale: of the loss scale under
    "fp16" (None: 65536).
    shadow_every: run every so manieth step once more in fp32 (a shadow step, see Recorder.shadow) and record it into
    `out`: what the precision of this run really does to gradients (Profile.load(out).truth). Where there is a recorder
    it has a shadow_every of its own.
    settings: fields of TrainConfig: seed, lr, weight_decay, betas, schedule, warmup, grad_clip, eval_every,
    checkpoint_every, keep, nonfinite_limit, accumulate (default: the task's) ...

    Raises UsageError, TaskError and PlanError for what cannot be done as asked, RunDirectoryError where `out` cannot be
    used, TrainingError where training cannot go on (what was logged is on disk by then).
    """
    config = make_config({"steps": steps, **settings})
    if exist not in ("error", "overwrite") and not resume:
        raise UsageError(f"exist must be 'error' or 'overwrite', not {exist!r}; to go on with a run pass resume=True")
    if isinstance(plan, str | Path):
        from ..plans import PrecisionPlan

        plan = PrecisionPlan.load(plan)
    plan, precision = storage_plan(plan, precision, config, initial_scale=initial_scale)
    if shadow_every is not None:
        recorder = shadow_recorder(shadow_every, out, recorder, resume=resume)
    if resume and out is None:
        raise UsageError("resume=True needs out=, the run directory to go on in")
    if not isinstance(task, Task):
        task = make_task(task, seed=config.seed)
    if "accumulate" not in settings:
        config = replace(config, accumulate=task.accumulate)
    with Engine.from_environment(strategy, pick_device(task.model, device)) as engine:
        task.model.to(engine.device)
        mode = make_precision(precision, plan=plan, model=task.model, device=engine.device, initial_scale=initial_scale)
        if resume or hasattr(recorder, "step"):
            exist = "append"  # the run is there already, and it is this one
        trainer = Trainer(
            task, config, precision=mode, out=out, exist=exist, engine=engine, compile=compile, guard=_guard(guard)
        )
        return trainer.run(resume=resume, recorder=recorder, progress=progress)


def _guard(wanted: GuardConfig | str | None) -> Any:
    if wanted is None:
        return None
    from .guard import Guard, GuardConfig

    return Guard(GuardConfig(action=wanted) if isinstance(wanted, str) else wanted)
