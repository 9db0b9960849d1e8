"""The training loop: forward, backward, unscale, clip, step; what surrounds a step is named and lives elsewhere.

Precision enters through one object (precision.py); a plan, a loss scale and fp32 look the same from here. Two runs of
the same task and seed are equal bit for bit, watched or not, stopped and resumed or not (on one device and thread
count). The host reads the device once every `sync_every` steps, not at each.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from ..batches import RandomStates, copy_containers, seed_everything
from ..errors import RunDirectoryError, TaskError, TrainingError, UsageError
from ..store import prepare_directory
from ..tasks import Task, TaskRef, make_task
from . import checkpoint
from .config import TrainConfig, make_config
from .devices import pick_device, to_device
from .diagnosis import nonfinite_message
from .evaluation import evaluate, in_mode
from .log import MemoryMeter, Row, StepClock, TrainLog, write_run_json
from .optim import clip, gradients, make_optimizer
from .precision import Precision, make_precision
from .result import TrainResult

if TYPE_CHECKING:
    from ..plans import PrecisionPlan

Progress = Callable[[int, int, float], None]
"""Called as progress(steps done, steps in all, last loss read), at each reading of the device."""


class Recorder(Protocol):
    """What the loop asks of a recorder: to be told of the end of each optimizer step. Where it also has `shadow_due`
    and `shadow`, as ps.Recorder does, a step that is due is run once more in fp32 before the optimizer steps."""

    def step(self) -> None: ...


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
    recorder: Recorder | Callable[[Trainer], AbstractContextManager[Recorder]] | None = None,
    progress: Progress | None = None,
    initial_scale: float | None = None,
    shadow_every: int | None = None,
    **settings: Any,
) -> TrainResult:
    """Train the task's model in place.

    task: a Task, or what `make_task` takes ("gpt", "my_task.py:make", a function), made under `seed`. plan: a
    PrecisionPlan or the path of one; precision: "fp32" (default), "tf32", "bf16" or "fp16" where there is no plan. out:
    run directory for train.parquet, run.json and checkpoints. exist: what to do with a run that is there: "error" or
    "overwrite". resume: go on from the newest checkpoint in `out`, or start where there is none. device: None takes the
    model's own, or the first GPU where the model is on the CPU. recorder: an entered one that has step() (ps.Recorder;
    `out` is then the directory it made), or a function of the Trainer (model, optimizer, scaler are there) that returns
    a context manager giving one. progress: see Progress. initial_scale: of the loss scale under "fp16" (None: 65536).
    shadow_every: run every so manieth step once more in fp32 (a shadow step, see Recorder.shadow) and record it into
    `out`: what the precision of this run really does to gradients (Profile.load(out).truth). Where there is a recorder
    it has a shadow_every of its own.
    settings: fields of TrainConfig: seed, lr, weight_decay, betas, schedule, warmup, grad_clip, accumulate, eval_every,
    checkpoint_every, keep, nonfinite_limit ...

    Raises UsageError, TaskError and PlanError for what cannot be done as asked, RunDirectoryError where `out` cannot be
    used, TrainingError where training cannot go on (what was logged is on disk by then).
    """
    config = make_config({"steps": steps, **settings})
    if exist not in ("error", "overwrite") and not resume:
        raise UsageError(f"exist must be 'error' or 'overwrite', not {exist!r}; to go on with a run pass resume=True")
    if isinstance(plan, str | Path):
        from ..plans import PrecisionPlan

        plan = PrecisionPlan.load(plan)
    if shadow_every is not None:
        recorder = _shadow_recorder(shadow_every, out, recorder, resume=resume)
    if resume and out is None:
        raise UsageError("resume=True needs out=, the run directory to go on in")
    if not isinstance(task, Task):
        task = make_task(task, seed=config.seed)
    place = pick_device(task.model, device)
    task.model.to(place)
    mode = make_precision(precision, plan=plan, model=task.model, device=place, initial_scale=initial_scale)
    if resume or hasattr(recorder, "step"):
        exist = "append"  # the run is there already, and it is this one
    return Trainer(task, config, precision=mode, out=out, exist=exist).run(
        resume=resume, recorder=recorder, progress=progress
    )


class Trainer:
    """One run. task, config: what and how. precision: see precision.py. out, exist: see `train`.

    model and scaler are there from the start, the optimizer from `run` on, when the plan is on the model.
    """

    optimizer: torch.optim.Optimizer

    def __init__(
        self, task: Task, config: TrainConfig, *, precision: Precision, out: str | Path | None, exist: str = "error"
    ) -> None:
        self.task, self.config, self.precision = task, config, precision
        self.model, self.device = task.model, precision.device
        self.scaler = precision.scaler
        self.out = prepare_directory(out, exist=exist) if out is not None else None
        self.log = TrainLog(self.out, flush_seconds=config.flush_seconds)
        self.clock, self.memory = StepClock(self.device), MemoryMeter(self.device)
        self.sync_every = config.sync_every or (1 if self.device.type == "cpu" else 10)
        self.evaluations: list[tuple[int, float]] = []
        self._unread: list[tuple[int, float, torch.Tensor, int]] = []
        self._bad_in_a_row = 0
        self._kept: list[tuple[Any, RandomStates]] = []  # micro-batches of a step that is to be shadowed
        self._shadow_fails = False
        self._progress: Progress | None = None

    def run(self, *, resume: bool = False, recorder: Any = None, progress: Progress | None = None) -> TrainResult:
        """Train to the last step, evaluate, and return the result. See `train` for the arguments and errors."""
        self._progress = progress
        seed_everything(self.config.seed)
        if self.out is not None and not resume:
            checkpoint.remove_all(self.out)  # of a run that is being overwritten
        with ExitStack() as stack:
            stack.enter_context(in_mode(self.model, training=True))
            stack.enter_context(self.precision.applied(self.model))
            self._make_optimizer()
            first = self.first_step = self._resume() if resume else 0
            stack.enter_context(self._outcome())
            with _entered(recorder, self) as watch:
                self._announce(first)
                for step in range(first, self.config.steps):
                    self._step(step, watch)
                    if self._due(step, self.sync_every):
                        self._read_device()
                    if self._due(step, self.config.eval_every):
                        self._evaluate_at(step, watch)
                    if self._due(step, self.config.checkpoint_every):
                        self._checkpoint(step)
            eval_loss = self._final_evaluation()
            self.log.flush()
            result = self._result(eval_loss)
            write_run_json(self.out, result.to_dict())
        return result

    def _make_optimizer(self) -> None:
        """Once the plan is on the model: a plan may store parameters low, and the optimizer's state follows them."""
        self.optimizer = make_optimizer(self.task, self.config)
        lr = self.config.lr
        self.base_lrs = [g["lr"] if lr is None else lr for g in self.optimizer.param_groups]

    # one step

    def _step(self, step: int, watch: Recorder | None) -> None:
        self.clock.start()
        lr = self._set_lr(step)
        shadowed = not self._shadow_fails and getattr(watch, "shadow_due", False)
        loss = self._accumulate_gradients(step, keep=shadowed)
        scale = self.precision.scale()
        self.precision.unscale(self.optimizer)
        if shadowed:
            self._shadow(watch, loss)
        grads = gradients(self.optimizer)
        if not grads:
            raise TaskError("no parameter got a gradient: does the loss depend on what the optimizer holds?")
        norm = clip(grads, self.config.grad_clip)
        skipped = self.precision.step(self.optimizer, torch.isfinite(norm))
        self.optimizer.zero_grad(set_to_none=True)
        if self.task.after_step is not None:
            self.task.after_step(self.model, step)
        if watch is not None:
            watch.step()
        self.clock.stop()
        parts = (loss, norm, torch.ones((), device=loss.device) if scale is None else scale, skipped)
        figures = torch.stack([p.detach().to(loss.device, torch.float64) for p in parts])
        self._unread.append((step, lr, figures, self.memory.now()))

    def _accumulate_gradients(self, step: int, *, keep: bool = False) -> torch.Tensor:
        """Gradients of the mean loss over the step's micro-batches; that mean, detached. keep: remember them."""
        count = self.config.accumulate
        total: torch.Tensor | None = None
        for index in range(step * count, (step + 1) * count):
            batch = to_device(self.task.batch(index), self.device)
            if keep:
                self._kept.append((_copied(batch), RandomStates.take(cuda=True)))
            with self.precision.forward_context():
                loss = self.task.checked_loss(batch)
            self.precision.backward(loss / count if count > 1 else loss)
            total = loss.detach() if total is None else total + loss.detach()
        assert total is not None
        return total / count if count > 1 else total

    def _shadow(self, watch: Any, loss: torch.Tensor) -> None:
        """The step's micro-batches once more in fp32, with the same random numbers. Where that fails (memory, or code
        that fp32 does not suit), warn and train on without shadow steps."""
        kept, self._kept = self._kept, []
        count = len(kept)

        def closure(batch: Any) -> Callable[[], torch.Tensor]:
            def again() -> torch.Tensor:
                loss = self.task.checked_loss(copy_containers(batch))  # it may be run twice, and may pop its labels
                return loss / count if count > 1 else loss

            return again

        try:
            watch.shadow([closure(batch) for batch, _ in kept], loss=loss, random=[state for _, state in kept])
        except RunDirectoryError:
            raise
        except Exception as error:
            self._shadow_fails = True
            reason = (str(error).strip().splitlines() or [""])[0]
            warnings.warn(
                f"no shadow steps: running a step in fp32 raised {type(error).__name__}: {reason:.200}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _set_lr(self, step: int) -> float:
        if self.config.schedule != "none":
            factor = self.config.lr_factor(step)
            for group, base in zip(self.optimizer.param_groups, self.base_lrs, strict=True):
                group["lr"] = base * factor
        return float(self.optimizer.param_groups[0]["lr"])

    # around the steps

    def _due(self, step: int, every: int | None) -> bool:
        return every is not None and ((step + 1) % every == 0 or step + 1 == self.config.steps)

    def _read_device(self) -> None:
        """Copy the figures of the steps since the last reading, log them, and stop where the run has gone bad."""
        unread, self._unread = self._unread, []
        figures = torch.stack([u[2] for u in unread]).tolist()
        times = self.clock.read()
        rows = []
        for (number, lr, _, memory), (loss, norm, scale, skipped), time_ms in zip(unread, figures, times, strict=True):
            bad = not math.isfinite(loss) or (self.scaler is None and not math.isfinite(norm))
            self._bad_in_a_row = self._bad_in_a_row + 1 if bad else 0
            rows.append(Row(number, loss, lr, scale, bool(skipped), bad, norm, time_ms, memory))
            if self._bad_in_a_row >= self.config.nonfinite_limit:
                break
        self.log.add(rows)
        self._stop_where_bad(rows[-1])
        if self._progress is not None:
            self._progress(rows[-1].step + 1, self.config.steps, rows[-1].loss)

    def _stop_where_bad(self, row: Row) -> None:
        if self._bad_in_a_row >= self.config.nonfinite_limit:
            batches = self._batches_of(row.step)
            raise TrainingError(nonfinite_message(row, self._bad_in_a_row, self.model, batches, self.precision.word))
        if self.scaler is not None and row.scale < self.config.min_scale:
            raise TrainingError(
                f"the loss scale fell to {row.scale:g} at step {row.step} and gradients still overflow fp16: some "
                "gradient is not finite at any scale; profile the run (precscope profile) to see which module, or use "
                "precision='bf16'"
            )

    def _batches_of(self, step: int) -> Any:
        """The batch of `step` again (a list where there are several), () where a generator cannot give it twice."""
        count = self.config.accumulate
        try:
            batches = [self.task.batch(index) for index in range(step * count, (step + 1) * count)]
        except TaskError:
            return ()
        return batches if count > 1 else batches[0]

    def _evaluate_at(self, step: int, watch: Recorder | None) -> None:
        if step + 1 == self.config.steps or self.task.eval_batches is None:
            return  # the last one is made after the loop, by _final_evaluation
        if self._unread:
            self._read_device()
        with getattr(watch, "paused", nullcontext)():
            loss = self.evaluate()
        self.evaluations.append((step + 1, loss))
        self.log.evaluated(loss)

    def _final_evaluation(self) -> float | None:
        if self.task.eval_batches is None:
            return None
        loss = self.evaluate()
        self.evaluations.append((self.config.steps, loss))
        self.log.evaluated(loss)
        return loss

    def evaluate(self) -> float:
        """Mean loss over the held-out batches in this run's precision; random streams and modes are put back."""
        return evaluate(self.task, precision=self.precision, limit=self.config.eval_limit)

    def _checkpoint(self, step: int) -> None:
        """Save after `step`; where that fails, warn and train on: the previous checkpoint is still there."""
        if self.out is None:
            return
        if self._unread:
            self._read_device()
        try:
            self.log.flush()
            checkpoint.save(self.out, step + 1, self.state_dict(), keep=self.config.keep)
        except RunDirectoryError as error:
            warnings.warn(f"no checkpoint after step {step}: {error}", RuntimeWarning, stacklevel=2)

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "precision": self.precision.state_dict(),
            "random": checkpoint.random_states(),
            "data_seed": self.task.seed,
            "bad_in_a_row": self._bad_in_a_row,
            "config": {k: list(v) if isinstance(v, tuple) else v for k, v in self.config.to_dict().items()},
            "word": self.precision.word,
        }

    def _resume(self) -> int:
        """Load the newest good checkpoint; how many steps it has behind it (0 where there is none)."""
        assert self.out is not None
        state = checkpoint.latest(self.out)
        if state is None:
            return 0
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError, KeyError) as error:
            reason = str(error).strip().splitlines()[0]
            raise RunDirectoryError(
                f"the checkpoint in {self.out} was made with another model or optimizer ({reason:.120}): "
                "resume with the task that made it, or choose another directory"
            ) from error
        self.precision.load_state_dict(state["precision"])
        checkpoint.set_random_states(state["random"])
        self.task.reseed(state["data_seed"])
        self._bad_in_a_row = state["bad_in_a_row"]
        self.log.load_before(state["step"])
        self.evaluations = [
            (row.step + 1, row.eval_loss)
            for row in self.log.rows
            if not math.isnan(row.eval_loss) and row.step + 1 < self.config.steps
        ]
        return state["step"]

    # files and results

    def _announce(self, first: int) -> None:
        if self.out is None:
            return
        from ..recording.provenance import provenance

        described = self.precision.describe()
        write_run_json(
            self.out,
            {
                **provenance(self.model),
                "status": "running",
                "task": self.task.name,
                "task_ref": self.task.reference,
                "precision": described["word"],
                "note": "; ".join(described["notes"]),
                "loss_scale": described["loss_scale"],
                "seed": self.config.seed,
                "resumed_from": first or None,
                "train": self.config.to_dict(),
            },
        )
        if self.precision.plan is not None:
            self.precision.plan.save(self.out / "plan.json")

    @contextmanager
    def _outcome(self) -> Iterator[None]:
        """Write status done or failed into run.json, and on failure all that was logged."""
        try:
            yield
        except BaseException as error:
            reason = f"{type(error).__name__}: {error}"
            self._save_what_there_is(error)
            with suppress(RunDirectoryError):  # a full disk; the error under way says so
                write_run_json(self.out, {"status": "failed", "error": reason})
            raise
        write_run_json(self.out, {"status": "done"})

    def _save_what_there_is(self, error: BaseException) -> None:
        try:
            if self._unread:
                self._read_device()
            self.log.flush()
        except (TrainingError, RunDirectoryError, RuntimeError) as second:
            error.add_note(f"the log's last rows were lost: {second}")

    def _result(self, eval_loss: float | None) -> TrainResult:
        return TrainResult.from_rows(
            self.log.rows,
            scaled=self.scaler is not None,
            eval_loss=eval_loss,
            peak_memory_bytes=self.memory.peak(),
            precision=self.precision.word,
            steps=self.config.steps,
            evaluations=tuple(self.evaluations),
            notes=tuple(self.precision.describe()["notes"]),
            out=self.out,
            plan=self.precision.plan,
        )


