"""Hugging Face transformers: a Trainer's run recorded, trained with a plan, and generation recorded.

    from precscope.integrations.transformers import RecordCallback, record_generation, train_with_plan

    trainer = Trainer(model, args, train_dataset=data, callbacks=[RecordCallback("runs/a", every=10)])
    trainer.train()                                     # a run directory, as by ps.record

    train_with_plan(trainer, "plan.json")               # in place of trainer.train()

    with record_generation(model, "runs/g"):
        model.generate(**inputs)                        # each call is a step

Tested with transformers 5.23.0 and accelerate 1.15.0, on the CPU, in one process and in two (gloo).
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..plans import PrecisionPlan
from ..recording import Recorder
from .generation import record_generation
from .given_plan import read_plan
from .missing import need
from .trainer_shadow import ShadowedTraining

transformers = need("transformers", "hf")
need("accelerate", "hf")  # which transformers.Trainer needs

from accelerate.utils.memory import should_reduce_batch_size  # noqa: E402
from transformers import Trainer, TrainerCallback  # noqa: E402

from . import accelerate as accelerating  # noqa: E402

__all__ = ["RecordCallback", "planned", "record_generation", "train_with_plan"]


class RecordCallback(TrainerCallback):
    """Records the training steps of a `Trainer` into the run directory `out`.

    A step is an optimizer step, whatever gradient_accumulation_steps is, and is numbered as the Trainer numbers it.
    Evaluations are not recorded. A run that is resumed from a checkpoint goes on with the directory: what was recorded
    after the checkpoint is dropped. An error in training closes the recorder with all that was seen; status and error
    are in run.json. Under `accelerate launch` or torchrun every process records, and rank 0 writes the sum.

    out, every, flush_every, max_calls, ops, on_error, exist, info: as in `ps.record`. shadow_every: which recorded
    steps are run once more in fp32 (multiples of a number, or the steps of a collection), which prices loss noise and
    measures the error of the run's own precision; None: none. recorder: the Recorder while training, else None.

    The Trainer refuses to go on with UsageError where the directory holds a run and exist="error", and on several GPUs
    in one process (nn.DataParallel).
    """

    def __init__(
        self,
        out: str | Path,
        *,
        every: int = 10,
        flush_every: int = 10,
        max_calls: int = 16,
        shadow_every: Any = None,
        ops: bool = False,
        on_error: str = "warn",
        exist: str = "error",
        info: dict[str, Any] | None = None,
    ) -> None:
        self.out, self._exist, self._info = Path(out), exist, info or {}
        self._settings: dict[str, Any] = {
            "every": every, "flush_every": flush_every, "max_calls": max_calls, "shadow_every": shadow_every,
            "ops": ops, "on_error": on_error,
        }  # fmt: skip
        self.recorder: Recorder | None = None
        self._trainer: Trainer | None = None
        self._open = False
        self._too_large = False  # whether the last run ended for lack of memory
        self._between = ExitStack()  # what is in force between two steps
        self._during = ExitStack()  # and from the first step to the last

    # events of the Trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.n_gpu > 1:
            raise UsageError(
                f"RecordCallback cannot record nn.DataParallel, which the Trainer uses for {args.n_gpu} GPUs in one "
                "process: start it with accelerate launch or torchrun"
            )
        exist = self._exist
        if state.global_step:
            exist = "append"  # a resumed run, also where it goes back to its checkpoint with smaller batches
        elif self._too_large and args.auto_find_batch_size:
            exist = "overwrite"  # the Trainer begins again, with smaller batches
        self._close(None)
        self._trainer = _running_trainer()
        optimizer = kwargs["optimizer"]
        self.recorder = Recorder(
            self._wrapped(kwargs["model"]), self.out, optimizer=optimizer, scaler=getattr(optimizer, "scaler", None),
            exist=exist, first_step=state.global_step, info=self._described(args, kwargs["model"]), **self._settings,
        )  # fmt: skip
        if self._trainer is not None:
            self._during.enter_context(_closing_on_errors(self._trainer, self._close))
            if self._settings["shadow_every"] is not None:
                self._during.enter_context(ShadowedTraining(self._trainer, self.recorder))

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.recorder is not None and not self._open:
            self.recorder.__enter__()
            self._open = True
        self._between.close()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not self._open:
            return
        assert self.recorder is not None
        self.recorder.step()
        if state.global_step >= state.max_steps:
            self._close(None)  # nothing of the training steps is left: what follows needs no hooks
        else:
            self._between.enter_context(self.recorder.paused())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._close(None)

    # the rest

    def close(self) -> None:
        """Write what was recorded and take all hooks off, where a loop that is not the Trainer's ended early."""
        self._close(None)

    def _close(self, error: BaseException | None) -> None:
        self._between.close()
        self._during.close()
        recorder, opened = self.recorder, self._open
        self.recorder, self._open, self._trainer = None, False, None
        self._too_large = isinstance(error, Exception) and should_reduce_batch_size(error)
        if recorder is not None and opened:
            recorder.__exit__(type(error) if error is not None else None, error, None)

    def _wrapped(self, model: Any) -> Any:
        """The model under DistributedDataParallel, which shadow steps need to know of; events pass the model in it."""
        return model if self._trainer is None else self._trainer.model_wrapped

    def _described(self, args: Any, model: Any) -> dict[str, Any]:
        from ..applying.spec import MARK

        if any(MARK in vars(module) for module in model.modules()):
            precision = "plan"
        else:
            precision = args.mixed_precision
            if precision == "no" or (self._trainer is not None and not self._trainer.accelerator.native_amp):
                precision = "fp32"  # as is fp16=True on the CPU
        return {
            "task": type(model).__name__, "precision": precision, "seed": args.seed,
            "trainer": f"transformers {transformers.__version__}", "accumulate": args.gradient_accumulation_steps,
            **self._info,
        }  # fmt: skip


