"""ps.profile: the recording loop done for you, with what a recommendation needs beside the statistics."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .batches import copy_containers
from .errors import UsageError, one_line
from .profiles import Profile

if TYPE_CHECKING:
    from .recording import Recorder
    from .tasks import Task
    from .training import Trainer, TrainResult

_KEPT_BYTES = 1 << 30
Note = Callable[[str], None]
"""Called with a line of text."""


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
    shadow_every: int | str | None = "auto",
    ops: bool = True,
    note: Note | None = None,
    **settings: Any,
) -> Profile:
    """Train the task's model for `steps` steps in `precision` while recording every `every`-th one into `out`.

    task: a Task, or what `make_task` takes ("gpt", "my_task.py:make"). precision: "fp32", "tf32", "bf16" or "fp16"
    (autocast, with a GradScaler for fp16). train: False runs the model in evaluation mode without gradients instead,
    on `task.forward` (default model(*batch)): activations and weights alone are recorded, of settings only seed and
    progress apply, and buffers and random generators are put back. costs: also measure what each module costs in each
    of `formats` on this device (cost.parquet). shadow_every: which steps are run once more in fp32 (shadow steps, see
    Recorder.shadow): "auto" takes the first, the middle and the last recorded one, a number every so manieth step as
    far as it is recorded, None none; nothing is trained differently for it, and with train=False the task's loss is
    taken in evaluation mode. ops: shadow steps also record every op, one more fp32 step each (`Profile.ops`).
    exist: what to do with a run that is already in `out`: "error" or "overwrite". note: called with a line of text when
    a part begins, and where FLOPs or costs could not be had: the profile is then without them (where note is None, that
    is a RuntimeWarning). settings: as in `ps.train` (lr, seed, grad_clip, accumulate, progress, ...).

    Raises UsageError, TaskError, RunDirectoryError, TrainingError; what was flushed before an error stays readable.
    """
    from .tasks import Task, make_task

    if not train:
        _check_inference_settings(settings)
    if not isinstance(task, Task):
        task = make_task(task, seed=settings.get("seed", 0))
    common: dict[str, Any] = {"steps": steps, "precision": precision, "every": every, "exist": exist, "note": note}
    shadowed = shadow_steps(shadow_every, steps=steps, every=every)
    task.start_state = _start_state(task.model) if train else None
    with _FirstBatch(task) as first:
        if train:
            train_recorded(task, out=out, shadow_every=shadowed, ops=ops, **common, **settings)
        else:
            _infer_recorded(task, out=out, shadow_every=shadowed, ops=ops, **common, **settings)
    if costs:
        measure_costs(task, out, formats=formats, note=note, first=first)
    return Profile.load(out)


def train_recorded(
    task: Task,
    *,
    out: str | Path,
    every: int = 10,
    shadow_every: Collection[int] | int | str | None = "auto",
    ops: bool = True,
    note: Note | None = None,
    **settings: Any,
) -> TrainResult:
    """`ps.train` with a recorder that also counts FLOPs; shadow_every as in `profile`, or a collection of steps; ops as
    there; settings as in `ps.train`."""
    from .recording import record
    from .training import train

    shadowed = shadow_steps(shadow_every, steps=settings["steps"], every=every)

    @contextlib.contextmanager
    def recorder(trainer: Trainer) -> Iterator[Recorder]:
        with record(
            trainer.model, out, optimizer=trainer.optimizer, scaler=trainer.scaler, every=every, on_error="raise",
            exist="append", shadow_every=shadowed, ops=ops, info={"task": task.name},
        ) as watch:  # fmt: skip
            with _flops_at_the_end(watch, first.loss, note):
                yield watch

    with _FirstBatch(task) as first:
        return train(task, out=out, recorder=recorder, **settings)


def shadow_steps(wanted: Collection[int] | int | str | None, *, steps: int, every: int) -> Collection[int] | int | None:
    """What a recorder of a run of `steps` steps takes as shadow_every: "auto" becomes the first, the middle and the
    last recorded step. Raises UsageError for anything but "auto", a positive number, a collection or None."""
    if wanted is None or (isinstance(wanted, Collection) and not isinstance(wanted, str)):
        return wanted
    if wanted == "auto":
        last = (steps - 1) // every
        return {0, last // 2 * every, last * every}
    if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
        raise UsageError(f"shadow_every must be a number of steps of at least 1, 'auto' or None, not {wanted!r}")
    return wanted


def _start_state(model: Any) -> dict[str, Any] | None:
    """Copies of parameters and buffers on the CPU; None where they are larger than `_KEPT_BYTES`."""
    from .attribution import unwrap

    own = unwrap(model)
    tensors = [*own.named_parameters(), *own.named_buffers()]
    plain = all(type(t).__name__ in ("Parameter", "Tensor") and t.device.type != "meta" for _, t in tensors)
    if not plain or sum(t.numel() * t.element_size() for _, t in tensors) > _KEPT_BYTES:
        return None
    return {name: t.detach().to("cpu", copy=True) for name, t in tensors}


def _check_inference_settings(settings: dict[str, Any]) -> None:
    for name in settings:
        if name not in ("seed", "progress"):
            raise UsageError(
                f"profile(train=False) has no setting {name!r}: nothing is trained, so of the settings of ps.train "
                "only seed and progress apply; leave it out, or pass train=True"
            )


def _infer_recorded(
    task: Task,
    *,
    out: str | Path,
    steps: int,
    precision: str,
    every: int,
    exist: str,
    shadow_every: Collection[int] | int | None,
    ops: bool,
    note: Note | None,
    seed: int = 0,
    progress: Callable[[int, int, float], None] | None = None,
) -> None:
    import torch

    from .batches import seed_everything
    from .preservation import preserved
    from .recording import record
    from .training import make_precision
    from .training.devices import own_device, to_device

    model = task.model
    forward = task.forward or (lambda model, batch: model(*batch) if isinstance(batch, tuple | list) else model(batch))
    mode = make_precision(precision, plan=None, model=model, device=own_device(model))

    def run(batch: Any) -> None:
        with torch.no_grad(), mode.forward_context():
            forward(model, to_device(batch, mode.device))

    info = {"task": task.name, "task_ref": task.reference, "precision": precision, "seed": seed, "mode": "inference"}
    with preserved(model), _FirstBatch(task) as first:
        model.eval()
        seed_everything(seed)
        options: dict[str, Any] = {"every": every, "shadow_every": shadow_every, "on_error": "raise", "exist": exist}
        with record(model, out, info=info, ops=ops, **options) as watch, mode.applied(model):
            with _flops_at_the_end(watch, lambda: run(first.batch()), note):
                for step in range(steps):
                    batch = task.batch(step)
                    run(copy_containers(batch))
                    if watch.shadow_due:
                        _shadow_of_inference(watch, task, to_device(batch, mode.device), note)
                    watch.step()
                    if progress is not None:
                        progress(step + 1, steps, float("nan"))


def _shadow_of_inference(watch: Recorder, task: Task, batch: Any, note: Note | None) -> None:
    """Prices by the task's loss, in evaluation mode. A task for inference alone may have none that works."""
    try:
        watch.shadow(lambda: task.checked_loss(copy_containers(batch)))
    except Exception as error:  # the user's loss, which inference does not need
        watch.shadow_every = None
        _say(note, f"no shadow steps: the loss could not be run ({one_line(error)}); loss noise is not priced")