@contextmanager
def _entered(recorder: Any, trainer: Trainer) -> Iterator[Recorder | None]:
    """The recorder of a run: as it is where it has step() (it may have watch(optimizer=, scaler=), to be told of them),
    else what the function makes of the trainer, entered."""
    if recorder is None or hasattr(recorder, "step"):
        if hasattr(recorder, "watch"):
            recorder.watch(optimizer=trainer.optimizer, scaler=trainer.scaler)
        yield recorder
        return
    with recorder(trainer) as watch:
        yield watch


def _shadow_recorder(
    every: int, out: str | Path | None, recorder: Any, *, resume: bool
) -> Callable[[Trainer], AbstractContextManager[Any]]:
    """A recorder of the steps 0, every, 2 every, ... that shadows each."""
    if not isinstance(every, int) or every < 1:
        raise UsageError(f"shadow_every must be an integer of at least 1, or None, not {every!r}")
    if out is None:
        raise UsageError("shadow_every needs out=, the run directory into which shadow steps are recorded")
    if recorder is not None:
        raise UsageError("give shadow_every to the recorder: ps.record(..., shadow_every=...)")

    def make(trainer: Trainer) -> AbstractContextManager[Any]:
        from ..recording import record

        return record(
            trainer.model, out, optimizer=trainer.optimizer, scaler=trainer.scaler, every=every, shadow_every=every,
            exist="append", first_step=trainer.first_step if resume else 0,
        )  # fmt: skip

    return make


def _copied(batch: Any) -> Any:
    """The same tensors in new containers: a loss function may pop its labels out of a batch."""
    from torch.utils._pytree import tree_map

    return tree_map(lambda leaf: leaf, batch)
