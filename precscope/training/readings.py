"""The figures of each step, read from the device once every so many steps: rows of the log, and when to stop."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch

from ..errors import TaskError, TrainingError
from .diagnosis import nonfinite_message
from .log import MemoryMeter, Row, StepClock

if TYPE_CHECKING:
    from .loop import Trainer


class Readings:
    """Figures wait on the device until `read`. bad_in_a_row: steps that were not finite, up to the last one read."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.device = trainer, trainer.engine.device
        self.clock, self.memory = StepClock(self.device), MemoryMeter(self.device)
        self.bad_in_a_row = 0
        self._unread: list[tuple[int, float, Any, int]] = []

    def add(self, step: int, lr: float, parts: tuple[torch.Tensor | None, ...]) -> None:
        """Note a step. parts: loss, gradient norm, loss scale (None: 1), skipped; scalars on the device."""
        loss = parts[0]
        assert loss is not None
        figures: Any
        if loss.device.type == "cpu":  # nothing to wait for
            figures = [1.0 if p is None else float(p.detach()) for p in parts]
        else:
            one = torch.ones((), device=loss.device)
            figures = torch.stack([(one if p is None else p.detach()).to(loss.device, torch.float64) for p in parts])
        self._unread.append((step, lr, figures, self.memory.now()))

    def read(self) -> None:
        """Copy the figures of the steps since the last reading, log them, show them to the guard, and raise
        TrainingError where the run has gone bad."""
        unread, self._unread = self._unread, []
        if not unread:
            return
        trainer = self.trainer
        figures = [u[2] for u in unread]
        if isinstance(figures[0], torch.Tensor):
            figures = torch.stack(figures).tolist()
        times = self.clock.read()
        rows = []
        for (step, lr, _, memory), (loss, norm, scale, skipped), time_ms in zip(unread, figures, times, strict=True):
            bad = not math.isfinite(loss) or (trainer.scaler is None and not math.isfinite(norm))
            self.bad_in_a_row = self.bad_in_a_row + 1 if bad else 0
            phase = len(trainer.history) - 1
            rows.append(Row(step, loss, lr, scale, bool(skipped), bad, norm, time_ms, memory, phase=phase))
            if trainer.guard is None and self.bad_in_a_row >= trainer.config.nonfinite_limit:
                break
        trainer.log.add(rows)
        if trainer.guard is not None:
            trainer.guard.after_reading(trainer, rows)
        if trainer.progress is not None and hasattr(trainer.progress, "read"):  # who watches sees bad steps, too
            trainer.progress.read(rows)
        self._stop_where_bad(rows[-1])
        if trainer.progress is not None:
            trainer.progress(rows[-1].step + 1, trainer.config.steps, rows[-1].loss)

    def forget(self) -> None:
        """Drop what was not read: the run goes back to an earlier step. Counts bad steps anew."""
        self._unread, self.bad_in_a_row = [], 0
        self.clock.read()

    def _stop_where_bad(self, row: Row) -> None:
        trainer = self.trainer
        if self.bad_in_a_row >= trainer.config.nonfinite_limit:
            batches = _batches_of(trainer, row.step)
            word = trainer.precision.word
            raise TrainingError(nonfinite_message(row, self.bad_in_a_row, trainer.model, batches, word))
        if trainer.scaler is not None and row.scale < trainer.config.min_scale:
            raise TrainingError(
                f"the loss scale fell to {row.scale:g} at step {row.step} and gradients still overflow fp16: some "
                "gradient is not finite at any scale; profile the run (precscope profile) to see which module, train "
                "with guard='promote', or use precision='bf16'"
            )


def _batches_of(trainer: Trainer, step: int) -> Any:
    """The batch of `step` again (a list where there are several), () where a generator cannot give it twice."""
    try:
        batches = list(trainer.micro_batches(step))
    except TaskError:
        return ()
    return batches if len(batches) > 1 else batches[0]