@contextlib.contextmanager
def _flops_at_the_end(watch: Recorder, run: Callable[[], Any], note: Note | None) -> Iterator[None]:
    """Count the FLOPs of `run()` for the recorder when the loop is done, or has failed: graph.json needs them last, and
    the run itself cannot be disturbed any more."""
    from .recording.flops import count_flops

    def count(note: Note | None) -> None:
        try:
            with watch.paused():
                watch.flops = count_flops(watch.model, run)
        except Exception as error:  # the user's code, run once more: a profile without FLOPs is still a profile
            _say(note, f"FLOPs could not be counted ({one_line(error)}): advice goes by measured costs alone")

    try:
        yield
    except Exception:
        count(lambda text: None)  # the error under way is what matters
        raise
    count(note)


def measure_costs(
    task: Task,
    out: str | Path,
    *,
    formats: Sequence[str],
    note: Note | None = None,
    first: _FirstBatch | None = None,
) -> None:
    """Time every module in every format on a batch of `task` and write `out`/cost.parquet.

    first: who remembers a batch; None: the task is asked for batch 0. Where nothing can be timed, `note` says so (or a
    RuntimeWarning), and no file is written. Raises RunDirectoryError where the file cannot be written.
    """
    from .advice.cost import save
    from .advice.measurement import measure
    from .attribution import unwrap
    from .preservation import preserved

    if note is not None:
        note("measuring what each module costs in each format")
    model = unwrap(task.model)
    first = first or _FirstBatch(task)
    try:
        with preserved(model):
            table = measure(model, first.loss, formats, note=lambda text: _say(note, text))
    except Exception as error:  # the user's code, run once more: a profile without costs is still a profile
        _say(note, f"costs could not be measured ({one_line(error)}): advice goes by a model of them")
        return
    save(table, Path(out) / "cost.parquet")


class _FirstBatch:
    """Remembers the first batch that the task gives while inside, so that FLOPs and costs need not ask for it again: a
    generator cannot go back, and a function may draw from the global generators."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self._kept: list[Any] = []

    def __enter__(self) -> _FirstBatch:
        read = self.task.batch
        self._outer = vars(self.task).get("batch")  # of another one of these, around this one

        def batch(step: int) -> Any:
            got = read(step)
            if not self._kept:
                self._kept.append(copy_containers(got))
            return got

        self.task.batch = batch  # type: ignore[method-assign]
        return self

    def __exit__(self, *exception: object) -> None:
        if self._outer is None:
            del self.task.batch
        else:
            self.task.batch = self._outer  # type: ignore[method-assign]

    def batch(self) -> Any:
        """The batch kept; batch 0 where none was read."""
        return copy_containers(self._kept[0] if self._kept else self.task.batch(0))

    def loss(self) -> Any:
        """The loss on that batch, where the model is. A wrapper that exchanges gradients (DDP) is told not to."""
        from .training.devices import to_device

        model = self.task.model
        with getattr(model, "no_sync", contextlib.nullcontext)():
            return self.task.loss(model, to_device(self.batch(), model))


def _say(note: Note | None, text: str) -> None:
    if note is not None:
        note(text)
    else:
        warnings.warn(text, RuntimeWarning, stacklevel=3)
