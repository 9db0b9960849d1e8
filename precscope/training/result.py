"""What a training run came to."""

from __future__ import annotations

import statistics
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .log import Row

if TYPE_CHECKING:
    from ..plans import PrecisionPlan


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    losses: training loss per optimizer step. train_loss: mean of the last ten. eval_loss: mean held-out loss at the
    end, None without held-out batches. step_time_ms: median over the steps after the third. peak_memory_bytes: see
    MemoryMeter. skipped_steps: the optimizer was not stepped. nonfinite_steps: the loss, or without a loss scale a
    gradient, was not finite (a loss scale that comes down skips steps; that is no failure). scale_history: (step, loss
    scale) at the start and at each change. evaluations: (steps done, held-out loss). precision: "fp32", "tf32", "bf16",
    "fp16" or "plan". notes: what a reader should know of how it ran. best: the checkpoint with the lowest
    held-out loss (keep_best=True), None where none is kept.
    """

    losses: tuple[float, ...]
    train_loss: float
    eval_loss: float | None
    step_time_ms: float
    peak_memory_bytes: int
    skipped_steps: int
    nonfinite_steps: int
    scale_history: tuple[tuple[int, float], ...]
    precision: str
    steps: int
    evaluations: tuple[tuple[int, float], ...] = ()
    notes: tuple[str, ...] = ()
    out: Path | None = None
    best: Path | None = None
    plan: PrecisionPlan | None = field(default=None, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """The figures without the curves, for run.json and tables."""
        names = ("precision", "steps", "train_loss", "eval_loss", "step_time_ms", "peak_memory_bytes", "skipped_steps",
                 "nonfinite_steps")  # fmt: skip
        return {name: getattr(self, name) for name in names}

    @classmethod
    def from_rows(cls, rows: list[Row], *, scaled: bool, **rest: Any) -> TrainResult:
        """The result of the log's rows. scaled: whether there was a loss scale. rest: the fields that no row tells."""
        times = [row.time_ms for row in rows[3:] or rows]
        changes = [(r.step, r.scale) for i, r in enumerate(rows) if i == 0 or r.scale != rows[i - 1].scale]
        last = [row.loss for row in rows[-10:]]
        return cls(
            losses=tuple(row.loss for row in rows),
            train_loss=sum(last) / len(last) if last else float("nan"),
            step_time_ms=statistics.median(times) if times else float("nan"),
            skipped_steps=sum(row.skipped for row in rows),
            nonfinite_steps=sum(row.nonfinite for row in rows),
            scale_history=tuple(changes) if scaled else (),
            **rest,
        )
