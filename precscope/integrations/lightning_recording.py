"""What RecordCallback does in the hooks of a Lightning Trainer. Needs no Lightning: lightning.py and
pytorch_lightning.py mix it with the Callback of theirs."""

from __future__ import annotations

from collections.abc import Callable, Collection
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from ..recording import Recorder
from ..recording.lossscale import loss_scale

_KEY = "precscope_steps"  # in Lightning's checkpoints
Loss = Callable[[Any, Any], torch.Tensor]


class Recording:
    """Records the training of a Lightning `Trainer` into the run directory `out`.

    A step is a batch after which an optimizer has stepped: with accumulate_grad_batches=4 each fourth, and under manual
    optimization one however many optimizers it steps. Sanity checking, validation, test and predict are not recorded.
    The loss scale of "16-mixed" (or of PlanPrecision) is divided out of gradients. A fit that is resumed from a
    checkpoint goes on with the directory: what was recorded after the checkpoint is dropped. What ends the fit, Ctrl-C
    included, closes the recorder with all that was seen; status and error are in run.json. Every process of DDP
    records, and rank 0 writes the sum.

    out, every, flush_every, max_calls, ops, on_error, exist, info: as in `ps.record`. module: name of the part of the
    LightningModule to record ("net"), so that names are those of a plain run of it; None: all. shadow_every: which
    recorded steps are run once more in fp32 (multiples of a number, or the steps of a collection), which prices loss
    noise and measures the error of the run's own precision; None: none. They need loss: (module, batch) -> loss, module
    being what is recorded; training_step will not do, since it logs. recorder: the Recorder during the fit, else None.

    Raises UsageError where shadow_every is given without loss, and, when training begins, where there is no such
    module or where the directory holds a run and exist="error".
    """

    def __init__(
        self,
        out: str | Path,
        *,
        every: int = 10,
        module: str | None = None,
        flush_every: int = 10,
        max_calls: int = 16,
        shadow_every: int | Collection[int] | None = None,
        loss: Loss | None = None,
        ops: bool = False,
        on_error: str = "warn",
        exist: str = "error",
        info: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (shadow_every is None) != (loss is None):
            raise UsageError(
                "shadow steps need both: RecordCallback(out, shadow_every=100, loss=lambda module, batch: ...), "
                "a function that computes the loss of a batch without logging it"
            )
        self.out, self._module, self._loss = Path(out), module, loss
        self._exist, self._info = exist, info or {}
        self._settings: dict[str, Any] = {
            "every": every, "flush_every": flush_every, "max_calls": max_calls, "shadow_every": shadow_every,
            "ops": ops, "on_error": on_error,
        }  # fmt: skip
        self.recorder: Recorder | None = None
        self._between = ExitStack()  # in force between two steps
        self._resumed: int | None = None  # steps done, by the checkpoint that was loaded
        self._stepped = 0  # trainer.global_step at the last end of a step
        self._batches: list[Any] = []  # of the running step, where a shadow step is due
        self._losses: list[torch.Tensor] = []

    # hooks of the Trainer

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._end(None)
        done = self._resumed if self._resumed is not None else _batches_that_stepped(trainer)
        self._resumed, self._stepped = None, trainer.global_step
        recorder = Recorder(
            self._watched(trainer, pl_module), self.out, optimizer=trainer.optimizers or None,
            scaler=getattr(trainer.precision_plugin, "scaler", None), exist="append" if done else self._exist,
            first_step=done, info=self._described(trainer, pl_module), **self._settings,
        )  # fmt: skip
        self.recorder = recorder.__enter__()

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        self._between.close()
        if self.recorder is not None and self.recorder.shadow_due:
            self._batches.append(batch)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: torch.Tensor) -> None:
        if self._batches:
            scale = loss_scale(getattr(trainer.precision_plugin, "scaler", None))  # on the device: no wait for it
            self._losses.append(loss.detach() / (1.0 if scale is None else scale))

    def on_before_optimizer_step(self, trainer: Any, pl_module: Any, optimizer: Any) -> None:
        batches, losses = self._batches, self._losses
        self._batches, self._losses = [], []
        if self.recorder is None or not batches:
            return
        part = pl_module if self._module is None else pl_module.get_submodule(self._module)
        closures = [partial(self._divided_loss, part, batch, trainer.accumulate_grad_batches) for batch in batches]
        self.recorder.shadow(closures, loss=torch.stack(losses).sum() if losses else None)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self.recorder is None or trainer.global_step == self._stepped:
            return
        self._stepped = trainer.global_step
        self._batches, self._losses = [], []
        self.recorder.step()
        self._between.enter_context(self.recorder.paused())  # until the next batch: validation, other callbacks

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self.recorder is not None:  # in the midst of an accumulation, too
            self._between.enter_context(self.recorder.paused())

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._end(None)

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._end(exception)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        self._end(None)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if self.recorder is not None:
            checkpoint[_KEY] = self.recorder.index + (trainer.global_step != self._stepped)

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        if trainer.state.fn == "fit":
            self._resumed = checkpoint.get(_KEY)

    # the rest

    def _end(self, error: BaseException | None) -> None:
        self._between.close()
        self._batches, self._losses = [], []
        recorder, self.recorder = self.recorder, None
        if recorder is not None:
            recorder.__exit__(type(error) if error is not None else None, error, None)

    def _divided_loss(self, part: Any, batch: Any, count: int) -> torch.Tensor:
        assert self._loss is not None
        return self._loss(part, batch) / count

    def _watched(self, trainer: Any, pl_module: Any) -> Any:
        """The model as the strategy wraps it, which shadow steps under DDP need to know of, or the part of it."""
        if self._module is not None:
            return submodule(pl_module, self._module)
        return pl_module if trainer.strategy.model is None else trainer.strategy.model

    def _described(self, trainer: Any, pl_module: Any) -> dict[str, Any]:
        from ..applying.spec import MARK

        words = {"32-true": "fp32", "bf16-mixed": "bf16", "16-mixed": "fp16"}
        planned = any(MARK in vars(module) for module in pl_module.modules())
        precision = "plan" if planned else words.get(trainer.precision, trainer.precision)
        return {
            "task": type(pl_module).__name__, "precision": precision,
            "accumulate": trainer.accumulate_grad_batches, **self._info,
        }  # fmt: skip


def submodule(model: Any, name: str) -> Any:
    """The part of `model` called `name`. Raises UsageError, with the nearest names, where there is none."""
    from ..errors import nearest

    names = [n for n, _ in model.named_modules() if n]
    if name not in names:
        hint = nearest(name, names) or ", ".join(names[:5])
        raise UsageError(f"{type(model).__name__} has no module {name!r}; it has {hint}")
    return model.get_submodule(name)


def _batches_that_stepped(trainer: Any) -> int:
    """Batches that ended with an optimizer step so far: where a Trainer's fit is called again."""
    return getattr(trainer.fit_loop.epoch_loop, "_batches_that_stepped", trainer.global_step)
