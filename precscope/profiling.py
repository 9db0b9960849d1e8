"""ps.profile: the recording loop done for you, with what a recommendation needs beside the statistics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .profiles import Profile

if TYPE_CHECKING:
    import torch

    from .recording import Recorder
    from .tasks import Task
    from .training import Trainer, TrainResult


def profile(
    task: Task | str,
    *,
    out: str | Path,
    steps: int = 50,
    precision: str = "bf16",
    every: int = 10,
    exist: str = "error",
    train: bool = True,
    costs: bool = True,
    formats: Sequence[str] = ("fp32", "bf16", "fp16"),
    note: Callable[[str], None] | None = None,
    **settings: Any,
) -> Profile:
    """Train the task's model for `steps` steps in `precision` while recording every `every`-th one into `out`.

    task: a Task, or what `make_task` takes ("gpt", "my_task.py:make"). precision: "fp32", "tf32", "bf16" or "fp16"
    (autocast, with a GradScaler for fp16). train: False runs the model in evaluation mode without gradients instead,
    on `task.forward` (default model(*batch)): activations and weights alone are recorded, of settings only seed and
    progress apply. costs: also measure what each module costs in each of `formats` on this device (cost.parquet).
    exist: what to do with a run that is already in `out`: "error" or "overwrite". note: called with a line of text when
    a part begins. settings: as in `ps.train` (lr, seed, grad_clip, accumulate, progress, ...).

    Raises UsageError, TaskError, RunDirectoryError, TrainingError; what was flushed before an error stays readable.
    """
    from .tasks import Task, make_task

    if not isinstance(task, Task):
        task = make_task(task, seed=settings.get("seed", 0))
    if train:
        train_recorded(task, out=out, steps=steps, precision=precision, every=every, exist=exist, **settings)
    else:
        _infer_recorded(task, out=out, steps=steps, precision=precision, every=every, exist=exist, **settings)
    if costs:
        measure_costs(task, out, formats=formats, note=note)
    return Profile.load(out)


def train_recorded(task: Task, *, out: str | Path, every: int = 10, **settings: Any) -> TrainResult:
    """`ps.train` with a recorder that also counts FLOPs; settings as in `ps.train`."""
    from .training import train

    def recorder(trainer: Trainer) -> Recorder:
        from .recording import record
        from .recording.flops import count_flops

        watch = record(
            trainer.model, out, optimizer=trainer.optimizer, scaler=trainer.scaler, every=every, on_error="raise",
            exist="append", info={"task": task.name},
        )  # fmt: skip
        watch.flops = count_flops(watch.model, lambda: one_loss(task))
        return watch

    return train(task, out=out, recorder=recorder, **settings)


def _infer_recorded(
    task: Task,
    *,
    out: str | Path,
    steps: int,
    precision: str,
    every: int,
    exist: str,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    import torch

    from .recording import record
    from .recording.flops import count_flops
    from .training import make_precision
    from .training.devices import own_device, to_device

    model = task.model
    forward = task.forward or (lambda model, batch: model(*batch) if isinstance(batch, tuple | list) else model(batch))
    mode = make_precision(precision, plan=None, model=model, device=own_device(model))

    def run(step: int) -> None:
        with torch.no_grad(), mode.forward_context():
            forward(model, to_device(task.batch(step), mode.device))

    was_training = model.training
    model.eval()
    info = {"task": task.name, "precision": precision, "seed": seed, "mode": "inference"}
    try:
        flops = count_flops(model, lambda: run(0))
        with record(model, out, every=every, on_error="raise", exist=exist, info=info) as watch, mode.applied(model):
            watch.flops = flops
            for step in range(steps):
                run(step)
                watch.step()
                if progress is not None:
                    progress(step + 1, steps, float("nan"))
    finally:
        model.train(was_training)


def measure_costs(
    task: Task, out: str | Path, *, formats: Sequence[str], note: Callable[[str], None] | None = None
) -> None:
    """Time every module in every format on a batch of `task` and write `out`/cost.parquet."""
    from .advice.cost import save
    from .advice.measurement import measure
    from .preservation import preserved
    from .recording.recorder import unwrap

    if note is not None:
        note("measuring what each module costs in each format")
    model = unwrap(task.model)
    with preserved(model):
        table = measure(model, lambda: one_loss(task), formats)
    save(table, Path(out) / "cost.parquet")


def one_loss(task: Task) -> torch.Tensor:
    """The loss on the task's first batch, where the model is."""
    from .training.devices import to_device

    return task.loss(task.model, to_device(task.batch(0), task.model))