def train_with_plan(trainer: Trainer, plan: PrecisionPlan | str | Path, **settings: Any) -> Any:
    """`trainer.train(**settings)` with every module in the precision that `plan` gives it; returns what that returns.

    The plan is applied before the Trainer prepares anything, so that optimizer and DistributedDataParallel see
    parameters as the plan stores them, and is taken off at the end, also after an error: `trainer.save_model` writes
    the plain model. It decides alone, as in `accelerate.planned`: of fp16=True and bf16=True no autocast and no loss
    scale is left, and where the plan computes in fp16, gradients are scaled as it says, on the CPU as well. Gradient
    accumulation, clipping, checkpoints and `accelerate launch` work as ever. To evaluate with the plan as well, use
    `planned`.

    plan: a PrecisionPlan, or the path of one. settings: resume_from_checkpoint, ... Raises PlanError and UsageError as
    `planned` does.
    """
    with planned(trainer, plan) as handle:
        handle.settle()
        return trainer.train(**settings)


@contextmanager
def planned(trainer: Trainer, plan: PrecisionPlan | str | Path) -> Iterator[Any]:
    """Inside, `trainer` trains, evaluates and predicts as `plan` says; yields the PlanHandle.

    The model afterwards: as after `accelerate.planned`, exactly as before where nothing was trained.

    Raises PlanError where the plan does not fit the model or has phases; UsageError where the Trainer's arguments
    contradict it: fp16=True or bf16=True with a plan that computes nowhere in that format, fp16_full_eval or
    bf16_full_eval, model_init, nn.DataParallel, DeepSpeed, FSDP.
    """
    plan = read_plan(plan)
    _check(trainer, plan)
    _release(trainer)
    try:
        model: Any = trainer.model
        with accelerating.planned(trainer.accelerator, plan, model) as handle:
            yield handle
    finally:
        _release(trainer)


def _check(trainer: Trainer, plan: PrecisionPlan) -> None:
    args = trainer.args
    if trainer.model_init is not None:
        raise UsageError(
            "Trainer(model_init=...) makes the model anew inside train(), where no plan is on it: "
            "give the Trainer the model itself, Trainer(model=...)"
        )
    if args.n_gpu > 1:
        raise UsageError(
            f"the Trainer uses nn.DataParallel for {args.n_gpu} GPUs in one process, which would lose the plan: "
            "start it with accelerate launch or torchrun"
        )
    for name in ("fp16_full_eval", "bf16_full_eval"):
        if getattr(args, name):
            raise UsageError(f"{name}=True converts the whole model for evaluation, against the plan: leave it out")
    layers = plan.resolve(name for name, _ in trainer.model.named_modules())
    for name in ("fp16", "bf16"):
        if getattr(args, name):
            accelerating.check_mixed_precision(name, {p.compute for p in layers.values()}, said=f"{name}=True")


def _release(trainer: Trainer) -> None:
    """Take off what earlier training has left on the model (autocast, DistributedDataParallel)."""
    model: Any = trainer.model
    accelerating.release(trainer.accelerator, model)
    trainer.model_wrapped = model


def _running_trainer() -> Trainer | None:
    """The Trainer whose event is being called: events do not pass it. None in another loop."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        owner = frame.f_locals.get("self")
        if isinstance(owner, Trainer):
            return owner
        frame = frame.f_back
    return None


@contextmanager
def _closing_on_errors(trainer: Trainer, close: Any) -> Iterator[None]:
    """Until left, errors in `trainer`'s epochs, KeyboardInterrupt included, are told to `close`: no event tells."""
    name = "_run_epoch" if hasattr(trainer, "_run_epoch") else "training_step"
    before, own = vars(trainer).get(name), getattr(trainer, name)

    def guarded(*args: Any, **kwargs: Any) -> Any:
        try:
            return own(*args, **kwargs)
        except BaseException as error:
            close(error)
            raise

    setattr(trainer, name, guarded)
    try:
        yield
    finally:
        if before is None:
            vars(trainer).pop(name, None)
        else:
            setattr(trainer, name, before)
